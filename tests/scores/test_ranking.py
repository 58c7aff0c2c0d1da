"""Ranking many networks: its arithmetic against loops, its error rates against a direct simulation, and odd input."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from qdv_gpu.errors import InputError
from qdv_gpu.scores import ranking
from qdv_gpu.scores.comparison import Side, differences
from qdv_gpu.scores.ranking import Estimates, estimates, gains, ranks
from qdv_gpu.scores.relation import halves, relation
from qdv_gpu.scores.statistics import image_covariance, image_variance

N, C = 120, 3
LABELS = torch.arange(N) % C


def sides(V, R=1, S=3, shift=0.0, noise=0.01):
    """Runs of V candidates that have a part of the images' values in common; each is ahead of the last by `shift`."""
    random = np.random.default_rng(V + 10 * R)
    shared = random.normal(0.5, 0.2, N)
    found = []
    for i in range(V):
        own = shared + random.normal(0, 0.1, N) + i * shift
        runs = [own + noise * random.normal(size=(S, 1)) + 0.01 * random.normal(size=(S, N)) for _ in range(R)]
        found.append([Side(torch.from_numpy(run), tuple(run.mean(axis=1))) for run in runs])
    return found


def known(nh, images, noise=0.0, noise_df=40.0):
    nh = np.asarray(nh, float)
    return Estimates(nh, np.asarray(images, float), np.full(len(nh), float(noise)), 1e6, noise_df)


def test_sigma_by_loops():
    candidates = sides(4)
    found = estimates(candidates, LABELS)
    phi = [runs[0].spread.mean(0).numpy() for runs in candidates]
    for i in range(4):
        for j in range(4):
            expected = 0.0
            for c in range(C):
                own = [n for n in range(N) if n % C == c]
                a, b = ([one[n] for n in own] for one in (phi[i], phi[j]))
                mean_a, mean_b = sum(a) / len(own), sum(b) / len(own)
                covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) / (len(own) - 1)
                expected += len(own) / N**2 * covariance
            assert found.images[i, j] == pytest.approx(expected, rel=1e-9)
    pooled = np.mean([np.var(runs[0].nh, ddof=1) for runs in candidates])
    assert found.noise == pytest.approx(np.full(4, pooled / 3), rel=1e-9)
    assert (found.images_df, found.noise_df) == (N - C, 8)
    assert np.diag(found.sigma) == pytest.approx([image_variance(x, LABELS) + pooled / 3 for x in phi], rel=1e-9)
    root = ranking._root(found.images)
    assert root @ root.T == pytest.approx(found.images, rel=1e-9)
    with pytest.raises(InputError, match="at least 2 points in every class, class 7 has 1"):
        image_covariance(torch.zeros(2, 5), torch.tensor([0, 0, 1, 1, 7]))


def test_three_runs_take_the_place_of_the_seeds_and_two_give_no_interval():
    candidates = sides(3, R=3)
    found = estimates(candidates, LABELS)
    means = [[np.mean(run.nh) for run in runs] for runs in candidates]
    assert found.nh == pytest.approx(np.mean(means, axis=1), rel=1e-12)
    assert found.noise == pytest.approx(np.full(3, np.mean(np.var(means, axis=1, ddof=1)) / 3), rel=1e-9)
    assert found.noise_df == 6
    two = estimates(sides(3, R=2, shift=5.0), LABELS)
    order, over = ranks(two), gains(two, 0)
    assert not two.known
    assert order.can_be_best.all()
    assert order.ranks.tolist() == [[1, 3]] * 3
    assert np.isnan([order.low, order.high, two.standard_error]).all()
    assert over.verdicts == ("baseline", "undecided", "undecided")
    assert over.delta[0] == over.low[0] == 0
    assert np.isnan(over.low[1:]).all()


def test_best_and_ranks_against_a_direct_simulation():
    random = np.random.default_rng(1)
    A = random.normal(size=(5, 9)) * 0.01
    sigma = A @ A.T
    nh = np.array([0.5, 0.52, 0.55, 0.58, 0.6])
    G = random.multivariate_normal(np.zeros(5), sigma, 400_000)
    error = np.array([[math.sqrt(sigma[i, i] + sigma[j, j] - 2 * sigma[i, j]) for j in range(5)] for i in range(5)])
    best, most = [], np.zeros(len(G))
    for i in range(5):
        ratios = np.stack([(G[:, j] - G[:, i]) / error[i, j] for j in range(5) if j != i])
        d = np.quantile(ratios.max(axis=0), 0.95)
        best.append(all(nh[j] - nh[i] <= d * error[i, j] for j in range(5) if j != i))
        most = np.maximum(most, np.abs(ratios).max(axis=0))
    c = np.quantile(most, 0.95)
    found = ranks(known(nh, sigma))
    assert found.can_be_best.tolist() == best
    assert 1 < sum(best) < 5
    for i in range(5):
        above = sum(nh[j] - nh[i] > c * error[i, j] for j in range(5) if j != i)
        below = sum(nh[i] - nh[j] > c * error[i, j] for j in range(5) if j != i)
        assert found.ranks[i].tolist() == [1 + above if best[i] else max(2, 1 + above), 5 - below]
    assert found.optimism == pytest.approx(G[:, best].max(axis=1).mean(), rel=0.03)
    largest = np.concatenate([block.max(axis=(1, 2)) for block in ranking._drawn_ratios(known(nh, sigma))])
    assert np.quantile(largest, 0.95) == pytest.approx(c, rel=0.02)


@pytest.mark.parametrize("nh", [[0.5, 0.5, 0.5, 0.5, 0.524], [0.5, 0.5, 0.5, 0.522, 0.524]])
def test_ranks_say_of_the_best_what_can_be_best_says(nh):
    """All pairs at once are too many to decide here, and each against the best are not."""
    found = ranks(known(nh, np.eye(5) * 0.007**2))
    assert found.can_be_best.tolist() == [x > 0.52 for x in nh]
    alone = found.can_be_best.sum() == 1
    assert found.ranks.tolist() == [[1, 1 if alone else 5] if x > 0.52 else [2, 5] for x in nh]


def test_few_degrees_of_freedom_widen_as_student_and_dunnett_do():
    """The noise alone, with 6 degrees of freedom: the points are those of the tables."""
    found = known(np.zeros(2), np.zeros((2, 2)), noise=0.5, noise_df=6.0)
    assert gains(found, 0).high[1] == pytest.approx(stats.t.ppf(0.975, 6), rel=0.03)
    three = known(np.zeros(4), np.zeros((4, 4)), noise=0.5, noise_df=20.0)
    assert gains(three, 0).high[1] == pytest.approx(2.57, rel=0.03)  # Dunnett's table: 3 treatments, 20, two-sided
    largest = np.concatenate([block.max(axis=(1, 2)) for block in ranking._drawn_ratios(three)])
    assert np.quantile(largest, 0.95) == pytest.approx(3.96 / 2**0.5, rel=0.03)  # Tukey's table: 4 means, 20


@pytest.mark.parametrize("R", [1, 3])
def test_two_candidates_agree_with_differences(R):
    candidates = sides(2, R=R, shift=0.05)
    (one, other) = differences([(candidates[0], candidates[1])] * 2, LABELS)
    assert one == other
    over = gains(estimates(candidates, LABELS), 0, layers=2)
    assert over.delta[1] == pytest.approx(one.delta, rel=1e-12)
    assert ranking._errors(estimates(candidates, LABELS))[0, 1] == pytest.approx(one.standard_error, rel=1e-9)
    # Those of `differences` follow Welch's degrees of freedom, for unequal variances.
    assert over.high[1] - over.low[1] == pytest.approx(one.high - one.low, rel=0.1)
    assert over.verdicts[1] == one.verdict


def test_error_rates():
    """Fresh samples of known noise: the true best is held, and nothing is claimed where all are equal."""
    random = np.random.default_rng(0)
    held = claimed = wrong = 0
    for _ in range(30):
        phi = random.normal(0.5, 0.3, N) + random.normal(0, 0.2, (8, N))
        runs = [one + random.normal(0, 0.02, (3, 1)) for one in phi]
        found = estimates([[Side(torch.from_numpy(run), tuple(run.mean(axis=1)))] for run in runs], LABELS)
        order = ranks(found)
        held += order.can_be_best[3]
        true = 1 + (np.arange(8) - 3) % 8  # as if equal ones were each a hair ahead of the next, the fourth of all
        wrong += ((true < order.ranks[:, 0]) | (true > order.ranks[:, 1])).any()
        claimed += any(verdict in ("ahead", "behind") for verdict in gains(found, 0).verdicts)
    assert held >= 27
    assert wrong <= 5
    assert claimed <= 5


def test_one_ties_equal_ones_and_no_variance():
    alone = estimates(sides(1), LABELS)
    assert (ranks(alone).can_be_best.tolist(), ranks(alone).ranks.tolist()) == ([True], [[1, 1]])
    assert gains(alone, 0).verdicts == ("baseline",)
    assert ranks(alone).optimism == 0
    same = sides(1)[0]
    tied = estimates([same] * 3, LABELS)
    assert ranks(tied).can_be_best.all()
    assert ranks(tied).ranks.tolist() == [[1, 3]] * 3
    assert gains(tied, 1).verdicts == ("undecided", "baseline", "undecided")
    still = known([0.5, 0.5, 0.6], np.zeros((3, 3)))
    assert ranks(still).can_be_best.tolist() == [False, False, True]
    assert ranks(still).ranks.tolist() == [[2, 3], [2, 3], [1, 1]]
    assert gains(still, 0).verdicts == ("baseline", "undecided", "ahead")
    single = sides(2, S=1)
    assert estimates(single, LABELS).noise.tolist() == [0, 0]  # one map: of this map


def test_the_same_numbers_every_time():
    found = estimates(sides(6), LABELS)
    a, b = ranks(found), ranks(found)
    assert (a.optimism, a.ranks.tolist()) == (b.optimism, b.ranks.tolist())
    assert gains(found, 2).low.tolist() == gains(found, 2).low.tolist()


def test_bad_input():
    with pytest.raises(InputError, match="at least one candidate is required"):
        estimates([], LABELS)
    with pytest.raises(InputError, match=r"equally many runs, at least one, got \[1, 2\]"):
        estimates([*sides(1), *sides(1, R=2)], LABELS)
    with pytest.raises(InputError, match="must be of equally many, got 3 and 2 values"):
        relation(np.zeros((1, 3)), [1, 2])
    with pytest.raises(InputError, match="halves of the images need at least 2 points in every class"):
        halves([0, 0, 1])


def test_halves_share_each_class():
    first = halves(LABELS)
    assert np.bincount(LABELS[first]).tolist() == [20] * 3
    assert np.array_equal(first, halves(LABELS))
    odd = torch.tensor([0] * 5 + [1] * 4)
    assert np.bincount(odd[halves(odd)], minlength=2).tolist() in ([3, 2], [2, 2])


def test_correlation_by_hand_and_permutations_of_the_largest():
    random = np.random.default_rng(0)
    nh, accuracy = random.random((3, 8)), random.random(8)
    nh[1] += 5 * accuracy
    found = relation(nh, accuracy)
    expected = [stats.pearsonr(row, accuracy) for row in nh]
    assert found.r == pytest.approx([one.statistic for one in expected], rel=1e-9)
    intervals = [one.confidence_interval(0.95) for one in expected]
    assert np.stack([found.low, found.high], axis=1) == pytest.approx(np.array(intervals), rel=1e-9)
    orders = [random.permutation(8) for _ in range(4000)]
    most = np.array([max(abs(np.corrcoef(row, accuracy[order])[0, 1]) for row in nh) for order in orders])
    assert found.p == pytest.approx([(most >= abs(r)).mean() for r in found.r], abs=0.03)
    assert found.p[1] < 0.05 < found.p[0]


def test_no_coefficient_of_few_or_equal_ones():
    few = relation(np.zeros((2, 4)), np.arange(4))
    assert np.isnan([few.r, few.p, few.low, few.high]).all()
    assert few.nh.shape == (2, 4)
    equal = relation([[0.5] * 6, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]], np.arange(6))
    assert math.isnan(equal.r[0])
    assert math.isnan(equal.p[0])
    assert equal.r[1] == pytest.approx(1)
    assert equal.p[1] < 0.02
    assert np.isnan(relation(np.random.default_rng(0).random((2, 6)), np.ones(6)).p).all()
