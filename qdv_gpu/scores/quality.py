"""How well a map keeps classes and neighbours together, and how sure we can be of it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from qdv_gpu.arrays import to_tensor
from qdv_gpu.errors import InputError
from qdv_gpu.neighbors import CHUNK, distances_to_all, knn, listed_distances


def neighborhood_hit(Z: Any, labels: Any, *, k: int = 5) -> float:
    """Neighborhood hit (NH): the mean share of a point's k nearest neighbours that have its class.

    Wang & Liu, CIKM 2024, eq. 2-3. The point itself is not its neighbour; ties go to the smaller index.

    Parameters
    ----------
    Z : array
        Points [N, d], real: numpy, torch or CuPy.
    labels : array
        Class of each point, integers [N], on any device.
    k : int
        Number of neighbours, below N.

    Raises
    ------
    InputError
        If labels and points differ in number, there is only one class, or `knn` refuses Z or k.
    """
    points = to_tensor(Z)
    return float(hits(knn(points, k).indices, labels).mean())


def hits(indices: torch.Tensor, labels: Any) -> torch.Tensor:
    """NH of each point (eq. 2), float64 [N], from its neighbours `indices` int64 [N, k] and the labels [N]."""
    return _matches(indices, labels).sum(dim=1).to(torch.float64) / indices.shape[1]


def influence_values(indices: torch.Tensor, labels: Any) -> torch.Tensor:
    """What each point contributes to NH, as a neighbour as well as with neighbours.

    With M_ji = [y_i = y_j] and h the `hits`, phi(i) = h(i) + (1/k) sum_{j : i in N_k(j)} (M_ji - h(j)). Neighbouring
    points share neighbours, so their hits are correlated; the spread of phi accounts for that (`standard_error`).

    Parameters
    ----------
    indices : torch.Tensor
        Neighbours int64 [N, k].
    labels : array
        Integers [N].

    Returns
    -------
    torch.Tensor
        float64 [N]; the mean is NH. The sums are of integers, hence the same bits on every run.
    """
    k = indices.shape[1]
    matches = _matches(indices, labels).to(torch.int64)  # [N, k]
    own = matches.sum(dim=1)  # [N], k h(i)
    balance = k * matches - own[:, None]  # [N, k], k (M_ji - h(j)) for row j
    received = torch.zeros_like(own).index_add_(0, indices.reshape(-1), balance.reshape(-1))
    return (k * own + received).to(torch.float64) / k**2


def standard_error(phi: Any, labels: Any, *, seed_values: Any = None) -> float:
    """Standard error of NH, for the test images drawn class by class and the seeds of the map.

    sqrt(sum_c (n_c / N)^2 s_c^2 / n_c + s_seeds^2 / S), with s_c^2 the variance of phi within class c and s_seeds^2
    that of NH over the S seeds.

    Parameters
    ----------
    phi : array
        Influence values [N], averaged over the seeds, or [S, N], which are averaged here.
    labels : array
        Integers [N], at least two points in each class.
    seed_values : array, optional
        NH of each seed, [S]. With fewer than two, the term of the seeds is left out: the error is then that of
        this one map.
    """
    values = to_tensor(phi).to(torch.float64)
    values = values.mean(dim=0) if values.ndim == 2 else values
    classes, members, counts = _classes(labels, values)
    if int(counts.min()) < 2:
        rare = int(classes[counts.argmin()])
        raise InputError(f"a standard error needs at least 2 points in every class, class {rare} has 1")
    means = _sums(values, members, len(counts)) / counts
    variances = _sums((values - means[members]).square(), members, len(counts)) / (counts - 1)
    variance = float((counts * variances).sum()) / len(values) ** 2
    if seed_values is not None:
        nh = to_tensor(seed_values).to(torch.float64)
        if nh.numel() > 1:
            variance += float(nh.var()) / nh.numel()
    return variance**0.5


def chance(labels: Any) -> float:
    """Expected NH of a map that ignores the classes: (n_c - 1) / (N - 1), averaged over the points."""
    _, members, counts = _classes(labels, None)
    N = len(members)
    return float((counts * (counts - 1)).sum()) / (N * (N - 1))


def trustworthiness(X: Any, Z: Any, *, k: int = 5) -> float:
    """Trustworthiness of the map Z of X (Venna & Kaski 2001): 1 if all neighbours in the map are neighbours in X.

    1 - 2 / (N k (2N - 3k - 1)) sum_i sum_{j in N_k(i) in Z} max(0, r(i, j) - k), with r(i, j) the rank of j by
    (distance to i, index) in X.

    Parameters
    ----------
    X, Z : array
        Points [N, d] and their map [N, m], of the same kind and on the same device.
    k : int
        Number of neighbours, below N / 2.
    """
    points, mapped = _pair(X, Z)
    return rank_score(neighbor_ranks(points, knn(mapped, k).indices))


def continuity(X: Any, Z: Any, *, k: int = 5) -> float:
    """Continuity of the map Z of X (Venna & Kaski 2001): 1 if all neighbours in X are neighbours in the map.

    `trustworthiness` with the parts of X and Z exchanged.
    """
    points, mapped = _pair(X, Z)
    return rank_score(neighbor_ranks(mapped, knn(points, k).indices))


def rank_score(ranks: torch.Tensor) -> float:
    """Trustworthiness or continuity from the ranks int64 [N, k] of the neighbours of the other space.

    For a smaller number of neighbours k' pass `ranks[:, :k']`.
    """
    N, k = ranks.shape
    if 2 * k >= N:
        raise InputError(f"trustworthiness and continuity need k smaller than N / 2, got k={k}, N={N}")
    penalty = int((ranks - k).clamp_(min=0).sum())
    return 1.0 - 2.0 * penalty / (N * k * (2 * N - 3 * k - 1))


def neighbor_ranks(X: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rank int64 [N, m], from 1, of each listed point among all others, by (distance in X, index).

    One pass over the distances serves all columns: for many maps of one X, concatenate their neighbours.

    Parameters
    ----------
    X : torch.Tensor
        Points [N, d].
    indices : torch.Tensor
        int64 [N, m], on the device of X, never the point itself.
    """
    if len(X) != len(indices):
        raise InputError(f"points and neighbours must be equally many, got {len(X)} and {len(indices)}")
    X = X.detach().to(torch.float64)
    XT = X.T.contiguous()  # [d, N]
    limits = listed_distances(X, indices)
    if X.is_cuda:
        return _ranks_torch(XT, indices, limits)
    from qdv_gpu.kernels import distances

    out = np.empty(indices.shape, dtype=np.int64)
    distances.ranks(XT.numpy(), indices.contiguous().numpy(), limits.numpy(), out)
    return torch.from_numpy(out)


def score_maps(
    X: torch.Tensor, Z: torch.Tensor, labels: torch.Tensor, *, k: Sequence[int] = (5,)
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Score the maps Z [S, N, 2] of a layer X [N, d] with class labels int64 [N].

    Returns
    -------
    rows : list of dict
        One per seed and k: seed, k, nh, nh_feature_space, chance, tied, trustworthiness, continuity.
    scores : list of dict
        One per k, averaged over the seeds, with the standard error of NH. `tied` is the share of points whose k
        neighbours, in the map or in the layer's own space, are an arbitrary choice among equally far ones.
    """
    labels = labels.to(X.device)
    most = max(k)
    near_X = knn(X, most)
    near_Z = [knn(z, most) for z in Z]
    # One pass over the distances in X ranks the neighbours of all maps: [N, S * most]
    ranks_X = neighbor_ranks(X, torch.cat([near.indices for near in near_Z], dim=1)).split(most, dim=1)
    ranks_Z = [neighbor_ranks(z, near_X.indices) for z in Z]
    expected = chance(labels)
    rows, scores = [], []
    for n in k:
        own, own_tied = near_X.first(n).indices, near_X.first(n).tied
        phi, own_rows = [], []
        for seed in range(len(Z)):
            near = near_Z[seed].first(n)
            phi.append(influence_values(near.indices, labels))
            own_rows.append(
                {
                    "seed": seed,
                    "k": n,
                    "nh": float(hits(near.indices, labels).mean()),
                    "nh_feature_space": float(hits(own, labels).mean()),
                    "chance": expected,
                    "tied": float((near.tied | own_tied).double().mean()),
                    "trustworthiness": rank_score(ranks_X[seed][:, :n]),
                    "continuity": rank_score(ranks_Z[seed][:, :n]),
                }
            )
        nh = [row["nh"] for row in own_rows]
        error = standard_error(torch.stack(phi), labels, seed_values=nh)
        mean = {key: float(np.mean([row[key] for row in own_rows])) for key in own_rows[0] if key not in ("seed", "k")}
        scores.append({"k": n, "nh": mean.pop("nh"), "standard_error": error, **mean})
        rows += own_rows
    return rows, scores


def _ranks_torch(XT: torch.Tensor, indices: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    N = XT.shape[1]
    ranks = torch.empty_like(indices)
    order = torch.arange(N, device=XT.device)
    step = max(1, CHUNK // N)
    for start in range(0, N, step):
        rows = order[start : start + step]
        D = distances_to_all(XT, rows)  # [step, N]
        for c in range(indices.shape[1]):
            limit, index = limits[rows, c, None], indices[rows, c, None]
            closer = (D < limit) | ((D == limit) & (order < index))
            ranks[rows, c] = closer.sum(dim=1) + 1
    return ranks


def _matches(indices: torch.Tensor, labels: Any) -> torch.Tensor:
    """M_ji = [y_i = y_j], bool [N, k], for i the neighbours of each j."""
    _, members, _ = _classes(labels, indices)
    return members[indices] == members[:, None]


def _classes(labels: Any, rows: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Class labels [C], the class number of each point [N] and the class sizes [C], on the device of `rows`."""
    y = to_tensor(labels)
    if y.ndim != 1 or y.is_floating_point() or y.is_complex():
        raise InputError(f"labels must be integers of shape [N], got {y.dtype} of shape {list(y.shape)}")
    if rows is not None:
        if len(y) != len(rows):
            raise InputError(f"labels and points must be equally many, got {len(y)} labels and {len(rows)} points")
        y = y.to(rows.device)
    classes, members, counts = torch.unique(y, return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise InputError(f"at least two classes are needed, all {len(y)} labels are the same")
    return classes, members, counts


def _sums(values: torch.Tensor, members: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Sum of `values` in each class, float64 [C], in a fixed order."""
    return torch.stack([values[members == c].sum() for c in range(n_classes)])


def _pair(X: Any, Z: Any) -> tuple[torch.Tensor, torch.Tensor]:
    points, mapped = to_tensor(X), to_tensor(Z)
    if len(points) != len(mapped):
        raise InputError(f"X and Z must be equally many points, got {len(points)} and {len(mapped)}")
    return points, mapped.to(points.device)
