"""Neighbours are exact, equally far ones by lot, and the same from every engine."""

import importlib.util
import re

import cuda_shim
import numpy as np
import pytest
import torch

from qdv_gpu import neighbors
from qdv_gpu.errors import InputError, MissingPackageError
from qdv_gpu.inverted import InvertedCells, sample_of
from qdv_gpu.kernels import distances as kernels
from qdv_gpu.kernels import rows
from qdv_gpu.machine import on_threads
from qdv_gpu.neighbors import _centred, _search_all, knn
from qdv_gpu.scores.quality import neighbor_ranks

ENGINES = ["torch", "direct"] + (["faiss"] if importlib.util.find_spec("faiss") else [])


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _grid(side, d):
    return torch.cartesian_prod(*[torch.arange(side, dtype=torch.float32)] * d)


def _dead(N, d):
    """Like a ReLU layer: many zeros, and many rows of nothing else."""
    X = _normal(N, d).relu()
    X[::3] = 0
    return X


INPUTS = {
    "grid": _grid(20, 2),
    "integers": torch.randint(0, 4, (500, 3), generator=torch.Generator().manual_seed(1)).float(),
    "duplicates": _normal(50, 6).repeat(9, 1),
    "same": torch.full((40, 5), 0.1),
    "random": _normal(700, 40),
    "float64": _normal(300, 17).double() / 3,
    "offset": _normal(500, 8) + 1e4,
    "outlier": torch.cat([_normal(300, 4) * 1e-6, torch.full((1, 4), 1e3)]),
    "tiny": _normal(300, 3).double() * 1e-120,
    "dead": _dead(400, 30),
    "clusters": (_normal(30, 2) * 9).repeat(50, 1).round() + _normal(1500, 2, seed=1).round(decimals=1),  # with ties
    "line": _normal(1000, 1).round(decimals=2),
}


def reference(X, k):
    """Brute force in float64: neighbours by (distance, product of lots), their distances, and ties at the k-th."""
    D = torch.zeros(len(X), len(X), dtype=torch.float64)
    for x in X.double().T:
        D += (x[:, None] - x[None, :]) ** 2
    D.fill_diagonal_(torch.inf)
    own = neighbors.lots(len(X), X.device).numpy()
    indices = torch.from_numpy(np.lexsort((own[:, None] * own[None, :], D.numpy()), axis=1))
    distances = D.gather(1, indices)
    return indices[:, :k], distances[:, :k], distances[:, k - 1] == distances[:, min(k, len(X) - 1)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", INPUTS)
def test_equals_brute_force(name, engine):
    X = INPUTS[name]
    for k in (1, 5, 30):
        for got, expected in zip(knn(X, k, engine=engine), reference(X, k), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_all_other_points(engine):
    X = INPUTS["random"][:8]
    result = knn(X, 7, engine=engine)
    assert torch.equal(result.indices, reference(X, 7)[0])
    assert not result.tied.any()
    assert knn(X[:2], 1, engine=engine).indices.tolist() == [[1], [0]]


def test_duplicates_are_neighbours():
    result = knn(torch.zeros(6, 3), 3)
    assert [len({i, *row}) for i, row in enumerate(result.indices.tolist())] == [4] * 6
    assert result.tied.all()


def test_copies_are_neighbours_by_lot():
    """Of points in two places, sorted by class, the classes do not matter, and no copy is everyone's neighbour."""
    N, k, place = 1200, 5, torch.arange(1200) % 2
    indices = knn(place[:, None].double(), k).indices
    assert (place[indices] == place[:, None]).all()
    quarter = torch.arange(N) * 4 // N
    same = (quarter[indices] == quarter[:, None]).double().mean()
    assert abs(same - 0.249) < 3 * (2 * 0.25 * 0.75 / (N * k)) ** 0.5  # two of a place often choose each other
    assert indices.flatten().bincount().max() < 5 * k
    assert knn(torch.zeros(6, 3), 5).indices.sort(dim=1).values.tolist() == [
        [*range(i), *range(i + 1, 6)] for i in range(6)
    ]


def test_proposals_are_rarely_refused(monkeypatch):
    """The bound on the proposals' error is of use: without ties, few rows are searched again."""
    refused = []
    search = neighbors._search_all
    monkeypatch.setattr(
        neighbors, "_search_all", lambda X, rows, *rest: (refused.append(len(rows)), search(X, rows, *rest))[1]
    )
    X = _normal(2000, 50) * torch.linspace(3, 0.3, 50)
    for engine in ENGINES:
        if engine != "direct":
            knn(X, 120, engine=engine)
    assert sum(refused) < 20


@pytest.mark.parametrize("name", ["duplicates", "random", "float64"])
@pytest.mark.parametrize("engine", ENGINES)
def test_blocks_do_not_matter(name, engine, monkeypatch):
    expected = knn(INPUTS[name], 5, engine=engine)
    monkeypatch.setattr(neighbors, "HOST_BLOCK", 1000)
    monkeypatch.setattr(neighbors, "FAISS_QUERIES", 33)
    for got, wanted in zip(knn(INPUTS[name], 5, engine=engine), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("engine", ENGINES)
def test_blocks_hold_every_point_once(engine, monkeypatch):
    monkeypatch.setattr(neighbors, "HOST_BLOCK", 1000)
    monkeypatch.setattr(neighbors, "FAISS_QUERIES", 33)
    X = _dead(400, 30)
    rows, indices, distances = map(torch.cat, zip(*neighbors.neighbor_blocks(X, 7, engine=engine), strict=True))
    order = rows.argsort()
    assert torch.equal(rows[order], torch.arange(len(X)))
    assert torch.equal(indices[order], reference(X, 7)[0])
    assert torch.equal(distances[order], reference(X, 7)[1])


@pytest.mark.parametrize("name", ["random", "float64", "offset"])
def test_distances_have_the_same_bits_on_a_gpu(name, cuda):
    X = INPUTS[name].double()
    indices = torch.randint(0, len(X), (len(X), 9), generator=torch.Generator().manual_seed(2))
    listed = neighbors.listed_distances(X, indices)
    assert torch.equal(neighbors.listed_distances(X.to(cuda), indices.to(cuda)).cpu(), listed)
    rows = torch.arange(101)
    everything = neighbors.distances_to_all(X.T.contiguous().to(cuda), rows.to(cuda)).cpu()
    assert torch.equal(everything.gather(1, indices[rows]), listed[rows])
    assert everything[rows, rows].isinf().all()


@pytest.mark.skipif(not cuda_shim.HAS_COMPILER, reason="needs g++")
def test_the_source_on_the_cpu():
    """Fibers take turns in a shuffled order: a missing barrier would show."""
    X = INPUTS["random"][:150, :7].double().contiguous()
    N, d = X.shape
    m, module = 40, cuda_shim.load("distances")
    indices = torch.randint(0, N, (N, m), generator=torch.Generator().manual_seed(2))
    listed, found = torch.empty(N, m, dtype=torch.float64), torch.empty(N, N, dtype=torch.float64)
    sizes = np.int64(N * m), np.int32(m), np.int32(d)
    module.launch("listed", X, indices, listed, *sizes, grid=(-(-N * m // 128),), block=128, seed=1)
    assert torch.equal(listed, neighbors.listed_distances(X, indices))
    XT, rows = X.T.contiguous(), torch.arange(N)
    sizes = np.int64(N), np.int64(N), np.int32(d)
    module.launch("to_all", XT, rows, found, *sizes, grid=(-(-N // 128), -(-N // 4)), block=128, seed=1)
    assert torch.equal(found.gather(1, indices), listed)
    X = (2 * X).round()  # with ties
    XT, own, indices = X.T.contiguous(), neighbors.lots(N, X.device), (rows[:, None] + torch.arange(1, m + 1)) % N
    limits, ranks = neighbors.listed_distances(X, indices), torch.empty_like(indices)
    sizes = np.int64(N), np.int32(m), np.int32(d)
    module.launch("ranks", XT, own, indices, limits, ranks, *sizes, grid=(-(-N // 16),), block=128, seed=1)
    assert torch.equal(ranks, neighbor_ranks(X, indices))


def test_threads_do_not_matter(monkeypatch):
    monkeypatch.setattr(rows, "WORTH", 1)
    X = INPUTS["random"]
    expected = knn(X, 9, engine="direct")
    for threads in (1, 3):
        with on_threads(threads):
            assert torch.equal(knn(X, 9, engine="direct").squared_distances, expected.squared_distances)


def test_tiles_out_of_reach_are_left_out(monkeypatch):
    """Few tiles hold all that can be near, in two coordinates or one, and the points are found nevertheless."""
    done = []
    tile, insert, nearest = (getattr(kernels, name).py_func for name in ("_tile", "_insert", "_nearest"))
    monkeypatch.setattr(kernels, "_tile", lambda *arguments: (done.append(len(arguments[1])), tile(*arguments)))
    monkeypatch.setattr(kernels, "_insert", insert)
    monkeypatch.setattr(kernels, "_nearest", nearest)
    for d, most in ((2, 0.4), (1, 0.2)):
        done.clear()
        X = _normal(1200, d)
        assert torch.equal(knn(X, 3, engine="direct").indices, reference(X, 3)[0])
        assert sum(done) * kernels.NEAR < most * len(X) ** 2


def test_odd_sizes_of_the_kernels():
    for N in (2, kernels.ROWS - 1, kernels.ROWS + 1, kernels.NEAR + 1, kernels.COLUMNS + 1):
        for d in (0, 1, kernels.SORTED, kernels.SORTED + 1, kernels.DEPTH, kernels.DEPTH + 1):
            X = _normal(N, d)
            assert torch.equal(knn(X, N - 1, engine="direct").indices, reference_all(X))


def reference_all(X):
    return reference(X, len(X) - 1)[0]


def test_first_is_a_smaller_search():
    X = INPUTS["integers"]
    for got, expected in zip(knn(X, 12).first(5), knn(X, 5), strict=True):
        assert torch.equal(got, expected)
    with pytest.raises(InputError, match="k must be between 1 and 12, got 13"):
        knn(X, 12).first(13)


@pytest.mark.parametrize(
    ("k", "message"),
    [(0, "at least 1, got 0"), (-1, "at least 1, got -1"), (10, "smaller than the number of points N, got k=10, N=10")],
)
def test_bad_k(k, message):
    with pytest.raises(InputError, match=message):
        knn(torch.zeros(10, 2), k)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_unusable_points_name_the_first_row(value):
    X = torch.zeros(10, 2, dtype=torch.float64)
    X[7, 1] = X[4, 0] = value
    with pytest.raises(InputError, match="row 4 is not"):
        knn(X, 3)


@pytest.mark.parametrize(
    "X",
    [torch.arange(20).view(10, 2) + 2**53, torch.full((10, 2), 2**63, dtype=torch.uint64)]
    + [torch.arange(20.0, dtype=torch.float64).view(10, 2) * size for size in (1e-160, 1e-310)],
    ids=str,
)
def test_points_whose_distances_float64_does_not_hold(X):
    with pytest.raises(InputError, match=r"points (of whole numbers must be within 2|must be of sizes within 1e-150)"):
        knn(X, 3)


def test_points_at_the_ends_of_what_float64_holds():
    X = torch.tensor([[0.0], [1], [3], [7]], dtype=torch.float64)
    expected = knn(X, 1).indices
    for same in (X.long() + 2**53 - 8, X * 1e149, X * 1e-149, torch.ones(4, 1).double() * 0):
        assert torch.equal(knn(same, 1).indices, expected) or not same.any()


def test_bad_engine_and_shape():
    with pytest.raises(InputError, match="did you mean faiss"):
        knn(torch.zeros(10, 2), 3, engine="fais")
    with pytest.raises(InputError, match=r"shape \[N, d\], got \[10\]"):
        knn(torch.zeros(10), 3)


def test_faiss_absent(monkeypatch):
    monkeypatch.setattr(neighbors, "has_faiss", lambda device: False)
    with pytest.raises(MissingPackageError, match=r'pip install "qdv_gpu\[cpu\]"'):
        knn(torch.zeros(10, 2), 3, engine="faiss")
    assert torch.equal(knn(INPUTS["random"], 5).indices, reference(INPUTS["random"], 5)[0])


@pytest.mark.parametrize("name", INPUTS)
def test_cuda_equals_cpu(name, cuda):
    for got, expected in zip(knn(INPUTS[name].to(cuda), 5), knn(INPUTS[name], 5), strict=True):
        assert torch.equal(got.cpu(), expected)


def test_faiss_resources_are_made_once_a_device(gpu):
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        knn(INPUTS["random"].to(device), 5)
    assert [made.pinned for made in gpu.faiss_resources] == [0, 0]  # faiss would page-lock 256 MiB


CLOUDS = {
    "clusters": torch.cat([_normal(400, 20, seed=c) * 0.3 + 10 * _normal(1, 20, seed=c + 50) for c in range(8)]),
    "copies": _normal(40, 20).repeat(60, 1),
    "a point and far ones": torch.cat([torch.zeros(1500, 20), 1e9 * _normal(10, 20)]),
    "an outlier": torch.cat([_normal(2000, 20).double(), torch.full((1, 20), 1e12, dtype=torch.float64)]),
}


def _cells(X, k):
    points, sample = _centred(X.double())[0], sample_of(len(X), 300)
    return InvertedCells(
        points, k + 1, sample, _search_all(points, sample, k, neighbors.lots(len(X), X.device))[1][:, -1]
    )


@pytest.mark.parametrize("name", CLOUDS)
def test_an_inverted_file_finds_nearly_all(name, monkeypatch):
    pytest.importorskip("faiss")
    X = CLOUDS[name]
    exact, nearly = knn(X, 30), knn(X, 30, engine="inverted")
    assert not (nearly.indices == torch.arange(len(X))[:, None]).any()
    kth = exact.squared_distances[:, -1:]
    assert (nearly.squared_distances <= kth).double().mean() >= 0.98
    assert (nearly.squared_distances.diff(dim=1) >= 0).all()
    for threads in (1, 3):
        with on_threads(threads):
            assert torch.equal(knn(X, 30, engine="inverted").indices, nearly.indices)


@pytest.mark.parametrize("name", [*CLOUDS, "one place", "many neighbours"])
def test_cells_find_nearly_all(name):
    X = {"one place": torch.zeros(500, 3), "many neighbours": _normal(400, 5)}.get(name)
    X = CLOUDS[name][::2] if X is None else X
    k = 300 if name == "many neighbours" else 30
    cells = _cells(X, k)
    own = torch.arange(len(X))
    found, outside = cells.propose(own)
    assert found.shape == (len(X), k + 1)
    assert ((found >= 0) & (found < len(X))).all()
    assert outside.isinf().all()
    others = found[found != own[:, None]]
    assert len(others) >= 0.9 * len(X) * k
    kth = knn(X, k).squared_distances[:, -1:]
    D = (X[:, None].double() - X[found].double()).square().sum(2).masked_fill(found == own[:, None], torch.inf)
    nearly = float((D <= kth * (1 + 1e-6)).sum() / (len(X) * k))
    assert nearly >= 0.98 or name == "an outlier"  # beside which float32 does not tell the others apart
    assert cells.recall == pytest.approx(min(1, nearly), abs=0.01)


@pytest.mark.parametrize("kind", ["file", "cells"])
def test_an_inverted_file_does_not_take_the_first_copies(kind):
    X = torch.arange(2400.0)[:, None] % 2
    if kind == "file":
        pytest.importorskip("faiss")
        found = knn(X, 30, engine="inverted").indices
    else:
        found = _cells(X, 30).propose(torch.arange(2400))[0]
    quarters = (found // 600).flatten().bincount(minlength=4) / found.numel()
    assert quarters.min() > 0.05
    own = found // 600 == torch.arange(2400)[:, None] // 600
    assert own.double().mean() < 0.45


def test_cells_search_no_more_than_they_must():
    X = CLOUDS["clusters"][::2]
    cells = _cells(X, 30)
    assert cells.probes < len(cells._members) / 2


@pytest.mark.parametrize("name", CLOUDS)
def test_an_inverted_file_on_a_gpu(name, cuda):
    X = CLOUDS[name][::5]
    exact, nearly = knn(X, 30), knn(X.to(cuda), 30, engine="inverted")
    assert (nearly.squared_distances.cpu() <= exact.squared_distances[:, -1:]).double().mean() >= 0.98
    again = knn(X.to(cuda), 30, engine="inverted")
    assert torch.equal(nearly.indices, again.indices)
    assert torch.equal(nearly.squared_distances, again.squared_distances)


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_an_inverted_file_of_few_points(place, request):
    """Fewer than 16, of which there are no 4 sqrt(N) lists."""
    if place == "cpu":
        pytest.importorskip("faiss")
    device = torch.device("cpu") if place == "cpu" else request.getfixturevalue("gpu") and torch.device("cuda", 0)
    for N in (4, 9, 15):
        X = _normal(N, 3)
        assert torch.equal(knn(X.to(device), 3, engine="inverted").indices.cpu(), knn(X, 3).indices)


def test_all_pairs_are_searched_where_float32_is_too_coarse(cuda, caplog):
    """Two clusters so far apart that products in float32 do not tell their points from each other."""
    X = 1e-3 * _normal(1200, 5).double()
    X[::2] += 100
    with caplog.at_level("INFO", "qdv_gpu"):
        found = knn(X.to(cuda), 15, engine="inverted")
    assert torch.equal(found.indices.cpu(), knn(X, 15).indices)
    assert caplog.messages[-1].endswith("inverted file: all pairs are searched")


def test_an_inverted_file_says_what_it_finds(caplog):
    pytest.importorskip("faiss")
    with caplog.at_level("INFO", "qdv_gpu"):
        knn(CLOUDS["clusters"], 30, engine="inverted")
    assert re.fullmatch(r"\d\d\d?\.\d % of the nearest neighbours are found, by an inverted file", caplog.messages[-1])
