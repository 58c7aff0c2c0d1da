"""Principal components of a layer that need not fit in memory: only row tiles are ever read."""

import math
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch

from qdv_gpu.errors import InputError
from qdv_gpu.features.normalise import (
    CPU_BLOCK,
    CPU_BLOCKS,
    CUDA_BLOCK,
    TINY,
    Statistics,
    check_normalisation,
    over_blocks,
    retiled,
    scale_rows_,
    tile_rows,
)
from qdv_gpu.machine import on_threads, product_precision, threads

TOLERANCE = 1e-6  # relative change of the captured variance between two passes
MAX_PASSES = 60
SEED = 0
MANY_ROWS = 256  # of a tile: from here on a product is cut between rows, and not within its sums


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
    columns : int
        Of the bases that it iterates.
    bytes : int
        Most bytes that it holds beside a tile of the network: two bases, the projected rows, a tile of its own, and
        what it needs for sums in float64.
    """

    columns: int
    bytes: int


@on_threads(1)
def reduce(
    tiles: Iterable[torch.Tensor],
    pca: int,
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
    pca : int
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
        float32 [N, n], on the tiles' device; with `pca` 0 the normalised layer [N, D]. On a CPU the same bits for any
        number of threads and any cut into tiles.

    Raises
    ------
    InputError
        If an activation is NaN or infinite, the tiles differ in width, or a setting is not one of the above.

    Examples
    --------
    >>> X = torch.randn(100, 20, generator=torch.Generator().manual_seed(0))
    >>> reduce(X.split(30), 5).shape
    torch.Size([100, 5])
    """
    _check(pca, normalise)
    if pca > 0:
        return principal_components(tiles, pca, normalise=normalise, name=name, workspace=workspace).scores
    statistics, _ = _first_pass(tiles, normalise, name, 0)
    shift, scale = statistics.affine(normalise)
    if normalise == "minmax":
        shift = torch.full_like(shift, statistics.lowest)
    elif normalise != "standard":
        shift, scale = torch.zeros_like(shift), torch.ones_like(scale)
    normalised = shift.new_empty(statistics.rows, len(shift))
    for rows, tile in retiled(tiles, name):
        scale_rows_(tile, normalise)
        normalised[rows] = tile.sub_(shift).mul_(scale)
    return normalised


@on_threads(1)
@product_precision("ieee")
def principal_components(
    tiles: Iterable[torch.Tensor],
    pca: int,
    *,
    normalise: str = "minmax",
    name: str = "",
    workspace: Workspace | None = None,
) -> Components:
    """Principal components of a normalised layer; parameters and errors as for `reduce`.

    Block subspace iteration (Halko, Martinsson & Tropp 2011, section 4.5): each pass computes Y = X Q and B = X^T Y,
    tile by tile, and B's orthonormal basis is the next Q. The bases have about three times as many columns as there
    are components, which takes about four passes where the usual few more columns take more than twelve. The first
    pass finds the statistics and, from the raw X, a first B. Passes end when the variance that the components
    capture changes by less than 1e-6 of itself.

    Products are float32, Gram matrices and statistics float64, all summed in an order that depends on shapes alone. A
    smaller `workspace` than the default takes more passes.

    Examples
    --------
    >>> X = torch.randn(100, 20, generator=torch.Generator().manual_seed(0))
    >>> found = principal_components([X], 5, normalise="none")
    >>> found.scores.shape, found.components.shape, bool(found.variance[0] >= found.variance[1])
    (torch.Size([100, 5]), torch.Size([5, 20]), True)
    """
    _check(pca, normalise)
    if pca == 0:
        raise InputError("the number of components must be at least 1, got 0")
    columns = workspace.columns if workspace else columns_for(pca)[0]
    statistics, B = _first_pass(tiles, normalise, name, columns)
    N, D = statistics.rows, len(statistics.mean)
    n = min(pca, N - 1, D)
    shift, scale = statistics.affine(normalise)
    projected = B.new_empty(N, min(B.shape[1], N))
    captured, passes = torch.inf, 1
    while True:
        Q = _orthonormal_(B)[:, : projected.shape[1]]
        B = torch.zeros_like(Q)
        for rows, tile in retiled(tiles, name):
            scale_rows_(tile, normalise)
            _multiply(tile, Q, B, shift, scale, out=projected[rows])
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


def columns_for(pca: int) -> list[int]:
    """How many columns the bases may have for so many components, the fastest first; 0 for no reduction."""
    return [3 * pca + 10, 2 * pca + 10, pca + pca // 2 + 10, pca + 10] if pca > 0 else [0]


def workspace(rows: int, features: int, pca: int, *, memory: float = math.inf, device: str = "cpu") -> Workspace:
    """The workspace of fewest passes that holds at most `memory` bytes, or the smallest there is.

    Parameters
    ----------
    rows, features : int
        N and D of the layer.
    pca : int
    memory : float
        Bytes, beside a tile of the network.
    device : {"cpu", "cuda"}
    """
    own = min(rows, tile_rows(features, device)) * features
    for columns in columns_for(pca):
        kept = rows * (min(columns, features) + pca) if pca > 0 else rows * features
        most = max(own, max(rows, features) * min(columns, features))
        blocks = threads() * min(CPU_BLOCK, -(-most // CPU_BLOCKS)) if device == "cpu" else min(CUDA_BLOCK, most)
        doubles = 8 * (3 * blocks + 8 * features)  # copies of a block; means, squares and the like
        work = Workspace(columns, 4 * (2 * features * min(columns, features) + kept + own) + doubles)
        if work.bytes <= memory:
            break
    return work


def _check(pca: int, normalise: str) -> None:
    if pca < 0:
        raise InputError(f"the number of components must be 0 (no reduction) or more, got {pca}")
    check_normalisation(normalise)


def _first_pass(
    tiles: Iterable[torch.Tensor], normalise: str, name: str, columns: int
) -> tuple[Statistics, torch.Tensor]:
    """Check and measure the layer, and multiply a random basis by its scatter matrix.

    Returns the statistics and B = sum_i (x_i - mean) (x_i - mean)^T Q, float32 [D, min(columns, D)], of the rows x_i.
    With weight N_1 N_2 / (N_1 + N_2), the scatter of two groups' means adds to the scatter within them. B is in units
    of the largest activation squared, to stay within float32.
    """
    statistics = None
    Q = B = ones = unit = torch.empty(0)
    for _, tile in retiled(tiles, name):
        n, D = tile.shape
        if statistics is None:
            statistics = Statistics.none(D, tile.device)
            generator = torch.Generator(tile.device).manual_seed(SEED)
            Q = torch.randn((D, min(columns, D)), generator=generator, dtype=torch.float32, device=tile.device)
            B, ones, unit = torch.zeros_like(Q), Q.new_ones(D), statistics.mean.new_zeros(())
        before = statistics
        statistics, mean = before.merged(tile, normalise)
        if columns > 0:
            least, most = statistics.extremes
            size = torch.ones_like(unit) if normalise == "l2" else torch.maximum(most, -least).clamp(min=TINY)
            if tile.is_cuda or size > unit:  # a GPU rather multiplies by 1 than waits
                larger = torch.maximum(size, unit)
                B *= (unit / larger) ** 2
                unit = larger
            _multiply(tile, Q, B, mean.to(torch.float32), ones / unit)
            shift = ((mean - before.mean) / unit).to(torch.float32)
            weight = before.rows * n / statistics.rows
            _multiply(shift[None] * weight**0.5, Q, B, torch.zeros_like(shift), ones)
    if statistics is None:
        raise InputError(f"{name or 'layer'}: there are no rows")
    if not statistics.extremes.isfinite().all():
        bad = next(
            rows.start + int(wrong.int().argmax())
            for rows, tile in retiled(tiles, name)
            if (wrong := ~tile.isfinite().all(dim=1)).any()
        )
        raise InputError(f"{name or 'layer'}: activations must be finite, row {bad} holds NaN or infinity")
    return statistics, B


def _multiply(
    tile: torch.Tensor, Q: torch.Tensor, B: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, *,
    out: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """With X = (tile - shift) * scale, which overwrites the tile [n, D]: add X^T X Q to B [D, b], keep X Q in `out`."""
    n, D = tile.shape
    Y = tile.new_empty(n, Q.shape[1]) if out is None else out

    def project(rows: slice) -> None:
        torch.mm(tile[rows].sub_(shift).mul_(scale), Q, out=Y[rows])

    def project_part(columns: slice) -> torch.Tensor:
        return tile[:, columns].sub_(shift[columns]).mul_(scale[columns]) @ Q[columns]

    def add(columns: slice) -> None:
        B[columns].addmm_(tile[:, columns].T, Y)

    if tile.is_cuda:
        torch.mm(tile.sub_(shift).mul_(scale), Q, out=Y)
        B.addmm_(tile.T, Y)
        return
    if tile_rows(D, "cpu") >= MANY_ROWS:
        over_blocks(project, n, D, tile.device)
    else:
        first, *others = over_blocks(project_part, D, n, tile.device)
        Y.copy_(first)
        for other in others:
            Y += other
    over_blocks(add, D, n, tile.device)


def _gram(A: torch.Tensor) -> torch.Tensor:
    """A^T A in float64, of A [rows, b]."""

    def part(rows: slice) -> torch.Tensor:
        wide = A[rows].to(torch.float64)
        return wide.T @ wide

    first, *others = over_blocks(part, len(A), A.shape[1], A.device)
    for other in others:
        first += other
    return first


def _product(A: torch.Tensor, M: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """A M in float64, kept as float32, of A [rows, b]; `out` may be A if M is square."""
    result = torch.empty((len(A), M.shape[1]), dtype=torch.float32, device=A.device) if out is None else out

    def part(rows: slice) -> None:
        result[rows] = A[rows].to(torch.float64) @ M

    over_blocks(part, len(A), A.shape[1], A.device)
    return result


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
        floor = squares[0] * 1e-14 + TINY
        _product(B, vectors / squares.clamp(min=floor).sqrt(), out=B)
    return B
