"""The exact engine of t-SNE: gradient descent over a batch of embeddings, with numba or with CUDA kernels."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from qdv_gpu.tsne.affinities import Affinities, SparseAffinities

GRAPH_ITERATIONS = 25  # in one CUDA graph
COLLAPSED = 1e-6  # standard deviation of an embedding that is a point; random starts have 1e-4
PAIRS_PER_THREAD = 100_000  # about 0.02 ms of work: with less, a second thread costs more than it saves
PAIRS_AT_ONCE = 4_000_000_000  # about 0.2 s on two cores between two looks at the clock and at Ctrl-C


class Phase(NamedTuple):
    """Some iterations with the same settings; `exaggeration` multiplies P."""

    iterations: int
    exaggeration: float
    momentum: float


class Rows(NamedTuple):
    """The rows of one or more P, one after the other, as the kernels read them.

    Attributes
    ----------
    first : torch.Tensor
        int64 [E]: the first row of each embedding's P.
    indptr : torch.Tensor
        int64 [R + 1].
    indices : torch.Tensor
        int32 [nnz], or [0] for dense P.
    values : torch.Tensor
        float32 [nnz].
    """

    first: torch.Tensor
    indptr: torch.Tensor
    indices: torch.Tensor
    values: torch.Tensor


def stacked(P: list[Affinities], *, copies: int) -> Rows:
    """Rows of all P, for `copies` embeddings in turn that share each."""
    sparse = [p for p in P if isinstance(p, SparseAffinities)]
    dense = [p for p in P if isinstance(p, torch.Tensor)]
    N = len(sparse[0].indptr) - 1 if sparse else len(dense[0])
    device = (sparse[0].values if sparse else dense[0]).device
    first = torch.arange(len(P), device=device).repeat_interleave(copies) * N
    if dense:
        indptr = torch.arange(len(P) * N + 1, device=device) * N
        values = dense[0].reshape(-1) if len(dense) == 1 else torch.cat([p.reshape(-1) for p in dense])
        return Rows(first, indptr, torch.empty(0, dtype=torch.int32, device=device), values)
    if len(sparse) == 1:
        return Rows(first, *sparse[0])
    indptr = torch.zeros(len(P) * N + 1, dtype=torch.int64, device=device)
    indptr[1:] = torch.cat([p.indptr.diff() for p in sparse]).cumsum(0)
    return Rows(first, indptr, torch.cat([p.indices for p in sparse]), torch.cat([p.values for p in sparse]))


def descend(
    P: list[Affinities],
    start: torch.Tensor,
    *,
    phases: list[Phase],
    learning_rate: float,
    gaussian: bool,
    advance: Callable[[int], None],
) -> torch.Tensor:
    """Minimise KL(P || Q) with momentum and gains (van der Maaten & Hinton 2008, section 3.4).

    Each phase starts at rest, as in scikit-learn. Where neighbourhoods are weak (noise, or few points), early
    exaggeration contracts the map to a point, from which float32 does not recover; such an embedding goes on from
    its start instead.

    Parameters
    ----------
    P : list of G joint affinities of N points, all sparse or all dense
    start : torch.Tensor
        float32 [E, N, 2], E a multiple of G: the first E / G embeddings have the first P, and so on.
    phases : list of Phase
    learning_rate : float
    gaussian : bool
        Similarity exp(-d^2) instead of 1 / (1 + d^2).
    advance : callable
        Called with the number of iterations just done.

    Returns
    -------
    float32 [E, N, 2] on the device of `start`.
    """
    rows = stacked(P, copies=len(start) // len(P))
    run = _descend_cuda if start.is_cuda else _descend_cpu
    Z = start
    for phase in phases:
        Z = run(rows, Z, phase, learning_rate=learning_rate, gaussian=gaussian, advance=advance)
        collapsed = Z.std(dim=1).amax(dim=1) < COLLAPSED
        Z = torch.where(collapsed[:, None, None] & (phase.exaggeration > 1), start, Z)
    return Z


def _descend_cpu(
    rows: Rows,
    start: torch.Tensor,
    phase: Phase,
    *,
    learning_rate: float,
    gaussian: bool,
    advance: Callable[[int], None],
) -> torch.Tensor:
    import numba

    from qdv_gpu.kernels import cpu

    E, N, _ = start.shape
    points = start.reshape(E * N, 2).numpy()
    Z, packed = points.T.copy(), np.ascontiguousarray(points).view(np.uint64)[:, 0].copy()
    state = (Z, packed, np.zeros_like(Z), np.ones_like(Z), np.repeat(np.arange(E), N), np.arange(E + 1) * N)
    P = (rows.first.numpy(), rows.indptr.numpy(), rows.indices.numpy().view(np.uint32), rows.values.numpy())
    forces = (np.empty_like(Z), np.empty((cpu.BANDS, *Z.shape), dtype=np.float32), np.empty((E, cpu.BANDS)))
    scalars = np.array([phase.exaggeration, learning_rate, phase.momentum], dtype=np.float32)
    threads = max(1, min(numba.get_num_threads(), E * N**2 // PAIRS_PER_THREAD))
    at_once = max(1, PAIRS_AT_ONCE // (E * N**2))

    with ThreadPoolExecutor(threads) as pool:
        for done in range(0, phase.iterations, at_once):
            turns, arrived = min(at_once, phase.iterations - done), np.zeros((threads, 8), dtype=np.int64)
            arguments = (turns, *state, *P, gaussian, *forces, *scalars, arrived)

            def work(part: int, arguments: tuple[Any, ...] = arguments) -> None:
                try:
                    cpu.descend(part, *arguments)
                finally:
                    arguments[-1][:] = 2 * arguments[0]  # one that failed or was interrupted is not waited for

            others = []
            try:
                others = [pool.submit(work, part) for part in range(1, threads)]
                work(0)
            finally:
                arrived[:] = 2 * turns
            for other in others:
                other.result()
            advance(turns)
    return torch.from_numpy(Z.T.copy()).view(E, N, 2)


def _descend_cuda(
    rows: Rows,
    start: torch.Tensor,
    phase: Phase,
    *,
    learning_rate: float,
    gaussian: bool,
    advance: Callable[[int], None],
) -> torch.Tensor:
    from qdv_gpu import kernels

    E, N, _ = start.shape
    Z = start.reshape(E * N, 2).clone(memory_format=torch.contiguous_format)
    velocity, gains, attraction, repulsion = (
        torch.zeros_like(Z), torch.ones_like(Z), torch.empty_like(Z), torch.empty_like(Z)
    )  # fmt: skip
    weight, bounds = torch.empty_like(Z[:, 0]), torch.arange(E + 1, device=Z.device) * N
    scalars = np.array([phase.exaggeration, learning_rate, phase.momentum], dtype=np.float32)
    dense = int(rows.indices.numel() == 0)
    replays = max(0, phase.iterations - 1) // GRAPH_ITERATIONS
    single = phase.iterations - replays * GRAPH_ITERATIONS  # what is captured has run before

    def step() -> None:
        kernels.launch(module, "repel", Z, bounds, repulsion, weight, grid=(-(-N // 16), E), block=128)
        kernels.launch(module, "attract", Z, bounds, *rows, attraction, grid=(-(-N // 4), E), block=128)
        kernels.launch(
            module, "update", Z, velocity, gains, attraction, repulsion, weight, bounds, *scalars,
            grid=(-(-N // 256), E), block=256,
        )  # fmt: skip

    with torch.cuda.device(Z.device):
        module = kernels.load("tsne", fast_math=True, GAUSSIAN=int(gaussian), DENSE=dense)
        for _ in range(single):
            step()
        advance(single)
        if replays:
            graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                graph.capture_begin(capture_error_mode="thread_local")
                for _ in range(GRAPH_ITERATIONS):
                    step()
                graph.capture_end()
            for _ in range(replays):
                graph.replay()
                torch.cuda.current_stream().synchronize()  # so that progress is real and Ctrl-C acts at once
                advance(GRAPH_ITERATIONS)
    return Z.view(E, N, 2)
