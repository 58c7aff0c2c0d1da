"""The loops of exact t-SNE on the CPU (numba, float32, every core).

Layout
    A batch of embeddings is flat: point i of embedding b is column `start[b] + i` of `Z` [2, T], so that the
    coordinates x = Z[0] and y = Z[1] are each contiguous and the loop over j becomes SIMD.
    Affinities are rows: row `first_row[b] + i` of P spans `indptr[r]:indptr[r + 1]` of `values`; its columns are
    `indices` (points of the same embedding), or, when `indices` is empty, all points in order (a dense P).
    Embeddings that differ only in their seed share one P through `first_row`.
Order
    A row is summed by one thread in an order set by N alone, and the rows' shares of the normaliser are added
    up one after the other in float64: the number of threads changes no bit of the result. Sums that the compiler
    may reorder stand in `forces` alone, with its helpers inlined before compilation and without prange: numba
    optimises a linked function a second time, and where it links the result depends on whether it comes from the
    cache. The same source then gave other bits in the process that compiled it than in later ones.
Cost
    The repulsion takes 11 float operations and one division a pair, 16 pairs at a time with AVX-512.
"""

# ruff: noqa: PLR0917 - numba passes arguments by position

import numpy as np
from numba import njit, prange

# Sums may be reordered into SIMD lanes and products fused; NaN and infinity keep their meaning.
# Without numpy's error model the test for a zero divisor would keep the loops from becoming SIMD.
_SIMD = {"fastmath": {"reassoc", "contract", "arcp", "nsz"}, "error_model": "numpy", "cache": True}
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_LOG2E, _LN2, _FLUSH = np.float32(1 / np.log(2)), np.float32(np.log(2)), np.float32(127)


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
def _repel_student(x, y, xi, yi):
    """Sum over j of w, w^2 (xi - xj), w^2 (yi - yj) with w = 1 / (1 + d^2)."""
    w_sum, fx, fy = _ZERO, _ZERO, _ZERO
    for j in range(x.size):
        dx = xi - x[j]
        dy = yi - y[j]
        w = _ONE / (_ONE + dx * dx + dy * dy)
        w_sum += w
        w2 = w * w
        fx += w2 * dx
        fy += w2 * dy
    return w_sum, fx, fy


@njit(inline="always", **_SIMD)
def _repel_gaussian(x, y, xi, yi):
    """Sum over j of w, w (xi - xj), w (yi - yj) with w = exp(-d^2)."""
    w_sum, fx, fy = _ZERO, _ZERO, _ZERO
    for j in range(x.size):
        dx = xi - x[j]
        dy = yi - y[j]
        w = _exp_minus(dx * dx + dy * dy)
        w_sum += w
        fx += w * dx
        fy += w * dy
    return w_sum, fx, fy


@njit(inline="always", **_SIMD)
def _attract_sparse(x, y, xi, yi, indices, values, stretch):
    """Sum over the row's neighbours of p w (zi - zj) with w = 1 / (1 + stretch d^2)."""
    fx, fy = _ZERO, _ZERO
    for e in range(values.size):
        j = indices[e]
        dx = xi - x[j]
        dy = yi - y[j]
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


@njit(nogil=True, **_SIMD)
def forces(low, high, Z, member, start, first_row, indptr, indices, values, gaussian, attraction, repulsion, weight):
    """Both sums of the gradient for the points low <= t < high of the batch; releases the GIL.

    Parameters
    ----------
    low, high : int
    Z : float32 [2, T]
        Coordinates of all embeddings.
    member : int64 [T]
        The embedding that a point belongs to.
    start : int64 [B + 1]
        First point of each embedding, and T.
    first_row : int64 [B]
        First row of P of each embedding.
    indptr, indices, values : int64 [R + 1], uint32 [nnz] or [0], float32 [nnz]
        P by rows. Unsigned indices spare the test for counting from the end.
    gaussian : bool
        Similarity exp(-d^2) instead of 1 / (1 + d^2).
    attraction, repulsion : float32 [2, T], written
        sum_j p_ij s_ij (zi - zj) and sum_j w_ij s_ij (zi - zj), where w is the similarity and s is w for Student-t
        and 1 for Gaussian.
    weight : float64 [T], written
        sum_j w_ij: the point's share of the normaliser.
    """
    for t in range(low, high):
        b = member[t]
        i = t - start[b]
        x = Z[0, start[b] : start[b + 1]]
        y = Z[1, start[b] : start[b + 1]]
        xi, yi = x[i], y[i]
        # The point itself is left out rather than subtracted: its weight of 1 would drown far neighbours.
        if gaussian:
            before = _repel_gaussian(x[:i], y[:i], xi, yi)
            after = _repel_gaussian(x[i + 1 :], y[i + 1 :], xi, yi)
        else:
            before = _repel_student(x[:i], y[:i], xi, yi)
            after = _repel_student(x[i + 1 :], y[i + 1 :], xi, yi)
        weight[t] = np.float64(before[0]) + np.float64(after[0])
        repulsion[0, t] = before[1] + after[1]
        repulsion[1, t] = before[2] + after[2]
        r = first_row[b] + i
        row = values[indptr[r] : indptr[r + 1]]
        stretch = _ZERO if gaussian else _ONE
        if indices.size:
            pull = _attract_sparse(x, y, xi, yi, indices[indptr[r] : indptr[r + 1]], row, stretch)
        else:
            pull = _attract_dense(x, y, xi, yi, row, stretch)
        attraction[0, t] = pull[0]
        attraction[1, t] = pull[1]


@njit(cache=True, error_model="numpy")
def update(Z, velocity, gains, attraction, repulsion, weight, start, exaggeration, learning_rate, momentum):
    """One step of gradient descent with momentum and gains (van der Maaten & Hinton 2008, section 3.4), in place.

    The gradient is 4 (exaggeration * attraction - repulsion / sum of weight). A gain grows by 0.2 where the
    gradient's sign differs from the velocity's and shrinks by a fifth elsewhere, down to 0.01. One thread: it
    is 1 % of the work, and a second one would have to be waited for.

    Parameters
    ----------
    Z, velocity, gains, attraction, repulsion : float32 [2, T]
    weight : float64 [T]
    start : int64 [B + 1]
    exaggeration, learning_rate, momentum : float32
    """
    four, grow, shrink, least = np.float32(4), np.float32(0.2), np.float32(0.8), np.float32(0.01)
    for b in range(start.size - 1):
        total = 0.0
        for t in range(start[b], start[b + 1]):
            total += weight[t]
        inverse = np.float32(1.0 / total) if total > 0.0 else _ZERO  # all similarities flushed to 0: no repulsion
        for c in range(2):
            for t in range(start[b], start[b + 1]):
                slope = four * (exaggeration * attraction[c, t] - inverse * repulsion[c, t])
                gain = gains[c, t] + grow if slope * velocity[c, t] < _ZERO else gains[c, t] * shrink
                gain = max(gain, least)
                step = momentum * velocity[c, t] - learning_rate * gain * slope
                gains[c, t] = gain
                velocity[c, t] = step
                Z[c, t] += step


@njit(cache=True, error_model="numpy")
def _log_normaliser(x, y, xi, yi, gaussian):
    """log of the sum over j of the similarity in float64; -inf for no points."""
    nearest, total = np.inf, 0.0
    if not gaussian:
        for j in range(x.size):
            total += 1.0 / (1.0 + (xi - x[j]) ** 2 + (yi - y[j]) ** 2)
        return np.log(total)
    for j in range(x.size):
        nearest = min(nearest, (xi - x[j]) ** 2 + (yi - y[j]) ** 2)
    for j in range(x.size):
        total += np.exp(nearest - ((xi - x[j]) ** 2 + (yi - y[j]) ** 2))
    return np.log(total) - nearest


@njit(cache=True, parallel=True, error_model="numpy")
def log_normalisers(x, y, gaussian, out):
    """log of the sum over j != i of the similarity of every point, for x, y and out float64 [N]."""
    for i in prange(x.size):
        before = _log_normaliser(x[:i], y[:i], x[i], y[i], gaussian)
        after = _log_normaliser(x[i + 1 :], y[i + 1 :], x[i], y[i], gaussian)
        out[i] = np.logaddexp(before, after) if i and i + 1 < x.size else max(before, after)


TOLERANCE = 1e-7  # on a row's entropy, in nats: the relative error of its perplexity
MAX_STEPS = 400  # a bracket is crossed at least twenty-fold at a time: enough for all of float64


@njit(cache=True, error_model="numpy")
def _search_row(D, perplexity, p):
    """Fill p with exp(-beta D), normalised, of the given perplexity; False if no beta was found.

    Newton's method for log(beta) inside a bracket, in float64. D [k] is overwritten.
    """
    k = D.size
    target = np.log(perplexity)
    D -= D.min()
    ties = 0
    for j in range(k):
        ties += D[j] == 0
    if ties >= perplexity:  # the limit of an infinite beta
        for j in range(k):
            p[j] = (D[j] == 0) / ties
        return True
    D /= D.mean()
    beta, low, high = 1.0, 0.0, np.inf
    for _ in range(MAX_STEPS):
        total, first, second = 0.0, 0.0, 0.0
        for j in range(k):
            p[j] = np.exp(-beta * D[j])
            total += p[j]
            first += p[j] * D[j]
            second += p[j] * D[j] * D[j]
        first /= total
        gap = np.log(total) + beta * first - target
        if abs(gap) <= TOLERANCE:
            p /= total
            return True
        if gap > 0:
            low = beta
        else:
            high = beta
        newton = beta * np.exp(min(max(gap / (beta * beta * (second / total - first * first)), -3.0), 3.0))
        if low < newton < high:
            beta = newton
        elif high == np.inf:
            beta *= 20
        elif low == 0:
            beta /= 20
        else:
            beta = np.sqrt(low * high)
    return False


@njit(cache=True, parallel=True, error_model="numpy")
def search(D, perplexity, P, found):
    """p_{j|i} of every row of squared distances D float64 [N, k] into P float64 [N, k]; found bool [N]."""
    for i in prange(D.shape[0]):
        found[i] = _search_row(D[i].copy(), perplexity, P[i])


@njit(cache=True, parallel=True, error_model="numpy")
def search_all_pairs(XT, perplexity, P, found):
    """p_{j|i} for every pair of the points XT float64 [d, N] into P float32 [N, N]; found bool [N]."""
    N = XT.shape[1]
    for i in prange(N):
        D = np.zeros(N)
        for c in range(XT.shape[0]):
            for j in range(N):
                D[j] += (XT[c, j] - XT[c, i]) ** 2
        p = np.empty(N - 1)
        found[i] = _search_row(np.concatenate((D[:i], D[i + 1 :])), perplexity, p)
        P[i, :i] = p[:i]
        P[i, i] = 0
        P[i, i + 1 :] = p[i:]
