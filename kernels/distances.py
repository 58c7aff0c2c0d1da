"""Exact squared distances on the CPU (numba).

Every distance is the float64 sum of squared differences, added up over the d coordinates from first to last. All
functions, and those of distances.cu, keep to that order, so that the same pair has the same bits
wherever it is computed and ties are ties everywhere. Each row is worked on by one thread alone: results do not
depend on the number of threads.

Layout: X is [N, d] float64; searches of all points read its transpose XT [d, N], so that the inner loop runs
over neighbouring memory. A tile is ROWS x COLUMNS distances, DEPTH coordinates at a time (128 kB of XT, which stays in
the second-level cache). Cost: 3 flops per pair and coordinate; `nearest` leaves out the pairs of tiles that lie too far
apart, so that in a map its work grows little faster than the points.
"""

# ruff: noqa: PLR0917 - numba passes arguments by position

import math

import numpy as np

from qdv_gpu.kernels.rows import compiled, inner, spread

ROWS, COLUMNS, DEPTH = 16, 256, 64
NEAR = 64  # columns of a tile where most are out of reach
SORTED = 16  # coordinates up to which two of them put tiles out of reach: of more they are too small a part


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


def nearest(XT, lots, rows, indices, distances):
    """Write the indices.shape[1] nearest points of each point in `rows`, over all points.

    Of points equally far from point i, the one with the smaller product of `lots` int64 [N], its own and that of i, is
    before the other. `indices` and `distances` are [len(rows), k]; where there are fewer than k other points, the last
    ones stay -1 and infinity. Of up to SORTED coordinates, points that are near in the two widest lie in one tile of
    NEAR; a tile is left out where these two alone, terms of every sum, put all of it farther away than what has been
    found.
    """
    d, N = XT.shape
    wide, order, width = np.empty(0, np.int64), np.arange(N), COLUMNS
    if 0 < d <= SORTED:
        wide, width = (XT.max(axis=1) - XT.min(axis=1)).argsort()[-2:], NEAR
        strips = np.empty(N, np.int64)
        strips[XT[wide[-1]].argsort()] = np.arange(N) * math.ceil(math.sqrt(N / NEAR)) // N
        order = np.lexsort((XT[wide[0]], strips))
        XT = np.ascontiguousarray(XT[:, order])
    places = np.empty_like(order)
    places[order] = np.arange(N)
    turn = places[rows].argsort()
    starts = np.arange(0, N, width)
    lower, upper = (f.reduceat(XT[wide], starts, axis=1) for f in (np.minimum, np.maximum))
    arguments = (XT, width, wide, lower, upper, order, places[rows[turn]], turn, lots, indices, distances)
    spread(_nearest, (rows.size + ROWS - 1) // ROWS, *arguments, work=3 * ROWS * XT.size)


@compiled
def _nearest(begin, end, XT, width, wide, lower, upper, order, places, turn, lots, indices, distances):
    N, k, tiles = XT.shape[1], indices.shape[1], lower.shape[1]
    tile, low_edge, high_edge = np.empty((ROWS, width)), np.empty(wide.size), np.empty(wide.size)
    for block in range(begin, end):
        own, turns = places[block * ROWS : (block + 1) * ROWS], turn[block * ROWS : (block + 1) * ROWS]
        for i in range(own.size):
            for a in range(wide.size):
                x = XT[wide[a], own[i]]
                low_edge[a] = min(low_edge[a], x) if i else x
                high_edge[a] = max(high_edge[a], x) if i else x
            for c in range(k):
                indices[turns[i], c] = -1
                distances[turns[i], c] = np.inf
        reach = np.inf  # how far the farthest is of those that have been found
        for step in range(tiles):  # from their own tile on, to both sides
            t = (own[0] // width + (step + 1) // 2 * (1 - step % 2 * 2)) % tiles
            away = 0.0
            for a in range(wide.size):
                gap = max(lower[a, t] - high_edge[a], low_edge[a] - upper[a, t], 0.0)
                away += gap * gap
            if away > reach:
                continue
            first, last = t * width, min((t + 1) * width, N)
            _tile(XT, own, first, last, tile)
            reach = 0.0
            for i in range(own.size):
                found, lot = tile[i, : last - first], lots[order[own[i]]]
                _insert(found, order[first:last], lot, lots, indices[turns[i]], distances[turns[i]])
                reach = max(reach, distances[turns[i], k - 1])


@inner
def _before(point, other, lot, lots):
    return lot * lots[point] < lot * lots[other]  # modulo 2^64


@inner
def _insert(found, points, lot, lots, indices, distances):
    """Keep the nearest of what is kept and of `points` at the distances `found` from a point with this lot."""
    for j in range(found.size):
        new, point, c = found[j], points[j], distances.size - 1
        if new < distances[c] or (new == distances[c] and indices[c] >= 0 and _before(point, indices[c], lot, lots)):
            while c > 0 and (
                distances[c - 1] > new or (distances[c - 1] == new and _before(point, indices[c - 1], lot, lots))
            ):
                distances[c] = distances[c - 1]
                indices[c] = indices[c - 1]
                c -= 1
            distances[c] = new
            indices[c] = point


def ranks(XT, lots, indices, limits, out):
    """Write to out[i, c] the rank, from 1, of point indices[i, c] among all but i, in the order of `nearest`.

    `limits` [N, m] are the distances of the listed points, from `listed`.
    """
    blocks = (XT.shape[1] + ROWS - 1) // ROWS
    spread(_ranks, blocks, XT, lots, indices, limits, out, work=ROWS * (3 * XT.size + indices.shape[1] * XT.shape[1]))


@compiled
def _ranks(begin, end, XT, lots, indices, limits, out):
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
                    closer = ties = 0
                    for j in range(last - first):
                        closer += tile[r, j] < limit
                        ties += tile[r, j] == limit
                    if ties:
                        point, lot = indices[rows[r], c], lots[rows[r]]
                        for j in range(last - first):
                            closer += tile[r, j] == limit and _before(first + j, point, lot, lots)
                    out[rows[r], c] += closer
