"""Differences of two networks: their arithmetic, their verdicts, and what a single image adds."""

import math
from itertools import chain

import numpy as np
import pytest
import torch
from scipy import stats

from qdv_gpu.errors import InputError
from qdv_gpu.neighbors import knn
from qdv_gpu.scores import comparison, similarity, statistics
from qdv_gpu.scores.comparison import Side, ahead_from, class_differences, differences
from qdv_gpu.scores.quality import score_maps


def blobs(seed, N=240, C=4, apart=2.0):
    random = np.random.default_rng(seed)
    labels = torch.arange(N) % C
    angle = 2 * np.pi * np.arange(C) / C
    centres = apart * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return torch.from_numpy(centres[labels] + random.normal(size=(N, 2))), labels


def side(seed, apart=2.0, S=3):
    points, labels = blobs(seed, apart=apart)
    random = np.random.default_rng(seed + 100)
    maps = torch.stack([points + torch.from_numpy(0.2 * random.normal(size=points.shape)) for _ in range(S)])
    (scores,) = score_maps(points, maps, labels, k=[5])
    return Side(scores.spread, tuple(row.nh for row in scores.maps)), scores, labels


def test_variance_degrees_and_interval_by_hand():
    (a, _, labels), (b, _, _) = side(0), side(1, apart=2.6)
    (found, other) = differences([([a], [b]), ([a], [a])], labels)
    D = (b.spread.mean(0) - a.spread.mean(0)).numpy()
    images = sum(D[labels == c].var(ddof=1) * 60 for c in range(4)) / 240**2
    seeds = [np.var(one.nh, ddof=1) / 3 for one in (a, b)]
    variance = images + sum(seeds)
    df = variance**2 / (images**2 / 236 + sum(s**2 / 2 for s in seeds))
    assert found.delta == pytest.approx(np.mean(b.nh) - np.mean(a.nh), rel=1e-12)
    assert (found.standard_error, found.df) == pytest.approx((variance**0.5, df), rel=1e-9)
    half = stats.t.ppf(1 - 0.05 / 4, df) * variance**0.5  # two layers
    assert (found.low, found.high) == pytest.approx((found.delta - half, found.delta + half), rel=1e-9)
    assert found.p == pytest.approx(2 * stats.t.sf(found.delta / variance**0.5, df), rel=1e-9)
    assert found.p_holm == pytest.approx(min(1, 2 * found.p), rel=1e-9)
    assert found.verdict == "ahead"
    assert (other.delta, other.verdict) == (0, "undecided" if other.high > 0.02 else "equivalent")


def test_verdicts():
    phi = torch.linspace(-1, 1, 400, dtype=torch.float64).repeat(3, 1)
    labels = torch.arange(400) % 4

    def one(shift, noise):
        random = torch.Generator().manual_seed(1)
        spread = phi + shift + noise * torch.randn(phi.shape[1], generator=random, dtype=torch.float64)
        return Side(spread, (shift - 1e-4, shift, shift + 1e-4))

    pairs = [([one(0, 0)], [one(d, noise)]) for d, noise in ((0.1, 0.01), (-0.1, 0.01), (0.001, 0.01), (0.01, 0.5))]
    found = differences(pairs, labels)
    assert [one.verdict for one in found] == ["ahead", "behind", "equivalent", "undecided"]
    (tiny,) = differences([([one(0, 0)], [one(0.01, 0.001)])], labels)
    assert (tiny.verdict, tiny.equivalent) == ("ahead", True)  # surely, and surely by little


def test_networks_of_which_every_image_hits_are_not_surely_alike_on_few():
    """Of 60 images none missed: of others one in 25 may."""

    def perfect(N):
        return Side(torch.ones(3, N, dtype=torch.float64), (1.0,) * 3), torch.arange(N) % 3

    for N, verdict in ((60, "undecided"), (600, "equivalent")):
        all_hit, labels = perfect(N)
        (found,) = differences([([all_hit], [all_hit])], labels)
        assert (found.verdict, found.p) == (verdict, 1)
        assert found.standard_error == pytest.approx(2**0.5 / N, rel=1e-12)
    own, _, labels = side(0)
    one = Side(own.spread[:1], own.nh[:1])
    (found,) = differences([([one], [one])], labels)
    assert (found.verdict, found.standard_error) == ("equivalent", 0)  # the same layer, on any images


def test_from_which_layer_on():
    def verdict(delta, error):
        rest = dict.fromkeys(("low", "high", "p", "p_holm", "equivalent", "verdict"), 0)
        return comparison.Difference(delta, error, 100.0, **rest)

    sure, unsure, behind = verdict(0.1, 0.01), verdict(0.01, 0.01), verdict(-0.1, 0.01)
    assert ahead_from([sure, unsure, sure, sure]) == 2
    assert ahead_from([sure, sure]) == 0
    assert ahead_from([sure, unsure]) is None
    assert ahead_from([sure, behind], sign=-1) == 1
    assert ahead_from([verdict(0.1, math.nan)]) is None


def test_runs():
    """Three runs of each take the place of the seeds; two give values and no interval."""
    sides = [side(seed)[0] for seed in range(6)]
    labels = side(0)[2]
    (found,) = differences([(sides[:3], sides[3:])], labels)
    means = [[np.mean(one.nh) for one in some] for some in (sides[:3], sides[3:])]
    D = sum(b.spread.mean(0) - a.spread.mean(0) for a, b in zip(sides[:3], sides[3:], strict=True)) / 3
    variance = statistics.image_variance(D, labels) + sum(np.var(m, ddof=1) / 3 for m in means)
    assert found.standard_error == pytest.approx(variance**0.5, rel=1e-9)
    (two,) = differences([(sides[:2], sides[3:5])], labels)
    assert math.isnan(two.standard_error)
    assert math.isnan(two.low)
    assert two.verdict == "undecided"
    with pytest.raises(InputError, match="equally many runs, at least one, got 2 and 1"):
        differences([(sides[:2], sides[3:4])], labels)
    with pytest.raises(InputError, match="margin must be"):
        differences([(sides[:1], sides[1:2])], labels, margin=0)


def test_classes_sum_to_the_whole_and_match_brute_force():
    (_, a, labels), (_, b, _) = side(0), side(1, apart=2.6)
    delta, error, p = class_differences([list(a.neighbors)], [list(b.neighbors)], labels)
    by_class = [[one.hits[:, labels == c].mean().item() for c in range(4)] for one in (a, b)]
    assert delta == pytest.approx(np.subtract(by_class[1], by_class[0]), abs=1e-12)
    assert (error > 0).all()
    assert ((p >= 0) & (p <= 1)).all()
    # psi of one map by its definition
    indices = a.neighbors[0].long()
    h = a.hits[0]
    M = (labels[indices] == labels[:, None]).double()
    for c in range(4):
        psi = (labels == c).double() * h
        for j in torch.nonzero(labels == c)[:, 0].tolist():
            for slot in range(5):
                psi[indices[j, slot]] += (M[j, slot] - h[j]) / 5
        assert torch.allclose(torch.from_numpy(comparison._class_values([indices], labels)[c]), psi * 4, atol=1e-12)


def test_small_classes_claim_no_differences():
    """30 classes of 3 and two of 2 images on a circle; two networks, neither of which is better at any."""
    labels = torch.arange(30).repeat_interleave(3)
    labels = torch.cat([labels, torch.tensor([30, 30, 31, 31])])
    angle = 2 * torch.pi * labels / 32
    centres = 5 * torch.stack([angle.cos(), angle.sin()], dim=1)
    generator = torch.Generator().manual_seed(0)

    def networks(k):
        return [[[knn(centres + torch.randn(94, 2, generator=generator), k).indices]] for _ in range(2)]

    p = np.array([class_differences(*networks(5), labels)[2] for _ in range(100)])
    assert np.isnan(p[:, 30:]).all()
    assert (p[:, :30] <= 0.05).any(axis=1).mean() <= 0.05
    assert np.isnan(class_differences(*networks(1), labels)[2]).all()


def test_a_large_class_beside_a_small_one_claims_no_difference():
    """Which images of the small one are drawn is most of what its hits vary by, and they are three."""
    labels, generator = (torch.arange(203) >= 200).long(), torch.Generator().manual_seed(7)
    centres = 2 * torch.randn(2, 2, generator=torch.Generator().manual_seed(5))

    def network():
        return [[knn(centres[labels] + torch.randn(203, 2, generator=generator), 20).indices]]

    p = np.array([class_differences(network(), network(), labels)[2][0] for _ in range(600)])
    assert (p <= 0.05).mean() <= 0.06


def test_degrees_of_freedom_are_welchs():
    random = np.random.default_rng(0)
    a, b = random.normal(size=30), 5 * random.normal(size=4)
    phi = np.concatenate([a * 34 / 30, b * 34 / 4])  # of which the sum of both means is the mean
    variance, freedom = statistics.image_variance_and_freedom(phi, np.repeat([0, 1], [30, 4]))
    welch = stats.ttest_ind(a, b, equal_var=False)
    assert freedom == pytest.approx(welch.df)
    assert variance == pytest.approx(((a.mean() - b.mean()) / welch.statistic) ** 2)
    assert statistics.image_variance_and_freedom(np.ones(4), np.array([0, 0, 1, 1])) == (0, math.inf)


def test_classes_of_networks_whose_runs_differ():
    """Three runs of each, in which a class is near another or not, by chance: nothing of networks trained so."""
    labels, random = torch.arange(200) % 4, np.random.default_rng(0)
    shared = random.normal(size=(200, 2))

    def runs(R):
        found = []
        for _ in range(R):
            apart = (2.5 + 0.5 * random.normal(size=4))[labels]
            angle = 2 * np.pi * labels.numpy() / 4
            Z = apart[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1) + shared
            found.append([knn(torch.from_numpy(Z), 5).indices])
        return found

    p = np.array([class_differences(runs(3), runs(3), labels)[2] for _ in range(60)])
    assert (p <= 0.05).any(axis=1).mean() <= 0.1
    a, b = runs(3), runs(3)
    delta, error, _ = class_differences(a, b, labels)
    ones = [[class_differences([one], [own], labels)[0] for one in b] for own in a]
    assert delta == pytest.approx(-np.mean(ones, axis=(0, 1)), abs=1e-12)
    assert (error > class_differences([[*chain(*a)]], [[*chain(*b)]], labels)[1]).all()  # as if of one run
    delta, error, p = class_differences(a[:2], b[:2], labels)
    assert np.isfinite(delta).all()
    assert np.isnan([error, p]).all()


def test_spread_values_need_no_neighbours_twice():
    """For k = 1 the influence values are the hits alone; the spread values are not."""
    points, labels = blobs(3)
    near = knn(points, 31).indices
    assert torch.equal(statistics.influence_values(near[:, :1], labels), statistics.hits(near[:, :1], labels))
    spread = statistics.spread_values(near, labels, k=1)
    M = (labels[near] == labels[:, None]).double()
    expected = M[:, 0].clone()
    for j in range(len(points)):
        expected[near[j, 0]] += M[j, 0] - M[j, 1:].mean()
    assert torch.allclose(spread, expected, atol=1e-12)
    few = torch.cat([labels[:-11] % 2, torch.tensor([2] * 2 + [3] * 3 + [4] * 6)])  # of one other: h(j) itself
    M = (few[near] == few[:, None]).double()
    expected = M[:, 0].clone()
    for j in range(len(points)):
        expected[near[j, 0]] += M[j, 0] - (M[j, 1:], M[j, 1:], M[j, :1], M[j, 1:2], M[j, 1:5])[few[j]].mean()
    assert torch.allclose(statistics.spread_values(near, few, k=1), expected, atol=1e-12)
    assert torch.equal(
        statistics.spread_values(near[:, :3], labels, k=3), statistics.influence_values(near[:, :3], labels)
    )


def test_link_variance_by_brute_force():
    points, labels = blobs(4, N=60)
    for k in (1, 5, 15):
        near = knn(points, statistics.error_neighbors(k, 60)).indices
        M = (labels[:, None] == labels[None]).double()
        agree = (labels[near] == labels[:, None]).double()
        start = k if k >= 15 else 0
        others = 14 if k < 15 else 15  # of each class; with k = 15 they are too few
        a = agree[:, start : start + others].mean(1)
        p = torch.stack([a[labels == c].mean() for c in range(4)])[labels]
        w = torch.zeros(60, 60, dtype=torch.float64).scatter_(1, near[:, :k], 1)
        w = w + w.T
        g = M - a[:, None] - a[None] + (p[:, None] + p[None]) / 2
        expected = ((w * g) ** 2).triu(1).sum() / (60 * k) ** 2 * (k < 15)
        assert statistics.link_variance([near], labels, k=k) == pytest.approx(float(expected), rel=1e-9)


def test_cka():
    random = torch.Generator().manual_seed(0)
    X, Y = (torch.randn(300, d, generator=random, dtype=torch.float64) for d in (20, 40))
    rotation, _ = torch.linalg.qr(torch.randn(20, 20, generator=random, dtype=torch.float64))
    assert similarity.linear_cka(X, 3 * X @ rotation + 1) == pytest.approx(1, abs=1e-9)
    assert abs(similarity.linear_cka(X, Y)) < 0.05  # the biased one is about 0.1
    a, b = X - X.mean(0), Y - Y.mean(0)
    K, L = (Z @ Z.T - torch.diag((Z * Z).sum(1)) for Z in (a, b))
    one, N = torch.ones(300, dtype=torch.float64), 300

    def hsic(K, L):
        middle = (one @ K @ one) * (one @ L @ one) / ((N - 1) * (N - 2))
        return (torch.trace(K @ L) + middle - 2 / (N - 2) * (one @ K @ L @ one)) / (N * (N - 3))

    expected = hsic(K, L) / (hsic(K, K) * hsic(L, L)) ** 0.5
    assert similarity.linear_cka(X, Y) == pytest.approx(float(expected), rel=1e-8)
    with pytest.raises(InputError, match="the same 4 or more images, got 10, 300 rows"):
        similarity.linear_cka(X, Y[:10])


def test_cka_of_any_size_and_of_numbers_alone():
    X, Y = torch.rand(50, 4, dtype=torch.float64), torch.rand(50, 3, dtype=torch.float64)
    expected = similarity.linear_cka(X, Y)
    for size in (1e-120, 1e120):
        assert similarity.linear_cka(X * size, Y) == pytest.approx(expected, rel=1e-9)
    for function in (
        lambda bad: similarity.linear_cka(X * bad, Y),
        lambda bad: similarity.probe_hits(X * bad, range(50)),
    ):
        for bad in (torch.nan, torch.inf, 1j):
            with pytest.raises(InputError, match="points must be"):
                function(bad)


def test_probe_is_at_chance_on_noise():
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(1000) % 5
    noise = torch.randn(1000, 20, generator=random)
    assert similarity.probe_hits(noise, labels).double().mean() == pytest.approx(0.2, abs=0.05)
    points, of = blobs(0, N=1000, apart=4)
    assert similarity.probe_hits(points, of).double().mean() > 0.9
    assert torch.equal(similarity.probe_hits(points, of), similarity.probe_hits(points, of))
