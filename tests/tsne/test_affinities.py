"""Every row has its perplexity, whatever the distances; P is symmetric and sums to 1."""

import math

import numpy as np
import pytest
import torch

from qdv_gpu.errors import InputError
from qdv_gpu.kernels import rows
from qdv_gpu.machine import on_threads
from qdv_gpu.neighbors import knn
from qdv_gpu.tsne import affinities
from qdv_gpu.tsne.affinities import SparseAffinities, conditional_affinities, joint_affinities


def points(n, d=8, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perplexities(P):
    return (-torch.xlogy(P, P).sum(1)).exp()


def dense(P):
    """A sparse P as a [N, N] tensor."""
    N = len(P.indptr) - 1
    result = torch.zeros(N, N, dtype=P.values.dtype)
    result[torch.arange(N).repeat_interleave(P.indptr.diff()), P.indices.long()] = P.values
    return result


def bisected(distances, perplexity):
    """p_{j|i} of one row by plain bisection of beta."""
    low, high = 0.0, 1e6
    for _ in range(200):
        beta = (low + high) / 2
        p = np.exp(-beta * (distances - distances.min()))
        p /= p.sum()
        entropy = -np.sum(p * np.log(np.maximum(p, 1e-300)))
        low, high = (beta, high) if entropy > math.log(perplexity) else (low, beta)
    return p


@pytest.mark.parametrize("search", [conditional_affinities, lambda D, perplexity: affinities._search(D, perplexity)])
@pytest.mark.parametrize(("n", "perplexity"), [(4, 1), (31, 10), (33, 2.5), (1000, 40), (1000, 333)])
def test_every_row_reaches_its_perplexity(search, n, perplexity):
    P = search(knn(points(n), int(3 * perplexity)).squared_distances, perplexity=perplexity)
    torch.testing.assert_close(P.sum(1), torch.ones(n, dtype=torch.float64))
    assert (perplexities(P) / perplexity - 1).abs().max() < 1e-6


@pytest.mark.parametrize("search", [conditional_affinities, lambda D, perplexity: affinities._search(D, perplexity)])
def test_search_agrees_with_bisection(search):
    D = knn(points(50), 30).squared_distances
    truth = np.stack([bisected(row, 10) for row in D.numpy()])
    np.testing.assert_allclose(search(D, perplexity=10).numpy(), truth, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("search", [conditional_affinities, lambda D, perplexity: affinities._search(D, perplexity)])
@pytest.mark.parametrize("scale", [1e-150, 1e-8, 1.0, 1e150])
def test_outliers_and_scales_give_no_nan(search, scale):
    D = knn(points(100), 60).squared_distances.clone()
    D[:50, 30:] += 1e16  # half of the neighbours are far away
    D[7] += 1e12  # a lone point: all others are far, at nearly the same distance
    P = search(D * scale, perplexity=20)
    assert (perplexities(P) - 20).abs().max() < 1e-4
    assert P.isfinite().all()


def test_newtons_circles_are_left():
    """Ordinary data in which Newton's method for log(beta) ran between 1.32 and 18.92 around a root at 3.60."""
    X = torch.randn(600, 20, generator=torch.Generator().manual_seed(299))
    D = knn(X, 60).squared_distances
    for search in (conditional_affinities, affinities._search):
        assert (perplexities(search(D, perplexity=20)) / 20 - 1).abs().max() < 1e-6


def hostile_rows(k, n, seed):
    """Squared distances [9 n, k] at scales, and with steps and ties, that make a search by slopes go astray."""
    rng = np.random.default_rng(seed)
    of_row = (n, 1)
    kinds = [
        np.exp(rng.normal(size=(n, k)) * rng.uniform(0, 40, of_row)),
        rng.random((n, k)) ** rng.uniform(0.01, 60, of_row),
        10.0 ** rng.integers(-150, 140, (n, k)),
        rng.random((n, k)) * 1e-6 + (rng.random((n, k)) < 0.3) * 10.0 ** rng.integers(0, 30, of_row),
        rng.random((n, k)).cumsum(1),
        rng.integers(0, 4, (n, k)) * 10.0 ** rng.integers(-20, 20, of_row)
        + rng.random((n, k)) * 10.0 ** rng.integers(-40, 5, of_row),
        rng.chisquare(20, (n, k)).astype(np.float32),
        rng.exponential(size=(n, k)),
        np.abs(rng.normal(size=(n, k))) ** rng.choice([-3, -1, 0.1, 8, 30], of_row)
        * 10.0 ** rng.uniform(-140, 140, of_row),
    ]
    return torch.from_numpy(np.concatenate(kinds).clip(0, 1e300))


@pytest.mark.parametrize("n", [500, pytest.param(200_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("perplexity", [1, 1.5, 2, 5, 20, 40])
def test_hostile_distances(n, perplexity):
    """Slow: 10^7 rows. The search asserts that each is found."""
    for seed in range(1 if n == 500 else 1 + n // 200_000):
        D = hostile_rows(int(3 * perplexity), n, seed)
        P = conditional_affinities(D, perplexity=perplexity)
        torch.testing.assert_close(P.sum(1), torch.ones(len(D), dtype=torch.float64))
    torch.testing.assert_close(affinities._search(D[::50], perplexity), P[::50], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("search", [conditional_affinities, lambda D, perplexity: affinities._search(D, perplexity)])
def test_more_duplicates_than_the_perplexity_share_equally(search):
    D = torch.tensor([[0.0] * 6 + [1.0] * 6, [2.0] * 4 + [3.0] * 8, [5.0] * 12], dtype=torch.float64)
    P = search(D, perplexity=4)
    torch.testing.assert_close(P[0, :6], torch.full((6,), 1 / 6, dtype=torch.float64))
    torch.testing.assert_close(P[1, :4], torch.full((4,), 1 / 4, dtype=torch.float64))
    torch.testing.assert_close(P[2], torch.full((12,), 1 / 12, dtype=torch.float64))
    assert P[0, 6:].max() == 0


def test_a_row_does_not_depend_on_the_others():
    D = knn(points(200), 30).squared_distances
    whole = conditional_affinities(D, perplexity=10)
    assert torch.equal(conditional_affinities(D[50:60], perplexity=10), whole[50:60])


@pytest.mark.parametrize("kind", ["knn", "full"])
def test_bits_do_not_depend_on_the_threads(kind, monkeypatch):
    monkeypatch.setattr(rows, "WORTH", 1)
    results = []
    for threads in (1, 3):
        with on_threads(threads):
            P = joint_affinities(points(300), perplexity=20, kind=kind)
        results.append(P.values if kind == "knn" else P)
    assert torch.equal(*results)


@pytest.mark.parametrize("n", [4, 33, 300])
def test_joint_affinities_are_symmetric_and_sum_to_one(n):
    X = points(n)
    perplexity = min(20, (n - 1) / 3)
    sparse, full = joint_affinities(X, perplexity=perplexity), joint_affinities(X, perplexity=perplexity, kind="full")
    for P in (dense(sparse), full):
        assert torch.equal(P, P.T)
        assert P.diagonal().abs().max() == 0
        assert abs(P.double().sum() - 1) < 1e-6
    for i in range(n):
        row = sparse.indices[sparse.indptr[i] : sparse.indptr[i + 1]]
        assert (row.diff() > 0).all()


def test_knn_over_all_points_is_full():
    X = points(31)
    torch.testing.assert_close(
        dense(joint_affinities(X, perplexity=10)), joint_affinities(X, perplexity=10, kind="full")
    )


def test_both_symmetrisations_agree():
    neighbors = knn(points(100), 30)
    conditional = conditional_affinities(neighbors.squared_distances, perplexity=10)
    ours = affinities._symmetrised(neighbors.indices, conditional)
    other = affinities._symmetrised_by_sorting(neighbors.indices, conditional)
    assert torch.equal(ours.indptr, other.indptr)
    assert torch.equal(ours.indices, other.indices)
    torch.testing.assert_close(ours.values, other.values)


@pytest.mark.parametrize("kind", ["knn", "full"])
def test_duplicates_in_the_data(kind):
    X = points(40).repeat_interleave(5, 0)
    P = joint_affinities(X, perplexity=3, kind=kind)
    values = P.values if isinstance(P, SparseAffinities) else P
    assert values.isfinite().all()
    assert abs(values.double().sum() - 1) < 1e-6


@pytest.mark.parametrize("perplexity", [0, 0.99, 10.1, math.nan, math.inf, -3, "thirty", "5", True, None])
def test_perplexity_out_of_range(perplexity):
    with pytest.raises(InputError, match="perplexity"):
        joint_affinities(points(31), perplexity=perplexity)


def test_unknown_kind():
    with pytest.raises(InputError, match="did you mean full"):
        joint_affinities(points(31), perplexity=5, kind="ful")


@pytest.mark.parametrize("kind", ["knn", "full"])
def test_points_that_are_not_finite_are_refused(kind):
    X = points(40)
    X[7, 1] = torch.nan
    with pytest.raises(InputError, match="row 7 is not"):
        joint_affinities(X, perplexity=5, kind=kind)


@pytest.mark.parametrize("kind", ["knn", "full"])
def test_cuda_agrees_with_cpu(kind, cuda):
    X = points(500)
    on_cpu, on_cuda = (joint_affinities(x, perplexity=30, kind=kind) for x in (X, X.to(cuda)))
    for a, b in zip(on_cpu, on_cuda, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-5, atol=1e-12)


def test_of_many_points_on_a_gpu_nearly_all_neighbours_are_found(cuda, monkeypatch):
    X = points(400, 12)
    monkeypatch.setattr(affinities, "CUDA_EXACT_UP_TO", 399)
    exact, nearly = joint_affinities(X, perplexity=10), joint_affinities(X.to(cuda), perplexity=10)
    missing = abs(len(nearly.indices) - len(exact.indices)) / len(exact.indices)
    assert missing <= 0.03
    assert float(nearly.values.sum()) == pytest.approx(1, abs=1e-5)
    searched = []
    monkeypatch.setattr(affinities, "neighbor_blocks", lambda X, k, engine: searched.append(engine) or iter(()))
    affinities._shares(X.to(cuda), 10)
    monkeypatch.setattr(affinities, "CUDA_EXACT_UP_TO", 400)
    affinities._shares(X.to(cuda), 10)
    assert searched == ["inverted", "auto"]
