"""Similarities p_ij of the points in their own space: perplexity search and symmetrisation."""

import math
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch

from qdv_gpu import kernels
from qdv_gpu.errors import InputError, check_among, short
from qdv_gpu.kernels import bandwidths
from qdv_gpu.neighbors import as_points, distances_to_all, has_faiss, neighbor_blocks

KINDS = ("knn", "full")
EXACT_UP_TO = 20_000  # points whose neighbours are searched among all pairs on a CPU
CUDA_EXACT_UP_TO = 50_000  # and on a GPU: predicted, not measured (docs/gpu-notes.md)
DISTANCES_AT_ONCE = 1 << 24  # of which bandwidths are searched on a GPU
UNREACHED = "a row's entropy did not reach log(perplexity), though it falls monotonically with beta"


class SparseAffinities(NamedTuple):
    """A symmetric P in compressed rows; entry e of row i says p_{i, indices[e]} = values[e].

    Attributes
    ----------
    indptr : torch.Tensor
        int64 [N + 1].
    indices : torch.Tensor
        int32 [nnz], ascending within a row.
    values : torch.Tensor
        float32 [nnz]; they sum to 1.
    """

    indptr: torch.Tensor
    indices: torch.Tensor
    values: torch.Tensor


Affinities = SparseAffinities | torch.Tensor


def check_perplexity(perplexity: Any, N: int) -> float:
    """Return the perplexity as a float, or raise InputError unless 1 <= perplexity <= (N - 1) / 3."""
    try:
        if isinstance(perplexity, bool | str | bytes):  # which float() takes
            raise TypeError
        value = float(perplexity)
    except Exception:  # of somebody's own class
        raise InputError(f"perplexity must be a number, got {short(perplexity)}") from None
    if not 1 <= value <= (N - 1) / 3:
        raise InputError(
            f"perplexity must be at least 1 and 3 * perplexity at most N - 1, got perplexity {perplexity} and N = {N}"
        )
    return value


def joint_affinities(X: torch.Tensor, *, perplexity: float = 30.0, kind: str = "knn") -> Affinities:
    """p_ij = (p_{j|i} + p_{i|j}) / 2N (Wang & Liu 2024, eq. 4; van der Maaten & Hinton 2008, eq. 1).

    Parameters
    ----------
    X : torch.Tensor
        Points [N, d], N >= 4, finite, on any device.
    perplexity : float
        Effective number of neighbours, at least 1 and at most (N - 1) / 3.
    kind : {"knn", "full"}
        "knn" gives p_{j|i} > 0 to the 3 * perplexity nearest neighbours only, "full" to every pair. Of more than
        20,000 points on a CPU with faiss, or 50,000 on a GPU, nearly all of them are found, at least 98 %
        (`qdv_gpu.inverted`).

    Returns
    -------
    SparseAffinities for "knn", a float32 [N, N] tensor with a zero diagonal for "full"; both sum to 1.

    Raises
    ------
    InputError
        If the perplexity or kind is not allowed, or a point is not finite.
    """
    check_among("affinities", kind, KINDS)
    perplexity = check_perplexity(perplexity, len(X))
    if kind == "full":
        return _dense(X, perplexity)
    return _symmetrised(*_shares(X, perplexity))


def conditional_affinities(squared_distances: torch.Tensor, *, perplexity: float) -> torch.Tensor:
    """p_{j|i} of each row: exp(-beta_i d_ij^2), normalised, with the beta_i that gives the row its perplexity.

    Rows are searched on their own, so a row's result does not depend on the others. Distances are taken relative
    to the row's smallest, which changes nothing but keeps far points from underflowing. A row in which at least
    `perplexity` points share the smallest distance (duplicates) cannot reach so small an entropy: it gets the limit
    of an infinite beta, equal shares to those points.

    Parameters
    ----------
    squared_distances : torch.Tensor
        float64 [N, k], finite, the point itself not among them.
    perplexity : float
        At least 1 and below k.

    Returns
    -------
    float64 [N, k]; every row sums to 1 and, duplicates apart, has entropy log(perplexity) within 1e-7.
    """
    P = torch.empty_like(squared_distances, memory_format=torch.contiguous_format)
    if not P.is_cuda:
        found = np.empty(len(P), dtype=bool)
        bandwidths.search(squared_distances.contiguous().numpy(), perplexity, P.numpy(), found)
        assert found.all(), UNREACHED
        return P
    step = max(1, DISTANCES_AT_ONCE // P.shape[1])
    for start in range(0, len(P), step):
        P[start : start + step] = _search(squared_distances[start : start + step], perplexity)
    return P


def _search(D: torch.Tensor, perplexity: float) -> torch.Tensor:
    """p_{j|i} float64 [n, k] of squared distances D float64 [n, k] by torch operations, on any device.

    The steps of `kernels.bandwidths`, all rows at once; a row that has arrived is not moved again.
    """
    target = math.log(perplexity)
    D = D - D.amin(1, keepdim=True)
    mean = D.mean(1, keepdim=True)
    D = D / torch.where(mean > 0, mean, 1)
    nearest = D < bandwidths.NEGLIGIBLE
    D = torch.where(nearest, 0, D)
    limit = nearest.sum(1) >= perplexity
    beta = torch.ones(len(D), dtype=D.dtype, device=D.device)
    low, high = torch.zeros_like(beta), torch.full_like(beta, torch.inf)
    width, before = high, high  # of the bracket in log(beta), after the last step and after the one before
    for turn in range(bandwidths.MAX_STEPS):
        E = torch.exp(-beta[:, None] * D)
        total = E.sum(1)
        first = (E * D).sum(1) / total
        variance = (E * D.square()).sum(1) / total - first.square()
        gap = total.log() + beta * first - target
        found = (gap.abs() <= bandwidths.TOLERANCE) | limit
        if found.all():
            break
        low, high = torch.where(gap > 0, beta, low), torch.where(gap < 0, beta, high)
        now = high.log() - low.log()  # infinite while low is 0
        slow, before, width = (now > before / 2) & (turn >= bandwidths.PATIENCE), width, now
        newton = beta * (gap / (beta.square() * variance)).clamp(-3, 3).exp()
        middle = torch.where(high.isinf(), 20 * beta, torch.where(low == 0, beta / 20, low.sqrt() * high.sqrt()))
        inside = (newton > low) & (newton < high) & ~slow
        beta = torch.where(found, beta, torch.where(inside, newton, middle))
    assert found.all(), UNREACHED
    P = E / total[:, None]
    return torch.where(limit[:, None], nearest / nearest.sum(1, keepdim=True).to(D.dtype), P)


def _shares(X: torch.Tensor, perplexity: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest neighbours of X [N, d], int32 [N, k], and p_{j|i} / 2N, float32 [N, k]."""
    N, k = len(X), int(3 * perplexity)
    indices = torch.empty((N, k), dtype=torch.int32, device=X.device)
    shares = torch.empty((N, k), dtype=torch.float32, device=X.device)
    place = kernels.reachable(X[:0]).device  # where they are searched
    nearly = N > CUDA_EXACT_UP_TO if place.type == "cuda" else N > EXACT_UP_TO and has_faiss(place)
    for rows, found, squared_distances in neighbor_blocks(X, k, engine="inverted" if nearly else "auto"):
        indices[rows] = found.to(torch.int32)
        shares[rows] = (conditional_affinities(squared_distances, perplexity=perplexity) / (2 * N)).to(torch.float32)
    return indices, shares


def _symmetrised(indices: torch.Tensor, shares: torch.Tensor) -> SparseAffinities:
    """The sum of a matrix and its transpose in compressed rows, from the columns and values [N, k] of its entries."""
    N, k = indices.shape
    if not indices.is_cuda:
        values = shares.to(torch.float32)
        rows = np.arange(0, N * k + 1, k, dtype=np.int32 if N * k < 2**31 else np.int64)
        columns = indices.numpy().ravel().astype(rows.dtype, copy=False)
        C = scipy.sparse.csr_array((values.numpy().ravel(), columns, rows), shape=(N, N))
        P = C + C.T.tocsr()
        P.sort_indices()
        indptr, columns = P.indptr.astype(np.int64), P.indices.astype(np.int32, copy=False)
        return SparseAffinities(torch.from_numpy(indptr), torch.from_numpy(columns), torch.from_numpy(P.data))
    return _symmetrised_by_sorting(indices, shares)


def _symmetrised_by_sorting(indices: torch.Tensor, shares: torch.Tensor) -> SparseAffinities:
    """The same by torch operations, on any device."""
    N, k = indices.shape
    rows = torch.arange(N, device=indices.device)[:, None]
    # What sorting needs beside them is most of the affinities' memory: nothing else is kept meanwhile.
    keys, order = torch.cat([(rows * N + indices).view(-1), (indices.long() * N + rows).view(-1)]).sort()
    values = shares.reshape(-1)[order.remainder_(N * k)]
    del order
    # A key comes once or twice: where it comes again, the second value joins the first.
    again = torch.zeros_like(keys, dtype=torch.bool)
    again[1:] = keys[1:] == keys[:-1]
    values[:-1] += torch.where(again[1:], values[1:], 0)
    keys, values = keys[~again], values[~again]
    indptr = torch.searchsorted(keys, torch.arange(N + 1, device=keys.device) * N)
    return SparseAffinities(indptr, (keys % N).to(torch.int32), values.to(torch.float32))


def _dense(X: torch.Tensor, perplexity: float) -> torch.Tensor:
    """Affinities of every pair, float32 [N, N]; only a few rows of distances are held at once."""
    N, home, X = len(X), X.device, kernels.reachable(as_points(X))
    XT = X.T.contiguous()
    P = torch.zeros((N, N), dtype=torch.float32, device=X.device)
    if X.is_cuda:
        columns = torch.arange(N, device=X.device)
        step = max(1, DISTANCES_AT_ONCE // N)
        for start in range(0, N, step):
            rows = columns[start : start + step]
            others = columns[None] != rows[:, None]  # [step, N]
            D = distances_to_all(XT, rows)[others].view(len(rows), N - 1)
            P[start : start + step][others] = _search(D, perplexity).to(torch.float32).view(-1)
    else:
        found = np.empty(N, dtype=bool)
        bandwidths.search_all_pairs(XT.numpy(), perplexity, P.numpy(), found)
        assert found.all(), UNREACHED
    return P.add_(P.T.clone()).div_(2 * N).to(home)
