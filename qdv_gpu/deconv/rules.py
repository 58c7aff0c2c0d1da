"""What each operation does to a signal on its way back: the rules of a Deconvnet (Zeiler & Fergus 2014), in one table.

A node of autograd's graph is led back by the rule of its kind, or, where it has none or the rule does not apply, by
autograd's own formula, which is right for whatever is linear in the image. Anything else is refused.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qdv_gpu.deconv.nodes import active, children, is_pool, is_relu, kind, module_of, saved, shape
from qdv_gpu.deconv.unpool import Pool, unpool_windows
from qdv_gpu.deconv.windows import Signal
from qdv_gpu.errors import InputError

# What is linear in the image needs no rule: its transpose is what autograd computes.
LINEAR = {
    "AccumulateGrad", "AdaptiveAvgPool2D", "AdaptiveMaxPool2D", "Add", "Addmm", "Alias", "AsStrided", "AvgPool2D",
    "Bmm", "Cat", "Clone", "Col2Im", "ConstantPadNd", "Convolution", "Copy", "CopyBackwards", "CudnnBatchNorm",
    "Div", "Expand", "Flip", "Index", "IndexSelect", "MaxPool2DWithIndices", "Mean", "Mm", "Mul", "NativeBatchNorm",
    "Neg", "Permute", "PixelShuffle", "PixelUnshuffle", "ReflectionPad2D", "Repeat", "ReplicationPad2D",
    "ReshapeAlias", "Roll", "Rsub", "Select", "Slice", "Split", "SplitWithSizes", "Squeeze", "Stack", "Sub", "Sum",
    "T", "ToCopy", "Transpose", "Unbind", "UnsafeView", "Unsqueeze", "UpsampleBicubic2D", "UpsampleBilinear2D",
    "UpsampleNearest2D", "View",
}  # fmt: skip

FEW = 4  # channels of an image

# Operations that give each unit what it needs from the units at the same place: a field stays what it is.
POINTWISE = {"Add", "Cat", "CopyBackwards", "Div", "Mul", "Neg", "Rsub", "Split", "SplitWithSizes", "Sub", "ToCopy"}

Edge = tuple[Any, int] | None  # a node on the way to the image, and which of its outputs


@dataclass(frozen=True)
class Step:
    """One node of the way back.

    Attributes
    ----------
    node : Node
    signal : Signal
        What has come back to its output.
    edges : list
        Of its inputs; None where the image is not reached.
    which : Tensor
        int64 [M]: the image that each signal is of.
    mode : str
    relu_next : bool
        Whether the node's only input comes from a ReLU that nothing else uses.
    """

    node: Any
    signal: Signal
    edges: list[Edge]
    which: Tensor
    mode: str
    relu_next: bool

    def first(self, signal: Signal) -> list[Signal | None]:
        """The signal for the first input alone; the others are weights and the like."""
        return [signal, *[None] * (len(self.edges) - 1)]


Rule = Callable[[Step], list[Signal | None] | None]  # a signal for each input; None if the rule does not apply


def _unchanged(step: Step) -> list[Signal | None]:
    return [step.signal if edge else None for edge in step.edges]


def _relu(step: Step) -> list[Signal | None] | None:
    """Rectify by the signal itself (deconvnet), by the activation (gradient), or by both (guided)."""
    if not is_relu(step.node):
        return None
    signal = step.signal
    data = signal.data if signal.rectified or step.mode == "gradient" else signal.data.relu()
    if step.mode in ("guided", "gradient"):
        passed = active(step.node)
        data = data * (passed[step.which] if signal.window is None else signal.window.crop(passed, step.which))
    return step.first(replace(signal, data=data, rectified=step.mode != "gradient"))


def _unpool(step: Step) -> list[Signal | None]:
    signal, which = step.signal, step.which
    pool, size = step.node.pool, step.node.size
    field = signal.field and signal.field.before(pool)
    window = signal.window and signal.window.before(pool)
    if window is not None and not window.smaller(size):
        window = None
    origin = torch.zeros((len(which), 5), dtype=torch.int32, device=which.device)
    origin[:, 0] = which
    if signal.window is not None:
        origin[:, 1:3] = signal.window.start
    if window is not None:
        origin[:, 3:] = window.start
    out = (size[0], size[1]) if window is None else window.size
    rectify = step.mode != "gradient" and step.relu_next
    data = unpool_windows(signal.data, step.node.switches, origin, out, size, pool, rectify=rectify)
    return step.first(Signal(data, window, field, rectify))


def _add(step: Step) -> list[Signal | None] | None:
    if not all(edge is None or shape(*edge) == shape(step.node) for edge in step.edges):
        return None  # broadcast
    alpha = saved(step.node, "alpha")
    scaled = replace(step.signal, data=step.signal.data * alpha, rectified=False)
    return [step.signal, step.signal if alpha == 1 else scaled]


def _cat(step: Step) -> list[Signal | None] | None:
    if saved(step.node, "dim") != 1 or not all(step.edges):
        return None
    parts = step.signal.data.split([shape(*edge)[1] for edge in step.edges if edge], dim=1)
    return [replace(step.signal, data=part) for part in parts]


def _batch_norm(step: Step) -> list[Signal | None] | None:
    node = step.node
    if len(shape(node)) != 4 or saved(node, "training"):
        return None
    eps, weight = saved(node, "eps", saved(node, "epsilon")), saved(node, "weight")
    scale = (saved(node, "running_var") + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    data = step.signal.data * scale.to(step.signal.data.dtype)[:, None, None]
    return step.first(replace(step.signal, data=data, rectified=False))


def _convolution(step: Step) -> list[Signal | None] | None:
    node = step.node
    if saved(node, "transposed") or len(saved(node, "stride")) != 2 or step.edges[0] is None:
        return None
    weight = saved(node, "weight")
    stride, padding, dilation = (tuple(saved(node, name)) for name in ("stride", "padding", "dilation"))
    padding = padding * 2 if len(padding) == 1 else padding  # one 0 for padding="valid"
    pool = Pool(tuple(weight.shape[2:]), stride, padding, dilation)
    return step.first(_transposed(step.signal, weight, pool, saved(node, "groups"), shape(*step.edges[0])[2:]))


def _average(step: Step) -> list[Signal | None] | None:
    node = step.node
    padding = tuple(saved(node, "padding"))
    if saved(node, "ceil_mode") or saved(node, "divisor_override") is not None or step.edges[0] is None:
        return None
    if not (saved(node, "count_include_pad") or padding == (0, 0)):
        return None
    kernel = tuple(saved(node, "kernel_size"))
    stride, C = tuple(saved(node, "stride") or kernel), step.signal.data.shape[1]
    weight = step.signal.data.new_full((C, 1, *kernel), 1 / math.prod(kernel))
    pool = Pool(kernel, stride, padding, (1, 1))
    return [_transposed(step.signal, weight, pool, C, shape(*step.edges[0])[2:])]


def _transposed(signal: Signal, weight: Tensor, pool: Pool, groups: int, size: Sequence[int]) -> Signal:
    """Through a convolution of maps of `size`, whose geometry is `pool`."""
    field = signal.field and signal.field.before(pool)
    if signal.window is None:
        spans = pool.span(signal.data.shape[2:])
        rest = [n - (span - 2 * p) for n, span, p in zip(size, spans, pool.padding, strict=True)]
        return Signal(_conv_transpose(signal.data, weight, pool, groups, rest), None, field)
    window = signal.window.before(pool)
    data = _conv_transpose(signal.data, weight, replace(pool, padding=(0, 0)), groups, (0, 0))
    sent = Signal(data, window, field)
    if not window.smaller(size):
        return Signal(sent.whole(size), None, field)
    return replace(sent, data=data.mul_(window.inside(size)))


def _conv_transpose(data: Tensor, weight: Tensor, pool: Pool, groups: int, rest: Sequence[int]) -> Tensor:
    """`conv_transpose2d` with `rest` as its output padding.

    To the few channels of an image and with a stride s, a CPU's library takes several times as long as to many: there,
    pixels that are s apart become channels of a convolution of stride 1.
    """
    s = pool.stride[0]
    few = data.is_cpu and weight.shape[1] <= FEW and groups == 1 and pool.dilation == (1, 1)
    if s == 1 or pool.stride[1] != s or not few:
        return functional.conv_transpose2d(data, weight, None, pool.stride, pool.padding, rest, groups, pool.dilation)
    C, channels, kh, kw = weight.shape
    rows, columns = -(-kh // s), -(-kw // s)
    filled = functional.pad(weight, (0, columns * s - kw, 0, rows * s - kh)).view(C, channels, rows, s, columns, s)
    kernel = filled.flip(2, 4).permute(1, 3, 5, 0, 2, 4).reshape(channels * s * s, C, rows, columns)
    whole = functional.pixel_shuffle(functional.conv2d(data, kernel, padding=(rows - 1, columns - 1)), s)
    sizes = zip(pool.span(data.shape[2:]), whole.shape[2:], pool.padding, rest, strict=True)
    (top, bottom), (left, right) = ((-p, span - p + r - have) for span, have, p, r in sizes)
    return functional.pad(whole, (left, right, top, bottom))


POOL = "max-pooling with switches"
RULES: dict[str, Rule] = {
    POOL: _unpool,
    "Relu": _relu,
    "ClampMin": _relu,
    "Clamp": _relu,
    "_SkippedNormalisation": _unchanged,
    "Clone": _unchanged,
    "Alias": _unchanged,
    "Add": _add,
    "Cat": _cat,
    "NativeBatchNorm": _batch_norm,
    "CudnnBatchNorm": _batch_norm,
    "Convolution": _convolution,
    "AvgPool2D": _average,
}


def rule_of(node: Any) -> Rule | None:
    """The node's rule, if its kind has one."""
    return RULES.get(POOL if is_pool(node) else kind(node))


def check_rules(nodes: Sequence[Any], network: str, mode: str) -> None:
    """Refuse what is neither linear in the image nor has a rule, rather than take its plain gradient."""
    inner = set(nodes)
    unknown: list[tuple[str, Any]] = []
    products: list[tuple[str, Any]] = []
    for node in nodes:
        name = kind(node)
        depends = [child in inner for child, _ in children(node)]
        if name == "Div" and saved(node, "rounding_mode") is not None:
            unknown.append((f"{name} with rounding", node))
        elif not (name in LINEAR or is_relu(node) or is_pool(node) or RULES.get(name) is _unchanged):
            unknown.append((name, node))
        elif name in ("NativeBatchNorm", "CudnnBatchNorm") and saved(node, "training"):
            unknown.append((f"{name} with the statistics of the image itself", node))
        elif (name in ("Mul", "Mm", "Bmm") and all(depends)) or (
            name in ("Addmm", "Div", "Convolution", "NativeBatchNorm", "CudnnBatchNorm")
            and any(depends[2 if name == "Addmm" else 1 :])
            and (name != "Addmm" or depends[1])
        ):
            products.append((f"the product or quotient of two signals ({name})", node))
    for what, node in unknown + products:
        raise InputError(
            f"a Deconvnet has no rule for {what}, which module {module_of(node) or network} of {network} "
            f"uses: choose a layer before it, a network with ReLUs, or mode gradient instead of {mode}"
        )
