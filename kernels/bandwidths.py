"""The search for the bandwidths that give every row of affinities its perplexity (numba, float64, every core)."""

# ruff: noqa: PLR0917 - numba passes arguments by position

import numpy as np

from qdv_gpu.kernels.rows import compiled, inner, spread

TOLERANCE = 1e-7  # on a row's entropy, in nats: the relative error of its perplexity
MAX_STEPS = 400  # of which bisection halves all of float64's range to its last digit in 200
PATIENCE = 16  # steps that Newton's method has to itself: ordinary rows arrive in ten
STEPS = 200  # operations for each entry of an ordinary row: ten steps of Newton's method, exponentials in them
NEGLIGIBLE = 1e-290  # of the mean distance: so near to the nearest point that no beta of float64 tells them apart


@inner
def _search_row(D, perplexity, p):
    """Fill p with exp(-beta D), normalised, of the given perplexity; False if no beta was found.

    Newton's method for log(beta) inside a bracket, in float64; later, where the bracket has not halved in two steps,
    bisection of log(beta), since Newton's method can run in a circle. D [k] is overwritten.
    """
    k = D.size
    target = np.log(perplexity)
    nearest, mean = np.inf, 0.0
    for j in range(k):
        nearest = min(nearest, D[j])
    for j in range(k):
        D[j] -= nearest
        mean += D[j]
    mean /= k
    ties = 0
    for j in range(k):
        if mean > 0:
            D[j] /= mean
        if D[j] < NEGLIGIBLE:
            D[j] = 0
            ties += 1
    if ties >= perplexity:  # the limit of an infinite beta
        for j in range(k):
            p[j] = (D[j] == 0) / ties
        return True
    beta, low, high = 1.0, 0.0, np.inf
    width, before = np.inf, np.inf  # of the bracket in log(beta), after the last step and after the one before
    for turn in range(MAX_STEPS):
        total, first, second = 0.0, 0.0, 0.0
        for j in range(k):
            p[j] = np.exp(-beta * D[j])
            total += p[j]
            first += p[j] * D[j]
            second += p[j] * D[j] * D[j]
        first /= total
        gap = np.log(total) + beta * first - target
        if abs(gap) <= TOLERANCE:
            for j in range(k):
                p[j] /= total
            return True
        if gap > 0:
            low = beta
        else:
            high = beta
        now = np.log(high) - np.log(low) if low > 0 else np.inf
        slow, before, width = turn >= PATIENCE and now > before / 2, width, now
        newton = beta * np.exp(min(max(gap / (beta * beta * (second / total - first * first)), -3.0), 3.0))
        if low < newton < high and not slow:
            beta = newton
        elif high == np.inf:
            beta *= 20
        elif low == 0:
            beta /= 20
        else:
            beta = np.sqrt(low) * np.sqrt(high)  # the product could overflow
    return False


def search(D, perplexity, P, found):
    """p_{j|i} of every row of squared distances D float64 [N, k] into P float64 [N, k]; found bool [N]."""
    spread(_search, len(D), D, float(perplexity), P, found, work=STEPS * D.shape[1])


@compiled
def _search(low, high, D, perplexity, P, found):
    own = np.empty(D.shape[1])
    for i in range(low, high):
        for j in range(own.size):
            own[j] = D[i, j]
        found[i] = _search_row(own, perplexity, P[i])


def search_all_pairs(XT, perplexity, P, found):
    """p_{j|i} for every pair of the points XT float64 [d, N] into P float32 [N, N]; found bool [N]."""
    spread(_search_all_pairs, len(P), XT, float(perplexity), P, found, work=(STEPS + 3 * len(XT)) * len(P))


@compiled
def _search_all_pairs(low, high, XT, perplexity, P, found):
    N = XT.shape[1]
    others, p = np.empty(N - 1), np.empty(N - 1)
    for i in range(low, high):
        D = np.zeros(N)
        for c in range(XT.shape[0]):
            for j in range(N):
                D[j] += (XT[c, j] - XT[c, i]) ** 2
        for j in range(N - 1):
            others[j] = D[j + (j >= i)]
        found[i] = _search_row(others, perplexity, p)
        P[i, i] = 0
        for j in range(N - 1):
            P[i, j + (j >= i)] = p[j]
