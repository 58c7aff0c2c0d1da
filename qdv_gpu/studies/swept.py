"""What a sweep found: a row for each point, and the ranking of the candidates whose runs are all done."""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qdv_gpu.errors import InputError
from qdv_gpu.report import tables
from qdv_gpu.report.folder import RunFolder
from qdv_gpu.report.ranking import sweep_rows, write_ranking
from qdv_gpu.results.ranking import Candidate, Ranking, Trained, ranked
from qdv_gpu.results.run import Run, check_same_images, read_run
from qdv_gpu.results.store import Store
from qdv_gpu.studies.point import Point, State

logger = logging.getLogger(__name__)
TIMES = ("training_seconds", "analysis_seconds")  # the last columns: all others are the same wherever it was computed


@dataclass(frozen=True)
class Found:
    """A point that is done, and its analysis."""

    point: Point
    state: State
    run: Run

    @property
    def trained(self) -> Trained:
        """As a run of a candidate."""
        [(network, layers)] = self.run.networks.items()
        hits = self.run.hits.get(network)
        said = self.state.about["accuracy"]
        accuracy = said if said is not None else math.nan if hits is None else float(hits.mean())
        return Trained(layers, hits, accuracy, self.state.seconds)


@dataclass(frozen=True)
class Rung:
    """Points that were computed together, with their states, the analyses of those that are done, and their ranking."""

    points: list[Point]
    states: list[State]
    found: list[Found]
    ranking: Ranking | None


def collected(out: Path, points: Sequence[Point], states: Sequence[State], store: Store) -> list[Found]:
    """The analyses of the points that are done, for the first k that all have, or if there is none each for its own."""
    done = [(point, state) for point, state in zip(points, states, strict=True) if state.kind == "done"]
    own = [point.settings.neighbors for point, _ in done]
    k = next((k for k in own[0] if all(k in other for other in own)), None) if own else None
    return [Found(p, s, read_run(p.folder(out) / "analysis", k=k, store=store.path)) for p, s in done]


def ranking_of(found: Sequence[Found], points: Sequence[Point], *, dropped: Sequence[str] = ()) -> Ranking | None:
    """Rank the candidates that have all their runs; None if there is none, or they cannot be ranked, and why is said.

    Parameters
    ----------
    found : sequence of Found
    points : sequence of Point
        All points of the rung; the first's candidate is the baseline.
    dropped : sequence of str
        What earlier rungs have dropped.
    """
    groups: dict[str, list[Found]] = {}
    for one in found:
        groups.setdefault(one.point.candidate, []).append(one)
    wanted = Counter(point.candidate for point in points)
    whole = {candidate: runs for candidate, runs in groups.items() if len(runs) == wanted[candidate]}
    runs = max((len(group) for group in whole.values()), default=0)
    compared = {candidate: group for candidate, group in whole.items() if len(group) == runs}
    if left := len(wanted) - len(compared):
        fewer = "not all of their runs are done, or they have fewer than the others"
        logger.warning("%d of %d candidates are not ranked: %s", left, len(wanted), fewer)
    if not compared:
        return None
    first = next(iter(compared.values()))[0]
    candidates = [
        Candidate(
            name=group[0].point.label,
            values=group[0].point.varied,
            runs=tuple(one.trained for one in sorted(group, key=lambda one: one.point.run)),
            gmac=math.nan if (gmac := group[0].state.about["gmac"]) is None else gmac,
        )
        for group in compared.values()
    ]
    try:
        for group in compared.values():
            for one in group:
                check_same_images(first.run, one.run)
        baseline = points[0].label if points[0].candidate in compared else None
        left_out = tuple({p.label: None for p in points if p.candidate not in compared})
        ranking = ranked(candidates, first.run.labels, k=first.trained.layers[0].scores[0].k, baseline=baseline)
        return replace(ranking, left_out=left_out, dropped=tuple(dropped))
    except InputError as error:
        logger.warning("the candidates are not ranked: %s", error)
        return None


def surely_worse(ranking: Ranking | None) -> list[str]:
    """Names of the candidates that are not the best, whatever chance did; none where there are no intervals."""
    if ranking is None or ranking.runs == 2:
        return []
    pairs = zip(ranking.candidates, ranking.top.in_maps.can_be_best, strict=True)
    return [candidate.name for candidate, possible in pairs if not possible]


def write_sweep(folder: RunFolder, rungs: Sequence[Rung], formats: Sequence[str]) -> list[Path]:
    """Write sweep.csv and .parquet, and of the last rung ranking.md and the figures, whose paths are returned."""
    rows = [row for number, rung in enumerate(rungs, start=1) for row in _rows(rung, number)]
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in TIMES)) + list(TIMES)
    folder.text("sweep.csv", tables.csv_text(rows, columns))
    folder.parquet("sweep.parquet", {name: [row.get(name) for row in rows] for name in columns})
    last = rungs[-1].ranking
    return [] if last is None else write_ranking(folder, last, formats)


def _rows(rung: Rung, number: int) -> list[dict[str, Any]]:
    """A dict for each point: what it is of, what it scored, the rank of its candidate, and times."""
    of = {one.point.digest: one for one in rung.found}
    ranks = {} if rung.ranking is None else {row.pop("name"): row for row in sweep_rows(rung.ranking)}
    rows = []
    for point, state in zip(rung.points, rung.states, strict=True):
        row = {"point": point.name, "candidate": point.label, "run": point.run, "rung": number, "state": state.kind}
        row |= {"error": state.about.get("message") if state.kind == "failed" else None, **_settings(point)}
        if (one := of.get(point.digest)) is not None:
            row |= {"accuracy": one.trained.accuracy, "gmac": state.about["gmac"], **_scores(one)}
            row |= {f"candidate {name}": value for name, value in ranks.get(point.label, {}).items() if " " not in name}
            row |= {f"{name}_seconds": value for name, value in state.about["seconds"].items()}
        rows.append(row)
    return rows


def _scores(one: Found) -> dict[str, Any]:
    """Name and scores of each layer."""
    row: dict[str, Any] = {}
    [layers] = one.run.networks.values()
    for number, layer in enumerate(layers, start=1):
        mean = layer.scores[0].mean
        row[f"layer {number}"] = layer.title
        for name in ("nh", "standard_error", "nh_feature_space", "trustworthiness", "continuity"):
            row[f"{name} {number}"] = getattr(mean, name)
    return row


def _settings(point: Point) -> dict[str, Any]:
    """All settings of a point; a name that training and analysis both have is of the analysis, or says which."""
    own = {"network": point.network, "data": point.data, "weights": point.weights}
    analysis = {("analyze.samples" if name == "samples" else name): v for name, v in asdict(point.settings).items()}
    training = {} if point.training is None else asdict(point.training)
    training = {("finetune.samples" if name == "samples" else name): value for name, value in training.items()}
    return {**own, **{n: _cell(v) for n, v in {**training, **analysis}.items() if n != "memory"}}


def _cell(value: Any) -> Any:
    """A value as one cell of a table."""
    return ",".join(map(str, value)) if isinstance(value, Mapping | list | tuple) else value
