"""Nearly all nearest neighbours of many points on the CPU: faiss's inverted file, with its recall measured.

Exact search takes N^2 distances. An inverted file lists each point under the nearest of about 4 sqrt(N) centroids and
searches, for a query, the lists of its nearest centroids alone. faiss works on blocks of fixed size, each with one
thread, so that its products have the same bits with any number of threads.
"""

import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

RECALL = 0.985  # of a sample of points; that of all of them is within 0.005
SAMPLE = 1000
QUERIES = 512  # in a block
TRAINING, TURNS = 32, 5  # points of each centroid that it is found by, and how often it is moved
logger = logging.getLogger(__name__)


class InvertedFile:
    """Points listed by their nearest centroid, of whose lists a query searches a few.

    Parameters
    ----------
    points : float32 [N, d]
        Centred, contiguous.
    width : int
        How many points `propose` finds for each.

    Attributes
    ----------
    probes : int
        Lists that a query searches: as many, doubled from 8 on, as find 98.5 % of the neighbours of 1,000 points.
    recall : float
        The share of them that is found.
    """

    def __init__(self, points: np.ndarray, width: int) -> None:
        self.points, self.width, self.probes = points, width, 8
        self._index = _in_blocks(_index, [points])[0]
        sample = np.random.default_rng(1).choice(len(points), min(SAMPLE, len(points)), replace=False)
        true = _in_blocks(self._exact, np.array_split(sample, 8))
        while True:
            self._index.nprobe = self.probes
            found = _in_blocks(self._search, np.array_split(sample, 8))
            pairs = zip(np.concatenate(true), np.concatenate(found), strict=True)
            self.recall = sum(np.isin(a, b).sum() for a, b in pairs) / (len(sample) * width)
            if self.recall >= RECALL or self.probes >= self._index.nlist:
                break
            self.probes *= 2
        logger.info("%.1f %% of the nearest neighbours are found, by an inverted file", 100 * self.recall)

    def propose(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidates int64 [n, width] of the points int64 [n], and infinity [n]: nothing is known of other points.

        Where the lists hold too few, the point itself stands for the rest.
        """
        blocks = np.split(rows.numpy(), range(QUERIES, len(rows), QUERIES))
        candidates = torch.from_numpy(np.concatenate(_in_blocks(self._search, blocks)))
        return torch.where(candidates < 0, rows[:, None], candidates), torch.full((len(rows),), torch.inf)

    def _search(self, rows: np.ndarray) -> np.ndarray:
        return self._index.search(self.points[rows], self.width)[1]

    def _exact(self, rows: np.ndarray) -> np.ndarray:
        import faiss

        return faiss.knn(self.points[rows], self.points, self.width)[1]


def _index(points: np.ndarray) -> Any:
    import faiss

    N, d = points.shape
    lists = int(4 * math.sqrt(N))
    clusters = faiss.Kmeans(d, lists, niter=TURNS, seed=1, min_points_per_centroid=1, max_points_per_centroid=TRAINING)
    clusters.train(points)
    centroids = faiss.IndexFlatL2(d)
    centroids.add(np.asarray(clusters.centroids))
    index = faiss.IndexIVFFlat(centroids, d, lists)
    index.is_trained = True
    index.add(points)
    return index


def _in_blocks(function: Any, blocks: Sequence[np.ndarray]) -> list[Any]:
    """Results of faiss on each block, each by one thread."""
    import faiss

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(function, blocks))
