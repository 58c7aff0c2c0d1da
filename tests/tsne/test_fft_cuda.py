"""The repulsion on a grid, on a GPU: its kernels against float64, and the engine against that of the CPU.

The kernels run as source on the CPU (cpu), as what the compiler makes of it (ptx), and on a GPU (cuda); the engine on a
simulated device or, with -m gpu, a real one.
"""

import numpy as np
import pytest
import torch
from device.launches import devices, run
from scipy.interpolate import BSpline
from tsne.test_fft import DIGITS, clouds, error, on_grid, over_all_pairs, tight_clusters

from qdv_gpu import TSNE, kernels
from qdv_gpu.errors import InputError
from qdv_gpu.kernels import mesh
from qdv_gpu.progress import watched
from qdv_gpu.tsne import schedule
from qdv_gpu.tsne.engines import fft_cuda as engine
from qdv_gpu.tsne.engines.grid import grid_for
from qdv_gpu.tsne.objective import SIMILARITIES
from qdv_gpu.tsne.problem import Motion, Phase, Problem, Repulsion, Rows

similarities = pytest.mark.parametrize("similarity", SIMILARITIES)


class Kernels:
    """The kernels on a batch of embeddings of any sizes, each with a grid of its own or (None) with none."""

    def __init__(self, device, embeddings, *, gaussian=False, turns=3):
        self.device = device
        self.sizes = [len(z) for z in embeddings]
        self.Z = self.on(torch.from_numpy(np.concatenate(embeddings).astype(np.float32)))
        self.start = self.on(torch.tensor([0, *np.cumsum(self.sizes)]))
        self.grids = [grid_for(z.min(axis=0), z.max(axis=0), 0.001, gaussian=gaussian) for z in embeddings]
        self.packed, self.kernels, self.nodes = np.zeros(len(embeddings), engine.GRID), [], 0
        for e, grid in enumerate(self.grids):
            self.kernels.append(engine._kernel_of(grid, self.Z.device, gaussian=gaussian))
            self.packed[e] = engine._packed(grid, self.kernels[-1], self.sizes[e], self.nodes, turns)
            self.nodes += grid.ny * grid.nx
        self.state = self.on(torch.zeros(len(embeddings), 4, dtype=torch.int32))
        self.table = self.on(torch.from_numpy(mesh.tables()))
        self.charges = self.on(torch.zeros(self.nodes, dtype=torch.int64))
        self.potential = self.on(torch.full((self.nodes,), torch.nan))
        self.force, self.weight = torch.full_like(self.Z, torch.nan), torch.full_like(self.Z[:, 0], torch.nan)
        self.inverse = self.on(torch.full((len(embeddings),), torch.nan))

    def on(self, tensor):
        return tensor.to("cuda" if self.device == "cuda" else "cpu")

    def launch(self, kernel, *args, grid, seed=0):
        args = [self.on(torch.from_numpy(x.view(np.uint8))) if x is self.packed else x for x in args]
        run(self.device, "tsne_fft", kernel, *args, grid=grid, block=256, fast_math=True, seed=seed)

    def by_points(self, points):
        return (-(-max(self.sizes) // points), len(self.sizes))

    def spread(self, seed=0):
        given = (self.Z, self.start, self.packed, self.state, self.table, self.charges)
        self.launch("spread", *given, grid=self.by_points(32), seed=seed)

    def convolve(self):
        for one, (influence, angles, *_) in zip(self.packed, self.kernels, strict=True):
            if not one["ny"]:
                continue
            twisted, grid = torch.empty(influence.shape, dtype=torch.complex64), (-(-one["ny"] * one["nx"] // 256),)
            scalars = (np.int64(one["nodes"]), np.uint32(one["ny"]), np.uint32(one["nx"]))
            twisted = self.on(twisted)
            self.launch("twist", self.charges, angles, twisted, *scalars, grid=grid)
            back = torch.fft.ifft2(torch.fft.fft2(twisted) * influence, norm="forward")
            self.launch("untwist", back, angles, self.potential, *scalars, grid=grid)

    def gather(self, seed=0):
        given = (self.Z, self.start, self.packed, self.state, self.table, self.potential, self.force, self.weight)
        self.launch("gather", *given, grid=self.by_points(32), seed=seed)

    def settle(self):
        given = (self.start, self.packed, self.weight, self.state, self.inverse)
        self.launch("settle", *given, grid=(1, len(self.sizes)))

    def update(self, velocity, gains, attraction, **scalars):
        moved = (self.Z, velocity, gains, attraction, self.force, self.inverse, self.start, self.packed, self.state)
        self.launch("update", *moved, *np.array([*scalars.values()], dtype=np.float32), grid=self.by_points(256))

    def parts(self, tensor):
        return [part.double().cpu().numpy() for part in tensor.split(self.sizes)]


def batch():
    """Off the block's size, duplicates, one point alone, spans from 1e-3 to 60."""
    kinds = clouds(70)
    return [
        60 * kinds["disk"][:33],
        np.full((1, 2), 3.0),
        1e-3 * kinds["blob"],
        np.repeat(12 * kinds["ring"][:20], 3, axis=0) - 4,
    ]


def test_numbers_are_packed_as_the_kernels_read_them():
    assert engine.GRID.itemsize == 240
    assert [engine.GRID.fields[name][1] for name in ("nodes", "origin", "ny", "core")] == [8, 16, 32, 48]
    assert len(mesh.tables()) == int((kernels.FOLDER / "tsne_fft.cu").read_text().split("#define TERMS ")[1].split()[0])


def splines(made, e):
    """Weights of an embedding's points at its rows and columns, float64 [N, ny] and [N, nx]."""
    ny, nx, spacing, origin = made.grids[e]
    spline = BSpline.basis_element(np.arange(-3, 4), extrapolate=False)
    place = (made.parts(made.Z)[e] - np.float32(origin)) / spacing + 2  # a point's first node is its cell's
    x, y = (np.nan_to_num(spline(np.arange(n) - place[:, [c]])) for c, n in ((0, nx), (1, ny)))
    return y, x


@devices
def test_charges_are_those_of_splines(device):
    made = Kernels(device, batch())
    made.spread()
    for e, one in enumerate(made.packed):
        y, x = splines(made, e)
        found = made.charges[one["nodes"] : one["nodes"] + one["ny"] * one["nx"]].double().cpu().numpy() * 2.0**-40
        np.testing.assert_allclose(found.reshape(one["ny"], one["nx"]), y.T @ x, atol=1e-5)
        assert found.sum() == pytest.approx(made.sizes[e], rel=1e-6)


@devices
@similarities
def test_forces_agree_with_all_pairs(similarity, device):
    gaussian = similarity == "gaussian"
    made = Kernels(device, batch(), gaussian=gaussian)
    made.spread()
    made.convolve()
    assert not made.charges.any()
    made.gather()
    made.settle()
    for e, (z, force, weight) in enumerate(zip(*map(made.parts, (made.Z, made.force, made.weight)), strict=True)):
        truth, total = over_all_pairs(z, gaussian=gaussian)
        lost, found = 1e-5 * len(z), weight.sum() + made.packed[e]["left_out"]
        assert abs(found - total) <= 0.002 * total + lost
        assert np.sqrt(((force - truth) ** 2).sum()) <= 0.002 * np.sqrt((truth**2).sum()) + lost
        if total > 0.1 * len(z):
            assert float(made.inverse[e]) == pytest.approx(1 / found, rel=1e-6)
            assert made.state[e].tolist() == [0, 0, 0, 1]
        elif total < 0.01 * len(z):  # the point alone
            assert made.state[e].tolist() == [1, 0, 1, 0]


@devices
def test_bits_repeat_alone_in_a_batch_and_in_any_thread_order(device):
    alone, others = Kernels(device, batch()[2:3]), Kernels(device, batch())
    for made, seed in ((alone, 0), (others, 1)):
        made.spread(seed)
        made.charges_before = made.charges.clone()
        made.convolve()
        made.gather(seed)
    nodes, first, points = alone.nodes, int(others.packed["nodes"][2]), slice(34, 104)
    assert torch.equal(others.charges_before[first : first + nodes], alone.charges_before)
    assert torch.equal(others.force[points], alone.force)
    assert torch.equal(others.weight[points], alone.weight)


@devices
def test_embeddings_that_have_halted_and_those_without_a_grid_stay_as_they_are(device):
    made = Kernels(device, batch())
    made.packed["ny"][0] = 0
    made.state[2, 0] = made.state[3, 1] = 1  # halted; outside its grid, where a point is
    made.Z[-1] = 1e6
    made.spread()
    made.convolve()
    made.gather()
    assert made.force.isnan().all(dim=1).tolist() == [True] * 33 + [False] + [True] * 130


@devices
def test_an_embedding_halts_where_its_turns_are_over(device):
    made = Kernels(device, batch(), turns=2)
    made.packed["ny"][1] = 0  # no grid: summed exactly, and few similarities are no hindrance
    made.weight.fill_(0.5)
    made.weight[34:104] = -1e9
    made.state[3, 1] = 1
    made.settle()
    # halted, outside, sparse, done
    assert made.state.tolist() == [[0, 0, 0, 1], [0, 0, 0, 1], [1, 0, 1, 0], [1, 1, 0, 0]]
    total = 33 * 0.5 + made.packed["left_out"][0]
    assert made.inverse[:2].tolist() == pytest.approx([1 / total, 2.0], rel=1e-6)
    made.settle()
    assert made.state.tolist() == [[0, 0, 0, 2], [0, 0, 0, 2], [1, 0, 1, 0], [1, 1, 0, 0]]
    made.settle()
    assert made.state.tolist() == [[1, 0, 0, 2], [1, 0, 0, 2], [1, 0, 1, 0], [1, 1, 0, 0]]


@devices
def test_update_follows_its_formula_and_says_who_leaves_the_grid(device):
    rng = np.random.default_rng(0)
    made = Kernels(device, [rng.normal(size=(300, 2)), rng.normal(size=(33, 2)), rng.normal(size=(40, 2))])
    made.state[2, 0] = 1
    made.inverse[:] = 0.01
    velocity, gains, pull, push = (made.on(torch.from_numpy(rng.normal(size=(373, 2)).astype("f4"))) for _ in range(4))
    gains.abs_()
    velocity[:300] *= 0.01
    push[:300] *= 0.1
    pull[:300] *= 0.001
    pull[310], push[310], velocity[310] = -1e3, 0, 0  # far away
    made.force = push
    before = [x.clone().double().cpu() for x in (made.Z, velocity, gains)]
    made.update(velocity, gains, pull, exaggeration=12, rate=0.5, momentum=0.8)
    z, v, g = before
    slope = 4 * (12 * pull.double().cpu() - 0.01 * push.double().cpu())
    g = torch.where(slope * v < 0, g + 0.2, g * 0.8).clamp(min=0.01)
    v = 0.8 * v - 0.5 * g * slope
    for found, truth, old in zip((made.Z, velocity, gains), (z + v, v, g), before, strict=True):
        torch.testing.assert_close(found.cpu()[:333].double(), truth[:333], rtol=1e-5, atol=1e-5)
        assert torch.equal(found.cpu()[333:].double(), old[333:])
    assert made.state.tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]]


def started(starts, device, *, gaussian=False):
    """The engine at these starts, with no attraction."""
    N, E = len(starts[0]), len(starts)
    nothing = Rows(
        torch.zeros(E, dtype=torch.int64), torch.zeros(N + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int32),
        torch.zeros(0),
    )  # fmt: skip
    rows = Rows(*(tensor.to(device) for tensor in nothing))
    Z = torch.from_numpy(np.stack(starts).astype(np.float32)).to(device)
    return engine._Batch(Problem(rows, Phase(1, 1.0, 0.0), 1.0, gaussian), Motion.at_rest(Z), Repulsion("fft", 0.01))


@similarities
def test_forces_are_those_of_the_cpu(cuda, similarity):
    gaussian = similarity == "gaussian"
    starts = [(span * clouds(60)["blob"]).astype(np.float32) for span in ((1, 7, 15) if gaussian else (1, 12, 100))]
    made = started(starts, cuda, gaussian=gaussian)
    _, used = made.descend(lambda count: None)
    forces = made.force.view(3, 60, 2).cpu().numpy()
    assert used == ["fft"]
    for Z, found, inverse in zip(starts, forces, made.inverse.tolist(), strict=True):
        force, total = on_grid(Z, gaussian=gaussian)
        assert np.abs(found - force).max() <= 1e-5 * np.abs(force).max()
        assert inverse * total == pytest.approx(1, rel=1e-5)
    alone = started(starts[1:2], cuda, gaussian=gaussian)
    alone.descend(lambda count: None)
    assert np.array_equal(alone.force.cpu().numpy(), forces[1])


SETTINGS = {"perplexity": 8, "early_exaggeration": 2.0, "learning_rate": 0.5, "exaggeration_iterations": 3}


@pytest.mark.parametrize(("similarity", "affinities"), [("student-t", "knn"), ("gaussian", "full")])
def test_the_engine_does_what_that_of_the_cpu_does(cuda, similarity, affinities):
    """A start that is spread out: from one near 0 the rounding of early exaggeration grows without bound."""
    start = np.random.default_rng(1).normal(size=(60, 2))
    model = TSNE(
        engine="fft", iterations=7, init=start, similarity=similarity, affinities=affinities, **SETTINGS
    )  # fmt: skip
    X = torch.from_numpy(DIGITS[:60])
    truth, divergence = model.fit_transform(X).double().numpy(), model.fit(X).kl_divergence_
    found = model.fit_transform(X.to(cuda))
    assert found.device == cuda
    assert model.engine_ == "fft"
    assert error(found.double().cpu().numpy(), truth) < 1e-5
    assert model.kl_divergence_ == pytest.approx(divergence, rel=1e-5)
    for _ in range(1 if torch.cuda.get_device_name() == "simulated GPU" else 20):
        assert torch.equal(model.fit_transform(X.to(cuda)), found)


def test_embeddings_of_different_spans_have_the_bits_that_they_have_alone(cuda, monkeypatch):
    """One of them leaves its grid again and again, so that they do not keep step."""
    rng = np.random.default_rng(0)
    X, starts = torch.from_numpy(DIGITS[:40]).to(cuda), np.stack([s * rng.normal(size=(40, 2)) for s in (1e-3, 3.0)])
    model = TSNE(engine="fft", iterations=6, exaggeration_iterations=0, perplexity=5, init=starts)
    done, rounds, original = [], [], engine._Batch._round

    def launched(self, turns, *rest, **more):
        rounds.append(turns.tolist())
        original(self, turns, *rest, **more)

    monkeypatch.setattr(engine, "STRETCH", 3)
    monkeypatch.setattr(engine._Batch, "_round", launched)
    with watched(lambda *at: done.append(at)):
        both = model.fit_transform(X, seeds=2)
    assert any(a != b for a, b in rounds)
    assert done[-1] == ("t-SNE", 6, 6)
    for e in range(2):
        assert torch.equal(model.set_params(init=starts[e]).fit_transform(X), both[e])


def test_points_too_far_apart_for_a_grid_are_summed_as_the_exact_engine_does(cuda):
    start, X = np.random.default_rng(0).uniform(0, 150, (12, 2)), torch.from_numpy(DIGITS[:12]).to(cuda)
    settings = {"iterations": 3, "fft_tolerance": 0.05, **SETTINGS, "perplexity": 3}
    for scale in (1, 1e4):  # for the latter a grid would be too large
        few, exact = (TSNE(engine=name, init=scale * start, **settings) for name in ("fft", "exact"))
        assert torch.equal(few.fit_transform(X, seeds=2)[1], exact.fit_transform(X))
        assert few.engine_ == "exact"
    start *= 0.01
    start[0] = 1e6
    with pytest.raises(InputError, match=r"spans 1e\+06, more than 1024 MiB"):
        few.set_params(init=start).fit_transform(X)
    with pytest.raises(InputError, match="smaller"):
        few.set_params(init="random", iterations=30, similarity="gaussian", learning_rate=1e30).fit_transform(X)


def test_clusters_smaller_than_a_cell_are_summed_as_on_the_cpu(cuda):
    start = np.stack([tight_clusters(), np.random.default_rng(1).normal(size=(60, 2))])
    settings = {**SETTINGS, "exaggeration_iterations": 0, "learning_rate": 1e-3}
    model = TSNE(engine="fft", iterations=30, init=start, **settings)
    X = torch.from_numpy(DIGITS[:60])
    truth, used = model.fit_transform(X, seeds=2), model.engine_
    found = model.fit_transform(X.to(cuda), seeds=2)
    assert model.engine_ == used == "fft, exact"
    np.testing.assert_allclose(found.cpu(), truth, rtol=1e-5, atol=1e-6)
    model.set_params(init=start[0])
    assert torch.equal(model.fit_transform(X.to(cuda)), found[0])


@similarities
def test_errors_are_those_against_all_pairs(cuda, similarity, monkeypatch):
    monkeypatch.setattr(engine, "PAIRS_AT_ONCE", 60 * 25)
    gaussian, Z = similarity == "gaussian", tight_clusters()
    made = started([Z + 3, Z], cuda, gaussian=gaussian)
    step = torch.from_numpy(np.random.default_rng(1).normal(size=(120, 2)).astype(np.float32)).to(cuda)
    made.velocity, made.force, made.launched = step, 2 * step, 4
    for state, moved in (([0, 0, 0, 4], 1), ([0, 1, 0, 2], 1), ([1, 0, 0, 2], 0)):
        made.state[1] = torch.tensor(state, dtype=torch.int32, device=cuda)
        step_, force = (tensor[60:].double().cpu().numpy() for tensor in (step, made.force))
        truth, _ = over_all_pairs(Z.astype(float) - moved * step_, gaussian=gaussian)
        sizes = np.concatenate([np.linalg.norm(force - truth, axis=1), np.linalg.norm(truth, axis=1)])
        np.testing.assert_allclose(made._errors(1).cpu(), sizes, rtol=1e-9)


def test_charges_of_as_many_points_as_are_taken_do_not_overflow(cuda, monkeypatch):
    most = mesh.values_at_nodes()[0] ** 2  # of a point's charge at one node
    assert engine.MOST_POINTS * float(most) * 2**40 < 2**63 < 1.05 * engine.MOST_POINTS * float(most) * 2**40
    monkeypatch.setattr(engine, "MOST_POINTS", 59)
    with pytest.raises(InputError, match="engine fft on a GPU takes at most 59 points, got 60"):
        TSNE(engine="fft", perplexity=5, iterations=1).fit_transform(torch.from_numpy(DIGITS[:60]).to(cuda))


def test_auto_takes_what_is_predicted_to_take_less(cuda, monkeypatch):
    assert [TSNE().engine_for(N, "cuda") for N in (10_000, 1_000_000)] == ["exact", "auto"]
    assert engine.seconds(25_000, 320 * 320) < engine.seconds(25_000, None) < engine.seconds(25_000, 1500 * 1500)
    X = torch.from_numpy(DIGITS[:60])
    model = TSNE(iterations=3, init=np.random.default_rng(1).normal(size=(60, 2)), **SETTINGS)
    asked = model.fit_transform(X.to(cuda))
    assert model.engine_ == "exact"
    monkeypatch.setattr(engine, "EXACT_PAIR", 1.0)
    model.fit_transform(X.to(cuda))
    assert model.engine_ == "fft"
    monkeypatch.setattr(schedule, "always_exact", lambda N, device: False)
    monkeypatch.setattr(engine, "EXACT_PAIR", 0.0)  # once it looks at the map
    assert torch.equal(model.fit_transform(X.to(cuda)), asked)
    assert model.engine_ == "exact"
