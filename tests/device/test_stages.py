"""Every stage on a device gives what it gives on the CPU, and stays on its device."""

import importlib.util
import re
from functools import partial

import numpy as np
import pytest
import torch

from qdv_gpu import (
    TSNE,
    Deconvnet,
    Settings,
    activations,
    analyze,
    doctor,
    finetune,
    inverted,
    kernels,
    load_images,
    load_network,
    profile,
)  # fmt: skip
from qdv_gpu.deconv.deconvnet import MODES
from qdv_gpu.errors import InputError
from qdv_gpu.features.pca import reduce
from qdv_gpu.machine import measured
from qdv_gpu.neighbors import knn
from qdv_gpu.networks.weights import read_weights
from qdv_gpu.scores.quality import neighbor_ranks
from qdv_gpu.studies import peaks
from qdv_gpu.studies import profile as throughput
from qdv_gpu.tsne import affinities
from qdv_gpu.tsne.affinities import joint_affinities
from qdv_gpu.tsne.engines.cuda import descend_cuda
from qdv_gpu.tsne.engines.fft_cuda import descend_fft_cuda
from qdv_gpu.tsne.objective import SIMILARITIES, kl_divergence
from qdv_gpu.tsne.problem import Motion, Phase, Problem, Repulsion, stacked

SPEC = "tiny_networks:cnn"


def blobs(N=60, d=6):
    return torch.randn(N, d, generator=torch.Generator().manual_seed(0)) + 4 * torch.eye(d)[torch.arange(N) % 3]


def relative(found, truth):
    found, truth = found.detach().double().cpu(), truth.detach().double().cpu()
    return float((found - truth).norm() / truth.norm())


def test_without_cupy_the_cpu_does_what_kernels_do(gpu, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "cupy" else find(name, *rest))
    X, Z = blobs(), blobs()[:, :2].contiguous()
    for found, truth in zip(knn(X.cuda(), 5), knn(X, 5), strict=True):
        assert found.is_cuda
        assert torch.equal(found.cpu(), truth)
    near = knn(Z, 5).indices
    assert torch.equal(neighbor_ranks(X.cuda(), near.cuda()).cpu(), neighbor_ranks(X, near))
    for kind in ("knn", "full"):
        P, there = (joint_affinities(points, perplexity=8, kind=kind) for points in (X, X.cuda()))
        for similarity in SIMILARITIES:
            divergence = kl_divergence(there, Z.cuda(), similarity=similarity)
            assert divergence == pytest.approx(kl_divergence(P, Z, similarity=similarity), rel=1e-6)
    settings = Settings(layers=("pool",), samples=80, pca=10, perplexity=8, iterations=30, seeds=1, k=(3,))
    analyze(SPEC, "digits", tmp_path / "run", settings=settings, device="cuda")
    assert not gpu.counts.kernels


def test_without_cupy_and_faiss_all_neighbours_are_found(gpu, monkeypatch):
    """Of any number of points: the CPU's inverted file is faiss's."""
    find = importlib.util.find_spec
    absent = ("cupy", "faiss")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name, *rest))
    for limit in ("EXACT_UP_TO", "CUDA_EXACT_UP_TO"):
        monkeypatch.setattr(affinities, limit, 50)
    P, there = (joint_affinities(points, perplexity=8) for points in (blobs(), blobs().cuda()))
    assert torch.equal(there.indices.cpu(), P.indices)


@pytest.mark.parametrize("affinities", ["knn", "full"])
@pytest.mark.parametrize("similarity", ["student-t", "gaussian"])
def test_tsne(cuda, similarity, affinities):
    """A start that is spread out: from one near 0 the rounding of early exaggeration grows without bound."""
    settings = {"similarity": similarity, "affinities": affinities, "perplexity": 8, "early_exaggeration": 2.0}
    start = torch.randn(2, 60, generator=torch.Generator().manual_seed(1)).T.numpy()  # column by column
    settings |= {"init": start, "learning_rate": 0.5}
    model = TSNE(iterations=56, exaggeration_iterations=27, **settings)  # graphs in both phases, and single steps
    truth, divergence = model.fit_transform(blobs()), model.fit(blobs()).kl_divergence_
    found = model.fit_transform(blobs().to(cuda))
    assert found.device == cuda
    assert relative(found, truth) < 1e-5
    assert model.kl_divergence_ == pytest.approx(divergence, rel=1e-6)
    assert torch.equal(model.fit_transform(blobs().to(cuda)), found)


def test_tsne_after_three_iterations_from_its_own_start(cuda):
    model = TSNE(perplexity=8, iterations=3, seed=4)
    assert relative(model.fit_transform(blobs().to(cuda)), model.fit_transform(blobs())) < 1e-6


def test_tsne_where_torch_makes_tensors_of_float64(cuda):
    """The kernels read float32, whatever torch's default is."""
    model, X = TSNE(perplexity=8, iterations=3, seed=4), blobs()
    truth = model.fit_transform(X)
    torch.set_default_dtype(torch.float64)
    try:
        found = model.fit_transform(X.to(cuda))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert relative(found, truth) < 1e-6


def moved(E, *, N=4, engine=descend_cuda):
    """E embeddings of N points after 30 iterations."""
    P = joint_affinities(torch.randn(N, 3, generator=torch.Generator().manual_seed(0)), perplexity=1)
    rows = stacked([P._make(part.cuda() for part in P)], copies=E)
    start = torch.randn(E, N, 2, generator=torch.Generator().manual_seed(1)).cuda()
    problem = Problem(rows, Phase(30, 1.0, 0.5), learning_rate=1.0, gaussian=False)
    return engine(problem, Motion.at_rest(start), lambda done: None)[0].Z


def test_more_embeddings_than_blocks_along_y(cuda, monkeypatch):
    truth = moved(5, N=20)
    monkeypatch.setattr(kernels, "MAX_GRID", 2)
    assert torch.equal(moved(5, N=20), truth)


def test_no_launch_is_larger_than_cuda_allows(gpu, monkeypatch):
    grids = []
    monkeypatch.setattr(kernels, "launch", lambda *args, grid, block: grids.append((args[1], grid[1])))
    moved(70_000)
    for kernel in ("repel", "attract", "update"):
        assert {size for name, size in grids if name == kernel} == {65_535, 70_000 - 65_535}
    with pytest.raises(InputError, match="at most 65,535 embeddings at once, got 65,536"):
        moved(65_536, engine=partial(descend_fft_cuda, repulsion=Repulsion("fft")))


def test_doctor_holds_kernels_to_the_cpu(cuda, monkeypatch):
    class Map:
        """In the place of an embedding: three clusters, and KL as the device has it."""

        def __init__(self, **_):
            pass

        def fit_transform(self, X):
            Z = 20.0 * (torch.arange(600) % 3)[:, None] + torch.randn(
                600, 2, generator=torch.Generator().manual_seed(0)
            )
            self.kl_divergence_ = kl_divergence(joint_affinities(X, perplexity=20), Z.to(X.device))
            return Z.to(X.device)

    monkeypatch.setattr(doctor, "TSNE", Map)
    tests = {name: test for name, test in doctor._tests(cuda) if name.endswith("cuda:0")}
    names = [f"{name}, cuda:0" for name in ("ranks", "neighbours, inverted file", "t-SNE, exact")]
    assert [tests[name]() for name in names] == ["", "", ""]
    launch = kernels.launch

    def wrong(module, kernel, *args, **sizes):
        launch(module, kernel, *args, **sizes)
        if kernel in ("ranks", "similarities"):
            args[{"ranks": 4, "similarities": 2}[kernel]].mul_(2)

    monkeypatch.setattr(kernels, "launch", wrong)
    assert tests[names[0]]() == "other ranks than by all distances in float64"
    assert tests[names[2]]().startswith("KL divergence")
    monkeypatch.setattr(inverted, "_nearest", lambda points, others, k: torch.arange(k).expand(len(points), k).to(cuda))
    monkeypatch.setattr(inverted, "RECALL", 0)
    assert re.fullmatch(r"finds only \d+\.\d% of the neighbours", tests[names[1]]())


@pytest.fixture
def quick_profile(monkeypatch):
    monkeypatch.setattr(peaks, "PRODUCT", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(peaks, "COPY", {"cpu": 2**16, "cuda": 2**16})
    monkeypatch.setattr(peaks, "SECONDS", 0.01)
    monkeypatch.setattr(throughput, "SECONDS", 0.01)


@pytest.fixture(scope="module")
def images():
    return load_images("digits", samples=40)


@pytest.fixture(scope="module")
def on_cpu(images):
    net = Deconvnet(load_network(SPEC, weights="none", device="cpu"))
    image = images.pixels[3]
    found = {(layer, mode): net.reconstruct(image, layer, mode=mode) for layer in ("conv2", "pool@2") for mode in MODES}
    return found, net.top_activations(images, "pool@1", k=9), net.sanity_check(image, "conv2")


def test_deconvnet(cuda, images, on_cpu):
    pictures, top, sanity = on_cpu
    net = Deconvnet(load_network(SPEC, weights="none", device=cuda))
    for (layer, mode), truth in pictures.items():
        found = net.reconstruct(images.pixels[3], layer, mode=mode)
        assert found.device == cuda
        assert relative(found, truth) < 1e-5, (layer, mode)
    best = net.top_activations(images, "pool@1", k=9)
    assert torch.equal(best.images.cpu(), top.images)
    assert relative(best.reconstructions, top.reconstructions) < 1e-5
    assert (
        relative(torch.tensor(net.sanity_check(images.pixels[3], "conv2").similarity), torch.tensor(sanity.similarity))
        < 1e-4
    )


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_activations(cuda, images, precision):
    truth = activations(load_network(SPEC, weights="none", device="cpu"), images, layers=["conv2"])["conv2"]
    net = load_network(SPEC, weights="none", device=cuda)
    found = activations(net, images, layers=["conv2"], precision=precision)["conv2"]
    assert found.device == cuda
    low, high = {"fp32": (0, 1e-5), "tf32": (1e-5, 2e-3), "bf16": (1e-4, 2e-2)}[precision]
    if precision == "tf32" and torch.cuda.get_device_name() != "simulated GPU":
        low = 0  # cuDNN computes so small a convolution in float32
    assert low <= relative(found, truth) < high


def test_a_network_that_flattens_by_a_view(cuda, images, quick_profile):
    """It takes no maps with channels last."""
    spec = "tiny_networks:viewing"
    truth = activations(load_network(spec, weights="none", device="cpu"), images, layers=["pool", "fc"], batch_size=16)
    net = load_network(spec, weights="none", device=cuda)
    found = activations(net, images, layers=["pool", "fc"], batch_size=16)
    assert all(relative(found[name], X) < 1e-5 for name, X in truth.items())
    assert len(Deconvnet(net).top_activations(images, "pool@2", k=3, maps=[0]).images) == 8
    assert profile(net, batch_sizes=[2])


def test_finetune_learns_as_on_the_cpu(cuda, tmp_path):
    options = {"epochs": 2, "batch_size": 50, "lr": 1e-2, "samples": 200}
    runs = [
        finetune(SPEC, "digits", tmp_path / name, device=place, **options)
        for name, place in (("a", "cpu"), ("b", cuda))
    ]
    for ours, theirs in zip(*(run["history"] for run in runs), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)  # bfloat16
    finetune(SPEC, "digits", tmp_path / "c", device=cuda, **options)
    again, before = (read_weights(tmp_path / name / "weights.safetensors")[0] for name in "cb")
    assert all(torch.equal(again[key], before[key]) for key in before)


@pytest.mark.parametrize("iterations", [3, pytest.param(400, marks=pytest.mark.slow)])
def test_an_analysis_of_200_images(cuda, tmp_path, iterations):
    """The same scores in the layer's own space, the same maps at first, and NH within the noise of seeds at the end."""
    settings = Settings(
        layers=("pool",), samples=200, pca=20, perplexity=20, iterations=iterations, seeds=3, k=(3, 5), learning_rate=50
    )
    runs = [analyze(SPEC, "digits", tmp_path / str(place), settings=settings, device=place) for place in ("cpu", cuda)]
    for theirs, ours in zip(*(run.layers for run in runs), strict=True):
        for k in (3, 5):
            there, here = theirs.of(k), ours.of(k)
            assert here.nh_feature_space == pytest.approx(there.nh_feature_space, abs=1e-12)
            noise = np.hypot(there.standard_error, here.standard_error)
            assert abs(here.nh - there.nh) <= (1e-12 if iterations == 3 else 2 * noise)


def test_maps_of_200_images_after_three_iterations(cuda):
    """Of the same components: those of two devices differ in their last digits, which early exaggeration enlarges."""
    net = load_network(SPEC, weights="none", device="cpu")
    X = reduce([activations(net, load_images("digits", samples=200), layers=["pool@1"])["pool@1"]], 20)
    model = TSNE(perplexity=20, iterations=3)
    assert relative(model.fit_transform(X.to(cuda), seeds=3), model.fit_transform(X, seeds=3)) < 1e-6


def test_profile(cuda, quick_profile):
    found = profile(SPEC, batch_sizes=[2], device=cuda)[0]
    truth = profile(SPEC, batch_sizes=[2], device="cpu")[0]
    assert [one.layer for one in found.layers] == [one.layer for one in truth.layers]
    assert [one.gflop for one in found.layers] == [one.gflop for one in truth.layers]
    assert [one.bytes for one in found.layers] == [one.bytes for one in truth.layers]
    assert all(one.seconds >= 0 for one in found.layers)


def test_a_second_device(gpu, images, tmp_path):
    """What is asked for on cuda:1 takes nothing on cuda:0 and answers on cuda:1."""
    with torch.cuda.device(0):
        net = load_network(SPEC, weights="none", device="cuda:1")
        assert activations(net, images, layers=["conv2"])["conv2"].device.index == 1
        assert Deconvnet(net).reconstruct(images.pixels[3], "pool@2").device.index == 1
        assert TSNE(perplexity=8, iterations=30).fit_transform(blobs().to("cuda:1")).device.index == 1
        TSNE(perplexity=8, iterations=1, engine="fft").fit(blobs().to("cuda:1"))
        settings = Settings(layers=("pool",), samples=40, pca=5, perplexity=5, iterations=30, seeds=2, k=(3,))
        analyze(SPEC, "digits", tmp_path / "run", settings=settings, device="cuda:1")
        finetune(SPEC, "digits", tmp_path / "tuned", epochs=1, samples=40, batch_size=20, device="cuda:1")
    assert gpu.memory[0].peak == 0
    assert gpu.memory[1].peak > 0


@pytest.mark.parametrize("index", [0, 1])
def test_a_device_that_is_too_small_is_refused_before_anything_is_written(gpu, tmp_path, index):
    gpu.memory[index].size = 100 << 20
    with pytest.raises(InputError, match="too small for layer"):
        analyze(SPEC, "digits", tmp_path / "run", layers="pool", samples=80, perplexity=8, device=f"cuda:{index}")
    assert not (tmp_path / "run").exists()


def test_a_capture_ends_where_a_launch_in_it_fails(gpu, monkeypatch):
    launch = kernels.launch

    def fails(*args, **sizes):
        if gpu.capturing:
            raise KeyboardInterrupt
        launch(*args, **sizes)

    monkeypatch.setattr(kernels, "launch", fails)
    with pytest.raises(KeyboardInterrupt):
        TSNE(perplexity=8, iterations=30).fit(blobs().cuda())
    assert gpu.capturing is None


def test_batches_are_halved_where_memory_is_short(gpu, images, lines):
    truth = activations(load_network(SPEC, weights="none", device="cpu"), images, layers=["conv2"])["conv2"]
    net = load_network(SPEC, weights="none", device="cuda")
    activations(net, images, layers=["conv2"], batch_size=40)
    whole = gpu.memory[0].peak
    torch.cuda.empty_cache()
    gpu.memory[0].size = int(0.7 * whole)
    found = activations(net, images, layers=["conv2"], batch_size=40)["conv2"].cpu()
    assert relative(found, truth) < 1e-5
    assert any("halved" in line for line in lines())


def test_fewer_maps_go_back_at_once_where_memory_is_short(gpu, images):
    net = Deconvnet(load_network(SPEC, weights="none", device="cuda"))
    truth = net.reconstruct(images.pixels[3], "conv2", mode="deconvnet-map").cpu()
    gpu.memory[0].size, gpu.memory[0].reserved = int(0.8 * gpu.memory[0].peak), 0
    assert relative(net.reconstruct(images.pixels[3], "conv2", mode="deconvnet-map"), truth) < 1e-5


def test_training_goes_on_in_tiles_where_memory_is_short(gpu, tmp_path, lines):
    options = {"epochs": 1, "batch_size": 100, "lr": 1e-2, "samples": 200, "device": "cuda"}
    finetune(SPEC, "digits", tmp_path / "whole", **options)
    gpu.memory[0].size, gpu.memory[0].reserved = int(0.75 * gpu.memory[0].peak), 0
    finetune(SPEC, "digits", tmp_path / "tiles", **options)
    assert any("tiles" in line for line in lines())


def test_a_measured_block_has_ended(gpu):
    with measured(torch.device("cuda", 0)):
        torch.zeros(3, device="cuda")
    assert gpu.host.get(gpu.stream.identity, 0) == gpu.stream.clock[gpu.stream.identity]


def test_faiss_is_asked_for_no_more_than_it_finds(gpu):
    """It proposes 2,048 candidates of 1,700 neighbours, where a quarter more would be wanted."""
    X = blobs(2200, 3).double()
    found = knn(X.cuda(), 1700, engine="faiss").squared_distances[0].cpu()
    torch.testing.assert_close(found, (X[0] - X).square().sum(1).sort().values[1:1701])


def test_cuml_gets_what_it_requires(gpu):
    """Points by columns, each point its own first neighbour, a stream that has been waited for, and torch's memory."""
    found = TSNE(engine="cuml", perplexity=8).fit_transform(blobs().cuda(), seeds=2)
    assert found.shape == (2, 60, 2)
    assert found.is_cuda
