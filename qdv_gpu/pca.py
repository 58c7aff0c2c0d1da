"""Normalisation and principal components of a layer that need not fit in memory: only row tiles are ever read."""

import math
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from qdv_gpu.errors import InputError, unknown

NORMALISATIONS = ("minmax", "l2", "standard", "none")
TOLERANCE = 1e-6  # relative change of the captured variance between two passes
MAX_PASSES = 60
TINY = torch.finfo(torch.float32).tiny  # norms, deviations and extents up to here count as 0
CHUNK = 1 << 22  # elements worked on at once
SEED = 0


class Components(NamedTuple):
    """Principal components of a normalised layer, largest first.

    Attributes
    ----------
    scores : torch.Tensor
        float32 [N, n]: the rows of the normalised layer, less their mean, in the components' coordinates.
    components : torch.Tensor
        float32 [n, D], orthonormal rows; the entry largest in size is positive. Beyond the layer's rank in
        float32 (variance below about 1e-14 of the largest) rows are shorter, down to zero.
    variance : torch.Tensor
        float64 [n]: variance (over N - 1) of the scores.
    total_variance : float
        Summed variance of all D normalised features.
    passes : int
        Passes over the tiles, that of the statistics included.
    """

    scores: torch.Tensor
    components: torch.Tensor
    variance: torch.Tensor
    total_variance: float
    passes: int


class Workspace(NamedTuple):
    """How much `principal_components` works on at a time.

    Attributes
    ----------
    block : int
        Columns of the block.
    rows : int
        Rows of a chunk, at least.
    bytes : int
        Most bytes that it holds beside a tile: two blocks, projected rows, copies of a chunk.
    """

    block: int
    rows: int
    bytes: int


class _Statistics(NamedTuple):
    """What the first pass finds: N, and how a row becomes a normalised, centred one."""

    rows: int
    lowest: float
    highest: float
    mean: torch.Tensor  # float64 [D], of the rows (divided by their norms for l2)
    squares: torch.Tensor  # float64 [D], sum of squared deviations from the mean


def reduce(
    tiles: Iterable[torch.Tensor],
    n_components: int,
    *,
    normalise: str = "minmax",
    name: str = "",
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """Normalise a layer and reduce it to its first principal components.

    Parameters
    ----------
    tiles : iterable of torch.Tensor
        Row tiles [n_i, D] of the layer, float32 or narrower, all on one device, in the same order each time they
        are iterated over: a list, or an object that computes them anew.
    n_components : int
        Number of components n, at most min(N - 1, D) of which exist: a larger number is reduced to that. 0 means
        no reduction.
    normalise : {"minmax", "l2", "standard", "none"}
        "minmax": (X - min) / (max - min) with the extremes of the whole layer; "l2": each row over its norm;
        "standard": each feature to mean 0 and variance 1 (over N). Rows of norm 0, features of variance 0 and, for
        "minmax", a constant layer become 0.
    name : str
        The layer, for messages.
    workspace : Workspace, optional
        From `workspace`, where memory is short.

    Returns
    -------
    torch.Tensor
        float32 [N, n], on the tiles' device; with n_components 0 the normalised layer [N, D].

    Raises
    ------
    InputError
        If an activation is NaN or infinite, the tiles differ in width, or a setting is not one of the above.
    """
    _check(n_components, normalise)
    if n_components > 0:
        return principal_components(tiles, n_components, normalise=normalise, name=name, workspace=workspace).scores
    work = workspace or _widest(n_components)
    statistics, _ = _first_pass(_chunks(tiles, work.rows), normalise, name, 0)
    shift, scale = _affine(statistics, normalise)
    if normalise == "minmax":
        shift = torch.full_like(shift, statistics.lowest)
    elif normalise != "standard":
        shift, scale = torch.zeros_like(shift), torch.ones_like(scale)
    return torch.cat([_normalised(chunk, shift, scale, normalise) for chunk in _chunks(tiles, work.rows)])


def principal_components(
    tiles: Iterable[torch.Tensor],
    n_components: int,
    *,
    normalise: str = "minmax",
    name: str = "",
    workspace: Workspace | None = None,
) -> Components:
    """Principal components of a normalised layer; parameters and errors as for `reduce`.

    Block subspace iteration (Halko, Martinsson & Tropp 2011, section 4.5): each pass computes Y = X Q and B = X^T Y,
    tile by tile, and B's orthonormal basis is the next Q. The block has about three times as many columns as there
    are components, which takes about four passes where the usual few more columns take more than twelve. The first
    pass finds the statistics and, from the raw X, a first B. Passes end when the variance that the components
    capture changes by less than 1e-6 of itself.

    Products are float32, Gram matrices and statistics float64. A smaller `workspace` than the default takes more
    passes.
    """
    _check(n_components, normalise)
    if n_components == 0:
        raise InputError("the number of components must be at least 1, got 0")
    work = workspace or _widest(n_components)
    statistics, B = _first_pass(_chunks(tiles, work.rows), normalise, name, work.block)
    N, D = statistics.rows, len(statistics.mean)
    n = min(n_components, N - 1, D)
    width = min(B.shape[1], N)
    shift, scale = _affine(statistics, normalise)
    captured, passes = torch.inf, 1
    while True:
        Q = _orthonormal_(B)[:, :width]
        B = torch.zeros_like(Q)
        Y = []
        for chunk in _chunks(tiles, work.rows):
            X = _normalised(chunk, shift, scale, normalise)
            Y.append(X @ Q)
            B.addmm_(X.T, Y[-1])
        projected = torch.cat(Y)  # [N, width]
        passes += 1
        squares, rotation = _eigen(_gram(projected))
        previous, captured = captured, float(squares[:n].sum())
        if abs(captured - previous) <= TOLERANCE * captured:
            break
        if passes == MAX_PASSES:
            warnings.warn(
                f"{name or 'layer'}: the captured variance still changes by more than {TOLERANCE:g} after "
                f"{MAX_PASSES} passes",
                RuntimeWarning,
                stacklevel=2,
            )
            break
    del B
    rotation = rotation[:, :n]
    components = _product(Q, rotation)  # [D, n]
    size = statistics.highest - statistics.lowest if normalise == "none" else 1.0
    if n > 0:
        signs = components.gather(0, components.abs().argmax(dim=0, keepdim=True)).sign()  # [1, n]
        components, rotation = components.mul_(signs), rotation * signs
    scores = _product(projected, rotation * size)
    degrees = max(N - 1, 1)
    total = float((statistics.squares * scale.to(torch.float64).square()).sum())
    return Components(scores, components.T, squares[:n] * size**2 / degrees, total * size**2 / degrees, passes)


def workspace(rows: int, features: int, n_components: int, *, memory: float = math.inf) -> Workspace:
    """The workspace of fewest passes that holds at most `memory` bytes, or the smallest there is.

    Parameters
    ----------
    rows, features : int
        N and D of the layer.
    n_components : int
    memory : float
        Bytes, beside a tile.
    """
    n = n_components
    if n == 0:
        return Workspace(0, 1, 4 * 2 * rows * features + 4 * 2 * max(features, CHUNK) + 8 * 6 * features)
    sizes = [(3 * n + 10, 64), (3 * n + 10, 16), (2 * n + 10, 16), (n + n // 2 + 10, 16), (n + 10, 4)]
    for block, chunk_rows in sizes:
        width, chunk = min(block, features), max(chunk_rows * features, CHUNK)
        held = 4 * (2 * features * width + 2 * rows * width + 4 * chunk) + 8 * 6 * features
        work = Workspace(block, chunk_rows, held)
        if work.bytes <= memory:
            break
    return work


def _widest(n_components: int) -> Workspace:
    return workspace(0, 0, n_components)


def _check(n_components: int, normalise: str) -> None:
    if n_components < 0:
        raise InputError(f"the number of components must be 0 (no reduction) or more, got {n_components}")
    if normalise not in NORMALISATIONS:
        raise unknown("normalisation", normalise, NORMALISATIONS)


def _chunks(tiles: Iterable[torch.Tensor], rows: int) -> Iterator[torch.Tensor]:
    """The tiles, cut into pieces of about CHUNK elements or put together to `rows`, so that products pay."""
    waiting: list[torch.Tensor] = []
    for tile in tiles:
        for piece in tile.split(max(rows, CHUNK // max(1, tile.shape[1]))):
            if waiting and waiting[0].shape[1:] != piece.shape[1:]:  # an error that is told later
                yield from waiting
                waiting = []
            waiting.append(piece)
            if sum(map(len, waiting)) >= rows:
                chunk = waiting[0] if len(waiting) == 1 else torch.cat(waiting)
                waiting = []
                yield chunk
    if waiting:
        yield torch.cat(waiting)


def _first_pass(
    chunks: Iterable[torch.Tensor], normalise: str, name: str, block: int
) -> tuple[_Statistics, torch.Tensor]:
    """Check and measure the layer, and multiply a random block by its scatter matrix.

    Returns the statistics and B = sum_i (x_i - mean) (x_i - mean)^T Q, float32 [D, min(block, D)], of the rows x_i. The
    chunks are merged as by Chan, Golub & LeVeque 1983: with weight N_1 N_2 / (N_1 + N_2), the scatter of two groups'
    means adds to the scatter within them. B is in units of the largest activation squared, to stay within float32.
    """
    N, lowest, highest, unit = 0, torch.inf, -torch.inf, 0.0
    mean = squares = Q = B = torch.empty(0)
    for chunk in chunks:
        n, D = chunk.shape
        if N == 0:
            mean = torch.zeros(D, dtype=torch.float64, device=chunk.device)
            squares = torch.zeros_like(mean)
            generator = torch.Generator(chunk.device).manual_seed(SEED)
            Q = torch.randn((D, min(block, D)), generator=generator, device=chunk.device)
            B = torch.zeros_like(Q)
        if len(mean) != D:
            raise InputError(f"{name or 'layer'}: features per row changed from {len(mean)} to {D}")
        least, most = map(float, torch.aminmax(chunk))
        if not (least > -torch.inf and most < torch.inf):  # False for NaN as well
            row = N + int((~chunk.isfinite().all(dim=1)).nonzero()[0])
            raise InputError(f"{name or 'layer'}: activations must be finite, row {row} holds NaN or infinity")
        lowest, highest = min(lowest, least), max(highest, most)
        rows = _rows(chunk, normalise)
        chunk_mean, chunk_squares = _moments(rows)
        shift, weight = chunk_mean - mean, N * n / (N + n)
        squares += chunk_squares + shift.square() * weight
        mean += shift * (n / (N + n))
        N += n
        if block > 0:
            size = 1.0 if normalise == "l2" else max(highest, -lowest, TINY)
            if size > unit:
                B *= (unit / size) ** 2
                unit = size
            rows = (rows - chunk_mean.to(torch.float32)).div_(unit)
            B.addmm_(rows.T, rows @ Q)
            shift = (shift / unit).to(torch.float32)
            B.addr_(shift, shift @ Q, alpha=weight)
    if N == 0:
        raise InputError(f"{name or 'layer'}: there are no rows")
    return _Statistics(N, lowest, highest, mean, squares), B


def _moments(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and sum of squared deviations of each feature, float64 [D], some columns at a time."""
    parts = []
    for columns in rows.split(max(1, CHUNK // len(rows)), dim=1):
        values = columns.to(torch.float64)
        mean = values.mean(dim=0)
        parts.append(torch.stack([mean, (values - mean).square_().sum(dim=0)]))
    means, squares = torch.cat(parts, dim=1)
    return means, squares


def _rows(chunk: torch.Tensor, normalise: str) -> torch.Tensor:
    """The rows as float32, for l2 over their norms."""
    rows = chunk.to(torch.float32)
    if normalise != "l2":
        return rows
    rows = rows / rows.abs().amax(dim=1, keepdim=True).clamp_(min=TINY)  # no square overflows
    return rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_(min=TINY))


def _affine(statistics: _Statistics, normalise: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift and scale, float32, such that (row - shift) * scale is a normalised row less the mean one.

    For "none" the scale is that of "minmax", which keeps products within float32; the caller takes it back.
    """
    mean = statistics.mean
    if normalise == "l2":
        scale = torch.ones_like(mean)
    elif normalise == "standard":
        deviation = (statistics.squares / statistics.rows).sqrt()
        scale = torch.where(deviation > TINY, 1 / deviation, 0.0)
    else:
        extent = statistics.highest - statistics.lowest
        scale = torch.full_like(mean, 1 / extent if extent > TINY else 0.0)
    return mean.to(torch.float32), scale.to(torch.float32)


def _normalised(chunk: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, normalise: str) -> torch.Tensor:
    return (_rows(chunk, normalise) - shift).mul_(scale)


def _gram(A: torch.Tensor) -> torch.Tensor:
    """A^T A in float64, some rows of A [rows, b] at a time."""
    G = torch.zeros((A.shape[1],) * 2, dtype=torch.float64, device=A.device)
    for rows in A.split(max(1, CHUNK // A.shape[1])):
        wide = rows.to(torch.float64)
        G.addmm_(wide.T, wide)
    return G


def _product(A: torch.Tensor, M: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """A M in float64, kept as float32, some rows of A [rows, b] at a time; `out` may be A if M is square."""
    if out is None:
        out = torch.empty((len(A), M.shape[1]), dtype=torch.float32, device=A.device)
    step = max(1, CHUNK // A.shape[1])
    for start in range(0, len(A), step):
        out[start : start + step] = A[start : start + step].to(torch.float64) @ M
    return out


def _eigen(G: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues [b], clamped at 0, and eigenvectors [b, b] of a symmetric matrix, largest first."""
    values, vectors = torch.linalg.eigh(G)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def _orthonormal_(B: torch.Tensor) -> torch.Tensor:
    """Turn B [D, b] in place into an orthonormal basis of its columns' space, largest singular vectors first.

    Twice through the eigenvectors of the Gram matrix: the second time mends what the rounding of a badly conditioned B
    left. Columns below that rounding become noise, a random restart; columns of zeros stay zeros.
    """
    for _ in range(2):
        squares, vectors = _eigen(_gram(B))
        floor = float(squares[0]) * 1e-14 + TINY
        _product(B, vectors / squares.clamp(min=floor).sqrt(), out=B)
    return B
