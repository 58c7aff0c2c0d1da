"""The repulsion on a grid: as exact as asked for, the same bits whoever adds them up, and nothing silently wrong."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import torch
from sklearn.datasets import load_digits

from qdv_gpu import TSNE
from qdv_gpu.errors import InputError
from qdv_gpu.kernels import fft, tsne_fft
from qdv_gpu.machine import on_threads
from qdv_gpu.tsne.affinities import joint_affinities
from qdv_gpu.tsne.engines import cpu as engine
from qdv_gpu.tsne.engines import grid as grids
from qdv_gpu.tsne.engines.grid import grid_for, kernel_for, spacing_for
from qdv_gpu.tsne.objective import SIMILARITIES
from qdv_gpu.tsne.problem import Motion, Phase, Problem, Repulsion, Rows, phases
from qdv_gpu.tsne.schedule import descend

DIGITS = load_digits().data.astype(np.float32)
similarities = pytest.mark.parametrize("similarity", SIMILARITIES)


def clouds(n, seed=0):
    """Points [n, 2] of several kinds, in a square of side 1."""
    rng = np.random.default_rng(seed)
    angle, radius = 2 * np.pi * rng.random(n), np.sqrt(rng.random(n))
    two = 0.3 * rng.normal(size=(n, 2))
    two[: n // 2, 0] += 5
    found = {
        "blob": rng.normal(size=(n, 2)),
        "ring": np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.02 * rng.normal(size=(n, 2)),
        "disk": np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1),
        "two clusters": two,
    }
    for name, Z in found.items():
        Z = Z - Z.min(axis=0)
        found[name] = Z / Z.max()
    return found


def on_grid(Z, *, gaussian, tolerance=0.01):
    """Repulsion [N, 2] of float32 Z [N, 2] by one iteration, and the sum of the similarities."""
    N = len(Z)
    nothing = Rows(
        torch.zeros(1, dtype=torch.int64), torch.zeros(N + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int32),
        torch.zeros(0),
    )  # fmt: skip
    repulsion = Repulsion("fft", tolerance)
    problem = Problem(nothing, Phase(1, 1.0, 0.0), 1.0, gaussian)
    one = engine._Embedding(problem, 0, Motion.at_rest(torch.from_numpy(Z)), repulsion)
    one.move(1)
    assert list(one.used) == ["fft"]
    moved = np.abs(one.velocity).argmax()  # by 4 times the gain, 0.8 at first, of the force over the sum
    return one.force.T.astype(float), 3.2 * float(one.force.flat[moved]) / float(one.velocity.flat[moved])


def over_all_pairs(Z, *, gaussian):
    """The same in float64."""
    Z = Z.astype(np.float64)
    difference = Z[:, None] - Z
    square = (difference**2).sum(axis=2)
    similarity = np.exp(-square) if gaussian else 1 / (1 + square)
    np.fill_diagonal(similarity, 0)
    force = similarity if gaussian else similarity**2
    return np.einsum("ij,ijk->ik", force, difference), similarity.sum()


def error(found, truth):
    return np.sqrt(((found - truth) ** 2).sum() / (truth**2).sum())


@pytest.mark.parametrize("span", [1e-4, 1e-2, 1, 5, 7, 12, 30, 100, 300, 1000])
@similarities
def test_the_force_errs_by_no_more_than_the_tolerance(similarity, span):
    gaussian = similarity == "gaussian"
    for tolerance, n in ((0.01, 1100), (0.001, 600)):
        for name, Z in clouds(n).items():
            Z = (span * Z).astype(np.float32)
            truth, total = over_all_pairs(Z, gaussian=gaussian)
            if total < 0.02 * n:  # too far apart for a grid: another test
                continue
            force, found = on_grid(Z, gaussian=gaussian, tolerance=tolerance)
            assert error(force, truth) <= tolerance, name
            assert abs(found / total - 1) <= tolerance, name


def test_the_force_of_a_real_map():
    Z = TSNE(iterations=400, engine="exact").fit_transform(DIGITS)
    truth, total = over_all_pairs(Z, gaussian=False)
    for tolerance in (0.05, 0.01, 0.0002):
        force, found = on_grid(Z, gaussian=False, tolerance=tolerance)
        assert error(force, truth) <= tolerance
        assert abs(found / total - 1) <= tolerance
    assert error(on_grid(Z, gaussian=False, tolerance=0.05)[0], truth) > 0.005  # a coarse grid is one


@pytest.mark.parametrize(("ny", "nx"), [(32, 48), (80, 144), (96, 32), (240, 400)])
def test_convolution(ny, nx):
    rng = np.random.default_rng(0)
    values = rng.random((ny, nx))
    y, x = np.exp(-0.1 * np.arange(ny)), 1 / (1 + np.arange(nx) ** 2)
    influence = np.empty((ny // 16, 2 * nx, 16), np.float32)
    halves = [fft.even_transform(x[None], parts) for parts in (0, 2)]
    fft.sum_of_products(fft.even_transform(y[None], 4) / (2 * nx * ny), np.concatenate(halves, axis=1), influence)
    stride = nx + 3
    grid = np.zeros((ny, stride), np.float32)
    grid[:, :nx] = values
    work = np.empty((nx // 16, ny * 32), np.float32)
    first, second = np.empty((2, nx * 32), np.float32)
    radices = [np.array(fft.radices_of(n)) for n in (ny, nx)]
    for block in range(nx // 16):
        fft.down(
            work[block], grid.reshape(-1), stride, 16 * block, ny, radices[0], fft.twiddles_of(ny), fft.angles_of(ny, 4)
        )
    for block in range(ny // 16):
        fft.across(
            work.reshape(-1), ny, 16 * block, nx, radices[1], fft.twiddles_of(nx), fft.angles_of(nx, 2),
            influence[block].ravel(), first, second,
        )  # fmt: skip
    for block in range(nx // 16):
        fft.up(
            work[block], grid.reshape(-1), stride, 16 * block, ny, radices[0], fft.twiddles_of(ny), fft.angles_of(ny, 4)
        )
    kernel = np.outer(np.r_[y[:0:-1], y], np.r_[x[:0:-1], x])
    truth = scipy.signal.fftconvolve(values, kernel)[ny - 1 : 2 * ny - 1, nx - 1 : 2 * nx - 1]
    np.testing.assert_allclose(grid[:, :nx], truth, rtol=0, atol=2e-6 * truth.max())


@similarities
@pytest.mark.parametrize("affinities", ["knn", "full"])
def test_bits_depend_on_no_thread_and_no_batch(similarity, affinities, monkeypatch):
    monkeypatch.setattr(engine, "POINTS_PER_THREAD", 100)
    model = TSNE(engine="fft", iterations=60, exaggeration_iterations=20, similarity=similarity, affinities=affinities)
    results = []
    for threads in (1, 2, 3, 7):  # the last: two for each embedding, and one idle
        with on_threads(threads):
            results.append(model.fit_transform(DIGITS[:1203], seeds=3))
            results.append(np.stack([model.set_params(seed=seed).fit_transform(DIGITS[:1203]) for seed in range(3)]))
        model.set_params(seed=0)
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)
    assert len(np.unique(results[0][:, 0, 0])) == 3
    assert model.engine_ == "fft"


def test_the_divergence_is_that_of_the_exact_engine():
    divergence = {}
    for name in ("exact", "fft"):
        model = TSNE(engine=name, iterations=750)
        model.fit_transform(DIGITS, seeds=6)
        divergence[name] = model.kl_divergence_.mean()
    assert divergence["fft"] == pytest.approx(divergence["exact"], rel=0.005)


def test_clusters_smaller_than_a_cell_drift_apart_as_they_should():
    """What the grid does wrong is common to the points of a cluster, and most of the force between two."""
    X = np.random.default_rng(0).normal(size=(10, 5))[np.arange(600) % 10]
    exact = TSNE(engine="exact", iterations=600)
    exact.fit_transform(X)
    model = TSNE(engine="fft", iterations=600)
    model.fit_transform(X)
    assert model.kl_divergence_ == pytest.approx(exact.kl_divergence_, rel=0.01)
    assert model.engine_ == "fft, exact"


def tight_clusters(n=60):
    """Three clusters far apart, of points 1e-3 apart, float32 [n, 2]."""
    rng = np.random.default_rng(0)
    return ([[0.1, 0], [20.3, 5], [7, 30.7]] + 1e-3 * rng.normal(size=(n // 3, 3, 2))).reshape(n, 2).astype(np.float32)


@similarities
def test_errors_are_those_against_all_pairs(similarity):
    gaussian, Z = similarity == "gaussian", tight_clusters()
    found, step = np.random.default_rng(1).normal(size=(2, *Z.shape)).astype(np.float32)
    truth, _ = over_all_pairs(Z.astype(float) - step, gaussian=gaussian)
    sample, sizes = np.array([0, 7, 59]), np.empty((2, 3))
    tsne_fft.errors(*(np.ascontiguousarray(a.T) for a in (Z, step, found)), gaussian or None, sample, sizes)
    np.testing.assert_allclose(sizes[0], np.linalg.norm((found - truth)[sample], axis=1), rtol=1e-9)
    np.testing.assert_allclose(sizes[1], np.linalg.norm(truth[sample], axis=1), rtol=1e-9)


def test_what_a_grid_is_taken_for():
    assert grids.next_tolerance(0.005, 0.005, 0.0024) == 0.005
    assert grids.next_tolerance(0.005, 0.005, 0.01) == pytest.approx(0.005 / 8)
    assert grids.next_tolerance(0.005, 0.005, 10) == grids.TOLERANCES[0]
    assert grids.next_tolerance(0.005, grids.TOLERANCES[0], 0.01) is None
    assert grids.next_tolerance(0.005, 0.001, 0) == 0.002  # a coarser one, step by step
    assert grids.next_tolerance(0.005, 0.001, 0.0017) == pytest.approx(0.001 * 0.7 * 0.0025 / 0.0017)
    assert grids.next_tolerance(0.005, 0.001, 0.0024) == 0.001
    assert grids.median_error(np.array([1.0, 2, 3]), np.array([10.0, 10, 10])) == pytest.approx(0.2)
    assert grids.median_error(np.array([1.0, 1, 1]), np.array([0.0, 0, 10])) == pytest.approx(1 / (1 / 3**0.5))
    assert grids.median_error(np.zeros(3), np.zeros(3)) == 0
    assert [len(grids.sample_of(N)) for N in (4, 1000, 1 << 18, 1 << 30)] == [4, 64, 32, 16]
    assert grids.sample_of(1000).max() == 999


@pytest.mark.parametrize("worth", [0.0, 1e6])
def test_where_no_grid_is_fine_enough_the_sum_is_exact_or_it_is_said(worth, monkeypatch, lines):
    monkeypatch.setattr(grids, "WORTH", worth)
    model = TSNE(engine="fft", iterations=60, exaggeration_iterations=0, perplexity=5, init=tight_clusters())
    model.set_params(learning_rate=1e-3).fit_transform(DIGITS[:60])
    if worth:
        assert model.engine_ == "fft, exact"
        assert not lines()
    else:
        assert model.engine_ == "fft"
        assert "t-SNE: half of the forces on the finest grid err by more than" in lines()[0]


def test_a_finer_grid_that_takes_too_much_memory_is_not_taken(monkeypatch, lines):
    monkeypatch.setattr(grids, "WORTH", 0.0)
    monkeypatch.setattr(grids, "LARGEST_GRID", 300_000)
    model = TSNE(engine="fft", iterations=100, exaggeration_iterations=0, perplexity=5, init=tight_clusters())
    model.set_params(learning_rate=1e-3).fit_transform(DIGITS[:60])
    assert model.engine_ == "fft"
    assert "half of the forces on the finest grid" in lines()[0]


def test_auto_decides_by_the_map(monkeypatch):
    assert TSNE().engine_for(1000, "cpu") == "exact"
    assert TSNE().engine_for(1_000_000, "cpu") == "auto"
    assert TSNE(engine="fft").engine_for(500, "cpu") == "fft"
    X = DIGITS[:400]
    exact = TSNE(engine="exact", iterations=60).fit_transform(X)
    model = TSNE(iterations=60)
    np.testing.assert_array_equal(model.fit_transform(X), exact)
    assert model.engine_ == "exact"
    monkeypatch.setattr(engine, "EXACT_PAIR", 10.0)
    asked, model_of_costs = [], engine.seconds
    monkeypatch.setattr(engine, "seconds", lambda N, nodes: asked.append(nodes) or model_of_costs(N, nodes))
    model.set_params(iterations=350)
    first, questions = model.fit_transform(X), list(asked)
    assert model.engine_ == "fft"
    asked.clear()
    np.testing.assert_array_equal(model.fit_transform(X), first)
    assert asked == questions
    monkeypatch.setattr(engine, "EXACT_PAIR", 2.5)  # takes less once the map has grown
    model.fit_transform(X)
    assert model.engine_ == "fft, exact"


@similarities
def test_few_points_far_apart_are_summed_exactly(similarity):
    X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    model = TSNE(engine="fft", perplexity=1, iterations=300, similarity=similarity)
    assert model.fit_transform(X).isfinite().all()
    settings = {"perplexity": 5, "iterations": 3, "exaggeration_iterations": 0, "similarity": similarity}
    for width in (1e3, 1e6):  # for the latter a grid would be too large
        settings["init"] = np.random.default_rng(0).uniform(0, width, (60, 2))
        few = TSNE(engine="fft", **settings)
        np.testing.assert_array_equal(
            few.fit_transform(DIGITS[:60]), TSNE(engine="exact", **settings).fit_transform(DIGITS[:60])
        )
        assert few.engine_ == "exact"


def test_a_map_too_wide_for_a_grid_is_refused_or_summed_exactly():
    start = np.random.default_rng(0).normal(size=(300, 2))
    start[150:] += 1e6
    settings = {"perplexity": 5, "iterations": 3, "exaggeration_iterations": 0, "init": start}
    with pytest.raises(InputError, match=r"spans 1e\+06, more than 1024 MiB.*engine auto or exact") as raised:
        TSNE(engine="fft", **settings).fit_transform(DIGITS[:300])
    assert "\n" not in str(raised.value)
    exact = TSNE(engine="exact", **settings).fit_transform(DIGITS[:300])
    np.testing.assert_array_equal(TSNE(**settings).fit_transform(DIGITS[:300]), exact)
    problem = joint_affinities(torch.from_numpy(DIGITS[:300]), perplexity=5)
    Z = torch.from_numpy(start.astype(np.float32))
    _, used = engine.descend_cpu(
        Problem(Rows(torch.zeros(1, dtype=torch.int64), *problem), Phase(3, 1.0, 0.8), 50.0, gaussian=False),
        Motion.at_rest(Z[None]), lambda count: None, Repulsion("auto"),
    )  # fmt: skip
    assert used == ["exact"]


def test_kernels_are_let_go_of_after_an_error(monkeypatch):
    def fail(*_):
        kernel_for(32, 32, 0.5, gaussian=False)
        raise InputError("of one embedding")

    monkeypatch.setattr(engine._Embedding, "move", fail)
    with pytest.raises(InputError, match="of one embedding"):
        TSNE(engine="fft", perplexity=5, iterations=3).fit_transform(DIGITS[:40])
    assert kernel_for.cache_info().currsize == 0


def test_equal_points_and_points_that_overflow():
    with pytest.warns(UserWarning, match="all points are equal"):
        assert np.isfinite(TSNE(engine="fft", iterations=300, perplexity=5).fit_transform(np.ones((40, 3)))).all()
    force, total = on_grid(np.outer(np.arange(40), [1e-9, 0]).astype(np.float32), gaussian=False)
    assert np.abs(force).max() < 1e-3
    assert total == pytest.approx(40 * 39, rel=1e-5)
    with pytest.raises(InputError, match=r"overflowed with learning_rate 1e\+30: a smaller one"):
        TSNE(engine="fft", perplexity=5, learning_rate=1e30, iterations=50, similarity="gaussian").fit_transform(
            DIGITS[:40]
        )


@pytest.mark.parametrize("tolerance", [0, 1e-5, 0.5, float("nan"), "fine", True])
def test_bad_tolerances_are_refused(tolerance):
    with pytest.raises(InputError, match=r"fft_tolerance must be a number within 0.0002 and 0.05"):
        TSNE(fft_tolerance=tolerance, perplexity=5).fit_transform(DIGITS[:40])


@pytest.mark.parametrize(("user", "used"), [("cpu", ["fft"]), ("tsne_fft", ["fft", "mesh", "cpu"])])
def test_numbas_cache_sees_what_a_kernel_is_built_of(user, used):
    """Else an upgrade that changes one file would go on with machine code from before."""
    folder = Path(fft.__file__).parent
    digest = hashlib.sha256(b"".join((folder / f"{name}.py").read_bytes() for name in used)).hexdigest()[:16]
    assert f'_BUILT_OF = "{digest}"' in (folder / f"{user}.py").read_text()


def test_grids():
    low, high = np.float32([-80, -30]), np.float32([90, 20])
    grid = grid_for(low, high, 0.01, gaussian=False)
    assert grid.spacing == spacing_for(0.01, gaussian=False)
    assert grid.nx % 16 == grid.ny % 16 == 0
    assert (grid.nx - 6) * grid.spacing > 170 > 0.7 * grid.nx * grid.spacing
    assert grid.origin[0] < -80 - 3 * grid.spacing
    assert grid.origin[0] + (grid.nx - 9) * grid.spacing > 90
    assert spacing_for(0.001, gaussian=False) < 0.8 * grid.spacing < spacing_for(0.01, gaussian=True)
    kernel = kernel_for(grid.ny, grid.nx, grid.spacing, gaussian=False)
    assert kernel_for(grid.ny, grid.nx, grid.spacing, gaussian=False) is kernel
    assert kernel.far == pytest.approx(1 / (1 + (grid.nx**2 + grid.ny**2) * grid.spacing**2), rel=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1.0, -1000.0, 1000.0, 1e6, 1e8])
def test_points_far_from_zero_lie_on_their_grid(offset):
    """Where float32 has few numbers, or one, within a cell or a whole map: the origin is rounded as well."""
    for tolerance in (2e-4, 0.0015, 0.0018, 0.002, 0.005, 0.05):
        for width in 2.0 ** np.arange(-26, 0):
            Z = (np.float32([[0, 0], [width, 0], [width, width * 2e-4]]) + np.float32([0, offset])).astype(np.float32)
            grid = grid_for(Z.min(axis=0), Z.max(axis=0), tolerance, gaussian=False)
            place = (Z - np.float32(grid.origin)) * np.float32(1 / grid.spacing)
            assert (place >= 0).all()
            assert (place < np.float32([grid.nx, grid.ny]) - grids.ORDER + 0.5).all(), (tolerance, width)


def test_progress_and_phases():
    P = joint_affinities(torch.from_numpy(DIGITS[:600]))
    start = 1e-4 * torch.randn(1, 600, 2, generator=torch.Generator().manual_seed(0))
    exact, *_ = descend([P], start, phases=phases(40, 12.0, 20), learning_rate=50.0, gaussian=False)
    found, *_ = descend(
        [P], start, phases=phases(40, 12.0, 20), learning_rate=50.0, gaussian=False, repulsion=Repulsion("fft", 2e-4)
    )
    assert error(found[0].double().numpy(), exact[0].double().numpy()) < 0.02
    assert grids.fits(grid_for(found[0].amin(0).numpy(), found[0].amax(0).numpy(), 0.01, gaussian=False))
