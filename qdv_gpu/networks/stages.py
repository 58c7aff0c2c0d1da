"""The layers that a network is analysed at by default: the ends of its stages, or some of its blocks."""

import itertools
import logging
from collections import Counter
from collections.abc import Container, Sequence
from math import isqrt
from typing import Any

from torch import nn

from qdv_gpu.errors import InputError, short
from qdv_gpu.files import text_of
from qdv_gpu.networks.fit import head_path
from qdv_gpu.networks.layers import Call, trace_calls
from qdv_gpu.networks.network import Network
from qdv_gpu.networks.spec import Spec
from qdv_gpu.networks.tokens import token_widths

# The paper's layers (Wang & Liu, CIKM 2024, Table 3); a conv layer is taken after its ReLU.
_NAMED_LAYERS = {
    "alexnet": {"maxpool1": 2, "maxpool2": 5, "conv3": 7, "conv4": 9, "maxpool5": 12},
    "caffe_alexnet": {"maxpool1": 3, "maxpool2": 7, "conv3": 9, "conv4": 11, "maxpool5": 14},
    "zfnet": {"maxpool1": 2, "maxpool2": 6, "conv3": 9, "conv4": 11, "maxpool5": 14},
}
logger = logging.getLogger(__name__)
FEW, MANY = 3, 30  # layers that are too few for a network of so many calls
BLOCKS = 6  # about so many of a plain transformer
PREFIX = 5  # tokens beside those of parts of the image: of the class, a teacher, registers
MOST = 8  # stages that timm may list before the last of each size are taken


def default_layers(network: Network) -> dict[str, str]:
    """Names and module paths, in forward order, of the layers that stand for a network.

    In this order: the module's own `named_layers`; the paper's layers, for its networks; the pooling layers of a VGG;
    what timm says in `feature_info`; the ends of the stages between down-samplings; about six blocks, evenly, of a
    network that has no stages, such as a plain transformer.

    Raises
    ------
    InputError
        If `named_layers` is no dict of names to module paths.
    """
    module, name = network.module, Spec.parse(network.spec).name
    own: dict[str, str] = getattr(module, "named_layers", {})
    if own:
        if not isinstance(own, dict) or not all(isinstance(t, str) and t for pair in own.items() for t in pair):
            raise InputError(
                f"named_layers of {network.name} must be a dict of names to module paths, got {short(own)}"
            )
        network.select(own.values())
        return {text_of(layer): path for layer, path in own.items()}
    if name in _NAMED_LAYERS:
        named = {layer: f"features.{position}" for layer, position in _NAMED_LAYERS[name].items()}
        return {_pooled(module, layer, path): path for layer, path in named.items() if network.has(path)}
    if name.startswith("vgg") and ":" not in name:
        pools = [path for path, m in module.named_modules() if isinstance(m, nn.MaxPool2d | nn.AvgPool2d)]
        return {_pooled(module, f"maxpool{number}", path): path for number, path in enumerate(pools, start=1)}
    calls = trace_calls(network)
    paths = _of_timm(module, calls)
    if not paths:
        heads = [path for path, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        head = head_path(module) if heads else None
        paths = _stages(module, list(itertools.takewhile(lambda call: call.path != head, calls)))
    if len(paths) < 2:
        paths = _evenly(_blocks(module, calls)) or paths
    if len(paths) < FEW and len(calls) > MANY:
        logger.warning("of %s only %d layers stand out: name others with --layers, which qdv-gpu layers --all lists",
                       network.name, len(paths))  # fmt: skip
    return {path: path for path in paths}


def _pooled(module: nn.Module, layer: str, path: str) -> str:
    """The name of a layer, with the kind of pooling that it has in a variant."""
    averages = isinstance(module.get_submodule(path), nn.AvgPool2d)
    return layer.replace("maxpool", "avgpool") if averages else layer


def _of_timm(module: nn.Module, calls: Sequence[Call]) -> list[str]:
    """The layers that timm takes features from; some blocks if it lists the blocks of a plain transformer."""
    info: Any = getattr(module, "feature_info", None)
    info = getattr(info, "info", info)
    if not isinstance(info, list | tuple) or not all(isinstance(one, dict) for one in info):
        return []
    order = [call.path for call in calls if call.output is not None]
    listed = {str(one.get("module", "")): one.get("reduction") for one in info}
    if not listed or any(path not in order for path in listed):
        return []
    paths = sorted(listed, key=order.index)
    if len(set(listed.values())) == 1:
        return _evenly(paths)
    if len(paths) > MOST:
        paths = sorted({listed[path]: path for path in paths}.values(), key=order.index)
    return paths


def _evenly(paths: Sequence[str]) -> list[str]:
    """At most BLOCKS of the paths, the last among them.

    >>> _evenly("abcdefghijkl")
    ['b', 'd', 'f', 'h', 'j', 'l']
    """
    count = min(BLOCKS, len(paths))
    return [paths[round((i + 1) * len(paths) / count) - 1] for i in range(count)]


def _blocks(module: nn.Module, calls: Sequence[Call]) -> list[str]:
    """The children of the list with the most blocks of one kind, or with the most modules."""

    def alike(many: nn.Module) -> tuple[int, int]:
        kinds = Counter(type(child) for child in many.children() if next(child.children(), None) is not None)
        return max(kinds.values(), default=0), len(list(many.children()))

    lists = [m for m in module.modules() if isinstance(m, nn.Sequential | nn.ModuleList)]
    inside = {id(child) for child in max(lists, key=alike).children()} if lists else set()
    called = {call.path for call in calls if call.output is not None and not call.view}
    return [path for path, m in module.named_modules() if id(m) in inside and path in called]


def _area(shape: tuple[int, ...] | None, widths: Container[int] = ()) -> int:
    """Units of a square feature map [C, H, W] or [H, W, C], or of tokens [T, C] of it; 0 for what is neither."""
    if shape is not None and len(shape) == 2 and shape[1] in widths:
        parts = isqrt(shape[0]) ** 2
        return parts if shape[0] - parts <= PREFIX and parts > 1 else 0
    if shape is None or len(shape) != 3:
        return 0
    first, second, third = shape
    return first * second if first == second != third else second * third


def _stages(module: nn.Module, calls: Sequence[Call]) -> list[str]:
    """The last module before each down-sampling, and the last before global average pooling.

    The network is read as a chain of its outermost modules that hold at most one down-sampling each. Down-sampling
    more than halves the area of the maps; less is the rim that a convolution without padding loses. In a stage, a
    module that is called once is preferred to one that is called again elsewhere, and a block to the normalisation
    behind it.
    """
    candidates, widths = [], token_widths(module)
    for call in calls:
        before, after = _area(call.input, widths), _area(call.output, widths)
        inner = {_area(other.output, widths) for other in calls if other.path.startswith(call.path + ".")}
        if before and after and not call.view and not any(after < between < before for between in inner):
            candidates.append(call)
    paths = [call.path for call in candidates]
    outermost = [call for call in candidates if not any(call.path.startswith(path + ".") for path in paths)]
    stages: list[list[str]] = [[]]
    size = full = _area(calls[0].input) if calls else 0
    for call in outermost:
        after = _area(call.output, widths)
        if after == 1 and isinstance(module.get_submodule(call.path), nn.AvgPool2d | nn.AdaptiveAvgPool2d):
            break
        if after < size / 2:
            stages.append([])
        if after <= size:
            stages[-1].append(call.path)
            size = after
    if size == full:
        return []
    return [_end(module, stage, paths) for stage in stages[1:]]


def _end(module: nn.Module, stage: Sequence[str], paths: Sequence[str]) -> str:
    """The module of a stage that stands for it."""
    inner = [next(module.get_submodule(path).children(), None) for path in stage]
    normalises = inner[-1] is None and "norm" in type(module.get_submodule(stage[-1])).__name__.lower()
    if normalises and len(stage) > 1 and inner[-2] is not None:
        stage = stage[:-1]
    return next((path for path in reversed(stage) if paths.count(path) == 1), stage[-1])
