"""The gradient is that of the KL divergence, a seed gives the same bits, and bad input is refused."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import tsne_reference as reference
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.manifold import TSNE as ScikitTSNE
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from qdv_gpu import TSNE
from qdv_gpu.errors import InputError, MissingPackageError
from qdv_gpu.kernels import cpu
from qdv_gpu.machine import on_threads
from qdv_gpu.progress import watched
from qdv_gpu.tsne import estimator as tsne
from qdv_gpu.tsne import schedule
from qdv_gpu.tsne.affinities import joint_affinities
from qdv_gpu.tsne.engines import cpu as cpu_engine
from qdv_gpu.tsne.objective import SIMILARITIES, kl_divergence
from qdv_gpu.tsne.problem import Phase, stacked
from qdv_gpu.tsne.schedule import descend

DIGITS = load_digits().data.astype(np.float32)
similarities = pytest.mark.parametrize("similarity", SIMILARITIES)
kinds = pytest.mark.parametrize("kind", ["knn", "full"])


@pytest.mark.parametrize(("iterations", "said"), [(250, 1), (251, 0)])
def test_a_map_that_stops_in_early_exaggeration_is_said_once(lines, iterations, said):
    tsne.warn_if_short.cache_clear()
    for _ in range(2):
        TSNE(perplexity=5, iterations=iterations, device="cpu").fit_transform(points(30))
    assert ["end within the early exaggeration of 250" in line for line in lines()] == [True] * said


def points(n, d=8, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def affinities(n, kind):
    return joint_affinities(points(n), perplexity=min(30, (n - 1) / 3), kind=kind)


def forces(P, Z, *, gaussian):
    """Attraction and repulsion [N, 2] of one embedding by the numba loops, and the sum of the weights."""
    N, flat = len(Z), Z.numpy().T.copy()
    attraction, partial = np.full((2, N), np.nan, "f"), np.full((cpu.BANDS, 2, N), np.nan, "f")
    weight = np.full(cpu.BANDS, np.nan)
    cpu.repel(0, cpu.BANDS, flat, gaussian or None, partial, weight)
    packed = Z.contiguous().numpy().view(np.uint64)[:, 0].copy()
    _, *rows = stacked([P], copies=1).on_cpu()
    cpu.attract(0, N, flat, packed, *rows, gaussian or None, attraction)
    repulsion = np.where(np.isnan(partial), 0, partial).sum(axis=0, dtype=np.float64)
    return attraction.T, repulsion.T, 2 * weight.sum()


def gradient(P, Z, *, gaussian):
    attraction, repulsion, weight = forces(P, Z, gaussian=gaussian)
    return 4 * torch.from_numpy(attraction - repulsion / weight)


EMBEDDINGS = {
    "4": reference.cloud(4),
    "31": reference.cloud(31),
    "33": reference.cloud(33),
    "1000": reference.cloud(1000, 2.0),
    "duplicates": reference.cloud(40).repeat_interleave(3, 0),
    "far": reference.far_apart(130),
    "lone": torch.cat([reference.cloud(50), torch.full((1, 2), 1e4)]),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
@similarities
@kinds
def test_gradient_agrees_with_autograd(name, similarity, kind):
    Z = EMBEDDINGS[name]
    P = affinities(len(Z), kind)
    truth = reference.gradient(reference.matrix(P), Z, gaussian=similarity == "gaussian")
    assert (gradient(P, Z, gaussian=similarity == "gaussian") - truth).norm() <= 1e-5 * truth.norm()


@similarities
@kinds
def test_descent_agrees_with_float64(similarity, kind):
    P, start = affinities(60, kind), reference.cloud(60)
    gaussian = similarity == "gaussian"
    found, *_ = descend([P], start[None], phases=[Phase(15, 4.0, 0.5)], learning_rate=2.0, gaussian=gaussian)
    truth = reference.descend(
        reference.matrix(P), start, iterations=15, exaggeration=4.0, momentum=0.5, rate=2.0, gaussian=gaussian
    )
    assert (truth - start).norm() > 0.1 * start.norm()
    assert (found[0] - truth).norm() <= 1e-4 * truth.norm()


def test_divergence_is_no_higher_than_scikit_learns():
    X = DIGITS[:400]
    peer = ScikitTSNE(init="random", random_state=0, max_iter=500).fit(X)
    ours = TSNE(iterations=500)
    kl = ours.fit(X).kl_divergence_
    assert kl <= 1.03 * kl_divergence(joint_affinities(torch.from_numpy(X)), torch.from_numpy(peer.embedding_))
    assert (ours.iterations_, ours.engine_, ours.learning_rate_, ours.n_features_in_) == (500, "exact", 50.0, 64)


@similarities
@kinds
def test_a_random_map_is_worse(similarity, kind):
    model = TSNE(iterations=300, perplexity=10, similarity=similarity, affinities=kind)
    model.fit(DIGITS[:200])
    P = joint_affinities(torch.from_numpy(DIGITS[:200]), perplexity=10, kind=kind)
    shuffled = torch.from_numpy(model.embedding_)[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    assert model.kl_divergence_ < 0.6 * kl_divergence(P, shuffled, similarity=similarity)


@similarities
def test_noise_does_not_stay_collapsed(similarity):
    X = torch.randn(300, 50, generator=torch.Generator().manual_seed(0))
    Z = TSNE(perplexity=20, iterations=600, similarity=similarity).fit_transform(X)
    assert Z.std() > 0.1


@similarities
@kinds
def test_bits_do_not_depend_on_the_threads(similarity, kind):
    X, results = DIGITS[:1501], []
    for threads in (1, 3):
        with on_threads(threads):
            results.append(TSNE(iterations=10, similarity=similarity, affinities=kind).fit_transform(X))
    np.testing.assert_array_equal(*results)


@similarities
@kinds
def test_batches_and_seeds_give_the_bits_of_single_runs(similarity, kind):
    model = TSNE(iterations=40, perplexity=5, similarity=similarity, affinities=kind, seed=3)
    X = np.stack([DIGITS[:60], DIGITS[60:120]])
    both = model.fit_transform(X, seeds=3)
    assert both.shape == (2, 3, 60, 2)
    assert model.kl_divergence_.shape == (2, 3)
    np.testing.assert_array_equal(model.fit_transform(X), both[:, 0])
    np.testing.assert_array_equal(model.fit_transform(X[1], seeds=3), both[1])
    np.testing.assert_array_equal(model.fit_transform(X[0], seeds=1), both[0, :1])
    last = clone(model).set_params(seed=5)
    np.testing.assert_array_equal(last.fit_transform(X[1]), both[1, 2])
    assert isinstance(last.kl_divergence_, float)
    assert not np.array_equal(both[0, 0], both[0, 1])


def test_arrays_come_back_as_their_kind():
    model = TSNE(iterations=5, perplexity=5, device="cpu")
    whole = np.round(DIGITS[:40])
    expected = model.fit_transform(whole)
    assert isinstance(expected, np.ndarray)
    assert expected.dtype == np.float32
    for same in (
        whole.astype(np.float16),
        whole.astype(np.uint8),
        whole.astype(np.int64),
        whole.tolist(),
        whole[::-1][::-1],
    ):
        np.testing.assert_array_equal(model.fit_transform(same), expected)
    tensor = model.fit_transform(torch.from_numpy(whole).requires_grad_())
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(tensor.numpy(), expected)


def test_starts():
    X = DIGITS[:50]
    model = TSNE(iterations=1, perplexity=5, learning_rate=1e-30)
    pca = model.set_params(init="pca").fit_transform(X)
    assert pca[:, 0].std() == pytest.approx(1e-4, rel=1e-3)
    assert pca[:, 0].std() > pca[:, 1].std() > 0
    wide = np.random.default_rng(0).normal(size=(50, 200))
    wide_pca, scores = model.fit_transform(wide), np.linalg.svd(wide - wide.mean(0))
    scores = scores[0][:, :2] * scores[1][:2]
    scores *= np.sign(scores[np.abs(scores).argmax(0), [0, 1]]) * 1e-4 / scores[:, 0].std()
    np.testing.assert_allclose(wide_pca, scores, rtol=1e-4, atol=1e-9)
    np.testing.assert_array_equal(model.fit_transform(X[:, 20:21])[:, 1], 0)  # one feature has one component
    given = np.random.default_rng(0).normal(size=(2, 50, 2)).astype(np.float32)
    np.testing.assert_array_equal(model.set_params(init=given).fit_transform(X, seeds=2), given)
    np.testing.assert_array_equal(model.set_params(init=given[0].astype(float)).fit_transform(X, seeds=2)[1], given[0])
    random = model.set_params(init="random").fit_transform(np.repeat(X, 20, 0))
    assert random.std() == pytest.approx(1e-4, rel=0.1)


def test_scikit_learn_conventions():
    model = TSNE(perplexity=7, init=np.zeros((40, 2)), seed=2)
    copy = clone(model)
    assert copy is not model
    assert copy.get_params()["perplexity"] == 7
    assert copy.set_params(iterations=3, init="random").iterations == 3
    assert "perplexity=7" in repr(copy)
    assert make_pipeline(StandardScaler(), copy).fit_transform(DIGITS[:40]).shape == (40, 2)


@pytest.mark.parametrize("init", ["random", "pca"])
@similarities
@kinds
def test_equal_points_give_a_finite_map_and_a_warning(init, similarity, kind):
    with pytest.warns(UserWarning, match="all points are equal"):
        Z = TSNE(iterations=300, perplexity=5, init=init, similarity=similarity, affinities=kind).fit_transform(
            np.ones((40, 3))
        )
    assert np.isfinite(Z).all()


@similarities
def test_small_duplicated_and_scattered_data_stay_finite(similarity):
    for X in (points(4), points(20).repeat(5, 1), torch.cat([points(50), 1e9 * points(3)])):
        model = TSNE(perplexity=min(5, (len(X) - 1) / 3), iterations=300, similarity=similarity)
        assert model.fit_transform(X).isfinite().all()
        assert np.isfinite(model.kl_divergence_)


def with_value(value, dtype=float):
    X = np.zeros((2, 10, 3), dtype)
    X[1, 4, 2] = value
    return X


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (with_value(np.nan)[1], "row 4 is not"),
        (with_value(-np.inf), "row 4 of set 1"),
        (np.zeros((10, 3), complex), "real"),
        (torch.zeros(10, 3, dtype=torch.complex64), "real"),
        (np.array([[object()] * 3] * 10), "numbers"),
        (np.array([["a"] * 3] * 10), "numbers"),
        (np.zeros((10, 3), "datetime64[s]"), "numbers"),
        (np.zeros((10, 0)), "at least one feature"),
        (np.zeros((3, 2)), "at least 4 points"),
        (np.zeros((0, 10, 3)), "at least one set"),
        (np.zeros(10), r"\[N, d\]"),
        (np.zeros((1, 1, 10, 3)), r"\[N, d\]"),
    ],
)
def test_bad_points_are_refused(X, message):
    with pytest.raises(InputError, match=message):
        TSNE(perplexity=2).fit_transform(X)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"perplexity": 14}, "N = 40"),
        ({"perplexity": 0.5}, "at least 1"),
        ({"iterations": 0}, "iterations"),
        ({"iterations": 10.0}, "iterations"),
        ({"exaggeration_iterations": -1}, "exaggeration_iterations"),
        ({"early_exaggeration": 0.5}, "early_exaggeration"),
        ({"early_exaggeration": "much"}, "early_exaggeration"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"seed": None}, "seed"),
        ({"seed": -1}, "seed"),
        ({"similarity": "cauchy"}, "similarity"),
        ({"affinities": "all"}, "affinities"),
        ({"engine": "exat"}, "did you mean exact"),
        ({"init": "spectral"}, "init"),
        ({"init": np.zeros((39, 2))}, r"\[40, 2\].*\[39, 2\]"),
        ({"init": np.full((40, 2), np.nan)}, "finite"),
        ({"init": np.full((40, 2), 1e200)}, "init must be real, finite and at most"),
        ({"init": np.zeros((40, 2), complex)}, "real"),
        ({"device": "tpu"}, "device"),
        ({"learning_rate": 1e30, "iterations": 50, "similarity": "gaussian"}, "smaller one or auto"),
    ],
)
def test_bad_parameters_are_refused(parameters, message):
    with pytest.raises(InputError, match=message):
        TSNE(**{"perplexity": 5, **parameters}).fit_transform(DIGITS[:40])


@pytest.mark.parametrize("init", ["random", "pca"])
@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_points_whose_distances_float64_does_not_hold(init, size):
    with pytest.raises(InputError, match="points must be of sizes within 1e-150"):
        TSNE(perplexity=5, init=init).fit_transform(DIGITS[:40].astype(np.float64) * size)


def test_a_map_that_is_lost_is_said(caplog, monkeypatch):
    TSNE(perplexity=5, learning_rate=1e30, iterations=300).fit_transform(DIGITS[:60], seeds=3)
    (record,) = caplog.records
    assert record.getMessage().startswith("3 of 3 maps fit the data worse than one with all points in one place would")
    caplog.clear()
    monkeypatch.setattr(tsne, "LARGE", 0)  # every map may be lost
    TSNE(perplexity=5, iterations=300).fit_transform(DIGITS[:60], seeds=3)
    assert not caplog.records


@pytest.mark.parametrize("seeds", [0, -1, 2.0, True])
def test_bad_seeds_are_refused(seeds):
    with pytest.raises(InputError, match="seeds"):
        TSNE(perplexity=5).fit_transform(DIGITS[:40], seeds=seeds)


def test_engine_that_is_not_installed_names_the_command(monkeypatch):
    monkeypatch.setattr(tsne.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="pip install"):
        TSNE(perplexity=5, engine="cuml", device="cpu").fit_transform(DIGITS[:40])
    for engine in ("exact", "fft"):
        with pytest.raises(MissingPackageError, match=f"engine {engine} on a GPU needs CuPy: pip install"):
            TSNE(engine=engine).check_engine("cuda")


def test_cuml_refuses_what_it_cannot_do(monkeypatch):
    monkeypatch.setattr(tsne.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(InputError, match="CUDA device, got cpu"):
        TSNE(perplexity=5, engine="cuml", device="cpu").fit_transform(DIGITS[:40])
    for parameters in (
        {"similarity": "gaussian"},
        {"affinities": "full"},
        {"init": np.zeros((40, 2))},
        {"perplexity": 341},
        {"kl_tolerance": 0.01},
    ):
        with pytest.raises(InputError, match="engine cuml"):
            TSNE(engine="cuml", **parameters).check_engine("cuda")
    TSNE(engine="cuml", perplexity=340).check_engine("cuda")


def test_any_seeds_give_the_bits_that_they_give_elsewhere():
    model = TSNE(iterations=30, perplexity=5)
    three = model.fit_transform(DIGITS[:60], seeds=3)
    chosen = model.fit_transform(DIGITS[:60], seeds=[2, 0])
    assert np.array_equal(chosen, three[[2, 0]])
    for wrong in ([], [1, 1], [-1], [0.5]):
        with pytest.raises(InputError, match="seeds must be"):
            model.fit_transform(DIGITS[:60], seeds=wrong)


def test_interrupt_stops_between_iterations(monkeypatch):
    monkeypatch.setattr(cpu_engine, "PAIRS_AT_ONCE", 1)
    done = []

    def stop(*at):
        done.append(at)
        if len(done) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watched(stop):
        descend(
            [affinities(40, "knn")], reference.cloud(40)[None], phases=[Phase(100, 1.0, 0.5)], learning_rate=1.0,
            gaussian=False,
        )  # fmt: skip
    assert done == [("t-SNE", 1, 100), ("t-SNE", 2, 100), ("t-SNE", 3, 100)]


@similarities
@kinds
def test_cuda_repeats_its_bits_and_reaches_the_same_divergence(similarity, kind, cuda):
    real = torch.cuda.get_device_name() != "simulated GPU"
    N, iterations, repeats = (1000, 500, 20) if real else (60, 30, 1)
    X = torch.from_numpy(DIGITS[:N])
    model = TSNE(similarity=similarity, affinities=kind, iterations=iterations, perplexity=30 if real else 10)
    on_cpu = model.fit(X).kl_divergence_
    batch = model.fit_transform(X.to(cuda), seeds=3)
    assert batch.is_cuda
    assert np.abs(model.kl_divergence_ - on_cpu).max() < (0.05 if real else 0.25) * on_cpu
    for _ in range(repeats):
        assert torch.equal(model.fit_transform(X.to(cuda), seeds=3), batch)
    assert torch.equal(clone(model).set_params(seed=2).fit_transform(X.to(cuda)), batch[2])


@pytest.mark.gpu
def test_cuml_reaches_nearly_the_same_divergence():
    pytest.importorskip("cuml")
    X = torch.from_numpy(DIGITS[:1500]).cuda()
    exact, approximate = (TSNE(engine=engine) for engine in ("exact", "cuml"))
    assert approximate.fit_transform(X).shape == (1500, 2)
    assert approximate.fit(X).kl_divergence_ < 1.15 * exact.fit(X).kl_divergence_


def test_bits_do_not_depend_on_who_compiled(tmp_path):
    """The process that compiles the loops, and the next one, which takes them from numba's cache."""
    code = (
        "import numpy as np; from qdv_gpu import TSNE\n"
        "X = np.random.default_rng(0).normal(size=(150, 5))\n"
        "for engine in ('exact', 'fft'):\n"
        "    model = TSNE(perplexity=8, iterations=60, device='cpu', engine=engine)\n"
        "    print(model.fit_transform(X).tobytes().hex(), model.kl_divergence_)"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout


FLAT = 0.003


@pytest.mark.parametrize("engine", ["exact", "fft"])
def test_a_map_stops_when_its_divergence_is_flat(engine):
    settings = {"engine": engine, "perplexity": 10, "exaggeration_iterations": 60, "init": "random"}
    model = TSNE(iterations=2000, kl_tolerance=FLAT, **settings)
    Z = model.fit_transform(DIGITS[:290], seeds=3)
    iterations = model.iterations_
    assert (iterations < 1000).all()
    for e, count in enumerate(iterations.tolist()):
        assert (count - 60) % 50 == 0
        alone = TSNE(iterations=2000, kl_tolerance=FLAT, seed=e, **settings)
        assert np.array_equal(alone.fit_transform(DIGITS[:290]), Z[e])
        assert (alone.iterations_, alone.kl_divergence_) == (count, model.kl_divergence_[e])
    if engine == "exact":  # the way there is that of fewer iterations; on a grid it is looked at more often
        assert len(set(iterations)) > 1
        for e, count in enumerate(iterations.tolist()):
            before = [TSNE(iterations=count - back, seed=e, **settings).fit(DIGITS[:290]) for back in (100, 50, 0)]
            assert np.array_equal(before[-1].embedding_, Z[e])
            first, second, last = (one.kl_divergence_ for one in before)
            assert first - second > FLAT * second
            assert second - last <= FLAT * last


def test_a_map_that_does_not_get_flat_does_all_iterations(monkeypatch):
    model = TSNE(iterations=130, kl_tolerance=0, perplexity=10, exaggeration_iterations=20)
    done, looks = [], []

    def look(*args, **options):
        looks.append(args)
        return kl_divergence(*args, **options)

    monkeypatch.setattr(schedule, "kl_divergence", look)
    with watched(lambda *at: done.append(at)):
        Z = model.fit_transform(DIGITS[:100])
    assert model.iterations_ == 130
    assert len(looks) == 2  # at 70 and 120, and at the end by the estimator alone
    assert done[-1] == ("t-SNE", 130, 130)
    model.set_params(kl_tolerance=None)
    assert np.array_equal(model.fit_transform(DIGITS[:100]), Z)
    with watched(lambda *at: done.append(at)):
        model.set_params(kl_tolerance=0.1, iterations=500).fit(DIGITS[:100])
    assert model.iterations_ < 500
    assert done[-1] == ("t-SNE", 500, 500)


@pytest.mark.parametrize("tolerance", [-0.1, 0.2, float("nan"), "flat", True])
def test_bad_kl_tolerances_are_refused(tolerance):
    with pytest.raises(InputError, match=r"kl_tolerance must be None or a number within 0 and 0\.1"):
        TSNE(kl_tolerance=tolerance, perplexity=5).fit_transform(DIGITS[:40])
