"""The stages of an analysis before and after t-SNE, each beside the packages that do the same."""

import argparse
import importlib.util
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import bar, interleaved, timing
from benchmarks.tsne import PERPLEXITY, components
from qdv_gpu import activations, load_images, load_network, neighborhood_hit
from qdv_gpu.data.images import Images, prepare
from qdv_gpu.features.forward import computing, network_input
from qdv_gpu.features.pca import principal_components
from qdv_gpu.networks.network import Network
from qdv_gpu.studies.profile import Profile, profile
from qdv_gpu.tsne.affinities import joint_affinities

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def networks(options: argparse.Namespace) -> list[Network]:
    """Those that were asked for."""
    specs = options.network or (["alexnet", "vgg19"] if options.device.type == "cuda" else ["alexnet"])
    return [load_network(spec, weights="imagenet" if "=" in spec else "none", device=options.device) for spec in specs]


def inputs(options: argparse.Namespace) -> tuple[list[Network], Images, int]:
    """The networks and the test images that were asked for, at the side that this device is timed at."""
    images = load_images(options.data or "fashion-mnist", samples=200 if options.quick else options.images)
    return networks(options), images, 224 if options.device.type == "cuda" else 64


def run_transfer(options: argparse.Namespace) -> dict[str, Any]:
    """Images of the host, uint8, to the device, resized and normalised there; a PIL pipeline beside it."""
    from torchvision.transforms import v2

    _, images, side = inputs(options)
    assert images.pixels is not None
    pixels, device = images.pixels, options.device

    def ours(_: int) -> Tensor:
        for batch in pixels.split(256):
            part = prepare(batch.to(device), size=side, channels=3, mean=IMAGENET[0], std=IMAGENET[1])
        return part

    resize = v2.Compose([v2.ToPILImage(), v2.Resize((side, side)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    normalise = v2.Normalize(*IMAGENET)

    def pil(_: int) -> Tensor:
        for batch in pixels.expand(-1, 3, -1, -1).split(256):
            part = torch.stack([normalise(resize(image)) for image in batch]).to(device)
        return part

    difference = float((ours(0) - pil(0)).abs().mean())
    assert difference < 0.02, f"differs from PIL's resizing by {difference} on average"
    times, _ = interleaved({"ours": ours, "PIL": pil}, 1 if options.quick else 3)
    return {"timings": [timing(f"transfer and resize, {len(images):,} images to {side} px", times)], "bars": []}


def run_forward(options: argparse.Namespace) -> dict[str, Any]:
    """All layers from one forward pass, a bare pass that ends at the last of them, and a pass for each layer."""
    (network, *_), images, side = inputs(options)
    batch, device = (256 if options.device.type == "cuda" else 64), options.device
    images = images.to(device)
    assert images.pixels is not None
    pixels = images.pixels
    layers = list(network.layers)

    def held(chosen: list[str] | None) -> dict[str, Tensor]:
        return activations(network, images, layers=chosen, image_size=side, batch_size=batch)

    def stop(*_: Any) -> None:
        raise StopIteration

    def bare(_: int) -> None:
        last = network.module.get_submodule(network.layers[layers[-1]])
        handle = last.register_forward_hook(stop)
        with torch.inference_mode(), computing("fp32", device):
            for part in pixels.split(batch):
                inputs = network_input(network, part, side)
                if inputs.is_cuda:
                    inputs = inputs.contiguous(memory_format=torch.channels_last)
                with suppress(StopIteration):
                    network.module(inputs)
        handle.remove()

    separate = {layer: held([layer])[layer] for layer in layers}
    together = held(None)
    assert all(torch.equal(together[layer], separate[layer]) for layer in layers), "one pass gives other activations"
    del separate, together
    methods: dict[str, Callable[[int], Any]] = {"one pass": lambda _: held(None) and None, "bare pass": bare}
    times, _ = interleaved(methods, 1 if options.quick else 7)
    separately = {"a pass for each": lambda _: [held([layer]) and None for layer in layers]}
    times |= interleaved(separately, 1 if options.quick else 3)[0]
    middle = {name: median(spent) for name, spent in times.items()}
    what = f"{len(layers)} layers of {network.name}, {len(images):,} images at {side} px"
    bars = [
        bar("all layers in one pass, times the bare one", middle["one pass"] / middle["bare pass"], "<=", 1.1),
        bar("a pass for each layer, times the one pass", middle["a pass for each"] / middle["one pass"], ">=", 1.5),
    ]
    return {"timings": [timing(what, times, ours="one pass")], "bars": bars}


def assert_operations(network: Network, found: Profile, side: int) -> None:
    """Compare the operations with those of the convolutions' and linear layers' shapes, where there are no others."""
    known = 0
    image = torch.zeros(1, network.channels, side, side, device=network.device)

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal known
        known += 2 * output.numel() * module.weight[0].numel()

    kinds = (nn.Conv2d, nn.Linear)
    handles = [m.register_forward_hook(count) for m in network.module.modules() if isinstance(m, kinds)]
    with torch.inference_mode():
        network.module(image)
    for handle in handles:
        handle.remove()
    counted = sum(layer.gflop for layer in found.layers) * 1e9 / found.batch_size
    assert abs(counted / known - 1) < 1e-6, f"{counted:g} operations an image, by the layers' shapes {known:g}"


def run_layers(options: argparse.Namespace) -> dict[str, Any]:
    """Every layer of a forward pass, and on CUDA what share of a matrix product's rate VGG19 reaches in bfloat16."""
    cuda = options.device.type == "cuda"
    batch, side = (8 if options.quick else 256 if cuda else 64), 224 if cuda else 64
    timings, bars, profiles = [], [], {}
    for network in networks(options):
        for precision in ("fp32", "bf16") if cuda else ("fp32",):
            (found,) = profile(network, batch_sizes=[batch], precision=precision, image_size=side)
            assert_operations(network, found, side)
            title = f"forward pass of {network.name}, {batch} images at {side} px, {precision}"
            profiles[title] = asdict(found)
            slowest = sorted(found.layers, key=lambda layer: -layer.seconds)[:5]
            parts = {f"{one.layer} ({one.kind})": one.seconds for one in slowest}
            timings.append(timing(title, {"ours": found.all_seconds}, parts=parts))
            bars.append(
                bar(f"{title}: layers' sum less the whole", abs(found.sum_of_layers / found.seconds - 1), "<=", 0.1)
            )
            if precision == "bf16" and network.name.startswith("vgg19"):
                bars.append(bar(f"{title}: share of the matrix peak", found.share_of_peak, ">=", 0.4))
    return {"timings": timings, "profiles": profiles, "bars": bars}


def run_pca(options: argparse.Namespace) -> dict[str, Any]:
    """The 50 components of the widest layer, beside scikit-learn's randomised solver."""
    (network, *_), images, side = inputs(options)
    held = activations(network, images.to(options.device), image_size=side)
    layer, X = max(held.items(), key=lambda item: item[1].shape[1])
    wide = X.double()
    wide = (wide - wide.min()) / (wide.max() - wide.min())
    centred = wide - wide.mean(dim=0)
    gram = centred.T @ centred if centred.shape[1] <= len(centred) else centred @ centred.T
    exact = float(torch.linalg.eigvalsh(gram)[-50:].sum()) / (len(X) - 1)
    del centred, gram
    found = principal_components([X], 50)
    lost = 1 - float(found.variance.sum()) / exact
    assert lost < 1e-5, f"captures {lost} less than float64"
    methods: dict[str, Callable[[int], Any]] = {"ours": lambda _: principal_components([X], 50)}
    narrow = wide.float().cpu().numpy()
    if importlib.util.find_spec("sklearn"):
        from sklearn.decomposition import PCA

        methods["sklearn"] = lambda seed: PCA(50, random_state=seed).fit(narrow)
    times, results = interleaved(methods, 1 if options.quick else 3)
    what = f"PCA of {layer}, {X.shape[0]:,} x {X.shape[1]:,} to 50"
    row = timing(what, times) | {"variance_lost": lost}
    if "sklearn" in results:
        row["variance_lost_sklearn"] = 1 - float(results["sklearn"][0].explained_variance_.sum()) / exact
    return {"timings": [row], "bars": [bar("captured variance lost against float64", lost, "<=", 1e-5)]}


def run_affinities(options: argparse.Namespace) -> dict[str, Any]:
    """The joint affinities of Fashion-MNIST's test set, beside openTSNE's exact ones."""
    X, _ = components(load_images("fashion-mnist"), device=options.device)
    X = X[: 1000 if options.quick else 10_000]
    methods: dict[str, Callable[[int], Any]] = {"ours": lambda _: joint_affinities(X, perplexity=PERPLEXITY)}
    P = methods["ours"](0)
    assert abs(float(P.values.sum()) - 1) < 1e-5
    if importlib.util.find_spec("openTSNE"):
        from openTSNE.affinity import PerplexityBasedNN

        points = X.cpu().numpy()
        methods["openTSNE"] = lambda _: PerplexityBasedNN(points, PERPLEXITY, method="exact", n_jobs=2)
        theirs = methods["openTSNE"](0).P
        assert abs(theirs.sum() - 1) < 1e-5
        assert abs(theirs.data.max() / float(P.values.max()) - 1) < 1e-2
    times, _ = interleaved(methods, 1 if options.quick else 3)
    return {"timings": [timing(f"affinities of {len(X):,} x {X.shape[1]}", times)], "bars": []}


def run_neighbors(options: argparse.Namespace) -> dict[str, Any]:
    """The neighborhood hit of a 2-D map, beside scikit-learn's trees and faiss."""
    X, labels = components(load_images("fashion-mnist"), device=options.device)
    N = 1000 if options.quick else 10_000
    Z, labels, k = X[:N, :2].contiguous(), labels[:N], 5
    points, classes = Z.cpu().numpy(), labels.numpy()

    def hit(neighbours: np.ndarray) -> float:
        return float((classes[neighbours] == classes[:, None]).mean())

    methods: dict[str, Callable[[int], float]] = {"ours": lambda _: neighborhood_hit(Z, labels, k=k)}
    if importlib.util.find_spec("sklearn"):
        from sklearn.neighbors import NearestNeighbors

        methods["sklearn"] = lambda _: hit(
            NearestNeighbors(n_neighbors=k).fit(points).kneighbors(return_distance=False)
        )
    if importlib.util.find_spec("faiss"):
        import faiss

        def with_faiss(_: int) -> float:
            found = faiss.knn(points, points, k + 1)[1]
            own = found == np.arange(N)[:, None]
            own[~own.any(axis=1), -1] = True  # crowded out by duplicates: the farthest goes
            return hit(found[~own].reshape(N, k))

        methods["faiss"] = with_faiss
    values = {name: method(0) for name, method in methods.items()}
    assert max(values.values()) - min(values.values()) < 1e-3, values
    times, _ = interleaved(methods, 1 if options.quick else 5)
    return {"timings": [timing(f"neighborhood hit of {N:,} points in a map", times)], "bars": []}
