"""What this machine has, which engine each stage will use and why, and whether each backend computes what it should."""

import importlib.metadata
import importlib.util
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from qdv_gpu import kernels
from qdv_gpu.deconv.unpool import max_pool, unpool
from qdv_gpu.machine import resolve_device
from qdv_gpu.neighbors import has_faiss, knn
from qdv_gpu.scores import quality
from qdv_gpu.tsne.affinities import joint_affinities
from qdv_gpu.tsne.estimator import TSNE
from qdv_gpu.tsne.objective import kl_divergence

REQUIRED = ["torch", "torchvision", "numpy", "numba", "scikit-learn", "matplotlib", "typer", "rich", "safetensors"]
OPTIONAL = {  # import name: (distributions, what it serves, pip command)
    "faiss": (("faiss-gpu-cuvs", "faiss-cpu"), "nearest neighbours", 'pip install "qdv_gpu[cpu]"'),
    "cupy": (("cupy-cuda13x",), "CUDA kernels of t-SNE and Deconvnet", 'pip install "qdv_gpu[cuda13]"'),
    "cuml": (("cuml-cu13",), "t-SNE by cuML, where asked for", 'pip install "qdv_gpu[cuda13]"'),
    "submitit": (("submitit",), "sweeps under Slurm", 'pip install "qdv_gpu[cluster]"'),
    "distributed": (("distributed",), "sweeps by Dask", 'pip install "qdv_gpu[cluster]"'),
}


def diagnose(console: Any, device: str = "auto") -> bool:
    """Print the report; return whether every backend that is here passed its test.

    Parameters
    ----------
    console : rich.console.Console
    device : str
        The device that the stages would run on.
    """
    target = resolve_device(device)
    console.print(f"device   {_device_name(target)}{'' if target.type == 'cuda' else ' (no CUDA device is used)'}")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        console.print(f"cuda:{index}   {torch.cuda.get_device_name(index)}, {free >> 20:,} of {total >> 20:,} MiB free")
    console.print(f"python   {platform.python_version()}")
    for name in REQUIRED:
        console.print(f"{name:<13}{importlib.metadata.version(name)}")
    for module, (distributions, purpose, command) in OPTIONAL.items():
        found = [f"{d} {_version(d)}" for d in distributions if _version(d)]
        console.print(f"{module:<13}{', '.join(found) if found else f'absent ({purpose}): {command}'}", markup=False)
    console.print("\nengines")
    for stage, engine, reason in _engines(target):
        console.print(f"  {stage:<12}{engine:<8}{reason}", markup=False)
    console.print("\nself-test")
    passed = True
    for name, test in _tests(target):
        started = time.perf_counter()
        try:
            problem = test()
        except (RuntimeError, ImportError, OSError, ValueError) as error:
            problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        passed &= not problem
        verdict = f"failed: {problem}" if problem else f"ok ({time.perf_counter() - started:.1f} s)"
        console.print(f"  {name:<32}{verdict}", markup=False)
    return passed


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"cpu {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _engines(device: torch.device) -> Iterator[tuple[str, str, str]]:
    cuda = device.type == "cuda"
    yield "activations", "torch", f"on {device}"
    yield "PCA", "torch", f"on {device}"
    if not cuda:
        yield "unpooling", "numba", "on the CPU"
    elif kernels.available():
        yield "unpooling", "CUDA", f"on {device}"
    else:
        yield "unpooling", "none", "CuPy is absent: qdv-gpu deconv needs --device cpu"
    if has_faiss(device):
        yield "neighbours", "faiss", "on the GPU" if cuda else "on the CPU; maps of up to 16 coordinates by numba"
    elif cuda:
        yield "neighbours", "torch", "faiss has no GPU support here"
    else:
        yield "neighbours", "numba", "every distance; faiss is absent"
    if cuda and not kernels.available():
        yield "t-SNE", "auto", "numba, on the CPU, because CuPy is absent"
        return
    kind = "CUDA kernels" if cuda else "numba"
    yield "t-SNE", "auto", f"{kind}: exact for few points, or on a grid by FFT"
    if cuda and importlib.util.find_spec("cuml") is not None:
        yield "", "cuml", "where it is asked for"


def _tests(device: torch.device) -> Iterator[tuple[str, Callable[[], str]]]:
    """Name and test of every backend that is here; a test returns what is wrong, or nothing."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 3
    X = torch.randn((600, 20), generator=generator) + 4 * torch.nn.functional.one_hot(labels, 20)
    distances = torch.cdist(X.double(), X.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(torch.inf)
    reference = distances.topk(5, largest=False).indices

    def neighbors(engine: str, where: torch.device) -> str:
        found = knn(X.to(where), 5, engine=engine).indices.cpu()
        if engine == "inverted":
            share = float((found[:, :, None] == reference[:, None]).any(dim=2).double().mean())
            return "" if share >= 0.98 else f"finds only {share:.1%} of the neighbours"
        return "" if torch.equal(found, reference) else "other neighbours than by all distances in float64"

    def ranks(where: torch.device) -> str:
        listed = distances.argsort(dim=1)[:, :-1:100]
        found = quality.neighbor_ranks(X.to(where), listed.to(where)).cpu()
        expected = 1 + 100 * torch.arange(listed.shape[1]).expand_as(found)
        return "" if torch.equal(found, expected) else "other ranks than by all distances in float64"

    def tsne(engine: str, where: torch.device) -> str:
        points = X.to(where)
        model = TSNE(perplexity=20, iterations=400, engine=engine, device=str(where))
        Z = model.fit_transform(points)
        nh = quality.neighborhood_hit(Z, labels)
        divergence = kl_divergence(joint_affinities(X, perplexity=20, kind="knn"), Z.cpu())
        if nh < 0.9:
            return f"NH of three separate clusters is {nh:.2f}"
        reported = float(np.mean(model.kl_divergence_))
        wrong = abs(divergence - reported) > 1e-3
        return f"KL divergence {reported:.4f}, on the CPU {divergence:.4f}" if wrong else ""

    def unpooling(where: torch.device) -> str:
        maps = torch.randn((2, 20, 13, 13), generator=generator)
        truth, indices = torch.nn.functional.max_pool2d(maps, 3, 2, return_indices=True)
        back = torch.zeros(2, 20, 169).scatter_add_(2, indices.flatten(2), truth.flatten(2)).view_as(maps)
        pooled, switches = max_pool(maps.to(where), 3, 2)
        found = unpool(pooled, switches, (13, 13), 3, 2).cpu()
        wrong = not torch.equal(pooled.cpu(), truth) or not torch.allclose(found, back, atol=1e-5)
        return "not the adjoint of torch's max-pooling" if wrong else ""

    cpu = torch.device("cpu")
    places = [cpu] if device.type == "cpu" else [cpu, device]
    for place in places:
        if has_faiss(place):
            yield f"neighbours, faiss, {place}", partial(neighbors, "faiss", place)
        yield f"neighbours, torch, {place}", partial(neighbors, "torch", place)
    yield "neighbours, numba, cpu", partial(neighbors, "direct", cpu)
    for place in places:
        if place.type == "cpu" or kernels.available():
            if place.type == "cuda":
                yield f"neighbours, inverted file, {place}", partial(neighbors, "inverted", place)
            yield f"ranks, {place}", partial(ranks, place)
            yield f"t-SNE, exact, {place}", partial(tsne, "exact", place)
            yield f"t-SNE, fft, {place}", partial(tsne, "fft", place)
            yield f"unpooling, {place}", partial(unpooling, place)
    if device.type == "cuda" and importlib.util.find_spec("cuml") is not None:
        yield f"t-SNE, cuml, {device}", partial(tsne, "cuml", device)
