"""The scores are what their formulas say, and the standard error of NH is that of fresh samples."""

import numpy as np
import pytest
import torch
from sklearn import manifold

from qdv_gpu.errors import InputError
from qdv_gpu.neighbors import knn, lots
from qdv_gpu.scores import quality, statistics


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _integers(high, *shape, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def brute_force_hit(Z, labels, k):
    """NH by definition: every point sorts all the others by (distance, product of lots)."""
    own = lots(len(Z), Z.device).numpy()
    Z, labels = np.asarray(Z, dtype=np.float64), np.asarray(labels)
    shares = []
    for i in range(len(Z)):
        D, before = ((Z - Z[i]) ** 2).sum(axis=1), own * own[i]
        others = [j for j in np.lexsort((before, D)) if j != i][:k]
        shares.append(np.mean(labels[others] == labels[i]))
    return np.mean(shares)


@pytest.mark.parametrize("k", [1, 5, 12])
@pytest.mark.parametrize("high", [3, 8, 40])
def test_neighborhood_hit_on_integer_grids(high, k):
    Z, labels = _integers(high, 300, 2), _integers(4, 300, seed=1)
    assert quality.neighborhood_hit(Z.float(), labels, k=k) == pytest.approx(brute_force_hit(Z, labels, k), abs=1e-12)


def test_kinds_of_arrays():
    Z, labels = _normal(100, 2), _integers(3, 100)
    expected = quality.neighborhood_hit(Z, labels)
    for y in (labels.numpy(), labels.to(torch.uint8), (labels * 7 - 3).tolist(), labels.numpy().astype(np.int16)):
        assert quality.neighborhood_hit(Z.numpy(), y) == expected


@pytest.mark.parametrize("Z", [_normal(400, 2), _integers(5, 400, 2).float(), torch.zeros(400, 2)])
@pytest.mark.parametrize("k", [1, 5, 7])
def test_influence_values(Z, k):
    labels = _integers(4, 400, seed=3)
    indices = knn(Z, k).indices
    phi = statistics.influence_values(indices, labels)
    assert abs(float(phi.mean()) - quality.neighborhood_hit(Z, labels, k=k)) < 1e-12
    h = statistics.hits(indices, labels)
    expected = h.clone()
    for j in range(400):
        for i in indices[j].tolist():
            expected[i] += (float(labels[i] == labels[j]) - h[j]) / k
    torch.testing.assert_close(phi, expected, rtol=0, atol=1e-12)


def test_random_map_scores_chance():
    for seed in range(3):
        Z, labels = _normal(3000, 2, seed=seed), _integers(10, 3000, seed=seed + 10)
        phi = statistics.influence_values(knn(Z, 5).indices, labels)
        difference = float(phi.mean()) - quality.chance(labels)
        assert abs(difference) < 3 * statistics.standard_error(phi, labels)


def test_chance():
    assert quality.chance([0] * 4 + [1] * 6) == pytest.approx((4 * 3 + 6 * 5) / (10 * 9))


def test_standard_error_is_the_spread_over_fresh_samples():
    """300 samples of 2,000 points from four overlapping classes, class sizes fixed."""
    labels = torch.arange(4).repeat_interleave(500)
    centres = torch.tensor([[0.0, 0.0], [1.5, 0.0], [0.0, 1.5], [2.0, 2.0]])
    generator = torch.Generator().manual_seed(0)
    hits, errors = [], []
    for _ in range(300):
        Z = centres[labels] + torch.randn(2000, 2, generator=generator)
        phi = statistics.influence_values(knn(Z, 5).indices, labels)
        hits.append(float(phi.mean()))
        errors.append(statistics.standard_error(phi, labels))
    ratio = np.sqrt(np.mean(np.square(errors))) / np.std(hits, ddof=1)
    assert 0.85 < ratio < 1.15


@pytest.mark.parametrize(
    ("sizes", "k", "apart"),
    [([5] * 40, 5, 4), ([5] * 40, 15, 4), ([3] * 40, 5, 4), ([10] * 20, 5, 18), ([14] * 20, 5, 15), ([20] * 5, 40, 2),
     ([6] * 20, 2, 11), ([4] * 20, 1, 6), ([3] * 40, 1, 9), ([100] + [2] * 10, 5, 2),
      ([100, 30, 10, 6, 4, 3, 2], 5, 2)],
)  # fmt: skip
def test_standard_error_of_small_classes(sizes, k, apart):
    """100 samples from as many classes on a circle, of which most have few images, or hardly more than k."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    angle = 2 * torch.pi * labels / len(sizes)
    centres = apart * torch.stack([angle.cos(), angle.sin()], dim=1)
    hits, errors = [], []
    for seed in range(100):
        near = knn(centres + _normal(len(labels), 2, seed=seed), statistics.error_neighbors(k, len(labels))).indices
        found = quality.hit_values([near], labels, k=k)
        hits.append(float(found.hits.mean()))
        errors.append(found.standard_error)
    assert 0.8 < np.mean(errors) / np.std(hits, ddof=1) < 1.35


def test_standard_error_where_all_hit_is_that_of_one_image():
    labels = torch.arange(4).repeat_interleave(40)
    Z = 100 * torch.nn.functional.one_hot(labels) + _normal(160, 4)
    assert quality.hit_values([knn(Z, 31).indices], labels, k=5).standard_error == pytest.approx(1 / 160, rel=1e-12)


def test_standard_error_of_seeds():
    labels = torch.tensor([0] * 30 + [1] * 50)
    phi = _normal(3, 80).double()
    mean = phi.mean(dim=0)
    classes = sum((n / 80) ** 2 * part.var() / n for n, part in ((30, mean[:30]), (50, mean[30:])))
    seeds = np.array([0.4, 0.5, 0.45])
    expected = float(classes + seeds.var(ddof=1) / 3) ** 0.5
    assert statistics.standard_error(phi, labels, seed_values=seeds) == pytest.approx(expected, rel=1e-12)
    assert statistics.standard_error(mean, labels, seed_values=[0.4]) == pytest.approx(float(classes) ** 0.5, rel=1e-12)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_trustworthiness_and_continuity_are_those_of_sklearn(k):
    X = _normal(400, 10).double()
    Z = X[:, :2] + 0.5 * _normal(400, 2, seed=1)
    expected = manifold.trustworthiness(X.numpy(), Z.numpy(), n_neighbors=k)
    assert quality.trustworthiness(X, Z, k=k) == pytest.approx(expected, abs=1e-9)
    expected = manifold.trustworthiness(Z.numpy(), X.numpy(), n_neighbors=k)
    assert quality.continuity(X.numpy(), Z.numpy(), k=k) == pytest.approx(expected, abs=1e-9)


def brute_force_continuity(X, Z, k):
    """By definition, in float64: each of the k nearest in X costs how far beyond the k nearest in Z it is."""
    X, Z, N = np.asarray(X, dtype=np.float64), np.asarray(Z, dtype=np.float64), len(X)

    own = lots(N, torch.device("cpu")).numpy()

    def order(points, i):
        return [j for j in np.lexsort((own * own[i], ((points - points[i]) ** 2).sum(axis=1))) if j != i]

    cost = 0
    for i in range(N):
        ranks = {j: rank for rank, j in enumerate(order(Z, i), start=1)}
        cost += sum(max(0, ranks[j] - k) for j in order(X, i)[:k])
    return 1 - 2 * cost / (N * k * (2 * N - 3 * k - 1))


@pytest.mark.parametrize(("N", "k"), [(5, 1), (5, 2), (130, 1), (130, 5)])
@pytest.mark.parametrize("high", [2, 4, 1000])
def test_continuity_with_ties(cuda, N, k, high):
    X, Z, labels = _integers(high, N, 3).float(), _integers(high, N, 2, seed=1).float(), torch.arange(N) % 2
    expected = brute_force_continuity(X, Z, k)
    for device in ("cpu", cuda):
        assert quality.continuity(X.to(device), Z.to(device), k=k) == pytest.approx(expected, abs=1e-12)
    (scores,) = quality.score_maps(X.to(cuda), torch.stack([X[:, :2], Z]).to(cuda), labels, k=[k])
    assert scores.maps[1].continuity == pytest.approx(expected, abs=1e-12)


def test_a_torn_map_is_trusted_and_not_continuous():
    """A cylinder cut open tears neighbours apart; one pressed flat lays strangers together."""
    angle = 2 * np.pi * torch.rand(400, generator=torch.Generator().manual_seed(0))
    height = _normal(400)
    X = torch.stack([angle.cos(), angle.sin(), height], dim=1)
    cut, flat = torch.stack([angle, height], dim=1), X[:, [0, 2]]
    assert quality.continuity(X, cut) < quality.trustworthiness(X, cut)
    assert quality.continuity(X, flat) > quality.trustworthiness(X, flat)


def test_perfect_map():
    X = _integers(5, 300, 3).float()
    assert quality.trustworthiness(X, X) == quality.continuity(X, X) == 1.0


@pytest.mark.parametrize("X", [_normal(333, 5), _integers(4, 333, 3).float(), torch.zeros(333, 2)])
def test_ranks_with_ties(X, cuda):
    indices = knn(_normal(333, 2, seed=5), 6).indices
    D = torch.zeros(333, 333, dtype=torch.float64)
    for x in X.double().T:
        D += (x[:, None] - x[None, :]) ** 2
    own = lots(333, D.device).numpy()
    D.fill_diagonal_(torch.inf)
    order = torch.from_numpy(np.lexsort((own[:, None] * own[None, :], D.numpy()), axis=1))
    expected = (order.argsort(dim=1) + 1).gather(1, indices)
    assert torch.equal(quality.neighbor_ranks(X, indices), expected)
    assert torch.equal(quality.neighbor_ranks(X.to(cuda), indices.to(cuda)).cpu(), expected)
    many = torch.cat([indices] * 7, dim=1)  # more columns than lanes
    assert torch.equal(quality.neighbor_ranks(X.to(cuda), many.to(cuda)).cpu(), torch.cat([expected] * 7, dim=1))


def test_bad_input():
    Z, labels = _normal(20, 2), _integers(2, 20)
    with pytest.raises(InputError, match="equally many, got 19 labels and 20 points"):
        quality.neighborhood_hit(Z, labels[1:])
    with pytest.raises(InputError, match="at least two classes"):
        quality.neighborhood_hit(Z, torch.ones(20, dtype=torch.int64))
    with pytest.raises(InputError, match="labels must be integers"):
        quality.neighborhood_hit(Z, labels.float())
    with pytest.raises(InputError, match="smaller than the number of points"):
        quality.neighborhood_hit(Z, labels, k=20)
    with pytest.raises(InputError, match="equally many points, got 20 and 19"):
        quality.trustworthiness(Z, Z[1:])
    with pytest.raises(InputError, match="equally many points, got 19 and 20"):
        quality.continuity(Z[1:], Z)
    for score in (quality.trustworthiness, quality.continuity):
        with pytest.raises(InputError, match="k smaller than N / 2, got k=10, N=20"):
            score(Z, Z, k=10)
    with pytest.raises(InputError, match="class 7 has 1"):
        statistics.standard_error(torch.zeros(5), [0, 0, 7, 1, 1])


def test_classes_that_were_found():
    X, labels = _normal(120, 5), _integers(3, 120)
    near, found = knn(X, 9).indices, statistics.classes_of(labels * 7 - 3, X)
    for count in (statistics.hits, statistics.influence_values):
        assert torch.equal(count(near, found), count(near, labels))
    with pytest.raises(InputError, match="119 labels and 120 points"):
        statistics.hits(near, statistics.classes_of(labels[1:], X[1:]))


def test_cuda_equals_cpu(cuda):
    X, Z, labels = _normal(500, 10), _integers(9, 500, 2).float(), _integers(4, 500)
    indices = knn(Z, 5).indices
    assert torch.equal(
        statistics.influence_values(indices.to(cuda), labels).cpu(), statistics.influence_values(indices, labels)
    )
    on_cpu = quality.neighborhood_hit(Z, labels)
    assert quality.neighborhood_hit(Z.to(cuda), labels) == pytest.approx(on_cpu, rel=1e-12)
    for score in (quality.trustworthiness, quality.continuity):
        assert score(X.to(cuda), Z.to(cuda)) == score(X, Z)


@pytest.mark.parametrize("score", [quality.trustworthiness, quality.continuity])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e200, 1j])
def test_no_score_of_what_has_no_distances(score, side, bad):
    pair = [torch.rand(20, 2, dtype=torch.float64), torch.rand(20, 2, dtype=torch.float64)]
    pair[side] = pair[side] * bad
    with pytest.raises(InputError, match="points must be "):
        score(*pair)
