"""Exact squared distances on the CPU (numba).

Every distance is the float64 sum of squared differences, added up over the d coordinates from first to last. All
functions, and those of distances.cu, keep to that order, so that the same pair has the same bits
wherever it is computed and ties are ties everywhere. Each row is worked on by one thread alone: results do not
depend on the number of threads.

Layout: X is [N, d] float64; searches of all points read its transpose XT [d, N], so that the inner loop runs
over neighbouring memory. A tile is ROWS x COLUMNS distances, DEPTH coordinates at a time (128 kB of XT, which stays in
the second-level cache). Cost: 3 flops per pair and coordinate.
"""

# ruff: noqa: PLR0917 - numba passes arguments by position

import numpy as np

from qdv_gpu.kernels.rows import compiled, inner, spread

ROWS, COLUMNS, DEPTH = 16, 256, 64


def listed(X, indices, out):
    """Write to out[i, c] the squared distance of point i and point indices[i, c]; infinity for i itself.

    Four points at a time: one sum alone would wait for each addition.
    """
    spread(_listed, len(indices), X, indices, out, work=3 * indices.shape[1] * X.shape[1])


@compiled
def _listed(low, high, X, indices, out):
    width = indices.shape[1]
    for i in range(low, high):
        for c in range(0, width, 4):
            last = width - 1
            p, q = indices[i, c], indices[i, min(c + 1, last)]
            r, s = indices[i, min(c + 2, last)], indices[i, min(c + 3, last)]
            t = u = v = w = 0.0
            for a in range(X.shape[1]):
                x = X[i, a]
                d, e, f, g = X[p, a] - x, X[q, a] - x, X[r, a] - x, X[s, a] - x
                t += d * d
                u += e * e
                v += f * f
                w += g * g
            out[i, c], out[i, min(c + 1, last)] = t, u
            out[i, min(c + 2, last)], out[i, min(c + 3, last)] = v, w
        for c in range(width):
            if indices[i, c] == i:
                out[i, c] = np.inf


@inner
def _tile(XT, rows, first, last, tile):
    """Squared distances of the points `rows` to the points first .. last - 1; infinity to themselves."""
    width = last - first
    for r in range(rows.size):
        for j in range(width):
            tile[r, j] = 0.0
    for start in range(0, XT.shape[0], DEPTH):
        for r in range(rows.size):
            sums = tile[r, :width]
            for a in range(start, min(start + DEPTH, XT.shape[0])):
                x = XT[a, rows[r]]
                others = XT[a, first:last]
                for j in range(width):
                    difference = others[j] - x
                    sums[j] += difference * difference
    for r in range(rows.size):
        if first <= rows[r] < last:
            tile[r, rows[r] - first] = np.inf


def nearest(XT, rows, indices, distances):
    """Write the indices.shape[1] nearest points of each point in `rows`, by (distance, index), over all points.

    `indices` and `distances` are [len(rows), k]; where there are fewer than k other points, the last ones stay
    -1 and infinity.
    """
    blocks = (rows.size + ROWS - 1) // ROWS
    spread(_nearest, blocks, XT, rows, indices, distances, work=3 * ROWS * XT.size)


@compiled
def _nearest(begin, end, XT, rows, indices, distances):
    N, k = XT.shape[1], indices.shape[1]
    for block in range(begin, end):
        low, high = block * ROWS, min((block + 1) * ROWS, rows.size)
        tile = np.empty((ROWS, COLUMNS))
        for r in range(low, high):
            for c in range(k):
                indices[r, c] = -1
                distances[r, c] = np.inf
        for first in range(0, N, COLUMNS):
            last = min(first + COLUMNS, N)
            _tile(XT, rows[low:high], first, last, tile)
            for r in range(low, high):
                for j in range(last - first):
                    new = tile[r - low, j]
                    if new < distances[r, k - 1]:  # later indices lose ties, so the order is (distance, index)
                        c = k - 1
                        while c > 0 and distances[r, c - 1] > new:
                            distances[r, c] = distances[r, c - 1]
                            indices[r, c] = indices[r, c - 1]
                            c -= 1
                        distances[r, c] = new
                        indices[r, c] = first + j


def ranks(XT, indices, limits, out):
    """Write to out[i, c] the rank, from 1, of point indices[i, c] among the others by (distance to i, index).

    `limits` [N, m] are the distances of the listed points, from `listed`.
    """
    blocks = (XT.shape[1] + ROWS - 1) // ROWS
    spread(_ranks, blocks, XT, indices, limits, out, work=ROWS * (3 * XT.size + indices.shape[1] * XT.shape[1]))


@compiled
def _ranks(begin, end, XT, indices, limits, out):
    N = XT.shape[1]
    for block in range(begin, end):
        low, high = block * ROWS, min((block + 1) * ROWS, N)
        rows, tile = np.empty(high - low, np.int64), np.empty((ROWS, COLUMNS))
        for r in range(high - low):
            rows[r] = low + r
            for c in range(indices.shape[1]):
                out[low + r, c] = 1
        for first in range(0, N, COLUMNS):
            last = min(first + COLUMNS, N)
            _tile(XT, rows, first, last, tile)
            for r in range(rows.size):
                for c in range(indices.shape[1]):
                    limit = limits[rows[r], c]
                    split = min(max(indices[rows[r], c] - first, 0), last - first)
                    closer = 0
                    for j in range(split):
                        closer += tile[r, j] <= limit
                    for j in range(split, last - first):
                        closer += tile[r, j] < limit
                    out[rows[r], c] += closer
