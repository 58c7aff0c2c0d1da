"""Normalisation and principal components of a layer that need not fit in memory: only row tiles are ever read."""

import math
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from qdv_gpu.errors import InputError, unknown
from qdv_gpu.machine import product_precision

NORMALISATIONS = ("minmax", "l2", "standard", "none")
TOLERANCE = 1e-6  # relative change of the captured variance between two passes
MAX_PASSES = 60
TINY = torch.finfo(torch.float32).tiny  # norms, deviations and extents up to here count as 0
CHUNK = 1 << 22  # elements worked on at once
DOUBLES = 1 << 20  # elements worked on at once in float64
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
        Rows of a chunk; 0 for as many as make about CHUNK elements.
    bytes : int
        Most bytes that it holds beside a tile: two blocks, the projected rows, a chunk, and what it needs for sums in
        float64.
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
    statistics, _ = _first_pass(_chunks(tiles, work.rows, name), normalise, name, 0)
    shift, scale = _affine(statistics, normalise)
    if normalise == "minmax":
        shift = torch.full_like(shift, statistics.lowest)
    elif normalise != "standard":
        shift, scale = torch.zeros_like(shift), torch.ones_like(scale)
    normalised = shift.new_empty(statistics.rows, len(shift))
    for rows, chunk in _placed(_chunks(tiles, work.rows, name)):
        normalised[rows] = _normalise_(chunk, shift, scale, normalise)
    return normalised


@product_precision("ieee")
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
    statistics, B = _first_pass(_chunks(tiles, work.rows, name), normalise, name, work.block)
    N, D = statistics.rows, len(statistics.mean)
    n = min(n_components, N - 1, D)
    width = min(B.shape[1], N)
    shift, scale = _affine(statistics, normalise)
    projected = B.new_empty(N, width)
    captured, passes = torch.inf, 1
    while True:
        Q = _orthonormal_(B)[:, :width]
        B = torch.zeros_like(Q)
        for rows, chunk in _placed(_chunks(tiles, work.rows, name)):
            X = _normalise_(chunk, shift, scale, normalise)
            B.addmm_(X.T, torch.mm(X, Q, out=projected[rows]))
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
        least, most = components.aminmax(dim=0, keepdim=True)
        signs = torch.where(most >= -least, 1.0, -1.0)  # [1, n]
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
    doubles = 8 * (2 * DOUBLES + 8 * features)  # two copies of a piece; means, squares and the like
    sizes = [
        (3 * n + 10, 512),
        (3 * n + 10, 64),
        (3 * n + 10, 16),
        (2 * n + 10, 16),
        (n + n // 2 + 10, 16),
        (n + 10, 4),
    ]
    for block, least in sizes if n > 0 else [(0, 1)]:
        width = min(block, features)
        chunk = min(rows, max(least, CHUNK // max(1, features)))
        kept = rows * (width + n) if n > 0 else rows * features
        work = Workspace(block, chunk, 4 * (2 * features * width + kept + chunk * features) + doubles)
        if work.bytes <= memory:
            break
    return work


def _widest(n_components: int) -> Workspace:
    return Workspace(3 * n_components + 10 if n_components else 0, 0, 0)


def _check(n_components: int, normalise: str) -> None:
    if n_components < 0:
        raise InputError(f"the number of components must be 0 (no reduction) or more, got {n_components}")
    if normalise not in NORMALISATIONS:
        raise unknown("normalisation", normalise, NORMALISATIONS)


def _chunks(tiles: Iterable[torch.Tensor], rows: int, name: str) -> Iterator[torch.Tensor]:
    """The rows of all tiles, as float32 in chunks of `rows`, or where that is 0 of about CHUNK elements.

    The reader may overwrite a chunk; the next one does. No tile is kept while the next one is computed.
    """
    buffer = torch.empty(0)
    filled = 0
    for tile in tiles:
        D = tile.shape[1]
        if buffer.ndim == 1:
            buffer = torch.empty(rows or max(64, CHUNK // max(1, D)), D, device=tile.device)
        if buffer.shape[1] != D:
            raise InputError(f"{name or 'layer'}: features per row changed from {buffer.shape[1]} to {D}")
        start = 0
        while start < len(tile):
            n = min(len(buffer) - filled, len(tile) - start)
            buffer[filled : filled + n] = tile[start : start + n]
            start, filled = start + n, filled + n
            if filled == len(buffer):
                yield buffer
                filled = 0
        del tile
    if filled:
        yield buffer[:filled]


def _placed(chunks: Iterable[torch.Tensor]) -> Iterator[tuple[slice, torch.Tensor]]:
    """Each chunk with its rows' place among all."""
    start = 0
    for chunk in chunks:
        yield slice(start, start + len(chunk)), chunk
        start += len(chunk)


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
        least, most = map(float, torch.aminmax(chunk))
        if not (least > -torch.inf and most < torch.inf):  # False for NaN as well
            row = N + int((~chunk.isfinite().all(dim=1)).nonzero()[0])
            raise InputError(f"{name or 'layer'}: activations must be finite, row {row} holds NaN or infinity")
        lowest, highest = min(lowest, least), max(highest, most)
        rows = _scale_(chunk, normalise)
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
            rows.sub_(chunk_mean.to(torch.float32)).div_(unit)
            B.addmm_(rows.T, rows @ Q)
            shift = (shift / unit).to(torch.float32)
            B.addr_(shift, shift @ Q, alpha=weight)
    if N == 0:
        raise InputError(f"{name or 'layer'}: there are no rows")
    return _Statistics(N, lowest, highest, mean, squares), B


def _moments(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and sum of squared deviations of each feature, float64 [D], some columns at a time."""
    parts = []
    for columns in rows.split(max(1, DOUBLES // len(rows)), dim=1):
        values = columns.to(torch.float64)
        mean = values.mean(dim=0)
        parts.append(torch.stack([mean, (values - mean).square_().sum(dim=0)]))
    means, squares = torch.cat(parts, dim=1)
    return means, squares


def _scale_(rows: torch.Tensor, normalise: str) -> torch.Tensor:
    """Divide the rows by their norms for l2."""
    if normalise == "l2":
        for order in (math.inf, 2):  # the first, so that no square overflows
            rows /= torch.linalg.vector_norm(rows, order, dim=1, keepdim=True).clamp_(min=TINY)
    return rows


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


def _normalise_(chunk: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, normalise: str) -> torch.Tensor:
    return _scale_(chunk, normalise).sub_(shift).mul_(scale)


def _gram(A: torch.Tensor) -> torch.Tensor:
    """A^T A in float64, some rows of A [rows, b] at a time."""
    G = torch.zeros((A.shape[1],) * 2, dtype=torch.float64, device=A.device)
    for rows in A.split(max(1, DOUBLES // A.shape[1])):
        wide = rows.to(torch.float64)
        G.addmm_(wide.T, wide)
    return G


def _product(A: torch.Tensor, M: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """A M in float64, kept as float32, some rows of A [rows, b] at a time; `out` may be A if M is square."""
    if out is None:
        out = torch.empty((len(A), M.shape[1]), dtype=torch.float32, device=A.device)
    step = max(1, DOUBLES // A.shape[1])
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
