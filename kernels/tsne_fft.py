"""The loops of t-SNE with the repulsion on a grid, on the CPU (numba, float32, every core).

Repulsion
    The potential of all points, phi(z) = sum_j w(z - zj), is their charges on a grid (`mesh`) convolved with w
    (`fft`). Its gradient is -2 times the repulsion, for w = 1 / (1 + d^2) and for exp(-d^2) alike, and its sum over the
    points the normaliser. The grid's kernel is w less a constant, its value across the grid: where the map is
    small, w is 1 nearly everywhere and what moves the points is in the digits that float32 would not keep.
Order
    Points are sorted by row of the grid, in a row by index. The rows are cut into bands of `BAND`; the points of a band
    reach into the next one, so every second band is spread first, and then the others. Other work is cut into
    blocks, of points or of lines, that share nothing. Whoever does a band or a block, the sums are the same: threads
    take the next one that nobody has, so that none waits long for another.
Cost, a thread
    Spreading a point takes 12 multiplications of vectors and the ways to and from memory of 6 rows, gathering 54;
    the transforms are in `fft`; an entry of P costs 8 bytes and a gather, as for the exact method.
"""

# ruff: noqa: PLR0917 - numba passes arguments by position

import numpy as np
from numba import njit, types

from qdv_gpu.kernels.cpu import _HALF, _HIGH, _SIMD, _ZERO, _meet, _moved, attract
from qdv_gpu.kernels.fft import LANES, across, down, instruction, up
from qdv_gpu.kernels.mesh import ORDER, gather, spread
from qdv_gpu.kernels.rows import inner

# numba caches what it compiled by the text of this file alone: this digest of fft.py, mesh.py and cpu.py is part of it.
_BUILT_OF = "b797c78a5dbd7729"

BAND = 8  # rows, at least ORDER - 1
BLOCK_POINTS = 256  # that a thread takes at a time
PHASES = 8  # of an iteration, between which the threads meet
MARGIN = 16  # floats after a row of the grid that its last points read and write
SPARSE = 0.02  # mean similarity to all others below which float32 transforms do not resolve it


@instruction
def _claim(typing, counter):
    """The first entry of an int64 array, and add 1 to it; no other thread gets the same."""

    def generate(context, builder, signature, args):
        start = context.make_array(counter)(context, builder, args[0]).data
        return builder.atomic_rmw("add", start, context.get_constant(types.int64, 1), "monotonic")

    return types.int64(counter), generate


@inner
def _sort(Z, origin, scale, ny, ends, order, cells):
    """Points by row of the grid: `ends` [ny + 1] where each row starts, and last the end, and places in cells."""
    N = Z.shape[1]
    for row in range(ny + 1):
        ends[row] = 0
    for i in range(N):
        ends[int((Z[1, i] - origin[1]) * scale) + 1] += 1
    for row in range(ny):
        ends[row + 1] += ends[row]
    for i in range(N):
        x, y = (Z[0, i] - origin[0]) * scale, (Z[1, i] - origin[1]) * scale
        row = int(y)
        at = ends[row]
        ends[row] = at + 1
        order[at] = i
        cells[0, at] = x
        cells[1, at] = y
    for row in range(ny, 0, -1):
        ends[row] = ends[row - 1]
    ends[0] = 0


@inner
def _spread_band(band, grid, stride, ends, cells):
    rows = len(ends) - 1
    for k in range(ends[band * BAND], ends[min((band + 1) * BAND, rows)]):
        column, row = int(cells[0, k]), int(cells[1, k])
        tx, ty = cells[0, k] - np.float32(column) - _HALF, cells[1, k] - np.float32(row) - _HALF
        spread(grid, row * stride + column, stride, tx, ty)


@inner
def _gather_block(block, grid, stride, cells, order, core, factor, repulsion):
    """Repulsion of a block's points; returns the sum of their potentials."""
    total = 0.0
    for k in range(block * BLOCK_POINTS, min((block + 1) * BLOCK_POINTS, len(order))):
        column, row = int(cells[0, k]), int(cells[1, k])
        tx, ty = cells[0, k] - np.float32(column) - _HALF, cells[1, k] - np.float32(row) - _HALF
        potential, x, y = gather(grid, row * stride + column, stride, tx, ty, core)
        total += potential
        repulsion[0, order[k]] = factor * x
        repulsion[1, order[k]] = factor * y
    return total


@njit(nogil=True, **_SIMD)
def descend(
    part, iterations, Z, packed, velocity, gains, indptr, indices, values, gaussian, attraction, repulsion, weight,
    origin, scale, far, shape, grid, work, lines, influence, core, radices, twiddles, angles, ends, order, cells,
    exaggeration, learning_rate, momentum, arrived, claimed, state,
):  # fmt: skip
    """Some iterations of gradient descent of one embedding, in place; one of `len(arrived)` threads.

    Ends early, before an iteration that the grid cannot do: a point has left it, or similarities are too small.

    Parameters
    ----------
    part, iterations : int
    Z, packed, velocity, gains
        As for `cpu.update`, of one embedding of N points, and `indptr` [N + 1], `indices`, `values` of its P.
    gaussian : None or True
    attraction, repulsion : float32 [2, N]
    weight : float64 [blocks], blocks = ceil(N / BLOCK_POINTS)
    origin, scale : float32 [2], float32
        Where the grid's first node is, and cells in a unit of length.
    far : float64
        What the grid's kernel is w less of.
    shape : (int, int)
        ny and nx of the grid.
    grid, work : float32 [ny * (nx + MARGIN)], [nx / 16, ny * 32]
    lines : float32 [parts, 2, nx * 32]
    influence, core : float32 [ny / 16, 2 * nx * 16], [ORDER * WIDTH]
    radices, twiddles, angles : pairs of arrays
        Of transforms of ny and of nx.
    ends, order, cells : int64 [ny + 1], int32 [N], float32 [2, N]
    exaggeration, learning_rate, momentum : float32
    arrived, claimed : int64 [parts, 8], [iterations * PHASES, 8], zeros
    state : int64 [2 + blocks]
        Zeros. Iterations done, whether similarities were too small, and which blocks have a point outside the grid.
    """
    ny, nx = shape
    N, blocks, bands, stride = Z.shape[1], len(weight), ny // BAND, nx + MARGIN
    bits, flat = Z.view(np.uint32), work.reshape(work.size)
    factor = -_HALF * scale
    right, top = np.float32(nx - ORDER + 0.5), np.float32(ny - ORDER + 0.5)
    met = 0
    for turn in range(iterations):
        phase = turn * PHASES
        task = _claim(claimed[phase])
        while task <= bands + blocks:
            if task == 0:
                _sort(Z, origin, scale, ny, ends, order, cells)
            elif task <= bands:
                first = (task - 1) * BAND * stride
                for node in range(first, first + BAND * stride):
                    grid[node] = _ZERO
            else:
                first = (task - bands - 1) * BLOCK_POINTS
                attract(first, min(first + BLOCK_POINTS, N), Z, packed, indptr, indices, values, gaussian, attraction)
            task = _claim(claimed[phase])
        met += 1
        _meet(part, arrived, met)
        for odd in range(2):
            task = 2 * _claim(claimed[phase + 1 + odd]) + odd
            while task < bands:
                _spread_band(task, grid, stride, ends, cells)
                task = 2 * _claim(claimed[phase + 1 + odd]) + odd
            met += 1
            _meet(part, arrived, met)
        task = _claim(claimed[phase + 3])
        while task < nx // LANES:
            down(work[task], grid, stride, task * LANES, ny, radices[0], twiddles[0], angles[0])
            task = _claim(claimed[phase + 3])
        met += 1
        _meet(part, arrived, met)
        task = _claim(claimed[phase + 4])
        while task < ny // LANES:
            across(
                flat, ny, task * LANES, nx, radices[1], twiddles[1], angles[1], influence[task], lines[part, 0],
                lines[part, 1],
            )  # fmt: skip
            task = _claim(claimed[phase + 4])
        met += 1
        _meet(part, arrived, met)
        task = _claim(claimed[phase + 5])
        while task < nx // LANES:
            up(work[task], grid, stride, task * LANES, ny, radices[0], twiddles[0], angles[0])
            task = _claim(claimed[phase + 5])
        met += 1
        _meet(part, arrived, met)
        task = _claim(claimed[phase + 6])
        while task < blocks:
            weight[task] = _gather_block(task, grid, stride, cells, order, core, factor, repulsion)
            task = _claim(claimed[phase + 6])
        met += 1
        _meet(part, arrived, met)
        total = far * N * (N - 1)
        for block in range(blocks):
            total += weight[block]
        if not total >= SPARSE * N:  # the same in every thread
            state[1] = 1
            break
        inverse = np.float32(1.0 / total)
        task = _claim(claimed[phase + 7])
        while task < blocks:
            outside = 0
            for c in range(2):
                limit = right if c == 0 else top
                for i in range(task * BLOCK_POINTS, min((task + 1) * BLOCK_POINTS, N)):
                    slope = np.float32(4) * (exaggeration * attraction[c, i] - inverse * repulsion[c, i])
                    gain, step = _moved(slope, velocity[c, i], gains[c, i], learning_rate, momentum)
                    gains[c, i] = gain
                    velocity[c, i] = step
                    Z[c, i] += step
                    place = (Z[c, i] - origin[c]) * scale
                    outside |= not (place >= _ZERO and place < limit)
            for i in range(task * BLOCK_POINTS, min((task + 1) * BLOCK_POINTS, N)):
                packed[i] = np.uint64(bits[0, i]) | np.uint64(bits[1, i]) << _HIGH
            state[2 + task] = outside
            task = _claim(claimed[phase + 7])
        met += 1
        _meet(part, arrived, met)
        if part == 0:
            state[0] = turn + 1
        outside = 0
        for block in range(blocks):
            outside |= state[2 + block]
        if outside:
            break


@njit(nogil=True, **_SIMD)
def errors(Z, step, found, gaussian, sample, out):
    """The sizes of repulsions' errors, and of the sums over all pairs in float64, of points int64 [n]: out [2, n].

    Z, step, found are float32 [2, N]: the points were at Z - step when `found` was their repulsion. `gaussian`
    is None or True, as for `cpu.repel`.
    """
    N = Z.shape[1]
    x, y = np.empty(N), np.empty(N)
    for j in range(N):
        x[j] = np.float64(Z[0, j]) - np.float64(step[0, j])
        y[j] = np.float64(Z[1, j]) - np.float64(step[1, j])
    for k in range(sample.size):
        i = sample[k]
        fx, fy = 0.0, 0.0
        for j in range(N):
            dx, dy = x[i] - x[j], y[i] - y[j]
            square = dx * dx + dy * dy
            force = 1.0 / ((1.0 + square) * (1.0 + square)) if gaussian is None else np.exp(-square)
            fx += force * dx
            fy += force * dy
        ex, ey = found[0, i] - fx, found[1, i] - fy
        out[0, k] = np.sqrt(ex * ex + ey * ey)
        out[1, k] = np.sqrt(fx * fx + fy * fy)
