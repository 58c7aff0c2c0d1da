"""Numba loops over rows, spread over threads: each call is given a range of rows, and no row depends on another.

What numba's own `parallel=True` does, at a third of its compile time and without more threads than torch's.
"""

import gc
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import torch
from numba.core import event

from qdv_gpu.errors import InputError

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]  # set at run time
    raise InputError("NUMBA_DISABLE_JIT is set: the loops on the CPU run compiled alone, so it must be unset")

RANGES_PER_THREAD = 8  # ranges that each thread gets, so that slow rows do not keep the others waiting
WORTH = 10_000_000  # operations of a thread, about 3 ms: as long as those of torch's last operator may spin on its core


class _NoCollection(event.Listener):
    """Keeps Python's garbage collector from running while numba compiles, of which it took a quarter of the time."""

    depth, was_enabled = 0, False  # compiling one function compiles what it calls; numba has a lock around it

    def on_start(self, event: event.Event) -> None:
        """Turn it off."""
        if self.depth == 0:
            self.was_enabled = gc.isenabled()
            gc.disable()
        self.depth += 1

    def on_end(self, event: event.Event) -> None:
        """Turn it on again, if it was."""
        self.depth -= 1
        if self.depth == 0 and self.was_enabled:
            gc.enable()


event.register("numba:compile", _NoCollection())


_OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a loop by numba, kept on disk for later processes; it lets go of the GIL. Division is IEEE's.

    What numpy does with whole arrays takes it long to compile (`a[:] = b` 1.6 s, for its error messages): loops do not.
    """
    return numba.njit(**_OPTIONS)(function)


def inner(function: Callable[..., Any]) -> Any:
    """The same for what only compiled loops call: without a way in for Python, it takes two thirds of the time."""
    return numba.njit(**_OPTIONS | {"no_cpython_wrapper": True})(function)


def spread(loop: Any, rows: int, *arguments: Any, work: float) -> None:
    """Call `loop(low, high, *arguments)` with ranges that cover `rows` rows, on as many threads as torch uses.

    Parameters
    ----------
    loop : numba function
        Of `compiled`; what it writes for a row must depend on that row alone.
    rows : int
    *arguments
        Arrays and numbers.
    work : float
        Operations that a row takes, roughly; little work is not spread.
    """
    threads = max(1, min(torch.get_num_threads(), int(rows * work / WORTH)))
    if threads == 1:
        loop(0, rows, *arguments)
        return
    parts = min(rows, RANGES_PER_THREAD * threads)
    edges = [rows * part // parts for part in range(parts + 1)]
    ranges = itertools.pairwise(edges)  # each goes to whoever asks first

    def work_off() -> None:
        try:
            for low, high in ranges:
                loop(low, high, *arguments)
        finally:
            list(ranges)  # after an error nobody goes on

    pool = ThreadPoolExecutor(threads - 1)
    others = [pool.submit(work_off) for _ in range(threads - 1)]
    try:
        work_off()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # torch's threads may keep the cores from one that just begins
    for other in others:
        if not other.cancelled():
            other.result()
