"""What every stage of the benchmarks needs: a record that is kept row by row, timing, and what was measured on."""

import importlib.metadata
import math
import platform
import resource
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import qdv_gpu
from benchmarks.bars import bar

PACKAGES = ["torch", "numpy", "numba", "scikit-learn", "scikit-learn-intelex", "openTSNE", "captum", "faiss-cpu"]
PACKAGES += ["faiss-gpu-cuvs", "cupy-cuda13x", "cuml-cu13"]


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version(), "qdv_gpu": qdv_gpu.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that `work` takes, until the GPU is done as well, and what it returns."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def timing(
    work: str, times: Mapping[str, list[float]], *, ours: str = "ours", parts: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """A row of the table: median seconds of ours and of the peers, all of them, and what ours is made of."""
    middle = {name: median(spent) for name, spent in times.items()}
    return {
        "work": work,
        "seconds": middle[ours],
        "spread": [min(times[ours]), max(times[ours])],
        "peers": {name: value for name, value in middle.items() if name != ours},
        "parts": dict(parts or {}),
        "all_seconds": dict(times),
    }


def peak_resident_bytes() -> int:
    """Most memory that this process has held.

    From Linux's own count, where there is one: `getrusage` starts a child process at its parent's peak.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Stage:
    """What a stage has measured so far, handed to `save` after each row and bar, and how long it may go on.

    Parameters
    ----------
    save : callable
        Gets the record whenever it has changed.
    budget : float
        Seconds; no row or repeat is started that would take longer than what is left of it.
    """

    def __init__(self, save: Callable[[dict[str, Any]], None] = lambda _: None, budget: float = math.inf) -> None:
        self.record: dict[str, Any] = {"complete": False, "error": "stopped before its end", "timings": [], "bars": []}
        self.failures: list[str] = []
        self._save, self._ends = save, time.monotonic() + budget
        save(self.record)

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self._ends - time.monotonic()

    def note(self, **facts: Any) -> None:
        """Keep something else than rows and bars."""
        self.record |= facts
        self._save(self.record)

    def row(self, row: Mapping[str, Any]) -> None:
        """Keep a row of `timing`, in place of one of the same work."""
        self._keep("timings", "work", row)

    def bar(self, what: str, value: float, sign: str = "", limit: float = 0) -> None:
        """Keep a bar, as `bars.bar`, in place of one of the same words."""
        self._keep("bars", "what", bar(what, value, sign, limit))

    def _keep(self, kind: str, key: str, entry: Mapping[str, Any]) -> None:
        others = [one for one in self.record[kind] if one[key] != entry[key]]
        self.note(**{kind: [*others, dict(entry)]})

    def leave_out(self, what: str) -> None:
        """Say that there is no time for something."""
        print(f"  left out, {max(0, self.left):.0f} s are left: {what}", flush=True)
        self.note(left_out=[*self.record.get("left_out", []), what])

    def fail(self, what: str, error: BaseException) -> None:
        """Keep the line of an error, with which the stage is not complete."""
        traceback.print_exception(error)
        text = str(error).strip().splitlines()
        self.failures.append(f"{what}: {type(error).__name__}{': ' + text[0] if text else ''}")
        self.note(error="; ".join(self.failures))

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        """Something that others do not depend on: an error in it is kept, and what comes after it goes on."""
        try:
            yield
        except Exception as error:
            self.fail(what, error)

    def fits(self, what: str) -> bool:
        """Whether there is time for something that is left out otherwise."""
        if self.left <= 0:
            self.leave_out(what)
        return self.left > 0

    def finish(self) -> None:
        """Mark the stage complete if nothing failed."""
        if not self.failures:
            del self.record["error"]
        self.note(complete=not self.failures)

    def interleaved(
        self, methods: Mapping[str, Callable[[int], Any]], repeats: int, *, show: bool = True
    ) -> tuple[dict[str, list[float]], dict[str, list[Any]]]:
        """Seconds and results of each method in `repeats` rounds; every other round in the opposite order.

        A method is called with the number of the round. An error of the first is raised; another that fails, or for
        which there is no time, is left out.
        """
        times: dict[str, list[float]] = {name: [] for name in methods}
        results: dict[str, list[Any]] = {name: [] for name in methods}
        first, going = next(iter(methods)), dict(methods)
        for turn in range(repeats):
            for name in list(going)[:: -1 if turn % 2 else 1]:
                if (turn or name != first) and self.left <= max(times[name], default=0):
                    self.leave_out(f"{name}, from round {turn + 1} of {repeats} on")
                    del going[name]
                    continue
                try:
                    spent, result = seconds(partial(methods[name], turn))
                except Exception as error:
                    if name == first:
                        raise
                    self.fail(name, error)
                    del going[name]
                    times[name] = []
                    continue
                times[name].append(round(spent, 7))
                results[name].append(result)
                if show:
                    print(f"    {name:<16}round {turn + 1} of {repeats}: {spent:.2f} s", flush=True)
        done = [name for name in methods if times[name]]
        return {name: times[name] for name in done}, {name: results[name] for name in done}
