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
from torchvision.models.feature_extraction import create_feature_extractor

from benchmarks.common import Stage, timing
from benchmarks.data import MADE, fashion
from benchmarks.tsne import PERPLEXITY, components
from qdv_gpu import TSNE, activations, load_images, load_network, neighborhood_hit
from qdv_gpu.data.datasets import stratified
from qdv_gpu.data.images import Images, prepare
from qdv_gpu.features.forward import computing, network_input
from qdv_gpu.features.pca import principal_components
from qdv_gpu.networks.network import Network
from qdv_gpu.scores.quality import trustworthiness
from qdv_gpu.studies.profile import Profile, profile
from qdv_gpu.tsne.affinities import joint_affinities

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def networks(options: argparse.Namespace) -> list[Network]:
    """Those that were asked for."""
    specs = options.network or (["alexnet", "vgg19"] if options.device.type == "cuda" else ["alexnet"])
    return [load_network(spec, weights="imagenet" if "=" in spec else "none", device=options.device) for spec in specs]


def inputs(options: argparse.Namespace) -> tuple[list[Network], Images, int]:
    """The networks and the test images that were asked for, at the side that this device is timed at."""
    count = 200 if options.quick else options.images
    if options.data:
        images = load_images(options.data, samples=count)
    else:
        images = fashion()
        images = images.take(stratified(images.require_labels("a sample"), images.classes, count))
    return networks(options), images, 224 if options.device.type == "cuda" else 64


def called(images: Images, side: int) -> str:
    """Images as a row of the table has them."""
    return f"{len(images):,} {MADE if images.name == MADE else 'images'} at {side} px"


def run_transfer(options: argparse.Namespace, stage: Stage) -> None:
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
    stage.bar("mean difference from PIL's resizing", difference, "<=", 0.02)
    times, _ = stage.interleaved({"ours": ours, "PIL": pil}, 1 if options.quick else 3)
    stage.row(timing(f"transfer and resize, {called(images, side).replace(' at ', ' to ')}", times))


def run_forward(options: argparse.Namespace, stage: Stage) -> None:
    """All layers from one forward pass, a bare pass that ends at the last of them, and a pass for each layer."""
    (network, *_), images, side = inputs(options)
    batch, device = (256 if options.device.type == "cuda" else 64), options.device
    images = images.to(device)
    assert images.pixels is not None
    pixels = images.pixels
    layers = list(network.layers)

    def held(chosen: list[str] | None) -> dict[str, Tensor]:
        return activations(network, images, layers=chosen, image_size=side)

    def stop(*_: Any) -> None:
        raise StopIteration

    def bare(_: int) -> None:
        last = network.module.get_submodule(network.layers[layers[-1]])
        handle = last.register_forward_hook(stop)
        with torch.inference_mode(), computing("fp32", device):
            for part in pixels.split(batch):
                inputs = network_input(network, part, side).contiguous(memory_format=torch.channels_last)
                with suppress(StopIteration):
                    network.module(inputs)
        handle.remove()

    separate = {layer: held([layer])[layer] for layer in layers}
    together = held(None)
    others = sum(not torch.equal(together[layer], separate[layer]) for layer in layers)
    stage.bar("layers of one pass that are not those of a pass for each", others, "<=", 0)
    extractor = create_feature_extractor(network.module, {network.layers[layer]: layer for layer in layers})

    def extracted(_: int) -> dict[str, Tensor]:
        """By torchvision, which knows no tiles and no budget of memory."""
        kept: dict[str, list[Tensor]] = {layer: [] for layer in layers}
        with torch.inference_mode(), computing("fp32", device):
            for part in pixels.split(batch):
                inputs = network_input(network, part, side).contiguous(memory_format=torch.channels_last)
                for layer, output in extractor(inputs).items():
                    kept[layer].append(output.flatten(1))
        return {layer: torch.cat(parts) for layer, parts in kept.items()}

    theirs = extracted(0)
    apart = max(float((theirs[layer] - together[layer]).norm() / together[layer].norm()) for layer in layers)
    stage.bar("relative L2 of the layers to torchvision's", apart, "<=", 1e-5)
    del theirs, separate, together
    methods: dict[str, Callable[[int], Any]] = {
        "one pass": lambda _: held(None) and None,
        "torchvision": lambda turn: extracted(turn) and None,
        "bare pass": bare,
    }
    times, _ = stage.interleaved(methods, 1 if options.quick else 7)
    what = f"{len(layers)} layers of {network.name}, {called(images, side)}"
    stage.row(timing(what, times, ours="one pass"))
    separately = {"a pass for each": lambda _: [held([layer]) and None for layer in layers]}
    times |= stage.interleaved(separately, 1 if options.quick else 3)[0]
    stage.row(timing(what, times, ours="one pass"))
    middle = {name: median(spent) for name, spent in times.items()}
    if "bare pass" in middle:
        ratio = middle["one pass"] / middle["bare pass"]
        stage.bar("all layers in one pass, times the bare one", ratio, "<=", 1.1)
    ratio = middle["a pass for each"] / middle["one pass"]
    stage.bar("a pass for each layer, times the one pass", ratio, ">=", 1.5)


def miscounted(network: Network, found: Profile, side: int) -> float:
    """How far the operations are from those of the convolutions' and linear layers' shapes: there are no others."""
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
    return abs(counted / known - 1)


def run_layers(options: argparse.Namespace, stage: Stage) -> None:
    """Every layer of a forward pass, and on CUDA what share of a matrix product's rate VGG19 reaches in bfloat16."""
    cuda = options.device.type == "cuda"
    batch, side = (8 if options.quick else 256 if cuda else 64), 224 if cuda else 64
    profiles: dict[str, Any] = {}
    for network in networks(options):
        for precision in ("fp32", "bf16") if cuda else ("fp32",):
            title = f"forward pass of {network.name}, {batch} images at {side} px, {precision}"
            if not stage.fits(title):
                continue
            with stage.part(title):
                (found,) = profile(network, batch_sizes=[batch], precision=precision, image_size=side)
                profiles[title] = asdict(found)
                stage.note(profiles=profiles)
                slowest = sorted(found.layers, key=lambda layer: -layer.seconds)[:5]
                parts = {f"{one.layer} ({one.kind})": one.seconds for one in slowest}
                stage.row(timing(title, {"ours": found.all_seconds}, parts=parts))
                stage.bar(f"{title}: operations miscounted", miscounted(network, found, side), "<=", 1e-6)
                outside = abs(found.sum_of_layers / found.seconds - 1)
                stage.bar(f"{title}: layers' sum less the whole", outside, "<=", 0.1)
                if precision == "bf16" and network.name.startswith("vgg19"):
                    stage.bar(f"{title}: share of the matrix peak", found.share_of_peak, ">=", 0.4)


def run_pca(options: argparse.Namespace, stage: Stage) -> None:
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
    stage.bar("captured variance lost against float64", lost, "<=", 1e-5)
    methods: dict[str, Callable[[int], Any]] = {"ours": lambda _: principal_components([X], 50)}
    narrow = wide.float().cpu().numpy()
    if importlib.util.find_spec("sklearn"):
        from sklearn.decomposition import PCA

        methods["sklearn"] = lambda seed: PCA(50, random_state=seed).fit(narrow)
    times, results = stage.interleaved(methods, 1 if options.quick else 3)
    what = f"PCA of {layer}, {X.shape[0]:,} x {X.shape[1]:,} to 50"
    row = timing(what, times) | {"variance_lost": lost, "images": images.name}
    if "sklearn" in results:
        row["variance_lost_sklearn"] = 1 - float(results["sklearn"][0].explained_variance_.sum()) / exact
    stage.row(row)


def run_affinities(options: argparse.Namespace, stage: Stage) -> None:
    """The joint affinities of Fashion-MNIST's test set, beside openTSNE's exact ones."""
    images = fashion()
    X, _ = components(images, device=options.device)
    X = X[: 1000 if options.quick else 10_000]
    methods: dict[str, Callable[[int], Any]] = {"ours": lambda _: joint_affinities(X, perplexity=PERPLEXITY)}
    P = methods["ours"](0)
    stage.bar("sum of the affinities less 1", abs(float(P.values.sum()) - 1), "<=", 1e-5)
    if importlib.util.find_spec("openTSNE"):
        from openTSNE.affinity import PerplexityBasedNN

        points = X.cpu().numpy()
        methods["openTSNE"] = lambda _: PerplexityBasedNN(points, PERPLEXITY, method="exact", n_jobs=2)
        with stage.part("openTSNE's affinities"):
            largest = methods["openTSNE"](0).P.data.max()
            difference = abs(largest / float(P.values.max()) - 1)
            stage.bar("largest affinity: relative difference to openTSNE's", difference, "<=", 1e-2)
    times, _ = stage.interleaved(methods, 1 if options.quick else 3)
    stage.row(timing(f"affinities of {len(X):,} x {X.shape[1]}", times) | {"images": images.name})


def run_neighbors(options: argparse.Namespace, stage: Stage) -> None:
    """The neighborhood hit of a 2-D map, beside scikit-learn's trees and faiss, and its trustworthiness."""
    images = fashion()
    X, labels = components(images, device=options.device)
    N = 1000 if options.quick else 10_000
    model = TSNE(perplexity=PERPLEXITY, iterations=300 if options.quick else 1000)
    Z, labels, k = model.fit_transform(X[:N]), labels[:N], 5
    points, classes = Z.cpu().numpy(), labels.numpy()

    def hit(neighbours: np.ndarray) -> float:
        return float((classes[neighbours] == classes[:, None]).mean())

    methods: dict[str, Callable[[int], float]] = {"ours": lambda _: neighborhood_hit(Z, labels, k=k)}
    if importlib.util.find_spec("sklearn"):
        from sklearn.neighbors import NearestNeighbors

        search = NearestNeighbors(n_neighbors=k, n_jobs=torch.get_num_threads())
        methods["sklearn"] = lambda _: hit(search.fit(points).kneighbors(return_distance=False))
    if importlib.util.find_spec("faiss"):
        import faiss

        def with_faiss(_: int) -> float:
            found = faiss.knn(points, points, k + 1)[1]
            own = found == np.arange(N)[:, None]
            own[~own.any(axis=1), -1] = True  # crowded out by duplicates: the farthest goes
            return hit(found[~own].reshape(N, k))

        methods["faiss"] = with_faiss
    times, values = stage.interleaved(methods, 2 if options.quick else 6)
    times = {name: spent[1:] or spent for name, spent in times.items()}  # the first is a warm-up
    stage.row(timing(f"neighborhood hit of {N:,} points in a map", times) | {"images": images.name})
    for name in list(values)[1:]:
        stage.bar(f"NH: difference to {name}", abs(values[name][0] - values["ours"][0]), "<=", 1e-3)
    methods = {"ours": lambda _: trustworthiness(X[:N], Z, k=k)}
    if importlib.util.find_spec("sklearn"):
        from sklearn.manifold import trustworthiness as sklearns

        layer = X[:N].cpu().numpy()
        methods["sklearn"] = lambda _: sklearns(layer, points, n_neighbors=k)
    times, values = stage.interleaved(methods, 2 if options.quick else 3)
    stage.row(timing(f"trustworthiness of {N:,} points in a map", times) | {"images": images.name})
    for name in list(values)[1:]:
        stage.bar(f"trustworthiness: difference to {name}", abs(values[name][0] - values["ours"][0]), "<=", 1e-6)
