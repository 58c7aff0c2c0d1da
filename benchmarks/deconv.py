"""Unpooling beside torch's scatter_add, and every map of a layer beside Captum's NeuronDeconvolution map by map."""

import argparse
import importlib.util
import itertools
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import bars
from benchmarks.common import Stage, timing
from qdv_gpu import Deconvnet, load_network
from qdv_gpu.deconv.unpool import max_pool, unpool
from qdv_gpu.machine import exact_convolutions
from qdv_gpu.networks.network import Network
from qdv_gpu.studies.deconv import picture
from qdv_gpu.studies.peaks import copy_bandwidth

ALEXNET = [(64, 55), (192, 27), (256, 13)]  # maps and side before each pooling


def on_device(methods: Mapping[str, Callable[[int], Any]], repeats: int, calls: int = 20) -> dict[str, list[float]]:
    """Seconds of the GPU's own for one call; a single one would be shorter than its launch."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    for turn, (name, method) in itertools.product(range(repeats), methods.items()):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(20_000_000)  # 10 ms, while the calls are launched
        begin.record()
        for _ in range(calls):
            method(turn)
        end.record()
        torch.cuda.synchronize()
        times[name].append(begin.elapsed_time(end) / 1e3 / calls)
    return times


def scattered(signal: Tensor, indices: Tensor, size: int) -> Tensor:
    """The same by torch: an atomic addition for each element, in no order on CUDA."""
    B, C = signal.shape[:2]
    out = signal.new_zeros(B, C, size * size)
    return out.scatter_add_(2, indices.flatten(2).expand(B, -1, -1), signal.flatten(2)).view(B, C, size, size)


def run_unpool(options: argparse.Namespace, stage: Stage) -> None:
    """Every pooling of VGG19 and AlexNet at 224 px, the switches of one image serving a batch of signals."""
    device, cuda = options.device, options.device.type == "cuda"
    B, repeats = (2, 1) if options.quick else (64 if cuda else 8, 7)
    bandwidth = copy_bandwidth(device)
    stage.note(copy_bytes_per_s=bandwidth)
    print(f"  copy: {bandwidth / 1e9:.1f} GB/s read and written")
    poolings = [("vgg19", *pooling, 2) for pooling in bars.POOLINGS] + [("alexnet", *pooling, 3) for pooling in ALEXNET]
    for network, C, side, kernel in poolings:
        what = f"unpooling {B} x {C} maps to {side} px ({network})"
        if not stage.fits(what):
            continue
        with stage.part(what):
            x = torch.randn(1, C, side, side, device=device)
            pooled, switches = max_pool(x, kernel, 2)
            indices = functional.max_pool2d(x, kernel, 2, return_indices=True)[1]
            signal = torch.randn(B, *pooled.shape[1:], device=device)
            ours = partial(unpool, signal, switches, (side, side), kernel, 2)
            result = ours()
            truth = scattered(signal.double(), indices, side)
            error = float((result - truth).norm() / truth.norm())
            stage.bar(f"{what}: relative L2 to the adjoint in float64", error, "<=", 1e-6)
            methods = {
                "ours": lambda _, f=ours: f(),
                "torch scatter_add": lambda _, s=signal, i=indices, n=side: scattered(s, i, n),
            }
            for method in methods.values():
                method(0)
            times = on_device(methods, repeats) if cuda else stage.interleaved(methods, repeats, show=False)[0]
            moved = signal.nbytes + switches.nbytes + result.nbytes
            row = timing(what, times)
            rate = moved / row["seconds"]
            stage.row(row | {"bytes": moved, "gb_per_s": rate / 1e9, "share_of_copy": rate / bandwidth})
            print(
                f"  {network:<8}{C:>4} x {side:>3} x {side:<4}{row['seconds'] * 1e3:>9.3f} ms, "
                f"{rate / 1e9:>7.1f} GB/s, {rate / bandwidth:.0%} of copy", flush=True,
            )  # fmt: skip
            if cuda and network == "vgg19":
                stage.bar(bars.unpooled(C, side), rate / bandwidth)
                ratio = row["peers"]["torch scatter_add"] / row["seconds"]
                stage.bar(f"{C} x {side} x {side}: ratio to scatter_add", ratio, ">=", 2)


@exact_convolutions()
def captum(net: Network, image: Tensor, units: list[tuple[int, int, int]], values: Tensor, path: str) -> Tensor:
    """Captum's NeuronDeconvolution, one unit after the other, times the activation."""
    from captum.attr import NeuronDeconvolution

    method = NeuronDeconvolution(net.module, net.module.get_submodule(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pictures = [method.attribute(image[None], unit)[0].detach() for unit in units]
    return torch.stack(pictures) * values[:, None, None, None]


class _Rectified(torch.autograd.Function):
    """A ReLU that passes back what is positive of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """max(x, 0)."""
        return x.relu()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """max(gradient, 0)."""
        return gradient.relu()


class _Rectifier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Rectified.apply(x)


@exact_convolutions()
def in_batches(stem: nn.Sequential, image: Tensor, units: list[tuple[int, int, int]], batch: int = 64) -> Tensor:
    """The gradients of activations by torch, `batch` maps at once, through a network whose ReLUs are `_Rectifier`s."""
    found = []
    for start in range(0, len(units), batch):
        chosen = torch.tensor(units[start : start + batch], device=image.device)
        images = image.expand(len(chosen), -1, -1, -1).clone().requires_grad_()
        every, (maps, rows, columns) = torch.arange(len(chosen), device=image.device), chosen.T
        activation = stem(images)[every, maps, rows, columns]
        found.append(torch.autograd.grad(activation, images, activation.detach())[0])
    return torch.cat(found)


def _reconstruct(net: Network, image: Tensor, layer: str, _: int) -> None:
    Deconvnet(net).reconstruct(image, layer)


def run_deconv(options: argparse.Namespace, stage: Stage) -> None:
    """Every layer of AlexNet, and on CUDA of VGG19; AlexNet's conv5 beside Captum; a run with its files."""
    device, quick = options.device, options.quick
    side, repeats = (96, 1) if quick else (224, 3)
    image = torch.randn(3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    stage.note(side=side)
    for name in ["vgg19", "alexnet"] if device.type == "cuda" else ["alexnet"]:
        what = f"every map of every layer of {name}"
        if stage.fits(what):
            with stage.part(what):
                every_layer(stage, name, image, repeats)
    if stage.fits("AlexNet's conv5"):
        with stage.part("AlexNet's conv5"):
            beside_peers(stage, image, maps=16 if quick else 256, repeats=repeats)
    if stage.fits("a run with its files"):
        with stage.part("a run with its files"):
            net = load_network("alexnet", weights="none", device=device)

            def draw(_: int) -> None:
                with tempfile.TemporaryDirectory() as folder:
                    picture([net], folder, data="digits", image_size=side, device=device)

            times, _ = stage.interleaved({"ours": draw}, repeats)
            row = timing("the same of alexnet with figures and arrays", times)
            stage.row(row)
            stage.bar("alexnet: every map of every layer, with figures, seconds", row["seconds"], "<=", 40)


def every_layer(stage: Stage, name: str, image: Tensor, repeats: int) -> None:
    """Every map of every layer of a network: of VGG19 every ReLU and pooling."""
    net = load_network(name, weights="none", device=image.device)
    kinds = (nn.ReLU, nn.MaxPool2d) if name == "vgg19" else ()
    paths = [path for path, m in net.module.features.named_modules(prefix="features") if isinstance(m, kinds)]
    methods = {layer: partial(_reconstruct, net, image, layer) for layer in paths or net.layers}
    for method in methods.values():
        method(0)
    times, _ = stage.interleaved(methods, repeats, show=False)
    whole = [sum(spent) for spent in zip(*times.values(), strict=False)]
    parts = {layer: median(spent) for layer, spent in times.items()}
    what = f"Deconvnet, every map of {len(parts)} layers of {name} at {image.shape[-1]} px"
    print(f"  {what}: " + ", ".join(f"{layer} {spent:.3f} s" for layer, spent in parts.items()), flush=True)
    stage.row(timing(what, {"ours": whole}, parts=parts if len(parts) < 10 else None))
    stage.note(**{name: parts})
    if name == "vgg19" and len(parts) == len(methods):
        stage.bar(bars.DECONV, median(whole))


def beside_peers(stage: Stage, image: Tensor, *, maps: int, repeats: int) -> None:
    """AlexNet's conv5 all maps at once; by torch in batches; and by Captum, where it is installed, map by map."""
    net = load_network("alexnet", weights="none", device=image.device)
    for module in net.module.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # Captum is wrong otherwise
    path = "features.11"
    with torch.no_grad():
        activation = net.module.features[:12](image[None])[0]
    chosen = list(range(maps))
    values, places = activation[chosen].flatten(1).max(dim=1)
    width = activation.shape[2]
    units = [(m, int(place) // width, int(place) % width) for m, place in zip(chosen, places, strict=True)]
    forward_passes: list[int] = []
    net.module.features[0].register_forward_hook(lambda *_: forward_passes.append(1))
    methods = {"ours": lambda _: Deconvnet(net).reconstruct(image, path, maps=chosen)}
    pictures = methods["ours"](0)
    stage.bar("forward passes for all maps of conv5", len(forward_passes), "<=", 1)
    rectifying = [_Rectifier() if isinstance(m, nn.ReLU) else m for m in net.module.features[:12]]
    methods["torch, 64 maps at once"] = lambda _: in_batches(nn.Sequential(*rectifying), image, units)
    theirs = methods["torch, 64 maps at once"](0)
    stage.bar("conv5: relative L2 to torch's gradients", float((pictures - theirs).norm() / theirs.norm()), "<=", 1e-5)
    if importlib.util.find_spec("captum"):
        methods["captum"] = lambda _: captum(net, image, units, values, path)
        theirs = methods["captum"](0)
        stage.bar("conv5: relative L2 to Captum", float((pictures - theirs).norm() / theirs.norm()), "<=", 1e-5)
    times, _ = stage.interleaved(methods, repeats)
    row = timing(f"Deconvnet, {maps} maps of AlexNet conv5 at {image.shape[-1]} px", times)
    stage.row(row)
    if "captum" in times:
        ratio = row["peers"]["captum"] / row["seconds"]
        stage.bar(f"conv5, {maps} maps: ratio to Captum map by map", ratio, ">=", 4)
