"""The repulsion on a grid, on a GPU: CUDA kernels and cuFFT; and where the exact sum takes less, that.

As `cpu.descend_cpu`, with the same grids and the same decisions every 25 iterations. Kernels work on all embeddings at
once, each on a grid of its own; transforms are done one embedding at a time, since cuFFT promises no bits for
different numbers of them. The host waits once for each round of up to 25 iterations: an embedding that leaves its grid
before stays where it is until the next round, and those that are ahead begin their next 25 iterations meanwhile.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from qdv_gpu.errors import InputError
from qdv_gpu.kernels import MAX_GRID
from qdv_gpu.tsne.engines.grid import Grid, factors_for, grid_or_pairs, sample_of, tolerance_after
from qdv_gpu.tsne.problem import Motion, Problem, Repulsion

STRETCH = 25  # iterations of an embedding between two choices of its engine
HASTE = 4  # iterations between two looks of the host at maps that leave their grids
PAIRS_AT_ONCE = 1 << 21  # of a sample with all points, in float64: about 100 MB
MOST_POINTS = 27_000_000  # all at one place give a node 0.55^2 of each, and int64 holds 2^23 charges of 2^40
THREADS, GROUP = 256, 8  # of a block, and of a point, in tsne_fft.cu
# Seconds by the roofs of an H200, and of its host for the launches: predicted. One took 1.5 to 2 times as long over all
# pairs, and on a grid 1.5 times at 20,000 points, so that both meet where these say (docs/gpu-notes.md).
EXACT_PAIR = 2.7e-13
FFT_NODE, FFT_POINT, FFT_ITERATION = 7e-11, 2e-10, 1e-4
GRID = np.dtype(
    [
        ("left_out", "f8"), ("nodes", "i8"), ("origin", "f4", 2), ("scale", "f4"), ("factor", "f4"), ("ny", "i4"),
        ("nx", "i4"), ("turns", "i4"), ("padding", "i4"), ("core", "f4", 48),
    ]
)  # fmt: skip


def seconds(N: int, nodes: int | None) -> float:
    """What the repulsion takes in an iteration, on a grid of so many nodes or (None) exactly: a model, not a clock."""
    if nodes is None:
        return EXACT_PAIR * N**2
    return FFT_NODE * nodes + FFT_POINT * N + FFT_ITERATION


def descend_fft_cuda(
    problem: Problem, motion: Motion, done: Callable[[int], None], repulsion: Repulsion
) -> tuple[Motion, list[str]]:
    """As `descend_cpu`, with CUDA kernels; InputError where a node's charge or a grid of blocks would be too large."""
    E, N, _ = motion.Z.shape
    if E > MAX_GRID:
        raise InputError(f"engine fft on a GPU takes at most {MAX_GRID:,} embeddings at once, got {E:,}")
    if N > MOST_POINTS:
        raise InputError(f"engine fft on a GPU takes at most {MOST_POINTS:,} points, got {N:,}")
    with torch.cuda.device(motion.Z.device):
        return _Batch(problem, motion, repulsion).descend(done)


class _Kernel(NamedTuple):
    """Of a grid: on the device influence float32 [2, ny, nx] and the angles of its shifts float32 [ny + nx, 2]; and as
    `grid.Kernel` has them core and far."""

    influence: torch.Tensor
    angles: torch.Tensor
    core: np.ndarray
    far: float


class _Seen(NamedTuple):
    """Embeddings after a round: their bounds [E, 2], where they were too sparse for a grid [E], the iterations that
    were done [E], and the errors and sizes of the forces on n sampled points [E, 2, n]."""

    low: np.ndarray
    high: np.ndarray
    sparse: np.ndarray
    done: np.ndarray
    errors: np.ndarray


class _Batch:
    """E embeddings of N points on their way through a phase."""

    def __init__(self, problem: Problem, motion: Motion, repulsion: Repulsion) -> None:
        from qdv_gpu import kernels
        from qdv_gpu.kernels import mesh

        self.rows, self.phase, rate, self.gaussian = problem
        self.how, (self.E, self.N, _), self.device = repulsion, motion.Z.shape, motion.Z.device
        self.Z, self.velocity, self.gains = (
            part.reshape(-1, 2).clone(memory_format=torch.contiguous_format) for part in motion
        )
        self.attraction, self.force = torch.empty_like(self.Z), torch.empty_like(self.Z)
        self.weight = torch.empty_like(self.Z[:, 0])
        self.bounds = torch.arange(self.E + 1, device=self.device) * self.N
        self.inverse = torch.empty(self.E, dtype=torch.float32, device=self.device)
        # Of each embedding: whether it does no more iterations, whether a point has left its grid, whether similarities
        # are too small for it, and how many iterations it has done.
        self.state = torch.zeros((self.E, 4), dtype=torch.int32, device=self.device)
        self.charges = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.potential = torch.empty(0, dtype=torch.float32, device=self.device)
        self.table = torch.from_numpy(mesh.tables()).to(self.device)
        self.scalars = np.array([self.phase.exaggeration, rate, self.phase.momentum], dtype=np.float32)
        dense = int(self.rows.indices.numel() == 0)
        self.pairs = kernels.load("tsne", fast_math=True, GAUSSIAN=int(self.gaussian), DENSE=dense)
        self.mesh = kernels.load("tsne_fft", fast_math=True)
        self.kept: dict[tuple[int, int, float], _Kernel] = {}
        self.used: list[dict[str, None]] = [{} for _ in range(self.E)]
        self.sample = torch.from_numpy(sample_of(self.N)).to(self.device)
        self.tolerances: list[float | None] = [repulsion.tolerance] * self.E  # None where no grid is fine enough
        self.grids: list[Grid | None] = [None] * self.E  # of the last round
        self.launched = 0  # its iterations

    def descend(self, done: Callable[[int], None]) -> tuple[Motion, list[str]]:
        """All iterations of the phase, round by round: what was seen of one decides on the next."""
        iterations, told = self.phase.iterations, 0
        completed = turns = np.zeros(self.E, dtype=int)
        while True:
            seen = self._look()
            for e in np.flatnonzero(seen.done):
                self.used[e]["exact" if self.grids[e] is None else "fft"] = None
            hasty = bool((seen.done < turns).any())  # a map that left its grid grows fast, and leaves the next one soon
            completed = completed + seen.done
            completed[~np.isfinite([seen.low, seen.high]).all(axis=(0, 2))] = iterations  # nothing brings it back
            if completed.min() > told:
                done(int(completed.min()) - told)
                told = int(completed.min())
            for e in np.flatnonzero((completed % STRETCH == 0) | (completed == 1)):
                self._choose(int(e), seen.errors[e])
            if told == iterations:
                moved = Motion(*(part.view(self.E, self.N, 2) for part in (self.Z, self.velocity, self.gains)))
                return moved, list(dict.fromkeys(name for used in self.used for name in used))
            turns = np.minimum(STRETCH - completed % STRETCH, iterations - completed)
            turns[(completed == 0) & (turns > 1)] = 1  # a phase may begin with clusters that its grid does not resolve
            grids = [self._next_grid(e, seen, completed, turns) for e in range(self.E)]
            self._round(turns, grids, hasty=hasty)

    def _look(self) -> _Seen:
        """The embeddings after the last round, in one copy to the host."""
        bounds = self.Z.view(self.E, self.N, 2).aminmax(dim=1)
        errors = torch.zeros((self.E, 2 * len(self.sample)), dtype=torch.float32, device=self.device)
        for e, grid in enumerate(self.grids):
            if grid is not None:
                errors[e] = self._errors(e)
        found = torch.cat([*bounds, self.state.to(torch.float32), errors], dim=1).cpu().numpy()  # the host waits here
        low, high, state, sizes = np.split(found, (2, 4, 8), axis=1)
        return _Seen(low, high, state[:, 2] > 0, state[:, 3].astype(int), sizes.reshape(self.E, 2, -1))

    def _errors(self, e: int) -> torch.Tensor:
        """The sizes of the errors of an embedding's last forces and of the sums over all pairs, float64 [2 n]."""
        own = slice(e * self.N, (e + 1) * self.N)
        _, outside, _, done = self.state[e]
        stepped = (done == self.launched) | (outside > 0)  # since its force was found
        before = self.Z[own].double() - torch.where(stepped, self.velocity[own].double(), 0)
        sums = []
        for part in self.sample.split(max(1, PAIRS_AT_ONCE // self.N)):
            difference = before[part, None] - before  # [n, N, 2]
            square = difference.square().sum(dim=2)
            weight = torch.exp(-square) if self.gaussian else (1 + square).pow(-2)
            sums.append((weight[:, :, None] * difference).sum(dim=1))
        truth = torch.cat(sums)
        return torch.cat([(self.force[own][self.sample].double() - truth).norm(dim=1), truth.norm(dim=1)])

    def _choose(self, e: int, sizes: np.ndarray) -> None:
        """What an embedding's next grid is taken for, by the error of its last iteration."""
        grid, taken = self.grids[e], self.tolerances[e]
        if grid is None or taken is None:
            return
        costs = {"on_grid": seconds(self.N, grid.ny * grid.nx), "over_pairs": seconds(self.N, None)}
        self.tolerances[e] = tolerance_after(self.how.tolerance, taken, sizes.astype(np.float64), **costs)

    def _next_grid(self, e: int, seen: _Seen, completed: np.ndarray, turns: np.ndarray) -> Grid | None:
        """What an embedding's repulsion is summed on next, None if over all pairs: depends on its map alone."""
        tolerance = self.tolerances[e]
        over_pairs = self.grids[e] is None and completed[e] % STRETCH > 0  # as it began these 25 iterations
        if tolerance is None or over_pairs or seen.sparse[e] or not turns[e]:
            return None
        own = self.Z[e * self.N : (e + 1) * self.N]
        return grid_or_pairs(
            own, seen.low[e], seen.high[e], tolerance, self.how, seconds=seconds, gaussian=self.gaussian
        )

    def _round(self, turns: np.ndarray, grids: list[Grid | None], *, hasty: bool) -> None:
        """Launch up to so many iterations of each embedding; if hasty, look now and then whether all have halted."""
        packed, nodes = np.zeros(self.E, dtype=GRID), 0
        packed["turns"] = turns
        self.grids = grids
        transforms = []
        before, self.kept = self.kept, {}
        for e, grid in enumerate(grids):
            if grid is None:
                continue
            ny, nx, key = grid.ny, grid.nx, grid[:3]
            kernel = self.kept[key] = (
                self.kept.get(key) or before.get(key) or _kernel_of(grid, self.device, gaussian=self.gaussian)
            )
            packed[e] = _packed(grid, kernel, self.N, nodes, turns[e])
            transforms.append((np.int64(nodes), np.uint32(ny), np.uint32(nx), kernel))
            nodes += ny * nx
        if nodes > len(self.charges):
            self.charges = torch.zeros(nodes, dtype=torch.int64, device=self.device)
            self.potential = torch.empty(nodes, dtype=torch.float32, device=self.device)
        exact = [e for e in range(self.E) if grids[e] is None and turns[e]]
        self.state.zero_()
        place = torch.from_numpy(packed.view(np.uint8)).to(self.device)
        for turn in range(1, turns.max() + 1):
            self._turn(place, transforms, exact)
            self.launched = turn
            if hasty and turn % HASTE == 0 and bool(self.state[:, :2].any(dim=1).all()):
                break

    def _turn(self, grids: torch.Tensor, transforms: list[Any], exact: list[int]) -> None:
        """Launch an iteration."""
        from qdv_gpu.kernels import launch

        E, N, mesh, pairs = self.E, self.N, self.mesh, self.pairs
        points = (self.Z, self.bounds)
        groups = (-(-N // (THREADS // GROUP)), E)
        if transforms:
            launch(mesh, "spread", *points, grids, self.state, self.table, self.charges, grid=groups, block=THREADS)
            for first, ny, nx, kernel in transforms:
                self._convolve(first, ny, nx, kernel)
            launch(
                mesh, "gather", *points, grids, self.state, self.table, self.potential, self.force, self.weight,
                grid=groups, block=THREADS,
            )  # fmt: skip
        for e in exact:
            own = slice(e * N, (e + 1) * N)
            launch(
                pairs, "repel", self.Z[own], self.bounds[:2], self.force[own], self.weight[own], grid=(-(-N // 16), 1),
                block=128,
            )  # fmt: skip
        launch(pairs, "attract", *points, *self.rows, self.attraction, grid=(-(-N // 4), E), block=128)
        launch(mesh, "settle", self.bounds, grids, self.weight, self.state, self.inverse, grid=(1, E), block=THREADS)
        launch(
            mesh, "update", self.Z, self.velocity, self.gains, self.attraction, self.force, self.inverse, self.bounds,
            grids, self.state, *self.scalars, grid=(-(-N // THREADS), E), block=THREADS,
        )  # fmt: skip

    def _convolve(self, first: np.int64, ny: np.uint32, nx: np.uint32, kernel: _Kernel) -> None:
        """From an embedding's charges to its potential."""
        from qdv_gpu.kernels import launch

        twisted = torch.empty(kernel.influence.shape, dtype=torch.complex64, device=self.device)
        grid = (-(-int(ny) * int(nx) // THREADS),)
        launch(self.mesh, "twist", self.charges, kernel.angles, twisted, first, ny, nx, grid=grid, block=THREADS)
        back = torch.fft.ifft2(torch.fft.fft2(twisted).mul_(kernel.influence), norm="forward").contiguous()
        launch(self.mesh, "untwist", back, kernel.angles, self.potential, first, ny, nx, grid=grid, block=THREADS)


def _packed(grid: Grid, kernel: _Kernel, N: int, nodes: int, turns: int) -> tuple[Any, ...]:
    """A grid of N points as an element of `GRID`: its first node and the iterations on it."""
    scale, left_out = np.float32(1 / grid.spacing), kernel.far * N * (N - 1)
    return left_out, nodes, grid.origin, scale, -0.5 * scale, grid.ny, grid.nx, turns, 0, kernel.core


def _kernel_of(grid: Grid, device: torch.device, *, gaussian: bool) -> _Kernel:
    from qdv_gpu.kernels import fft

    ny, nx, spacing, _ = grid
    y, x, core, far = factors_for(ny, nx, spacing, gaussian=gaussian)
    place_y, place_x = (np.argsort(fft.order_of(n)) for n in (ny, nx))
    left = torch.from_numpy(y[:, place_y]).to(device)  # [q, ny]
    right = torch.from_numpy(x.reshape(-1, 2, nx)[:, :, place_x]).to(device)  # [q, 2, nx]
    influence = torch.matmul(left.T, right.transpose(0, 1)).to(torch.float32)
    angles = np.concatenate([fft.angles_of(ny, 4), fft.angles_of(nx, 2)]).reshape(-1, 2)
    return _Kernel(influence, torch.from_numpy(angles).to(device), core, far)
