"""What every stage of the benchmarks needs: timing, what was measured on, and bars."""

import importlib.metadata
import platform
import resource
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

PACKAGES = ["qdv_gpu", "torch", "numpy", "numba", "scikit-learn", "openTSNE", "captum", "faiss-cpu"]
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
    found = {"python": platform.python_version()}
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


def interleaved(
    methods: Mapping[str, Callable[[int], Any]], repeats: int, *, show: bool = True
) -> tuple[dict[str, list[float]], dict[str, list[Any]]]:
    """Seconds and results of each method in `repeats` rounds; every other round in the opposite order.

    A method is called with the number of the round.
    """
    times: dict[str, list[float]] = {name: [] for name in methods}
    results: dict[str, list[Any]] = {name: [] for name in methods}
    for turn in range(repeats):
        for name in list(methods)[:: -1 if turn % 2 else 1]:
            spent, result = seconds(partial(methods[name], turn))
            times[name].append(round(spent, 7))
            results[name].append(result)
            if show:
                print(f"    {name:<16}round {turn + 1} of {repeats}: {spent:.2f} s", flush=True)
    return times, results


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


def bar(what: str, value: float, sign: str, limit: float) -> dict[str, Any]:
    """A requirement `value` >= or <= `limit`, and whether it is met."""
    return {
        "what": what,
        "value": float(value),
        "limit": f"{sign} {limit:g}",
        "met": bool(value >= limit if sign == ">=" else value <= limit),
    }
