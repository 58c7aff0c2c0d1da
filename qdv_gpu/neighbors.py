"""Exact nearest neighbours: faiss or torch propose candidates, float64 distances decide."""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from qdv_gpu import kernels
from qdv_gpu.errors import InputError, MissingPackageError, check_among, check_count
from qdv_gpu.machine import product_precision

ENGINES = ("auto", "faiss", "torch", "direct", "inverted")
BLOCK = 1 << 24  # distances held at once on a GPU, in elements
HOST_BLOCK = 1 << 19  # and on a CPU
FAISS_GPU_LIMIT = 2048  # faiss aborts the process when a GPU is asked for more neighbours
DIRECT_COLUMNS = 16  # up to here a CPU computes every distance sooner than faiss proposes
FAISS_QUERIES = 4096  # at once on a CPU: as many as faiss itself takes at once
LARGEST = 1e150  # beyond this, squares overflow, and below its reciprocal they are 0
MIXER = 0x9E3779B97F4A7C15 - 2**64  # odd, with the digits of the golden ratio
EXACT = 2.0**53  # from here on, float64 does not hold every whole number


Proposer = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
Block = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # points, their neighbours, squared distances


class Neighbors(NamedTuple):
    """The k nearest other points of each of N points.

    Attributes
    ----------
    indices : torch.Tensor
        int64 [N, k], nearest first; equally far points by lot, as `lots` says.
    squared_distances : torch.Tensor
        float64 [N, k].
    tied : torch.Tensor
        bool [N]: the k-th and the (k + 1)-th other point are equally far, so that the choice is by lot.
    """

    indices: torch.Tensor
    squared_distances: torch.Tensor
    tied: torch.Tensor

    def first(self, k: int) -> "Neighbors":
        """The k nearest of these neighbours, as `knn` with that k gives them."""
        if k == self.indices.shape[1]:
            return self
        if not 1 <= k < self.indices.shape[1]:
            raise InputError(f"k must be between 1 and {self.indices.shape[1]}, got {k}")
        distances = self.squared_distances
        return Neighbors(self.indices[:, :k], distances[:, :k], distances[:, k - 1] == distances[:, k])


def knn(X: torch.Tensor, k: int, *, engine: str = "auto") -> Neighbors:
    """Find the k nearest other points of every point, exactly.

    A point is left out of its own neighbours by its index, so duplicates of it are neighbours like any other.
    Distances are float64 sums of squared differences over the coordinates in order. The engine "direct" computes
    them for all pairs. faiss and torch propose k and a few more candidates, which these distances rank; a row for
    which the proposal cannot be proven complete (ties, duplicates, points too close for the proposing precision)
    is searched directly. All engines hence return the same neighbours. Of equally far points each point takes others,
    by lots that are the same on every run and do not know the order of the points (`lots`).

    Parameters
    ----------
    X : torch.Tensor
        Points [N, d], real, on a CPU or CUDA device.
    k : int
        Number of neighbours, from 1 to N - 1.
    engine : {"auto", "faiss", "torch", "direct", "inverted"}
        "auto" is, on the CPU, "direct" for up to 16 coordinates; then faiss where it can be imported (for CUDA
        tensors: with GPU support); else "torch" for CUDA and "direct" for the CPU. "inverted", on the CPU faiss's,
        finds nearly all of the neighbours, as `qdv_gpu.inverted` says.

    Raises
    ------
    InputError
        If k is out of range, X is not [N, d], or a row holds NaN, an infinity or a value of 1e150 or more; if no value
        is above 1e-150, but for zeros, or integers are beyond 2^53.
    MissingPackageError
        If faiss is asked for and absent.
    """
    home, X, k = X.device, kernels.reachable(_validated(X, k)), int(k)
    N = len(X)
    result = Neighbors(
        torch.empty((N, k), dtype=torch.int64, device=X.device),
        torch.empty((N, k), dtype=torch.float64, device=X.device),
        torch.zeros(N, dtype=torch.bool, device=X.device),
    )
    for rows, indices, distances in _blocks(X, k + 1, _resolved_engine(X, k, engine)):
        result.indices[rows], result.squared_distances[rows] = indices[:, :k], distances[:, :k]
        result.tied[rows] = distances[:, k - 1] == distances[:, k]  # never for k = N - 1: the last one is infinite
    return Neighbors(*(part.to(home) for part in result))


def neighbor_blocks(X: torch.Tensor, k: int, *, engine: str = "auto") -> Iterator[Block]:
    """Find neighbours as `knn` does, some points at a time, so that the caller keeps only what is needed.

    Yields the points int64 [n], in any order, their k nearest other points int64 and the squared distances float64
    [n, k].
    """
    home, points, k = X.device, kernels.reachable(_validated(X, k)), int(k)
    blocks = _blocks(points, k, _resolved_engine(points, k, engine))
    return ((rows.to(home), indices.to(home), distances.to(home)) for rows, indices, distances in blocks)


def _blocks(X: torch.Tensor, k: int, engine: str) -> Iterator[Block]:
    """The same of points float64 [N, d], for k up to N: of the N-th the distance is infinite."""
    N = len(X)
    missing = torch.arange(N, device=X.device)
    own = lots(N, X.device)
    if engine != "direct":
        width = min(N, k + 1 + max(16, k // 4))  # the point itself is proposed as well
        width = min(width, FAISS_GPU_LIMIT) if X.is_cuda and engine == "faiss" else width
        twice = torch.cat([X, X])  # from a block's first point on, it holds all points, those of the block in front
        X = twice[:N]
        size, propose = PROPOSERS[engine](X, width)
        unproven = []
        for start in range(0, N, size):
            rows = missing[start : start + size]
            candidates, outside = propose(rows)
            candidates = _by_lot(rows, candidates, own)
            indices, distances, proven = _ranked(twice[start : start + N], start, k, candidates, outside)
            yield rows[proven], indices[proven], distances[proven]
            unproven.append(rows[~proven])
        missing = torch.cat(unproven)
    for rows in missing.split(_block_size(X, k)):
        yield rows, *_search_all(X, rows, k, own)


def lots(N: int, device: torch.device) -> torch.Tensor:
    """Odd numbers int64 [N] that order equally far points, the same each time.

    Of points that are equally far from point i, the one whose lot times that of i is smaller, as int64, is before the
    other. By index the first of images sorted by class would be of one class; and an order that all points share would
    give all copies of a point the same k neighbours, so that NH would hang on the classes of these few.
    """
    numbers = torch.arange(1, N + 1, device=device)
    for _ in range(2):  # as hash functions mix bits
        numbers *= MIXER
        numbers ^= numbers >> 32
    return numbers.mul_(MIXER).bitwise_or_(1)


def _by_lot(rows: torch.Tensor, points: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Points int64 [n, m], each row in the order in which its point takes equally far ones, by the lots int64 [N]."""
    return points.gather(1, (own[rows, None] * own[points]).argsort(dim=1))


def listed_distances(X: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Squared distances float64 [n, m] of each of the first n points to its listed points; infinity to itself.

    X is float64 [N, d], indices int64 [n, m].
    """
    X, indices = X.contiguous(), indices.contiguous()
    out = torch.empty(indices.shape, dtype=torch.float64, device=X.device)
    if not X.is_cuda:
        from qdv_gpu.kernels import distances

        distances.listed(X.numpy(), indices.numpy(), out.numpy())
    elif out.numel():
        pairs, m, d = out.numel(), indices.shape[1], X.shape[1]
        sizes, grid = (np.int64(pairs), np.int32(m), np.int32(d)), (-(-pairs // 128),)
        kernels.run("distances", "listed", X, indices, out, *sizes, grid=grid, block=128)
    return out


def distances_to_all(XT: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Squared distances float64 [n, N] of the points `rows` (int64 [n]) to all points; infinity to themselves.

    XT is float64 [d, N], contiguous, on a GPU. The caller bounds n.
    """
    (d, N), n = XT.shape, len(rows)
    out = torch.empty((n, N), dtype=torch.float64, device=XT.device)
    sizes, grid = (np.int64(n), np.int64(N), np.int32(d)), (-(-N // 128), -(-n // 4))
    kernels.run("distances", "to_all", XT, rows.contiguous(), out, *sizes, grid=grid, block=128)
    return out


def check_range(X: torch.Tensor) -> None:
    """Raise InputError unless float64 holds the finite points X, of any shape, and their squared distances."""
    if X.dtype.itemsize == 8:
        _check_size(X, float(X.detach().to(torch.float64).abs().max()) if X.numel() else 0.0)


def _check_size(X: torch.Tensor, largest: float) -> None:
    """The same, if that is the size of the largest."""
    if not X.is_floating_point() and largest >= EXACT:
        raise InputError(f"points of whole numbers must be within 2^53, which float64 holds, got {largest:.17g}")
    if largest >= LARGEST or 0 < largest < 1 / LARGEST:
        raise InputError(f"points must be of sizes within {1 / LARGEST:g} and {LARGEST:g}, the largest is {largest:g}")


def as_points(X: torch.Tensor) -> torch.Tensor:
    """Points [N, d] as float64; InputError unless they are real and finite, as for `knn`."""
    if X.ndim != 2:
        raise InputError(f"points must have shape [N, d], got {list(X.shape)}")
    if X.is_complex():
        raise InputError(f"points must be real, got {X.dtype}")
    points = X.detach().to(torch.float64)
    largest = float(points.abs().max()) if points.numel() else 0.0
    if not largest < LARGEST:  # NaN as well
        row = int((~(points.abs() < LARGEST).all(dim=1)).nonzero()[0])
        raise InputError(f"points must be finite and below {LARGEST:g} in size, row {row} is not")
    _check_size(X, largest)
    return points


def _validated(X: torch.Tensor, k: int) -> torch.Tensor:
    check_count("k", k)
    points = as_points(X)
    if k >= len(X):
        raise InputError(f"k must be smaller than the number of points N, got k={k}, N={len(X)}")
    return points


def _resolved_engine(X: torch.Tensor, k: int, engine: str) -> str:
    """Choose "faiss", "torch" or "direct", or say why the one asked for cannot be had."""
    check_among("engine", engine, ENGINES)
    within_limit = not X.is_cuda or k + 2 <= FAISS_GPU_LIMIT
    if engine == "faiss" or (engine == "inverted" and not X.is_cuda):
        if not has_faiss(X.device):
            command = f'pip install "qdv_gpu[{"cuda13" if X.is_cuda else "cpu"}]"'
            raise MissingPackageError(f"engine {engine} on {X.device.type} needs a package that is absent: {command}")
        if not within_limit:
            raise InputError(f"engine faiss finds at most {FAISS_GPU_LIMIT - 2} neighbours on a GPU, got k={k}")
    if engine != "auto":
        return engine
    if not X.is_cuda and X.shape[1] <= DIRECT_COLUMNS:
        return "direct"
    if within_limit and has_faiss(X.device):
        return "faiss"
    return "torch" if X.is_cuda else "direct"


def has_faiss(device: torch.device) -> bool:
    """Whether faiss searches points on a device."""
    if importlib.util.find_spec("faiss") is None:
        return False
    if device.type == "cpu":
        return True
    import faiss

    return hasattr(faiss, "knn_gpu") and faiss.get_num_gpus() > 0  # without a GPU, knn_gpu aborts the process


def _block_size(X: torch.Tensor, columns: int) -> int:
    """Number of rows, so that an array of so many columns holds no more than a block."""
    return max(1, (BLOCK if X.is_cuda else HOST_BLOCK) // columns)


def _ranked(
    X: torch.Tensor, start: int, k: int, candidates: torch.Tensor, outside: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k nearest candidates of the first n points of X, and whether they are proven to be the nearest points.

    Parameters
    ----------
    X : torch.Tensor
        All points float64 [N, d], from point `start` on and then from the first one.
    candidates, outside : torch.Tensor
        Of points start, start + 1, ...: int64 [n, width], equally far ones in their order, and a lower bound [n] on
        the distance of the other points.

    Returns
    -------
    Indices int64 and distances float64 [n, k], nearest first, and bool [n].
    """
    distances, order = listed_distances(X, (candidates - start).remainder_(len(X))).sort(dim=1, stable=True)
    distances, indices = distances[:, :k], candidates.gather(1, order[:, :k])
    return indices, distances, (distances[:, -1] < outside) | (candidates.shape[1] == len(X))


def _error_bound(X: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bound [N] on the error of |x|^2 + |y|^2 - 2 x.y, from X rounded to `dtype`, against the true distance.

    With u the unit roundoff, rounding the points moves a squared distance by less than 3 u (|x| + |y|)^2; the
    sums over d coordinates, in any order, and the two additions add (d + 3) u (|x| + |y|)^2 (Higham 2002, section
    3.1). The float64 distance that it is compared with costs (d + 2) more float64 roundoffs. One unit is added for the
    higher-order terms, and a constant for underflow, X being scaled to at most 1.
    """
    d = X.shape[1]
    u = torch.finfo(dtype).eps / 2
    norms = torch.linalg.vector_norm(X, dim=1, dtype=torch.float64)
    return 2 * (d + 8) * u * (norms + norms.max()).square() + d * torch.finfo(dtype).tiny


def _centred(X: torch.Tensor) -> tuple[torch.Tensor, float]:
    """X less its mean, over the power of two that brings it to at most 1, and that power."""
    C = X - X.mean(dim=0)
    largest = float(torch.linalg.vector_norm(C, torch.inf)) if C.numel() else 0.0
    scale = 2.0 ** np.ceil(np.log2(largest)) if largest > 0 else 1.0
    return C.div_(scale), scale


def _torch_proposer(X: torch.Tensor, width: int) -> tuple[int, Proposer]:
    """How many points to ask for at once, and a function that proposes neighbours of the points int64 [n].

    It returns candidates int64 [n, width] and a lower bound float64 [n] on the distance of every point left out. In
    float64, so that the setting that lets CUDA multiply float32 matrices as TF32 has no say.
    """
    C, scale = _centred(X)
    norms, error = C.square().sum(dim=1), _error_bound(C, torch.float64)

    def propose(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        D = torch.addmm(norms, C[rows], C.T, alpha=-2) + norms[rows, None]  # [n, N]
        found = D.topk(width, dim=1, largest=False)
        return found.indices, (found.values[:, -1] - error[rows]) * scale**2

    return _block_size(X, len(X)), propose


def _faiss_proposer(X: torch.Tensor, width: int) -> tuple[int, Proposer]:
    """As `_torch_proposer`, in float32 by faiss."""
    import faiss

    C, scale = _centred(X)
    C = C.to(torch.float32).contiguous()
    error = _error_bound(C, torch.float32)
    if X.is_cuda:
        import faiss.contrib.torch_utils  # makes knn_gpu take CUDA tensors, on torch's stream

        resources = _faiss_resources(X.device.index)

    def propose(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if X.is_cuda:
            with torch.cuda.device(X.device):
                D, candidates = faiss.knn_gpu(resources, C[rows], C, width, device=X.device.index, use_cuvs=False)
        else:
            D, candidates = map(torch.from_numpy, faiss.knn(C[rows].numpy(), C.numpy(), width))
        return candidates, (D[:, -1].to(torch.float64) - error[rows]) * scale**2

    return _block_size(X, width) if X.is_cuda else FAISS_QUERIES, propose


def _inverted_proposer(X: torch.Tensor, width: int) -> tuple[int, Proposer]:
    """As `_torch_proposer`, nearly complete, by an inverted file; complete where its float32 is too coarse for that."""
    from qdv_gpu.inverted import RECALL, SAMPLE, InvertedCells, InvertedFile, sample_of

    points, sample = _centred(X)[0], sample_of(len(X), SAMPLE).to(X.device)
    radii = _search_all(points, sample, width - 1, lots(len(X), X.device))[1][:, -1]
    with product_precision("ieee"):
        found = (InvertedCells if X.is_cuda else InvertedFile)(points, width, sample, radii)
    if found.recall >= RECALL:
        return _block_size(X, width) if X.is_cuda else FAISS_QUERIES, found.propose
    del found, points
    return _torch_proposer(X, width) if X.is_cuda else _faiss_proposer(X, width)


PROPOSERS = {"torch": _torch_proposer, "faiss": _faiss_proposer, "inverted": _inverted_proposer}


@functools.cache
def _faiss_resources(device: int) -> Any:
    """faiss's streams, handles and memory on a CUDA device, which take 0.1 s to make; kept as long as the process."""
    import faiss

    resources = faiss.StandardGpuResources()
    resources.setPinnedMemory(0)  # what is searched is on the device already
    resources.setTempMemory(256 << 20)  # bytes, outside torch's pool
    return resources


def _search_all(X: torch.Tensor, rows: torch.Tensor, k: int, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest of the points `rows` among all points, indices int64 and distances float64 [len(rows), k].

    `own` are the `lots` of all points.
    """
    indices = torch.empty((len(rows), k), dtype=torch.int64, device=X.device)
    distances = torch.empty((len(rows), k), dtype=torch.float64, device=X.device)
    XT = X.T.contiguous()
    if not X.is_cuda:
        from qdv_gpu.kernels.distances import nearest

        nearest(XT.numpy(), own.numpy(), rows.numpy(), indices.numpy(), distances.numpy())
        return indices, distances
    step, everything = max(1, BLOCK // len(X)), torch.arange(len(X), device=X.device)
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        points = _by_lot(rows[block], everything.expand(len(rows[block]), -1), own)
        found = distances_to_all(XT, rows[block]).gather(1, points).sort(dim=1, stable=True)
        indices[block], distances[block] = points.gather(1, found.indices[:, :k]), found.values[:, :k]
    return indices, distances
