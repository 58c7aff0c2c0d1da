"""The layers that a network is analysed at: by name, or found by following one image through it."""

import itertools
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qdv_gpu.errors import InputError
from qdv_gpu.networks.hooks import hooked
from qdv_gpu.networks.network import Network

# The paper's layers (Wang & Liu, CIKM 2024, Table 3); a conv layer is taken after its ReLU.
_NAMED_LAYERS = {
    "alexnet": {"maxpool1": 2, "maxpool2": 5, "conv3": 7, "conv4": 9, "maxpool5": 12},
    "caffe_alexnet": {"maxpool1": 3, "maxpool2": 7, "conv3": 9, "conv4": 11, "maxpool5": 14},
    "zfnet": {"maxpool1": 2, "maxpool2": 6, "conv3": 9, "conv4": 11, "maxpool5": 14},
}
_KINDS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Dropout)


@dataclass(frozen=True)
class LayerName:
    """One output of a layer.

    Attributes
    ----------
    path : str
        The layer's name or module path.
    call : int or None
        Which of the calls in a forward pass, from 1, where the module is called several times.

    >>> str(LayerName("relu", 2)), LayerName.parse("relu@2")
    ('relu@2', LayerName(path='relu', call=2))
    """

    path: str
    call: int | None = None

    def __str__(self) -> str:
        return self.path if self.call is None else f"{self.path}@{self.call}"

    @classmethod
    def parse(cls, text: str) -> "LayerName":
        """From "relu" or "relu@2"."""
        path, _, call = text.rpartition("@")
        return cls(path, int(call)) if path and call.isascii() and call.isdigit() and call[0] != "0" else cls(text)


def numbered(path: str, calls: int) -> list[LayerName]:
    """Names of the outputs of a layer that is called so often."""
    return [LayerName(path)] if calls == 1 else [LayerName(path, call) for call in range(1, calls + 1)]


@dataclass(frozen=True)
class Call:
    """A call of a submodule in a forward pass: its path, and the shapes of input and output without batch."""

    path: str
    input: tuple[int, ...] | None
    output: tuple[int, ...] | None


def trace_calls(network: Network, image_size: int | None = None) -> list[Call]:
    """Run one blank image through the network and list the calls of all submodules, inner ones first.

    Raises
    ------
    InputError
        If the network cannot take images of that size.
    """
    size = network.image_size if image_size is None else image_size
    if size < 1:
        raise InputError(f"image size must be at least 1 pixel, got {size}")
    calls: list[Call] = []

    def shape(value: Any) -> tuple[int, ...] | None:
        return tuple(value.shape[1:]) if isinstance(value, Tensor) else None

    def record(path: str, _: nn.Module, inputs: tuple[Any, ...], _options: dict[str, Any], output: Any) -> None:
        calls.append(Call(path, shape(inputs[0]) if inputs else None, shape(output)))

    # What torch makes a weight of, such as its norm and direction, is no layer.
    paths = [path for path, _ in network.module.named_modules() if path and "parametrizations" not in path.split(".")]
    with hooked(network.module, paths, after=record):
        check_size(network, (network.channels, size, size))
    return calls


def check_size(network: Network, shape: Sequence[int]) -> None:
    """Run a blank image [C, H, W] through the network; InputError if it cannot take images of that shape.

    What fails with other images only is a mistake of the network's or of ours, and not the images' size.
    """
    image = torch.zeros(1, *shape, dtype=network.dtype, device=network.device)
    try:
        with torch.inference_mode():
            network.module(image)
    except (RuntimeError, ValueError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
            raise
        pixels = " x ".join(map(str, shape[1:]))
        raise InputError(f"{network.name} cannot take images of {pixels} pixels: {error}") from error


def describe_layers(network: Network, image_size: int | None = None) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, module path and output shape (without batch) of the network's default layers."""
    shapes = {call.path: call.output or () for call in trace_calls(network, image_size)}
    return [(name, path, shapes[path]) for name, path in network.layers.items()]


def default_layers(network: Network) -> dict[str, str]:
    own: dict[str, str] = getattr(network.module, "named_layers", {})
    if own:
        if not isinstance(own, dict) or not all(isinstance(t, str) and t for pair in own.items() for t in pair):
            raise InputError(f"named_layers of {network.name} must be a dict of names to module paths, got {own!r}")
        network.select(own.values())
        return dict(own)
    if network.spec in _NAMED_LAYERS:
        return {name: f"features.{position}" for name, position in _NAMED_LAYERS[network.spec].items()}
    paths = {kind: [p for p, m in network.module.named_modules() if isinstance(m, kind)] for kind in _KINDS}
    if network.spec.startswith("vgg") and ":" not in network.spec:
        return {f"maxpool{number}": path for number, path in enumerate(paths[nn.MaxPool2d], start=1)}
    heads = [path for path, m in network.module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    head = head_path(network.module) if heads else None
    calls = itertools.takewhile(lambda call: call.path != head, trace_calls(network))
    averages = {*paths[nn.AvgPool2d], *paths[nn.AdaptiveAvgPool2d]}
    stages = _stages([call for call in calls if call.path not in paths[nn.Dropout]], averages)
    if len(stages) < 2:  # no pyramid: a transformer's blocks
        blocks = max(
            (m for m in network.module.modules() if isinstance(m, nn.Sequential | nn.ModuleList)),
            key=len,
            default=None,
        )
        inside = {id(child) for child in (blocks or [])}
        stages = [path for path, m in network.module.named_modules() if id(m) in inside] or stages
    return {path: path for path in stages}


def _area(shape: tuple[int, ...] | None) -> int:
    """Units of a feature map, 0 for what is no map."""
    return shape[1] * shape[2] if shape is not None and len(shape) == 3 else 0


def _stages(calls: Sequence[Call], pools: Container[str]) -> list[str]:
    """The last module before each down-sampling, and the last before global average pooling.

    The network is read as a chain of its outermost modules that hold at most one down-sampling each. Down-sampling
    more than halves the area of the maps; less is the rim that a convolution without padding loses. In a stage, a
    module that is called once is preferred to one that is called again elsewhere.
    """
    candidates = []
    for call in calls:
        before, after = _area(call.input), _area(call.output)
        inner = {_area(other.output) for other in calls if other.path.startswith(call.path + ".")}
        if before and after and not any(after < between < before for between in inner):
            candidates.append(call)
    paths = [call.path for call in candidates]
    outermost = [call for call in candidates if not any(call.path.startswith(path + ".") for path in paths)]

    stages: list[list[str]] = [[]]
    size = full = _area(calls[0].input) if calls else 0
    for call in outermost:
        after = _area(call.output)
        if after == 1 and call.path in pools:
            break
        if after < size / 2:
            stages.append([])
        if after <= size:
            stages[-1].append(call.path)
            size = after
    if size == full:
        return []
    return [next((path for path in reversed(stage) if paths.count(path) == 1), stage[-1]) for stage in stages[1:]]


def head_path(module: nn.Module) -> str:
    """Path of the layer that gives the logits: the last linear one, or the last convolution (SqueezeNet)."""
    for kind in (nn.Linear, nn.Conv2d):
        paths = [path for path, child in module.named_modules() if isinstance(child, kind)]
        if paths:
            return paths[-1]
    raise InputError("the network has no linear or convolutional layer to use as its head")
