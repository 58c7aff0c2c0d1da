"""How far a sweep has come, from its folder and store alone."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdv_gpu.errors import InputError, as_path
from qdv_gpu.files import readable_time
from qdv_gpu.results.store import Store
from qdv_gpu.studies.point import LOG, SWEEP, Kept, Point, State, state_of

KINDS = ("done", "running", "waiting", "failed", "lost")


@dataclass(frozen=True)
class Status:
    """States of a sweep's points.

    Attributes
    ----------
    out : Path
    points : list of Point
    states : list of State
        Of each point.
    """

    out: Path
    points: list[Point]
    states: list[State]

    @property
    def counts(self) -> dict[str, int]:
        """Number of points in each state."""
        found = Counter(state.kind for state in self.states)
        return {kind: found[kind] for kind in KINDS}

    @property
    def seconds_left(self) -> float:
        """Until all are done, if as many run at a time as now and take as long as those that are; NaN unless one is."""
        done = [state.seconds for state in self.states if state.kind == "done"]
        if not done:
            return math.nan
        mean = sum(done) / len(done)
        running = [state.seconds for state in self.states if state.kind == "running"]
        waiting = self.counts["waiting"] + self.counts["lost"]
        left = waiting * mean + sum(max(mean - seconds, 0.0) for seconds in running)
        return left / max(1, len(running))

    def table(self) -> list[list[str]]:
        """A header, and a row for each point."""
        rows = [["point", "state", "seconds", ""]]
        for point, state in zip(self.points, self.states, strict=True):
            seconds = "" if math.isnan(state.seconds) else f"{state.seconds:.0f}"
            message = f"{state.about['message']} ({point.folder(self.out) / LOG})" if "message" in state.about else ""
            rows.append([point.name, state.kind, seconds, message])
        return rows

    def sentence(self) -> str:
        """Counts, and the time left, in words."""
        counts = ", ".join(f"{number} {kind}" for kind, number in self.counts.items() if number)
        left = self.seconds_left
        return f"{counts} of {len(self.points)}" + (f"; {readable_time(left)} left" if left > 0 else "")

    def said(self) -> dict[str, Any]:
        """As JSON."""
        rows = [
            {
                "point": point.name,
                "label": point.label,
                "run": point.run,
                "state": state.kind,
                "seconds": None if math.isnan(state.seconds) else round(state.seconds, 3),
                "message": state.about.get("message"),
                "log": str(point.folder(self.out) / LOG),
            }
            for point, state in zip(self.points, self.states, strict=True)
        ]
        left = self.seconds_left
        return {**self.counts, "seconds_left": None if math.isnan(left) else round(left, 1), "points": rows}


def status(out: str | Path) -> Status:
    """Look at the points of the sweep in `out`.

    Raises
    ------
    InputError
        If there is none, or it is damaged.
    """
    out = as_path("out", out)
    if not (out / SWEEP).is_file():
        raise InputError(f"{out} holds no sweep: `qdv-gpu sweep SWEEP.toml --out {out}` makes one")
    kept = Kept.read(out)
    return Status(out, kept.points, [state_of(out, point, Store(kept.store)) for point in kept.points])
