"""Exact squared distances on the CPU (numba).

Every distance is the float64 sum of squared differences, added up over the d coordinates from first to last. All
functions, and the torch twin in `qdv_gpu.neighbors`, keep to that order, so that the same pair has the same bits
wherever it is computed and ties are ties everywhere. Each row is worked on by one thread alone: results do not
depend on the number of threads.

Layout: X is [N, d] float64; searches of all points read its transpose XT [d, N], so that the inner loop runs
over neighbouring memory. A tile is ROWS x COLUMNS distances, DEPTH coordinates at a time (128 kB of XT, which stays in
the second-level cache). Cost: 3 flops per pair and coordinate.
"""

import numpy as np
from numba import njit, prange

ROWS, COLUMNS, DEPTH = 16, 256, 64


@njit(cache=True, parallel=True)
def listed(X, indices, out):
    """Write to out[i, c] the squared distance of point i and point indices[i, c]; infinity for i itself."""
    for i in prange(indices.shape[0]):
        for c in range(indices.shape[1]):
            j = indices[i, c]
            total = 0.0
            if j == i:
                total = np.inf
            else:
                for a in range(X.shape[1]):
                    difference = X[j, a] - X[i, a]
                    total += difference * difference
            out[i, c] = total


@njit(cache=True)
def _tile(XT, rows, first, last, tile):
    """Squared distances of the points `rows` to the points first .. last - 1; infinity to themselves."""
    width = last - first
    tile[:, :] = 0.0
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


@njit(cache=True, parallel=True)
def nearest(XT, rows, indices, distances):
    """Write the indices.shape[1] nearest points of each point in `rows`, by (distance, index), over all points.

    `indices` and `distances` are [len(rows), k]; where there are fewer than k other points, the last ones stay
    -1 and infinity.
    """
    N, k = XT.shape[1], indices.shape[1]
    for block in prange((rows.size + ROWS - 1) // ROWS):
        low, high = block * ROWS, min((block + 1) * ROWS, rows.size)
        tile = np.empty((ROWS, COLUMNS))
        indices[low:high] = -1
        distances[low:high] = np.inf
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


@njit(cache=True, parallel=True)
def ranks(XT, indices, limits, out):
    """Write to out[i, c] the rank, from 1, of point indices[i, c] among the others by (distance to i, index).

    `limits` [N, m] are the distances of the listed points, from `listed`.
    """
    N = XT.shape[1]
    for block in prange((N + ROWS - 1) // ROWS):
        rows = np.arange(block * ROWS, min((block + 1) * ROWS, N))
        tile = np.empty((ROWS, COLUMNS))
        out[rows[0] : rows[-1] + 1] = 1
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
