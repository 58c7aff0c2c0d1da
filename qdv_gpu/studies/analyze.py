"""The pipeline: networks and images in, a run folder with maps, scores, tables and figures out."""

import math
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import qdv_gpu
from qdv_gpu.data.images import Images, check_data, load_images
from qdv_gpu.errors import InputError, unknown
from qdv_gpu.features.budget import FORWARD, Layer, Plan, Task, plan
from qdv_gpu.features.forward import BATCH, PRECISIONS, ForwardPass, check_precision, hold
from qdv_gpu.features.pca import NORMALISATIONS, Workspace, reduce
from qdv_gpu.machine import free_memory, measured, resolve_device
from qdv_gpu.networks.layers import trace_calls
from qdv_gpu.networks.network import Network, load_networks, select_layers
from qdv_gpu.scores.quality import score_maps
from qdv_gpu.studies.records import Analysis, RunFolder
from qdv_gpu.tsne.estimator import ENGINES, TSNE

Report = Callable[[str], None]
SOURCE = 9  # bytes for each byte of an image of its own size: it, and two copies in float32
DECODED = 16  # and of those that wait, where files are decoded batch by batch
# Bytes of neighbours, affinities and their copies for each image and unit of perplexity; of blocks of distances.
AFFINITIES, BLOCKS = {"cpu": 200, "cuda": 320}, {"cpu": 0, "cuda": 10**9}


@dataclass(frozen=True)
class Settings:
    """What an analysis computes; `preset("paper")` gives the values of Wang & Liu (CIKM 2024).

    Attributes
    ----------
    samples : int or "all"
        Test images, the same number of each class.
    image_size : int, optional
        Side in pixels that images are resized to; None takes the size that each network was trained at.
    layers : tuple of str, optional
        Layer names or module paths, of which each network has at least one; None takes its default layers.
    normalise : {"minmax", "l2", "standard", "none"}
    pca : int
        Components before t-SNE; 0 for none.
    perplexity : float
    iterations : int
    learning_rate : float or "auto"
    seeds : int
        Number of t-SNE maps of each layer, from seeds 0, 1, ...
    k : int or tuple of int
        Numbers of neighbours that the neighborhood hit is computed for.
    engine : {"auto", "exact", "cuml"}
        Of t-SNE.
    precision : {"fp32", "tf32", "bf16"}
        Of the forward pass: float32, on CUDA with products in TF32, or automatic mixed precision with bfloat16.
    memory : int, optional
        Bytes to stay within, weights and images included; None for four fifths of what is free.
    """

    samples: int | str = "all"
    image_size: int | None = None
    layers: tuple[str, ...] | None = None
    normalise: str = "minmax"
    pca: int = 50
    perplexity: float = 40.0
    iterations: int = 1000
    learning_rate: float | str = "auto"
    seeds: int = 5
    k: int | tuple[int, ...] = (5,)
    engine: str = "auto"
    precision: str = "fp32"
    memory: int | None = None

    @property
    def neighbors(self) -> tuple[int, ...]:
        """`k` as a tuple."""
        return (self.k,) if isinstance(self.k, int) else tuple(self.k)

    def check(self) -> None:
        """Raise InputError for a value that no data can make valid."""
        if self.normalise not in NORMALISATIONS:
            raise unknown("normalisation", self.normalise, NORMALISATIONS)
        if self.engine not in ENGINES:
            raise unknown("t-SNE engine", self.engine, ENGINES)
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        least = {"pca": 0, "iterations": 1, "seeds": 1, "image_size": 1, "memory": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise InputError(f"{name.replace('_', ' ')} must be at least {bound}, got {value}")
        k = self.neighbors
        if not k or min(k) < 1 or len(set(k)) < len(k):
            raise InputError(f"k must be one or more different positive numbers, got {list(k)}")

    def check_images(self, images: Images) -> None:
        """Raise InputError for a value that does not fit these images."""
        N = len(images)
        if not 1 <= self.perplexity < (N - 1) / 3:
            raise InputError(
                f"perplexity must be at least 1 and 3 * perplexity below N - 1 = {N - 1}, got {self.perplexity:g}"
            )
        if max(self.neighbors) >= N / 2:
            raise InputError(f"k must be smaller than half the number of images ({N}), got {max(self.neighbors)}")
        counts = images.labels.bincount(minlength=len(images.classes))
        for name, count in zip(images.classes, counts.tolist(), strict=True):
            if count < 2:
                raise InputError(f"class {name!r} has {count} images: at least 2 are required")


PRESETS = {"default": Settings(), "paper": Settings(samples=1000, iterations=3000, learning_rate=200.0)}


def preset(name: str) -> Settings:
    """The settings of that name: "default" or "paper" (InputError for another)."""
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]


def analyze(
    networks: str | Network | Sequence[str | Network],
    data: str | Path,
    out: str | Path,
    *,
    settings: Settings | str = "default",
    weights: str | Path = "imagenet",
    device: str = "auto",
    skip_bad: bool = False,
    report: Report = print,
) -> Analysis:
    """Score every layer of networks: activations, normalisation, PCA, t-SNE, neighborhood hit (Algorithm 1).

    Parameters
    ----------
    networks : str, Network or sequence of them
        From `load_network`, or as for it: "alexnet", "vgg19=runs/vgg19", "package.module:factory", ...
    data : str or Path
        As for `load_images`; its test images are analysed.
    out : str or Path
        The run folder: run.json, layers.csv, table3.md and .csv, timings.json, embeddings/<network>/<layer>.npz
        (Z float32 [S, N, 2], labels, indices) and figures/*.png. A layer that is already there is not computed
        again, so a killed run goes on where it was.
    settings : Settings or "default" or "paper"
    weights : str or Path
        For the networks that name no checkpoint, as for `load_network`.
    report : callable
        Called with one line of text for each thing that a user should know.

    Returns
    -------
    Analysis

    Raises
    ------
    InputError
        For anything in the input that is not as required, before anything is written; for NaN or infinite
        activations; for an `out` folder that holds something else; for a full disk.
    """
    settings = preset(settings) if isinstance(settings, str) else settings
    settings.check()
    check_data(data)
    target = resolve_device(device)
    _tsne(settings, target).check_engine(target.type)
    check_precision(settings.precision, target)
    chosen = [networks] if isinstance(networks, str | Network) else list(networks)
    loaded = load_networks(chosen, weights=weights, device=target)
    selected = select_layers(loaded, settings.layers)
    images = load_images(data, "test", samples=settings.samples, image_size=settings.image_size, skip_bad=skip_bad)
    settings.check_images(images)
    if images.skipped:
        report(f"skipped {images.skipped} unreadable files")
    probes = []
    for network, layers in zip(loaded, selected, strict=True):
        probe = ForwardPass(
            network, images.take(torch.arange(2)), layers, settings.image_size, precision=settings.precision
        )
        probe.run()
        probes.append(probe)

    inputs = {
        "data": str(data),
        "images": images.fingerprint(),
        "networks": {network.name: _describe(network, settings) for network in loaded},
        "device": target.type,
        "version": qdv_gpu.__version__,
        **asdict(replace(settings, k=settings.neighbors)),
    }
    del inputs["memory"]  # changes nothing but rounding, and a run that was killed for it goes on with another
    about = {
        "memory": settings.memory,
        "samples": len(images),
        "classes": list(images.classes),
        "skipped": images.skipped,
        "device_name": torch.cuda.get_device_name(target) if target.type == "cuda" else platform.processor(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
    folder = RunFolder(Path(out), inputs, about)
    images = images.to(target, limit=settings.memory and settings.memory // 2)
    tasks = [_task(folder, probe, images, settings) for probe in probes]
    taken = _taken(loaded, images, settings)
    budget = settings.memory or taken + free_memory(target) * 4 // 5
    plans = plan(tasks, budget=budget, reserved=taken)  # or nothing is written
    for probe, planned in zip(probes, plans, strict=True):
        _network(folder, probe, images, settings, chosen=planned, report=report)
    return folder.finish(images.labels.numpy(), images.classes)


def _taken(networks: Sequence[Network], images: Images, settings: Settings) -> int:
    """Bytes of weights and images on the networks' device."""
    weights = [tensor for network in networks for tensor in network.module.state_dict().values()]
    copied = max(tensor.nbytes for tensor in weights) // 2 if settings.precision == "bf16" else 0  # the one in use
    pixels = images.pixels
    on_device = 0 if pixels is None or pixels.device != networks[0].device else pixels.nbytes
    return sum(tensor.nbytes for tensor in weights) + copied + on_device


def _tsne(settings: Settings, device: torch.device) -> TSNE:
    return TSNE(
        perplexity=settings.perplexity,
        n_iter=settings.iterations,
        learning_rate=settings.learning_rate,
        engine=settings.engine,
        device=str(device),
    )


def _network(
    folder: RunFolder, probe: ForwardPass, images: Images, settings: Settings, *, chosen: Plan, report: Report
) -> None:
    """Compute the layers of one network that are not done yet; `probe` has run on a few of the images."""
    network, names = probe.network, list(probe.widths)
    folder.layers += [(network.name, name) for name in names]
    pending = [name for name in names if not folder.is_done(network.name, name)]
    if len(pending) < len(names):
        report(f"{network.name}: {len(names) - len(pending)} of {len(names)} layers were done before")
    if not pending:
        return

    sources, layers = _sources(probe, pending)
    whole = ForwardPass(network, images, probe.layers, settings.image_size, precision=settings.precision, report=report)
    for line in chosen.lines(network.name, {layer.name: layer.row * len(images) for layer in layers}):
        report(line)
    for number, group in enumerate([*chosen.passes, *([source] for source in chosen.recomputed)]):
        if network.device.type == "cuda":
            torch.cuda.empty_cache()  # blocks of other sizes, which the budget does not count
        at_once = replace(whole, batch_size=chosen.batches[group[0]])
        held: dict[str, Tensor] = {}
        stages: dict[str, dict[str, float]] = {}
        if number < len(chosen.passes):
            with measured(network.device) as forward:
                held = hold(replace(at_once, layers={source: probe.layers[source] for source in group}))
            stages["activations"] = {**forward, "seconds": round(forward["seconds"] / len(held), 3)}
        for source in group:
            for name in sources[source]:
                X = held.pop(name, None)
                if name not in pending:
                    del X
                    continue
                tiles = at_once.tiles(name) if X is None else X.split(chosen.batches[source])
                del X
                _layer(
                    folder, at_once, name, tiles, features=probe.widths[name], stages=dict(stages), settings=settings,
                    workspace=chosen.workspaces[source],
                )  # fmt: skip
                del tiles


def _sources(probe: ForwardPass, pending: Sequence[str]) -> tuple[dict[str, list[str]], list[Layer]]:
    """The outputs of each layer that has one pending, and the layers to plan for."""
    names = list(probe.widths)
    sources = {probe.source(name): [n for n in names if probe.source(n) == probe.source(name)] for name in pending}
    layers = [Layer(source, tuple(probe.widths[n] for n in own), probe.element) for source, own in sources.items()]
    return sources, layers


def _task(folder: RunFolder, probe: ForwardPass, images: Images, settings: Settings) -> Task:
    """The layers of one network that are not done yet, and what they need."""
    network, N = probe.network, len(images)
    _, layers = _sources(probe, [name for name in probe.widths if not folder.is_done(network.name, name)])
    calls = trace_calls(network, settings.image_size)
    largest = max(math.prod(call.input or ()) + math.prod(call.output or ()) for call in calls)
    (pixels,) = images.batches([torch.tensor([0])], network.device)
    kind, S = network.device.type, settings.seeds
    widest = max((width for layer in layers for width in layer.widths), default=0)
    d = settings.pca or widest
    row = AFFINITIES[kind] * settings.perplexity + 350 * S + 40 * S * max(settings.neighbors) + 48 * d
    waiting = DECODED if images.pixels is None and kind == "cpu" else 0
    return Task(
        network.name,
        layers,
        images=N,
        image_bytes=max(FORWARD * largest * 4, SOURCE * pixels.numel()) + waiting * pixels.numel(),
        n_components=settings.pca,
        embedding=int(row * N) + BLOCKS[kind],
        batch=BATCH[kind],
    )


def _layer(
    folder: RunFolder,
    whole: ForwardPass,
    layer: str,
    tiles: Iterable[Tensor],
    *,
    features: int,
    stages: dict[str, dict[str, float]],
    settings: Settings,
    workspace: Workspace,
) -> None:
    """Reduce, embed and score one layer, and write it."""
    network, images = whole.network, whole.images
    with measured(network.device) as stages["pca"]:
        X = reduce(
            tiles,
            settings.pca,
            normalise=settings.normalise,
            name=f"{network.name} {layer}",
            workspace=workspace,
        )
    with measured(network.device) as stages["tsne"]:
        tsne = _tsne(settings, network.device)
        Z = tsne.fit_transform(X, seeds=settings.seeds)  # [S, N, 2]
    with measured(network.device) as stages["quality"]:
        rows, scores = score_maps(X, Z, images.labels, k=settings.neighbors)
    divergences = np.atleast_1d(tsne.kl_divergence_)  # [S]
    seconds = sum(stage["seconds"] for stage in stages.values()) / settings.seeds
    for row in rows:
        row |= {
            "network": network.name,
            "layer": layer,
            "features": features,
            "samples": len(images),
            "perplexity": settings.perplexity,
            "kl": float(divergences[row["seed"]]),
            "seconds": round(seconds, 3),
        }
    arrays = {"Z": Z.cpu().numpy(), "labels": images.labels.numpy(), "indices": images.indices.numpy()}
    record = {"engine": tsne.engine_, "stages": stages, "rows": rows, "scores": scores}
    folder.add(network.name, layer, arrays, record)
    best = scores[0]
    whole.report(f"{network.name} {layer}: NH {best['nh']:.3f} ± {best['standard_error']:.3f} ({features} features)")


def _describe(network: Network, settings: Settings) -> dict[str, Any]:
    """What a network's activations depend on, and where it came from."""
    digest = sha256()
    for name, tensor in network.module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return {
        "spec": network.spec,
        "weights": network.source,
        "metadata": network.metadata,
        "image_size": settings.image_size or network.image_size,
        "mean": network.mean,
        "std": network.std,
        "bgr": network.bgr,
        "layers": network.layers,
        "hash": digest.hexdigest(),
    }
