"""The descent on the CPU, with the repulsion over all pairs or on a grid: numba, on every core.

An iteration of N points with M entries of P on a grid of G nodes reads and writes, at least, 8 M bytes of P, 60 N of
the points and 60 G of the grid (charges, transform, kernel, potential), and takes about 20 M, 400 N and 13 G log2(G)
float operations. On one core with AVX-512: attraction 0.46 ns an entry, points 33 ns each, the grid 0.16 ns a node and
log2(G); a pair of the exact sum 0.08 ns.
"""

import itertools
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from qdv_gpu.tsne.engines.grid import Grid, grid_or_pairs, kernel_for, sample_of, tolerance_after
from qdv_gpu.tsne.problem import Motion, Problem, Repulsion

STRETCH = 25  # iterations between two looks at the map: which engine, which grid
POINTS_AT_ONCE = 5_000_000  # points times iterations of a stretch at most, about 1 s between two looks at Ctrl-C
PAIRS_AT_ONCE = 4_000_000_000  # the same where all is summed over pairs, about 0.2 s on two cores
POINTS_PER_THREAD = 1000  # on a grid; with less, a second thread costs more than it saves
PAIRS_PER_THREAD = 100_000  # the same over all pairs, about 0.02 ms of work
# Nanoseconds on one core, measured with AVX-512 by `python -m benchmarks.tsne_costs`; but FFT_ITERATION is
# what two threads lose where they meet and in what they cannot share: 1,797 points take less time by all pairs.
EXACT_PAIR, EXACT_POINT = 0.081, 45.0
FFT_NODE, FFT_POINT, FFT_ITERATION = 0.156, 33.0, 200_000.0


def seconds(N: int, nodes: int | None) -> float:
    """What the repulsion takes in an iteration, on a grid of so many nodes or (None) exactly: a model, not a clock."""
    if nodes is None:
        return 1e-9 * (EXACT_PAIR * N**2 / 2 + EXACT_POINT * N)
    return 1e-9 * (FFT_NODE * nodes * math.log2(nodes) + FFT_POINT * N + FFT_ITERATION)


def descend_cpu(
    problem: Problem, motion: Motion, done: Callable[[int], None], repulsion: Repulsion
) -> tuple[Motion, list[str]]:
    """The phase's iterations from `motion` on, and what the repulsion was summed by, "exact" or "fft", in that order.

    `done` is called with the number of iterations just done.

    Embeddings know nothing of each other, and each gains less by each further thread: as many as there are threads are
    moved side by side, each by one thread, and then those left over, which share the threads.
    """
    E, N, _ = motion.Z.shape
    threads = torch.get_num_threads()
    embeddings = [_Embedding(problem, e, Motion(*(part[e] for part in motion)), repulsion) for e in range(E)]
    left = E % threads
    share = threads // max(1, left)
    try:
        with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(max(1, left)) as leaders:
            for turns in _stretches(problem.phase.iterations, N, exact=repulsion.engine == "exact"):
                for _ in pool.map(lambda one, turns=turns: one.move(turns), embeddings[left:]):
                    pass
                for _ in leaders.map(lambda one, turns=turns: one.move(turns, pool, share), embeddings[:left]):
                    pass
                done(turns)
    finally:
        kernel_for.cache_clear()  # up to 430 MB each
    moved = zip(*((one.Z, one.velocity, one.gains) for one in embeddings), strict=True)
    used = list(dict.fromkeys(name for one in embeddings for name in one.used))
    return Motion(*(torch.from_numpy(np.stack([part.T for part in parts])) for parts in moved)), used


def _stretches(iterations: int, N: int, *, exact: bool) -> list[int]:
    """Iterations between two looks; on a grid first one alone: it may not resolve what a phase begins with.

    >>> _stretches(60, 1000, exact=False)
    [1, 24, 25, 10]
    """
    at_once = max(1, PAIRS_AT_ONCE // N**2 if exact else min(STRETCH, POINTS_AT_ONCE // N))
    ends = sorted({0, 0 if exact else min(1, iterations), *range(at_once, iterations, at_once), iterations})
    return [end - begin for begin, end in itertools.pairwise(ends)]


class _Embedding:
    """An embedding of N points on its way through a phase."""

    def __init__(self, problem: Problem, number: int, motion: Motion, repulsion: Repulsion) -> None:
        rows, self.phase, self.rate, self.gaussian = problem
        firsts, indptr, self.indices, self.values = rows.on_cpu()
        N, first = len(motion.Z), int(firsts[number])
        self.repulsion, self.used = repulsion, dict[str, None]()
        self.Z, self.velocity, self.gains = (part.numpy().T.copy() for part in motion)
        self.packed = self.Z.T.copy().view(np.uint64)[:, 0].copy()
        self.indptr = indptr[first : first + N + 1]
        self.scalars = np.array([self.phase.exaggeration, self.rate, self.phase.momentum], dtype=np.float32)
        self.attraction, self.force = np.empty_like(self.Z), np.empty_like(self.Z)
        self.cells, self.order = np.empty_like(self.Z), np.empty(N, dtype=np.int32)
        self.tolerance: float | None = repulsion.tolerance  # of the next grid; None where none is fine enough
        self.sample = sample_of(N)

    def move(self, turns: int, pool: ThreadPoolExecutor | None = None, threads: int = 1) -> None:
        """Do so many iterations; the choice of engine and grid depends on the map alone."""
        exact = self.repulsion.engine == "exact" or self.tolerance is None
        tolerance, grid = self.tolerance or self.repulsion.tolerance, None
        while turns > 0:
            grid = None
            if not exact:
                low, high = self.Z.min(axis=1), self.Z.max(axis=1)
                if not (np.isfinite(low).all() and np.isfinite(high).all()):
                    return  # nothing brings it back
                Z = torch.from_numpy(self.Z.T)
                grid = grid_or_pairs(Z, low, high, tolerance, self.repulsion, seconds=seconds, gaussian=self.gaussian)
            moved = self._on_grid(turns, grid, pool, threads) if grid else self._exact(turns, pool, threads)
            if moved:
                self.used["fft" if grid else "exact"] = None
            exact = grid is None or not moved  # too sparse for a grid
            turns -= moved
        if grid and not exact:
            self._check(grid)

    def _check(self, grid: Grid) -> None:
        """Choose what the next grid is taken for, or that none is fine enough, by the error of the last iteration."""
        from qdv_gpu.kernels import tsne_fft

        assert self.tolerance is not None
        sizes, N = np.empty((2, len(self.sample))), self.Z.shape[1]
        tsne_fft.errors(self.Z, self.velocity, self.force, self.gaussian or None, self.sample, sizes)
        costs = {"on_grid": seconds(N, grid.ny * grid.nx), "over_pairs": seconds(N, None)}
        self.tolerance = tolerance_after(self.repulsion.tolerance, self.tolerance, sizes, **costs)

    def _on_grid(self, turns: int, grid: Grid, pool: ThreadPoolExecutor | None, threads: int) -> int:
        """Up to so many iterations; returns how many were done."""
        from qdv_gpu.kernels import fft, tsne_fft

        ny, nx, spacing, origin = grid
        N = self.Z.shape[1]
        threads = max(1, min(threads, N // POINTS_PER_THREAD))
        kernel = kernel_for(ny, nx, spacing, gaussian=self.gaussian)
        blocks = -(-N // tsne_fft.BLOCK_POINTS)
        weight, state = np.empty(blocks), np.zeros(2 + blocks, dtype=np.int64)
        nodes = np.empty(ny * (nx + tsne_fft.MARGIN) + tsne_fft.MARGIN, dtype=np.float32)
        work = np.empty((nx // fft.LANES, ny * fft.LINE), dtype=np.float32)
        lines = np.empty((threads, 2, nx * fft.LINE), dtype=np.float32)
        tables = (
            (np.array(fft.radices_of(ny)), np.array(fft.radices_of(nx))),
            (fft.twiddles_of(ny), fft.twiddles_of(nx)),
            (fft.angles_of(ny, 4), fft.angles_of(nx, 2)),
        )
        arrived = np.zeros((threads, 8), dtype=np.int64)
        claimed = np.zeros((turns * tsne_fft.PHASES, 8), dtype=np.int64)
        arguments = (
            turns, self.Z, self.packed, self.velocity, self.gains, self.indptr, self.indices, self.values,
            self.gaussian or None, self.attraction, self.force, weight, np.array(origin, dtype=np.float32),
            np.float32(1 / spacing), kernel.far, (ny, nx), nodes, work, lines, kernel.influence, kernel.core, *tables,
            np.empty(ny + 1, dtype=np.int64), self.order, self.cells, *self.scalars, arrived, claimed, state,
        )  # fmt: skip
        _together(tsne_fft.descend, arguments, threads, pool)
        return int(state[0])

    def _exact(self, turns: int, pool: ThreadPoolExecutor | None, threads: int) -> int:
        from qdv_gpu.kernels import cpu

        N = self.Z.shape[1]
        forces = (self.attraction, np.empty((cpu.BANDS, 2, N), dtype=np.float32), np.empty(cpu.BANDS))
        arrived = np.zeros((max(1, min(threads, N**2 // PAIRS_PER_THREAD)), 8), dtype=np.int64)
        arguments = (
            turns, self.Z, self.packed, self.velocity, self.gains, self.indptr, self.indices, self.values,
            self.gaussian or None, *forces, *self.scalars, arrived,
        )  # fmt: skip
        _together(cpu.descend, arguments, len(arrived), pool)
        return turns


def _together(
    descend: Callable[..., None], arguments: tuple[Any, ...], parts: int, pool: ThreadPoolExecutor | None
) -> None:
    """Call descend(part, *arguments) for every part, each in a thread of the pool; without one, the only part here.

    Parts wait for each other, so either all begin or, after an interrupt, none.
    """
    if pool is None:
        descend(0, *arguments)
        return
    gate, complete = threading.Event(), False

    def work(part: int) -> None:
        gate.wait()
        if complete:
            descend(part, *arguments)

    try:
        others = [pool.submit(work, part) for part in range(parts)]
        complete = True
    finally:
        gate.set()
    for other in others:
        other.result()
