"""The loops of exact t-SNE on the CPU (numba, float32, every core).

Layout
    The coordinates x = Z[0] and y = Z[1] of an embedding [2, N] are each contiguous, so that loops over j become SIMD.
    Row i of P spans `indptr[i]:indptr[i + 1]` of `values`; its columns are `indices` or, when `indices` is None, all
    points in order (a dense P).
    What the loops are compiled for is in the types: `gaussian` is None or True and `indices` None or an array, so that
    numba leaves out what is not used, a fifth of its work.
Order
    A pair is computed once, by its earlier point, and given to both. The earlier points are cut into `BANDS` bands
    with the same number of pairs; a band is summed by one thread into its own row of `partial`, in an order set by
    N alone, and the bands are added up one after the other: the number of threads changes no bit of the result.
    Everything that `descend` runs is inlined before compilation, and nothing is prange: numba optimises a linked
    function a second time, and where it links the result depends on whether it comes from the cache. The same
    source then gave other bits in the process that compiled it than in later ones.
Cost
    A pair takes 13 float operations and a division; no pair is computed twice, and two points at a time share the loads
    and stores. An estimate of the reciprocal and Newton's method take longer than the division: with one step, which
    errs by 0.3 %, 1.22 times as long, with two 1.45 times (`python -m benchmarks.reciprocals`, on one core).
    An entry of a sparse P costs a gather: x and y are packed into 64 bits, so that it is one and not two.
    At 1,000 points an iteration takes 0.1 ms, less than to wake a sleeping thread: the threads of `descend` run many
    iterations and spin where they meet.
"""

# ruff: noqa: PLR0917 - numba passes arguments by position

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from qdv_gpu.kernels.fft import Vectors, instruction
from qdv_gpu.kernels.rows import compiled, spread

# Sums may be reordered into SIMD lanes and products fused; NaN and infinity keep their meaning.
# Without numpy's error model the test for a zero divisor would keep the loops from becoming SIMD.
_SIMD: dict[str, Any] = {
    "fastmath": {"reassoc", "contract", "arcp", "nsz"},
    "error_model": "numpy",
    "cache": True,
    "no_cfunc_wrapper": True,
}
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_HIGH = np.uint64(32)
_sched_yield = types.ExternalFunction("sched_yield", types.int32())  # of the C library
_LOG2E, _LN2, _FLUSH = np.float32(1 / np.log(2)), np.float32(np.log(2)), np.float32(127)

# numba caches what it compiled by the text of this file alone: this digest of fft.py is part of it.
_BUILT_OF = "14e472dd20430ab2"

SPINS = 10_000  # before a waiting thread offers its core to others
BANDS = 32  # of the repulsion: as many threads can share one embedding
TILE = 1024  # columns that a band works on at a time: x, y, fx and fy take 16 kB, half of a first-level cache


@njit(inline="always", **_SIMD)
def _edge(N, band):
    """First point of a band of N points, even: the points before it have band / BANDS of all pairs."""
    return N if band == BANDS else int(N * (1 - np.sqrt(1 - band / BANDS))) // 2 * 2


@njit(inline="always", **_SIMD)
def _exp_minus(d):
    """exp(-d) for d >= 0 as 2^-k times a polynomial, because a call of the C library's exp is not SIMD."""
    u = min(d * _LOG2E, _FLUSH)
    k = np.int32(u + _HALF)
    f = (np.float32(k) - u) * _LN2  # |f| <= ln(2) / 2: the Taylor polynomial errs by 5e-9
    p = np.float32(1 / 5040) * f + np.float32(1 / 720)
    p = p * f + np.float32(1 / 120)
    p = p * f + np.float32(1 / 24)
    p = p * f + np.float32(1 / 6)
    p = p * f + _HALF
    p = p * f + _ONE
    p = p * f + _ONE
    return p * np.int32((127 - k) << 23).view(np.float32)  # k = 127 gives 0


@njit(inline="always", **_SIMD)
def _similarity(dx, dy, gaussian):
    """w and s of `repel` for a difference (dx, dy)."""
    d = dx * dx + dy * dy
    if gaussian is not None:
        return _exp_minus(d), _ONE
    w = _ONE / (_ONE + d)
    return w, w


@njit(inline="always", **_SIMD)
def _repel_student(x, y, fx, fy, xi, yi, xk, yk):
    """Sums over j of w and w^2 (zi - zj), w^2 (zk - zj), with w = 1 / (1 + d^2); the opposite forces to fx, fy."""
    wi, xi_sum, yi_sum, wk, xk_sum, yk_sum = _ZERO, _ZERO, _ZERO, _ZERO, _ZERO, _ZERO
    for j in range(x.size):
        dx, dy = xi - x[j], yi - y[j]
        ex, ey = xk - x[j], yk - y[j]
        u = _ONE / (_ONE + dx * dx + dy * dy)
        v = _ONE / (_ONE + ex * ex + ey * ey)
        wi += u
        wk += v
        dx, dy = u * u * dx, u * u * dy
        ex, ey = v * v * ex, v * v * ey
        xi_sum += dx
        yi_sum += dy
        xk_sum += ex
        yk_sum += ey
        fx[j] -= dx + ex
        fy[j] -= dy + ey
    return wi + wk, xi_sum, yi_sum, xk_sum, yk_sum


@njit(inline="always", **_SIMD)
def _repel_gaussian(x, y, fx, fy, xi, yi, xk, yk):
    """The same with w = exp(-d^2) and w (zi - zj)."""
    wi, xi_sum, yi_sum, wk, xk_sum, yk_sum = _ZERO, _ZERO, _ZERO, _ZERO, _ZERO, _ZERO
    for j in range(x.size):
        dx, dy = xi - x[j], yi - y[j]
        ex, ey = xk - x[j], yk - y[j]
        u = _exp_minus(dx * dx + dy * dy)
        v = _exp_minus(ex * ex + ey * ey)
        wi += u
        wk += v
        dx, dy = u * dx, u * dy
        ex, ey = v * ex, v * ey
        xi_sum += dx
        yi_sum += dy
        xk_sum += ex
        yk_sum += ey
        fx[j] -= dx + ex
        fy[j] -= dy + ey
    return wi + wk, xi_sum, yi_sum, xk_sum, yk_sum


@njit(inline="always", **_SIMD)
def _attract_sparse(packed, xi, yi, indices, values, stretch):
    """Sum over the row's neighbours of p w (zi - zj) with w = 1 / (1 + stretch d^2)."""
    fx, fy = _ZERO, _ZERO
    for e in range(values.size):
        z = packed[indices[e]]
        dx = xi - np.uint32(z).view(np.float32)
        dy = yi - np.uint32(z >> _HIGH).view(np.float32)
        w = values[e] / (_ONE + stretch * (dx * dx + dy * dy))
        fx += w * dx
        fy += w * dy
    return fx, fy


@njit(inline="always", **_SIMD)
def _attract_dense(x, y, xi, yi, values, stretch):
    """The same for a dense row: `values` has an entry for every point."""
    fx, fy = _ZERO, _ZERO
    for j in range(values.size):
        dx = xi - x[j]
        dy = yi - y[j]
        w = values[j] / (_ONE + stretch * (dx * dx + dy * dy))
        fx += w * dx
        fy += w * dy
    return fx, fy


@njit(inline="always", **_SIMD)
def repel(low, high, Z, gaussian, partial, weight):
    """Repulsion of the bands low <= band < high.

    Parameters
    ----------
    low, high : int
    Z : float32 [2, N]
    gaussian : None or True
        Similarity exp(-d^2) instead of 1 / (1 + d^2).
    partial : float32 [BANDS, 2, N], written
        The band's share of sum_j w_ij s_ij (zi - zj), where w is the similarity and s is w for Student-t and 1 for
        Gaussian. Points before the band have no share, and there nothing is written.
    weight : float64 [BANDS], written
        Sum of w over the band's pairs.
    """
    x, y = Z[0], Z[1]
    N = x.size
    for band in range(low, high):
        fx, fy = partial[band, 0], partial[band, 1]
        first, last = _edge(N, band), _edge(N, band + 1)
        for j in range(first, N):
            fx[j] = _ZERO
            fy[j] = _ZERO
        total = 0.0
        for i in range(first, min(last, N - 1), 2):  # i and k = i + 1: the pair that the loop below leaves out
            dx, dy = x[i] - x[i + 1], y[i] - y[i + 1]
            w, s = _similarity(dx, dy, gaussian)
            total += w
            fx[i] += w * s * dx
            fy[i] += w * s * dy
            fx[i + 1] -= w * s * dx
            fy[i + 1] -= w * s * dy
        for left in range(first, N, TILE):
            right = min(left + TILE, N)
            for i in range(first, min(last, right - 2), 2):
                k = i + 1
                c = max(left, i + 2)
                if gaussian is not None:
                    sums = _repel_gaussian(x[c:right], y[c:right], fx[c:right], fy[c:right], x[i], y[i], x[k], y[k])
                else:
                    sums = _repel_student(x[c:right], y[c:right], fx[c:right], fy[c:right], x[i], y[i], x[k], y[k])
                total += sums[0]
                fx[i] += sums[1]
                fy[i] += sums[2]
                fx[k] += sums[3]
                fy[k] += sums[4]
        weight[band] = total


@njit(inline="always", **_SIMD)
def attract(low, high, Z, packed, indptr, indices, values, gaussian, attraction):
    """Attraction of the points low <= i < high.

    Parameters
    ----------
    low, high : int
    Z : float32 [2, N]
    packed : uint64 [N]
        The same coordinates; x is the lower half.
    indptr, indices, values : int64 [N + 1], uint32 [nnz] or None, float32 [nnz]
        P by rows.
    gaussian : None or True
    attraction : float32 [2, N], written
        sum_j p_ij s_ij (zi - zj), with s as for `repel`.
    """
    stretch = _ONE if gaussian is None else _ZERO
    for i in range(low, high):
        row = values[indptr[i] : indptr[i + 1]]
        if indices is not None:
            pull = _attract_sparse(packed, Z[0, i], Z[1, i], indices[indptr[i] : indptr[i + 1]], row, stretch)
        else:
            pull = _attract_dense(Z[0], Z[1], Z[0, i], Z[1, i], row, stretch)
        attraction[0, i] = pull[0]
        attraction[1, i] = pull[1]


@njit(inline="always", **_SIMD)
def _moved(slope, velocity, gain, learning_rate, momentum):
    """The gain and the velocity of a coordinate after a step."""
    gain = gain + np.float32(0.2) if slope * velocity < _ZERO else gain * np.float32(0.8)
    gain = max(gain, np.float32(0.01))
    return gain, momentum * velocity - learning_rate * gain * slope


@njit(inline="always", **_SIMD)
def update(Z, packed, velocity, gains, attraction, partial, weight, exaggeration, learning_rate, momentum):
    """One step of gradient descent with momentum and gains (van der Maaten & Hinton 2008, section 3.4), in place.

    The gradient is 4 (exaggeration * attraction - repulsion / sum of weight). A gain grows by 0.2 where the
    gradient's sign differs from the velocity's and shrinks by a fifth elsewhere, down to 0.01. One thread: it
    is a few percent of the work, and a second one would have to be waited for.

    Parameters
    ----------
    Z : float32 [2, N]
    packed : uint64 [N]
        As for `attract`.
    velocity, gains, attraction : float32 [2, N]
    partial : float32 [BANDS, 2, N]
        Added up into its first band, which has a share in every point.
    weight : float64 [BANDS]
    exaggeration, learning_rate, momentum : float32
    """
    N, four = Z.shape[1], np.float32(4)
    repulsion, bits = partial[0], Z.view(np.uint32)
    total = 0.0
    for band in range(BANDS):
        total += 2 * weight[band]
    inverse = np.float32(1.0 / total) if total > 0.0 else _ZERO  # all similarities flushed to 0: no repulsion
    for c in range(2):
        for band in range(1, BANDS):
            for i in range(_edge(N, band), N):
                repulsion[c, i] += partial[band, c, i]
        for i in range(N):
            slope = four * (exaggeration * attraction[c, i] - inverse * repulsion[c, i])
            gain, step = _moved(slope, velocity[c, i], gains[c, i], learning_rate, momentum)
            gains[c, i] = gain
            velocity[c, i] = step
            Z[c, i] += step
    for i in range(N):
        packed[i] = np.uint64(bits[0, i]) | np.uint64(bits[1, i]) << _HIGH


@intrinsic
def _load(typing, array):
    """First entry of an int64 array, read so that what its writer wrote before is seen."""

    def generate(context, builder, signature, args):
        return builder.load_atomic(context.make_array(array)(context, builder, args[0]).data, "acquire", 8)

    return types.int64(array), generate


@intrinsic
def _store(typing, array, value):
    """Write the first entry of an int64 array, after all that was written before."""

    def generate(context, builder, signature, args):
        builder.store_atomic(args[1], context.make_array(array)(context, builder, args[0]).data, "release", 8)
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@njit(inline="always")
def _meet(part, arrived, times):
    """Return when every part has been here `times` times."""
    _store(arrived[part], times)  # type: ignore[call-arg]  # numba's stubs count the typing context as an argument
    for other in range(len(arrived)):
        spins = 0
        while _load(arrived[other]) < times:
            spins += 1
            if spins > SPINS:
                _sched_yield()


@njit(nogil=True, **_SIMD)
def descend(
    part, iterations, Z, packed, velocity, gains, indptr, indices, values, gaussian, attraction, partial, weight,
    exaggeration, learning_rate, momentum, arrived,
):  # fmt: skip
    """Some iterations of gradient descent of one embedding, in place; one of `len(arrived)` threads.

    Releases the GIL. Ends when all parts were called.

    Parameters
    ----------
    part, iterations : int
    Z, packed, velocity, gains, indptr, indices, values, gaussian
        As for `repel`, `attract` and `update`.
    attraction, partial, weight
        Of the shapes that these write.
    exaggeration, learning_rate, momentum : float32
    arrived : int64 [parts, 8]
        Zeros: how often each part has met the others. A row is a cache line.
    """
    parts, points = len(arrived), Z.shape[1]
    for turn in range(iterations):
        repel(BANDS * part // parts, BANDS * (part + 1) // parts, Z, gaussian, partial, weight)
        attract(
            points * part // parts, points * (part + 1) // parts, Z, packed, indptr, indices, values, gaussian,
            attraction,
        )  # fmt: skip
        _meet(part, arrived, 2 * turn + 1)
        if part == 0:
            update(Z, packed, velocity, gains, attraction, partial, weight, exaggeration, learning_rate, momentum)
        _meet(part, arrived, 2 * turn + 2)


@instruction
def _similarities(typing, x, y, start, stop, xi, yi):
    """Sum of 1 / (1 + d^2) over the points start <= j < stop, a multiple of 16 of them, in 16 sums of float64."""

    def generate(context, builder, signature, args):
        v = Vectors(context, builder, 16, ir.DoubleType())
        places = [v.data(signature.args[k], args[k]) for k in range(2)]
        own, one = [v.spread(value) for value in args[4:]], v.constant(1.0)
        total = cgutils.alloca_once_value(builder, v.constant(0.0))
        with cgutils.for_range_slice(builder, args[2], args[3], args[2].type(16), args[2].type) as (j, _):
            dx, dy = (v.sub(mine, v.load(place, j)) for mine, place in zip(own, places, strict=True))
            weight = builder.fdiv(one, v.fma(dy, dy, v.fma(dx, dx, one)))
            builder.store(v.add(builder.load(total), weight), total)
        lanes = builder.load(total)
        result = builder.extract_element(lanes, ir.IntType(32)(0))
        for lane in range(1, 16):
            result = builder.fadd(result, builder.extract_element(lanes, ir.IntType(32)(lane)))
        return result

    return types.float64(x, y, types.int64, types.int64, types.float64, types.float64), generate


def student_normalisers(x, y, out):
    """Sum of 1 / (1 + d^2) over all points j > i, and those j > N - 1 - i, in out[i], for i < (N + 1) / 2.

    x and y are float64 [N], out float64 [(N + 1) / 2]. A pair is computed once, and no share takes longer than another.
    """
    spread(_student_normalisers, len(out), x, y, out, work=8 * len(x))


@compiled
def _student_normalisers(low, high, x, y, out):
    N = x.size
    for share in range(low, high):
        first, total = share, 0.0
        for turn in range(2):
            i = first if turn == 0 else N - 1 - first
            if turn == 1 and i == first:
                continue
            stop = i + 1 + (N - 1 - i) // 16 * 16
            total += _similarities(x, y, i + 1, stop, x[i], y[i])
            for j in range(stop, N):
                total += 1.0 / (1.0 + (x[i] - x[j]) ** 2 + (y[i] - y[j]) ** 2)
        out[share] = total


def gaussian_normalisers(x, y, out):
    """log of the sum over j != i of exp(-d^2) of every point, for x, y and out float64 [N]."""
    spread(_gaussian_normalisers, len(x), x, y, out, work=40 * len(x))


@compiled
def _gaussian_normalisers(low, high, x, y, out):
    for i in range(low, high):
        nearest, total = np.inf, 0.0
        for j in range(x.size):
            if j != i:
                nearest = min(nearest, (x[i] - x[j]) ** 2 + (y[i] - y[j]) ** 2)
        for j in range(x.size):
            if j != i:
                total += np.exp(nearest - ((x[i] - x[j]) ** 2 + (y[i] - y[j]) ** 2))
        out[i] = np.log(total) - nearest
