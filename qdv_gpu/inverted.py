"""Nearly all nearest neighbours of many points: an inverted file, with its recall measured.

Exact search takes N^2 distances. An inverted file lists each point under the nearest of about 4 sqrt(N) centroids and
searches, for a query, the lists of its nearest centroids alone. On the CPU that is faiss's, which works on blocks of
fixed size, each with one thread, so that its products have the same bits with any number of threads. On a GPU the
points of a list are searched together, so that all of it is products of small matrices, in batches.
"""

import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

BLOCK = 1 << 24  # numbers held at once on a GPU
RECALL = 0.985  # of a sample of points; that of all of them is within 0.005
SAMPLE = 1000
QUERIES = 512  # in a block, on a CPU
TRAINING, TURNS = 32, 5  # points of each centroid that it is found by, and how often it is moved
logger = logging.getLogger(__name__)


class InvertedFile:
    """Points listed by their nearest centroid, of whose lists a query searches a few; on the CPU.

    Parameters
    ----------
    points : float64 [N, d]
        Centred. They are searched in float32, which may not tell near ones apart, and what is found is measured in
        float64.
    width : int
        How many points `propose` finds for each, itself among them.
    sample, radii : int64 [n], float64 [n]
        Some points, and how far the nearest width - 1 others of each reach, squared.

    Attributes
    ----------
    probes : int
        Lists that a query searches: as many, doubled from 8 on, as find 98.5 % of the neighbours of the sample.
    recall : float
        The share of them that is found.
    """

    def __init__(self, points: torch.Tensor, width: int, sample: torch.Tensor, radii: torch.Tensor) -> None:
        self.points, self.width = points.to(torch.float32).contiguous().numpy(), width
        self._index = _in_blocks(_index, [self.points])[0]

        def searched(probes: int) -> torch.Tensor:
            self._index.nprobe = probes
            found = np.concatenate(_in_blocks(self._search, np.array_split(sample.numpy(), 8)))
            return torch.from_numpy(np.where(found < 0, len(points), found))

        self.probes, self.recall = _probes(points, sample, radii, searched, probes=8, most=self._index.nlist)

    def propose(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidates int64 [n, width] of the points int64 [n], and infinity [n]: nothing is known of other points.

        Where the lists hold too few, the point itself stands for the rest.
        """
        blocks = np.split(rows.numpy(), range(QUERIES, len(rows), QUERIES))
        candidates = torch.from_numpy(np.concatenate(_in_blocks(self._search, blocks)))
        return torch.where(candidates < 0, rows[:, None], candidates), torch.full((len(rows),), torch.inf)

    def _search(self, rows: np.ndarray) -> np.ndarray:
        return self._index.search(self.points[rows], self.width)[1]


class InvertedCells:
    """The same by torch's operators, on any device, with all lists of one length: longer ones are cut into cells.

    Points of a cell share the cells that they search, those whose centroids are nearest to their own.
    """

    def __init__(self, exact: torch.Tensor, width: int, sample: torch.Tensor, radii: torch.Tensor) -> None:
        (N, d), device = exact.shape, exact.device
        self.width, lists = width, _lists(N)
        self._points = torch.zeros((N + 1, d), dtype=torch.float32, device=device)
        points = self._points[:N].copy_(exact)
        centroids = _centroids(points, lists)
        own = _nearest(points, centroids, 1)[:, 0]
        shuffled = sample_of(N, N).to(device)  # copies of a point would lie in cells with those that come next
        order, counts = shuffled[own[shuffled].argsort(stable=True)], own.bincount(minlength=lists)
        length = -(-N // lists)
        cells = (counts + length - 1) // length  # of each list
        place = torch.arange(N, device=device) - (counts.cumsum(0) - counts)[own[order]]  # in its list
        self._cell = torch.empty(N, dtype=torch.int64, device=device)
        self._cell[order] = (cells.cumsum(0) - cells)[own[order]] + place // length
        self._centroids = centroids.repeat_interleave(cells, dim=0)
        self._members = torch.full((len(self._centroids), length), N, device=device)  # N stands for no point
        self._members[self._cell[order], place % length] = order
        self._norms = torch.cat([points.square().sum(1), points.new_full((1,), torch.inf)])

        def searched(probes: int) -> torch.Tensor:
            return self._search(sample[:, None], self._cell[sample], probes)[:, 0]

        least = max(8, -(-2 * width // length))
        self.probes, self.recall = _probes(exact, sample, radii, searched, probes=least, most=len(self._centroids))
        self._candidates = torch.empty((N + 1, width), dtype=torch.int32, device=device)
        every = torch.arange(len(self._members), device=device)
        for some in every.split(max(1, BLOCK // (width * length))):
            rows = self._members[some]
            self._candidates[rows] = self._search(rows, some, self.probes).to(torch.int32)

    def propose(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `InvertedFile.propose`."""
        candidates = self._candidates[rows].long()
        bound = self._norms.new_full((len(rows),), torch.inf)
        return torch.where(candidates == len(self._cell), rows[:, None], candidates), bound

    def _search(self, rows: torch.Tensor, cells: torch.Tensor, probes: int) -> torch.Tensor:
        """Neighbours int64 [n, q, width] of the points [n, q], each row of them of one of the cells int64 [n]."""
        probes = min(probes, len(self._members))
        numbers = probes * self._members.shape[1] * max(rows.shape[1], self._points.shape[1])
        at_once = max(1, BLOCK // numbers)
        blocks = zip(rows.split(at_once), cells.split(at_once), strict=True)
        return torch.cat([self._search_block(*block, probes) for block in blocks])

    def _search_block(self, rows: torch.Tensor, cells: torch.Tensor, probes: int) -> torch.Tensor:
        near = _nearest(self._centroids[cells], self._centroids, probes)
        candidates = self._members[near].flatten(1)  # [n, m]
        others = self._points[candidates].transpose(1, 2)  # [n, d, m]
        D = torch.baddbmm(self._norms[candidates][:, None], self._points[rows], others, alpha=-2)
        found = D.topk(self.width, dim=2, largest=False).indices
        return candidates[:, None].expand(-1, rows.shape[1], -1).gather(2, found)


def _nearest(points: torch.Tensor, others: torch.Tensor, k: int) -> torch.Tensor:
    """The k nearest of all others [m, d] to each of the points [n, d], int64 [n, k]."""
    norms = others.square().sum(1)
    blocks = points.split(max(1, BLOCK // len(others)))
    return torch.cat([torch.addmm(norms, x, others.T, alpha=-2).topk(k, dim=1, largest=False).indices for x in blocks])


def _centroids(points: torch.Tensor, lists: int) -> torch.Tensor:
    """Means [lists, d] of points that are nearest to them, by Lloyd's algorithm on some of the points."""
    some = points[sample_of(len(points), TRAINING * lists).to(points.device)]
    centroids = some[:lists].clone()
    for _ in range(TURNS):
        own = _nearest(some, centroids, 1)[:, 0]
        counts = own.bincount(minlength=lists)[:, None]
        sums = torch.zeros_like(centroids).index_put_((own,), some, accumulate=True)  # in a fixed order on a GPU
        centroids = torch.where(counts > 0, sums / counts, centroids)
    return centroids


def _lists(N: int) -> int:
    return min(N, int(4 * math.sqrt(N)))


def sample_of(N: int, count: int) -> torch.Tensor:
    """Indices int64 of some of N points, the same each time."""
    return torch.from_numpy(np.random.default_rng(1).choice(N, min(count, N), replace=False))


def _probes(
    points: torch.Tensor,
    sample: torch.Tensor,
    radii: torch.Tensor,
    searched: Callable[[int], torch.Tensor],
    *,
    probes: int,
    most: int,
) -> tuple[int, float]:
    """How many lists must be searched, doubled from `probes` up to `most`, and the share of neighbours then found.

    `searched` gives what is found for the sample in so many lists, int64 [n, width], N where that is no point. Found is
    what is no farther than the last of the neighbours: of points that are equally far any will do.
    """
    bounds = radii[:, None] * (1 + 1e-12)  # that were summed in another order
    while True:
        found = searched(probes)
        there = found < len(points)
        within = there & (found != sample[:, None])
        for block in torch.arange(len(sample), device=sample.device).split(100):
            differences = points[sample[block], None] - points[found[block] * there[block]]
            within[block] &= differences.square().sum(2) <= bounds[block]
        others = found.shape[1] - 1
        recall = float(within.sum(1).clamp(max=others).double().mean()) / others
        if recall >= RECALL or probes >= most:
            break
        probes *= 2
    share = f"{100 * recall:.1f} % of the nearest neighbours are found, by an inverted file"
    logger.info("%s", share if recall >= RECALL else f"only {share}: all pairs are searched")
    return probes, recall


def _index(points: np.ndarray) -> Any:
    import faiss

    N, d = points.shape
    lists = _lists(N)
    clusters = faiss.Kmeans(d, lists, niter=TURNS, seed=1, min_points_per_centroid=1, max_points_per_centroid=TRAINING)
    clusters.train(points)
    centroids = faiss.IndexFlatL2(d)
    centroids.add(np.asarray(clusters.centroids))
    index = faiss.IndexIVFFlat(centroids, d, lists)
    index.is_trained = True
    for some in np.array_split(sample_of(N, N).numpy(), 64):  # shuffled, as ties are found in the order of a list
        index.add_with_ids(points[some], some)
    return index


def _in_blocks(function: Any, blocks: Sequence[np.ndarray]) -> list[Any]:
    """Results of faiss on each block, each by one thread."""
    import faiss

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(function, blocks))
