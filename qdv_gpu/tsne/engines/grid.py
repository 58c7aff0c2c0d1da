"""The grid that an embedding's repulsion is computed on: its size and spacing, and the kernel that belongs to it."""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from qdv_gpu.errors import InputError
from qdv_gpu.tsne.objective import log_normaliser
from qdv_gpu.tsne.problem import Repulsion

logger = logging.getLogger(__name__)
ORDER = 6  # of the B-splines
LANES = 16  # sides are multiples of it
CELLS = 16  # that the points take at least, where the map is small
SLACK = 4  # cells between the points and the grid's end, that they may move into
LARGEST_SIDE = 16_384
BYTES_PER_NODE = 20  # charges 4, transform 8, kernel 8
LARGEST_GRID = 1 << 30  # bytes
SMALLEST_SPAN = 1e-7  # a map that is smaller is a point
TINY = 1e-30
SMALLEST_SHARE = 2.0**-17  # of its distance from 0 that a map spans: float32 has no finer cells
# For each similarity, spacings and the rms error of the force, relative to its rms: 1.2 times the largest of a blob, a
# ring, a disk and two clusters of 1,200 points that span 16 to 700 nodes. Of points on a line it is 1.6 times that.
SPACINGS = {
    "student-t": (
        (0.2, 1.9e-4), (0.25, 6e-4), (0.3, 1.8e-3), (0.35, 4.5e-3), (0.4, 9.6e-3), (0.5, 3.1e-2), (0.6, 6.2e-2),
    ),
    "gaussian": (
        (0.3, 1.9e-4), (0.35, 6.8e-4), (0.4, 1.6e-3), (0.45, 3.6e-3), (0.5, 7.9e-3), (0.6, 2.7e-2), (0.7, 6.4e-2),
    ),
}  # fmt: skip
TOLERANCES = (2e-4, 0.05)  # that may be asked for
# Points within a cell of each other share what the grid does wrong: most of the force, of tight clusters far apart.
# So the force on a sample is compared with the sum over all pairs, every 25 iterations.
SAMPLE, FEWEST, SAMPLED_PAIRS = 64, 16, 1 << 23
POOR = 0.5  # of the tolerance: the median error beyond which a finer grid is taken; ordinary maps have 0.3 to 0.45
WORTH = 10.0  # times what the finest grid takes: what the exact sum may take instead, where even that is too coarse


class Grid(NamedTuple):
    """ny rows of nx nodes, `spacing` apart, from `origin` (x, y) on."""

    ny: int
    nx: int
    spacing: float
    origin: tuple[float, float]


class Kernel(NamedTuple):
    """The similarity between nodes of a grid, less `far`.

    Attributes
    ----------
    influence : float32 [ny / 16, 2 * nx * 16]
        Its transform over that of the splines, as `kernels.fft` reads it.
    core : float32 [48]
        Its values at up to 5 nodes' distance, over the splines, as `kernels.mesh` reads them.
    far : float
    """

    influence: np.ndarray
    core: np.ndarray
    far: float


class Factors(NamedTuple):
    """The same, with the transform as a sum of products.

    Attributes
    ----------
    y, x : float64 [q, ny], [q, 2 * nx]
        influence[k_y, k_x] = sum_q y[q, k_y] x[q, k_x], in the order of `kernels.fft.order_of`.
    core, far
    """

    y: np.ndarray
    x: np.ndarray
    core: np.ndarray
    far: float


def spacing_for(tolerance: float, *, gaussian: bool) -> float:
    """The spacing at which the force errs by `tolerance` of its root mean square."""
    spacings, errors = np.array(SPACINGS["gaussian" if gaussian else "student-t"]).T
    return float(np.exp(np.interp(math.log(tolerance), np.log(errors), np.log(spacings))))


def sample_of(N: int) -> np.ndarray:
    """Points int64 [n] of N whose force is compared with the sum over all pairs."""
    return np.linspace(0, N - 1, min(N, max(FEWEST, min(SAMPLE, SAMPLED_PAIRS // N)))).astype(np.int64)


def median_error(errors: np.ndarray, forces: np.ndarray) -> float:
    """Of the sizes [n] of errors relative to those of the forces, of which the least stand for a tenth of the rms."""
    sizes = np.maximum(forces, 0.1 * np.sqrt((forces**2).mean()))
    return float(np.median(errors / np.maximum(sizes, TINY)))


def next_tolerance(asked: float, taken: float, error: float) -> float | None:
    """What to take the next grid for, where one for `taken` had this median error; None if none is fine enough."""
    limit = POOR * asked
    if error > limit:
        return max(taken * limit / (2 * error), TOLERANCES[0]) if taken > TOLERANCES[0] else None
    return min(asked, 2 * taken, max(taken, taken * 0.7 * limit / max(error, TINY)))


def tolerance_after(
    asked: float, taken: float, sizes: np.ndarray, *, on_grid: float, over_pairs: float
) -> float | None:
    """As `next_tolerance`, by the sizes [2, n] of a sample's errors and forces; None if all pairs are to be summed.

    Where no grid is fine enough, and an iteration over all pairs takes too many times the seconds of one on the grid,
    it stays as it is and a warning says by how much half of the forces err.
    """
    error = median_error(*sizes)
    tolerance = next_tolerance(asked, taken, error)
    if tolerance is not None or over_pairs <= WORTH * on_grid:
        return tolerance
    logger.warning(
        "t-SNE: half of the forces on the finest grid err by more than %.2g %%, fft_tolerance is %.2g %%, and the exact"
        " sum would take too long: clusters may lie nearer to each other than they should",
        100 * error, 100 * asked,
    )  # fmt: skip
    return taken


def grid_for(low: np.ndarray, high: np.ndarray, tolerance: float, *, gaussian: bool) -> Grid:
    """The grid for points within `low` and `high` (x, y)."""
    low, high = low.astype(np.float64), high.astype(np.float64)
    spacing = spacing_for(tolerance, gaussian=gaussian)
    reach = float(np.maximum(-low, high).max())
    span = max(float((high - low).max()), SMALLEST_SPAN, SMALLEST_SHARE * reach)
    if span < CELLS * spacing:
        spacing *= 2.0 ** -math.ceil(math.log2(CELLS * spacing / span))
    slack = SLACK + reach * 2.0**-23 / spacing  # the origin will be rounded to float32
    nx, ny = (_side(extent / spacing * 1.04 + 2 * slack + ORDER) for extent in high - low)
    middle = (low + high) / 2
    x, y = middle - (np.array([nx, ny]) - ORDER + 1) / 2 * spacing
    return Grid(ny, nx, spacing, (float(x), float(y)))


def grid_or_pairs(
    Z: torch.Tensor, low: np.ndarray, high: np.ndarray, tolerance: float, repulsion: Repulsion, *,
    seconds: Callable[[int, int | None], float], gaussian: bool,
) -> Grid | None:  # fmt: skip
    """What the repulsion of a map [N, 2] within `low` and `high` is summed on, None if over all pairs.

    `seconds` is what an iteration takes with N points on so many nodes, or (None) over all pairs.
    """
    grid, N = finest_grid(low, high, tolerance, repulsion.tolerance, gaussian=gaussian), len(Z)
    if repulsion.engine == "auto":
        return grid if fits(grid) and seconds(N, grid.ny * grid.nx) < seconds(N, None) else None
    return None if too_large(grid, Z, gaussian=gaussian) else grid


def finest_grid(low: np.ndarray, high: np.ndarray, tolerance: float, asked: float, *, gaussian: bool) -> Grid:
    """The grid for `tolerance`, or where that takes too much memory the one for what was asked for."""
    grid = grid_for(low, high, tolerance, gaussian=gaussian)
    return grid if fits(grid) else grid_for(low, high, asked, gaussian=gaussian)


def too_large(grid: Grid, Z: torch.Tensor, *, gaussian: bool) -> bool:
    """Whether a map [N, 2] takes too much memory on a grid and is summed exactly, its similarities being too small for
    any grid; InputError where they are not."""
    if fits(grid):
        return False
    from qdv_gpu.kernels.tsne_fft import SPARSE

    x, y = Z.to(torch.float64).T.contiguous()
    if log_normaliser(x, y, gaussian=gaussian) < math.log(SPARSE * len(Z)):
        return True
    span = float((Z.amax(dim=0) - Z.amin(dim=0)).max())
    raise InputError(
        f"engine fft needs a grid of {grid.ny:.4g} x {grid.nx:.4g} nodes for a map that spans {span:.4g}, more than"
        f" {LARGEST_GRID >> 20} MiB hold: engine auto or exact does without; if the map should be smaller, a"
        " smaller learning_rate may help"
    )


def fits(grid: Grid) -> bool:
    """Whether the grid may be had."""
    return max(grid.ny, grid.nx) <= LARGEST_SIDE and grid.ny * grid.nx * BYTES_PER_NODE <= LARGEST_GRID


def _side(cells: float) -> int:
    """The least number of nodes that a transform takes and that is no less."""
    return math.ceil(cells) if cells > 2 * LARGEST_SIDE else _smooth_above(max(2 * LANES, math.ceil(cells)))


def _smooth_above(n: int) -> int:
    """The least multiple of 16 with no prime factor above 5 that is no less."""
    n = -(-n // LANES) * LANES
    while not _smooth(n):
        n += LANES
    return n


@functools.cache
def _smooth(n: int) -> bool:
    for factor in (2, 3, 5):
        while n % factor == 0:
            n //= factor
    return n == 1


@functools.lru_cache(maxsize=8)
def kernel_for(ny: int, nx: int, spacing: float, *, gaussian: bool) -> Kernel:
    """The kernel of the similarity 1 / (1 + d^2), or exp(-d^2), on a grid."""
    from qdv_gpu.kernels import fft

    y, x, core, far = factors_for(ny, nx, spacing, gaussian=gaussian)
    influence = np.empty((ny // LANES, 2 * nx, LANES), dtype=np.float32)
    fft.sum_of_products(y, x, influence)
    return Kernel(influence.reshape(ny // LANES, -1), core, far)


def factors_for(ny: int, nx: int, spacing: float, *, gaussian: bool) -> Factors:
    """The factors of the kernel on a grid.

    1 / (1 + d^2) is the integral of exp(-s (1 + d^2)) over s: a sum of Gaussians, which are products of a function of x
    and one of y. Each of these is sampled, transformed, and divided by the transform of the spline at the nodes, once
    for the charges and once for the potential (Essmann et al. 1995), in float64. The two-dimensional transform is
    then one product of matrices. exp(-s d^2) - 1 is what is summed, so that small grids, where it is nearly 0, lose
    nothing.
    """
    from qdv_gpu.kernels import fft, mesh

    exponents, weights = _gaussians(gaussian=gaussian)
    y, x = (_side_of(n, spacing, gaussian=gaussian) for n in (ny, nx))
    square = (nx**2 + ny**2) * spacing**2
    lift = -float(_weighted(weights, np.expm1(-exponents * square)))

    def factors(a: np.ndarray, one: np.ndarray, b: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # w_q (1 + y_q) (1 + x_q) - far = w_q y_q x_q + w_q y_q + w_q x_q + lift; `one` and `other` stand for 1
        left = np.concatenate([weights[:, None] * a, [_weighted(weights, a) + lift * one, one]])
        return left, np.concatenate([b, [other, _weighted(weights, b)]])

    ones = np.ones(LANES)
    near = np.empty((1, LANES, LANES), dtype=np.float32)  # [1, x, y]
    fft.sum_of_products(*factors(y.values[:, :LANES], ones, x.values[:, :LANES], ones), near)
    core = np.zeros((ORDER, mesh.WIDTH), dtype=np.float32)
    core[:, :ORDER] = near[0].T[:ORDER, :ORDER]
    left, right = factors(y.quarter / (2 * nx * ny), y.quarter_of_one / (2 * nx * ny), x.halves, x.halves_of_one)
    return Factors(left, right, core.ravel(), float(_weighted(weights, np.exp(-exponents * square))))


class _Side(NamedTuple):
    """exp(-s y^2) - 1 of some s at a side's nodes [s, n], its transforms, and those of 1, as `kernels.fft` has them."""

    values: np.ndarray
    quarter: np.ndarray
    quarter_of_one: np.ndarray
    halves: np.ndarray
    halves_of_one: np.ndarray


def _weighted(weights: np.ndarray, values: np.ndarray) -> Any:
    """The sum over the first axis; not by `@`, whose bits may depend on the threads."""
    return (weights.reshape(-1, *[1] * (values.ndim - 1)) * values).sum(axis=0)


@functools.cache
def _gaussians(*, gaussian: bool) -> tuple[np.ndarray, np.ndarray]:
    """Exponents s and weights of the Gaussians whose sum is the similarity."""
    if gaussian:
        return np.ones(1), np.ones(1)
    step = 0.45  # the trapezoidal rule in log(s) then errs by 1e-9
    exponents = np.exp(np.arange(-38.0, 3.4, step))  # as far as (1 + d^2) = 1e8 needs
    return exponents, step * exponents * np.exp(-exponents)


@functools.lru_cache(maxsize=8)
def _side_of(n: int, spacing: float, *, gaussian: bool) -> _Side:
    from qdv_gpu.kernels import fft, mesh

    exponents, _ = _gaussians(gaussian=gaussian)
    period = _smooth_above(2 * n + 8 * ORDER)  # what it folds back has decayed before it reaches the first n nodes
    places = np.arange(period // 2 + 1)
    half = np.expm1(-exponents[:, None] * (places * spacing) ** 2)
    whole = np.concatenate([half, half[:, -2:0:-1]], axis=1)
    angle, spline = 2 * np.pi * places / period, mesh.values_at_nodes()
    symbol = spline[0] + 2 * sum(value * np.cos(k * angle) for k, value in enumerate(spline[1:], 1))
    values = np.fft.irfft(np.fft.rfft(whole).real / symbol**2, period)[:, :n]  # over the spline's transform, twice
    all_values = np.concatenate([values, np.ones((1, n))])
    quarter = fft.even_transform(all_values, 4)
    halves = np.concatenate([fft.even_transform(all_values, 0), fft.even_transform(all_values, 2)], axis=1)
    return _Side(values, quarter[:-1], quarter[-1], halves[:-1], halves[-1])
