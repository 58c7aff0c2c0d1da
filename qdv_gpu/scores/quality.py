"""How well a map keeps classes and neighbours together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from qdv_gpu import kernels
from qdv_gpu.arrays import to_tensor
from qdv_gpu.errors import InputError
from qdv_gpu.neighbors import as_points, knn, listed_distances, lots
from qdv_gpu.scores.statistics import (
    classes_of,
    error_neighbors,
    hits,
    influence_values,
    link_variance,
    spread_values,
    standard_error,
)


def neighborhood_hit(Z: Any, labels: Any, *, k: int = 5) -> float:
    """Neighborhood hit (NH): the mean share of a point's k nearest neighbours that have its class.

    Wang & Liu, CIKM 2024, eq. 2-3. The point itself is not its neighbour; ties are by lot (`knn`).

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


def chance(labels: Any) -> float:
    """Expected NH of a map that ignores the classes: (n_c - 1) / (N - 1), averaged over the points."""
    _, members, counts = classes_of(labels, None)
    N = len(members)
    return float((counts * (counts - 1)).sum()) / (N * (N - 1))


def trustworthiness(X: Any, Z: Any, *, k: int = 5) -> float:
    """Trustworthiness of the map Z of X (Venna & Kaski 2001): 1 if all neighbours in the map are neighbours in X.

    1 - 2 / (N k (2N - 3k - 1)) sum_i sum_{j in N_k(i) in Z} max(0, r(i, j) - k), with r(i, j) the rank of j by
    its distance to i in X, ties by lot (`knn`).

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
    """Continuity of the map Z of X (Venna & Kaski 2006): 1 if all neighbours in X are neighbours in the map.

    1 - 2 / (N k (2N - 3k - 1)) sum_i sum_{j in N_k(i) in X} max(0, r(i, j) - k), with r(i, j) the rank of j by
    its distance to i in Z, ties by lot: `trustworthiness` with the parts of X and Z exchanged.

    Parameters
    ----------
    X, Z : array
        Points [N, d] and their map [N, m], of the same kind and on the same device.
    k : int
        Number of neighbours, below N / 2.

    Raises
    ------
    InputError
        If X and Z are not equally many points, `knn` refuses one of them, or k is not below N / 2.

    >>> X = torch.tensor([[0.0, 0], [1, 0], [1.1, 1.2], [0.2, 1.4]])
    >>> f"{continuity(X, X[:, :1], k=1):.3f} {continuity(X, 2 * X, k=1):.3f}"
    '0.250 1.000'
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
    """Rank int64 [N, m], from 1, of each listed point among all others, by its distance in X, ties by lot (`knn`).

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
    home, X = X.device, kernels.reachable(X.detach().to(torch.float64))
    XT = X.T.contiguous()  # [d, N]
    indices = indices.to(X.device).contiguous()
    own, limits, out = lots(len(X), X.device), listed_distances(X, indices), torch.empty_like(indices)
    if not X.is_cuda:
        from qdv_gpu.kernels import distances

        distances.ranks(XT.numpy(), own.numpy(), indices.numpy(), limits.numpy(), out.numpy())
    elif out.numel():
        (d, N), m = XT.shape, indices.shape[1]
        sizes, grid = (np.int64(N), np.int32(m), np.int32(d)), (-(-N // 16),)
        kernels.run("distances", "ranks", XT, own, indices, limits, out, *sizes, grid=grid, block=128)
    return out.to(home)


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What is measured for k neighbours.

    Attributes
    ----------
    k : int
    nh, nh_feature_space : float
        Neighborhood hit in the map, and in the layer's own space.
    chance : float
        NH of a map that ignores the classes.
    tied : float
        Share of points whose k neighbours, in the map or in the layer's own space, are a choice by lot among equally
        far ones.
    trustworthiness, continuity : float
    """

    k: int
    nh: float
    nh_feature_space: float
    chance: float
    tied: float
    trustworthiness: float
    continuity: float


MEASURES = tuple(field.name for field in fields(Measures))  # columns of the tables, in this order


@dataclass(frozen=True, kw_only=True)
class MapScore(Measures):
    """One map, of one seed."""

    seed: int


@dataclass(frozen=True, kw_only=True)
class Score(Measures):
    """A layer: the means over its maps, and the standard errors of NH in the maps and in the layer's own space."""

    standard_error: float
    standard_error_feature_space: float


@dataclass(frozen=True)
class LayerScores:
    """All that one k says of a layer.

    Attributes
    ----------
    k : int
    maps : tuple of MapScore
        One for each seed.
    mean : Score
    influence, hits, spread : torch.Tensor
        float64 [S, N]: what each point contributes to NH in each map, its hit there, and what it adds to NH for the
        error of it (`spread_values`).
    neighbors : torch.Tensor
        int32 [S, N, k]: the nearest neighbours in each map.
    influence_feature_space, hits_feature_space, spread_feature_space, neighbors_feature_space : torch.Tensor
        float64 [N] and int32 [N, k]: the same in the layer's own space.
    """

    k: int
    maps: tuple[MapScore, ...]
    mean: Score
    influence: torch.Tensor
    hits: torch.Tensor
    spread: torch.Tensor
    neighbors: torch.Tensor
    influence_feature_space: torch.Tensor
    hits_feature_space: torch.Tensor
    spread_feature_space: torch.Tensor
    neighbors_feature_space: torch.Tensor


@dataclass(frozen=True)
class HitValues:
    """What each point's neighbours say in S maps of N points.

    Attributes
    ----------
    hits, influence, spread : torch.Tensor
        float64 [S, N]: `hits`, `influence_values` and `spread_values` of `scores.statistics`.
    standard_error : float
        Of NH averaged over the maps.
    """

    hits: torch.Tensor
    influence: torch.Tensor
    spread: torch.Tensor
    standard_error: float


def hit_values(neighbors: Sequence[torch.Tensor], labels: Any, *, k: int) -> HitValues:
    """Hits of maps from neighbours int64 [N, m], m at least what `error_neighbors` says; NaN where labels are None."""
    if labels is None:
        unknown = torch.full((len(neighbors), len(neighbors[0])), math.nan, dtype=torch.float64)
        return HitValues(hits=unknown, influence=unknown, spread=unknown, standard_error=math.nan)
    m = error_neighbors(k, len(neighbors[0]))
    labels = classes_of(labels, neighbors[0])
    wide = [indices[:, :m] for indices in neighbors]
    hit = torch.stack([hits(indices[:, :k], labels) for indices in wide])
    spread = torch.stack([spread_values(indices, labels, k=k) for indices in wide])
    links = link_variance(wide, labels, k=k)
    return HitValues(
        hits=hit,
        influence=torch.stack([influence_values(indices[:, :k], labels) for indices in wide]),
        spread=spread,
        standard_error=standard_error(spread, labels, seed_values=hit.mean(dim=1), links=links),
    )


def score_maps(
    X: torch.Tensor,
    Z: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    k: Sequence[int] = (5,),
    seeds: Sequence[int] | None = None,
) -> list[LayerScores]:
    """Score the maps Z [S, N, 2] of a layer X [N, d] with class labels int64 [N], for each k.

    Without labels what needs them is NaN. `seeds` are the seeds of the maps, by default 0, 1, ... Results are on the
    CPU: neighbours and ranks are found where X is, and what is counted in them is little.

    >>> X = torch.rand(60, 5, generator=torch.Generator().manual_seed(0))
    >>> (scores,) = score_maps(X, X[None, :, :2], torch.arange(60) % 3, k=[5])
    >>> scores.influence.shape, abs(float(scores.influence.mean()) - scores.mean.nh) < 1e-12
    (torch.Size([1, 60]), True)
    """
    classes = None if labels is None else classes_of(labels.cpu(), None)
    most = max(k)
    wide = error_neighbors(most, len(X))
    near_X, near_Z = knn(X, wide), [knn(z, wide) for z in Z]
    # One pass over the distances in X ranks the neighbours of all maps: [N, S * most]
    ranks_X = neighbor_ranks(X, torch.cat([near.indices[:, :most] for near in near_Z], dim=1)).int().split(most, dim=1)
    ranks_Z = [neighbor_ranks(z, near_X.indices[:, :most]).int().cpu() for z in Z]
    ranks_X = [ranks.cpu() for ranks in ranks_X]
    tied = {n: [near.first(n).tied.cpu() for near in (near_X, *near_Z)] for n in k}
    own, *in_map = (near.indices.int().cpu().long() for near in (near_X, *near_Z))  # half of the bytes
    expected = math.nan if classes is None else chance(classes)
    result = []
    for n in k:
        in_maps, in_layer = hit_values(in_map, classes, k=n), hit_values([own], classes, k=n)
        tied_own, *tied_maps = tied[n]
        maps = tuple(
            MapScore(
                seed=number if seeds is None else seeds[number],
                k=n,
                nh=float(in_maps.hits[number].mean()),
                nh_feature_space=float(in_layer.hits.mean()),
                chance=expected,
                tied=float((tied_map | tied_own).double().mean()),
                trustworthiness=rank_score(ranks_X[number][:, :n]),
                continuity=rank_score(ranks_Z[number][:, :n]),
            )
            for number, tied_map in enumerate(tied_maps)
        )
        mean = Score(
            k=n,
            standard_error=in_maps.standard_error,
            standard_error_feature_space=in_layer.standard_error,
            **{name: float(np.mean([getattr(row, name) for row in maps])) for name in MEASURES[1:]},
        )
        result.append(
            LayerScores(
                k=n,
                maps=maps,
                mean=mean,
                influence=in_maps.influence,
                hits=in_maps.hits,
                spread=in_maps.spread,
                neighbors=torch.stack([indices[:, :n] for indices in in_map]).int(),
                influence_feature_space=in_layer.influence[0],
                hits_feature_space=in_layer.hits[0],
                spread_feature_space=in_layer.spread[0],
                neighbors_feature_space=own[:, :n].int(),
            )
        )
    return result


def _pair(X: Any, Z: Any) -> tuple[torch.Tensor, torch.Tensor]:
    points, mapped = as_points(to_tensor(X)), as_points(to_tensor(Z))
    if len(points) != len(mapped):
        raise InputError(f"X and Z must be equally many points, got {len(points)} and {len(mapped)}")
    return points, mapped.to(points.device)
