"""Components from row tiles are those of a float64 singular value decomposition of the normalised layer."""

import warnings

import pytest
import torch

from qdv_gpu.errors import InputError
from qdv_gpu.features import normalise as normalisation
from qdv_gpu.features import pca
from qdv_gpu.features.normalise import NORMALISATIONS, over_blocks, tile_rows


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _layer(N=500, D=700):
    """ReLU features with a decaying spectrum, some dead features and some dead rows."""
    X = (_normal(N, 120) * torch.arange(1, 121) ** -0.5 @ _normal(120, D, seed=1) + 0.3 * _normal(N, D, seed=2)).relu()
    X[:, ::10] = 0
    X[5::50] = 0
    return X


def _normalise(X, how):
    X = X.double()
    if how == "minmax":
        return (X - X.min()) / (X.max() - X.min())
    if how == "l2":
        norms = X.norm(dim=1, keepdim=True)
        return X / torch.where(norms > 0, norms, 1)
    if how == "standard":
        deviation = X.std(dim=0, correction=0)
        return (X - X.mean(dim=0)) / torch.where(deviation > 0, deviation, 1)
    return X


def _check(X, how, result, n):
    Y = _normalise(X, how)
    Y = Y - Y.mean(dim=0)
    _, S, V = torch.linalg.svd(Y, full_matrices=False)
    V = V[:n]
    W = result.components.double()
    degrees = len(X) - 1
    best = float(S[:n].square().sum()) / degrees
    assert float((Y @ W.T).square().sum()) / degrees == pytest.approx(best, rel=1e-5)
    assert float(result.variance.sum()) == pytest.approx(best, rel=1e-5)
    assert result.total_variance == pytest.approx(float(S.square().sum()) / degrees, rel=1e-5)
    sine = torch.linalg.matrix_norm(W.T - V.T @ (V @ W.T), ord=2)  # of the largest angle between the subspaces
    assert float(sine.asin()) < 0.02
    torch.testing.assert_close(W @ W.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(result.scores.double(), Y @ W.T, rtol=0, atol=1e-5 * float(S[0]))


@pytest.mark.parametrize("how", NORMALISATIONS)
def test_equals_singular_value_decomposition(how):
    X = _layer()
    _check(X, how, pca.principal_components([X], 50, normalise=how), 50)


@pytest.fixture(scope="module")
def whole():
    return pca.principal_components([_layer(300, 400)], 20)


@pytest.mark.parametrize("rows", [1, 7, 64, 299])
def test_tile_size_does_not_matter(rows, whole):
    X = _layer(300, 400)
    result = pca.principal_components(X.split(rows), 20)
    _check(X, "minmax", result, 20)
    assert result.passes == whole.passes
    torch.testing.assert_close(result.scores, whole.scores, rtol=0, atol=1e-3 * float(whole.scores.abs().max()))


def test_tiles_may_be_computed_anew():
    X = _layer()

    class Tiles:
        def __iter__(self):
            return iter(X.clone().split(100))

    assert torch.equal(pca.reduce(Tiles(), 5), pca.reduce(X.split(100), 5))


def test_half_precision_tiles():
    X = _layer().half()
    _check(X, "minmax", pca.principal_components([X], 10), 10)
    assert pca.reduce([X], 10).dtype == torch.float32


def test_same_bits_twice_and_signs():
    X = _layer()
    one, two = pca.principal_components([X], 10), pca.principal_components([X], 10)
    assert torch.equal(one.scores, two.scores)
    W = one.components
    assert (W.gather(1, W.abs().argmax(dim=1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("how", NORMALISATIONS)
@pytest.mark.parametrize("scale", [1e-25, 1e20])
def test_very_small_and_large_activations(scale, how):
    X = _layer(200, 300)
    result = pca.principal_components((X * scale).split(30), 10, normalise=how)
    expected = pca.principal_components([X], 10, normalise=how).scores * (scale if how == "none" else 1)
    torch.testing.assert_close(result.scores, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("how", NORMALISATIONS)
def test_no_reduction(how):
    X = _layer(60, 40)
    result = pca.reduce(X.split(7), 0, normalise=how)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), _normalise(X, how), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("N", "D"), [(12, 40), (40, 12), (2, 5), (5, 1), (1, 3)])
def test_more_components_than_exist(N, D):
    X = _normal(N, D)
    result = pca.reduce([X], 50)
    assert result.shape == (N, min(N - 1, D))
    Y = _normalise(X, "minmax")
    Y = Y - Y.mean(dim=0)
    distances = torch.cdist(Y, Y) if result.shape[1] else torch.zeros(1, 1, dtype=torch.float64)
    torch.testing.assert_close(torch.cdist(result.double(), result.double()), distances, rtol=0, atol=1e-4)


@pytest.mark.parametrize("how", NORMALISATIONS)
@pytest.mark.parametrize("value", [0.0, 3.7])
def test_constant_layer(value, how):
    assert not pca.reduce([torch.full((30, 20), value)], 5, normalise=how).any()
    assert pca.reduce([torch.full((30, 20), value)], 0, normalise=how).isfinite().all()


def test_rank_below_the_number_of_components():
    X = _normal(50, 3) @ _normal(3, 40, seed=1)
    result = pca.principal_components([X], 10)
    assert result.scores.isfinite().all()
    assert float(result.variance[3:].sum()) < 1e-9 * float(result.variance.sum())


def test_maximum_of_passes_warns(monkeypatch):
    monkeypatch.setattr(pca, "MAX_PASSES", 2)
    with pytest.warns(RuntimeWarning, match="conv3: the captured variance still changes"):
        pca.reduce([_layer()], 5, name="conv3")
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pca.reduce([_layer()], 5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("n", [0, 3])
def test_unusable_activations_name_layer_and_row(n, value):
    X = _normal(30, 6)
    X[17, 2] = X[23, 0] = value
    with pytest.raises(InputError, match="conv3: activations must be finite, row 17"):
        pca.reduce(X.split(4), n, name="conv3")


def test_bad_input():
    X = _normal(30, 6)
    with pytest.raises(InputError, match="did you mean minmax"):
        pca.reduce([X], 3, normalise="minmx")
    with pytest.raises(InputError, match="got -1"):
        pca.reduce([X], -1)
    with pytest.raises(InputError, match="features per row changed from 6 to 5"):
        pca.reduce([X, X[:, :5]], 3)
    with pytest.raises(InputError, match="there are no rows"):
        pca.reduce([], 3)


@pytest.mark.parametrize("how", NORMALISATIONS)
def test_components_on_a_gpu(how, cuda):
    X = _layer()
    found = pca.principal_components(X.to(cuda).split(64), 20, normalise=how)
    assert found.scores.is_cuda
    moved = [value.cpu() if isinstance(value, torch.Tensor) else value for value in found]
    _check(X, how, pca.Components(*moved), 20)


def test_blocks_of_a_gpu_are_few_and_bounded(monkeypatch):
    device = torch.device("cuda")
    assert over_blocks(lambda rows: rows, 10_000, 160, device) == [slice(0, 10_000)]
    monkeypatch.setattr(normalisation, "CUDA_BLOCK", 1000)
    assert over_blocks(lambda rows: rows, 250, 10, device) == [slice(0, 100), slice(100, 200), slice(200, 250)]
    assert tile_rows(4096, "cuda") >= 4 * tile_rows(4096, "cpu")


def test_float32_whatever_torch_makes_by_default():
    X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    truth = pca.reduce([X], 3)
    torch.set_default_dtype(torch.float64)
    try:
        found = pca.reduce([X], 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, truth)
