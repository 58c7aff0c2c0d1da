"""The way from a layer's maps back to the image: all maps in one batch, with the Deconvnet's rules.

A unit sees only its receptive field, so a signal is a rectangle of the maps for as long as that is smaller than they
are; what would be multiplications by zeros is never done.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qdv_gpu.deconv.record import Record, active, is_pool, is_relu, kind, shape
from qdv_gpu.deconv.unpool import Pool, unpool_windows

# Operations that give each unit what it needs from the units at the same place: a field stays what it is.
POINTWISE = {"Add", "Cat", "CopyBackwards", "Div", "Mul", "Neg", "Rsub", "Split", "SplitWithSizes", "Sub", "ToCopy"}


@dataclass(frozen=True)
class Window:
    """A rectangle of the maps for each signal: `start` int64 [M, 2] (row, column), may be negative; `size` (h, w)."""

    start: Tensor
    size: tuple[int, int]

    def before(self, pool: Pool) -> "Window":
        """The rectangle of inputs that these outputs of a convolution or pooling see."""
        stride, padding = (self.start.new_tensor(pair) for pair in (pool.stride, pool.padding))
        return Window(self.start * stride - padding, pool.span(self.size))

    def union(self, other: "Window") -> "Window":
        """The smallest rectangle that holds both."""
        if self is other:
            return self
        start = torch.minimum(self.start, other.start)
        ends = torch.maximum(
            self.start + self.start.new_tensor(self.size), other.start + self.start.new_tensor(other.size)
        )
        rows, columns = (ends - start).amax(dim=0).tolist()
        return Window(start, (rows, columns))

    def inside(self, size: Sequence[int]) -> Tensor:
        """Which pixels are on a map of that size, bool [M, 1, h, w]."""
        rows, columns = self._places()
        return ((rows >= 0) & (rows < size[0]))[:, None, :, None] & ((columns >= 0) & (columns < size[1]))[
            :, None, None
        ]

    def crop(self, maps: Tensor, which: Tensor) -> Tensor:
        """The rectangles of maps [K, C, H, W], signal m from map which[m]: [M, C, h, w], 0 beyond the edges."""
        rows, columns = self._places()
        H, W = maps.shape[2:]
        cropped = maps[
            which[:, None, None, None],
            torch.arange(maps.shape[1], device=maps.device)[:, None, None],
            rows.clamp(0, H - 1)[:, None, :, None],
            columns.clamp(0, W - 1)[:, None, None],
        ]
        return cropped * self.inside((H, W))

    def _places(self) -> list[Tensor]:
        """Rows [M, h] and columns [M, w]."""
        return [
            self.start[:, axis, None] + torch.arange(n, device=self.start.device) for axis, n in enumerate(self.size)
        ]


@dataclass(frozen=True)
class Signal:
    """What has come back to a tensor of the network, one signal for each map.

    Attributes
    ----------
    data : Tensor
        [M, C, h, w], or of the tensor's shape with M in front if it is not a batch of maps.
    window : Window or None
        The rectangle that `data` is; None if it is the whole tensor.
    field : Window or None
        The rectangle that the signal can differ from 0 in; None if unknown.
    rectified : bool
        Whether nothing of it is negative.
    """

    data: Tensor
    window: Window | None
    field: Window | None
    rectified: bool = False

    def __add__(self, other: "Signal") -> "Signal":
        field = self.field.union(other.field) if self.field and other.field else None
        if self.window is None or other.window is None:
            size = (self if self.window is None else other).data.shape[2:]
            return Signal(self.whole(size) + other.whole(size), None, field)
        window = self.window.union(other.window)
        return Signal(self.within(window) + other.within(window), window, field)

    def within(self, window: Window) -> Tensor:
        """The data of another rectangle, 0 where this one has none."""
        if window is self.window:
            return self.data
        start = window.start if self.window is None else window.start - self.window.start
        return Window(start, window.size).crop(self.data, torch.arange(len(self.data), device=start.device))

    def whole(self, size: Sequence[int]) -> Tensor:
        """The data [M, C, *size] of the whole maps."""
        return self.data if self.window is None else self.within(all_of(size, self.window.start))


def all_of(size: Sequence[int], like: Tensor) -> Window:
    """The whole maps, for as many signals as `like` [M, 2] has."""
    return Window(torch.zeros_like(like), (size[0], size[1]))


@torch.no_grad()
def back_to_image(record: Record, which: Tensor, seed: Signal, mode: str) -> Signal:
    """Lead the signals of a layer's maps, of the images `which` [M], back to the image."""
    inner, images = set(record.nodes), len(record.images)
    consumers = {node: 0 for node in record.nodes}
    for node in record.nodes:
        for child, _ in node.next_functions:
            if child in inner:
                consumers[child] += 1
    arriving: dict[Any, dict[int, Signal]] = {record.nodes[0]: {record.number: seed}}
    for node in record.nodes[:-1]:
        edges = [(child, number) if child in inner else None for child, number in node.next_functions]
        signals = _back(node, arriving.pop(node), edges, which, images=images, consumers=consumers, mode=mode)
        for edge, signal in zip(edges, signals, strict=True):
            if edge is not None and signal is not None:
                known = arriving.setdefault(edge[0], {})
                known[edge[1]] = known[edge[1]] + signal if edge[1] in known else signal
    return arriving[record.nodes[-1]][0]


def _back(
    node: Any,
    arrived: dict[int, Signal],
    edges: list[Any],
    which: Tensor,
    *,
    images: int,
    consumers: dict[Any, int],
    mode: str,
) -> list[Signal | None]:
    """What a node sends to each of its inputs; None where there is no edge to the image."""
    operation, size = kind(node), shape(node)
    signal = arrived.get(0)
    batched = all(one[:1] == [images] for one in (size, *(shape(*edge) for edge in edges if edge)))
    if signal is None or len(arrived) > 1 or not batched:
        return _autograd(node, arrived, edges, which, images)
    if operation in ("Clone", "_SkippedNormalisation", "Alias"):
        return [signal if edge else None for edge in edges]
    if is_relu(node):
        return [_relu(node, signal, which, mode), *[None] * (len(edges) - 1)]
    if is_pool(node):
        follows = edges[0][0]
        rectify = mode != "gradient" and is_relu(follows) and consumers[follows] == 1
        return [_unpool(node, signal, which, rectify=rectify), *[None] * (len(edges) - 1)]
    if operation == "Add" and all(edge is None or shape(*edge) == shape(node) for edge in edges):
        scaled = replace(signal, data=signal.data * node._saved_alpha, rectified=False)
        return [signal, signal if node._saved_alpha == 1 else scaled]
    if operation == "Cat" and node._saved_dim == 1 and all(edges):
        parts = signal.data.split([shape(*edge)[1] for edge in edges], dim=1)
        return [replace(signal, data=part) for part in parts]
    if operation in ("NativeBatchNorm", "CudnnBatchNorm") and len(size) == 4 and not node._saved_training:
        eps = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon
        scale = (node._saved_running_var + eps).rsqrt()
        scale = scale if node._saved_weight is None else scale * node._saved_weight
        data = signal.data * scale.to(signal.data.dtype)[:, None, None]
        return [replace(signal, data=data, rectified=False), *[None] * (len(edges) - 1)]
    if operation == "Convolution" and not node._saved_transposed and len(node._saved_stride) == 2:
        weight, groups = node._saved_weight, node._saved_groups
        pool = Pool(
            tuple(weight.shape[2:]), *map(tuple, (node._saved_stride, node._saved_padding, node._saved_dilation))
        )
        sent = _transposed(signal, weight, pool, groups, shape(*edges[0])[2:])
        return [sent, *[None] * (len(edges) - 1)]
    if operation == "AvgPool2D" and not node._saved_ceil_mode and node._saved_divisor_override is None:
        padding = tuple(node._saved_padding)
        if node._saved_count_include_pad or padding == (0, 0):
            kernel, stride = tuple(node._saved_kernel_size), tuple(node._saved_stride or node._saved_kernel_size)
            C = signal.data.shape[1]
            weight = signal.data.new_full((C, 1, *kernel), 1 / math.prod(kernel))
            return [_transposed(signal, weight, Pool(kernel, stride, padding, (1, 1)), C, shape(*edges[0])[2:])]
    return _autograd(node, arrived, edges, which, images)


def _relu(node: Any, signal: Signal, which: Tensor, mode: str) -> Signal:
    """Rectify by the signal itself (deconvnet), by the activation (gradient), or by both (guided)."""
    data = signal.data if signal.rectified or mode == "gradient" else signal.data.relu()
    if mode in ("guided", "gradient"):
        passed = active(node)
        data = data * (passed[which] if signal.window is None else signal.window.crop(passed, which))
    return replace(signal, data=data, rectified=mode != "gradient")


def _unpool(node: Any, signal: Signal, which: Tensor, *, rectify: bool) -> Signal:
    pool, size = node.pool, node.size
    field = signal.field and signal.field.before(pool)
    window = signal.window and signal.window.before(pool)
    if window is not None and not _smaller(window, size):
        window = None
    origin = torch.zeros((len(which), 5), dtype=torch.int32, device=which.device)
    origin[:, 0] = which
    if signal.window is not None:
        origin[:, 1:3] = signal.window.start
    if window is not None:
        origin[:, 3:] = window.start
    out = (size[0], size[1]) if window is None else window.size
    data = unpool_windows(signal.data, node.switches, origin, out, size, pool, rectify=rectify)
    return Signal(data, window, field, rectify)


def _transposed(signal: Signal, weight: Tensor, pool: Pool, groups: int, size: Sequence[int]) -> Signal:
    """Through a convolution of maps of `size`, whose geometry is `pool`."""
    field = signal.field and signal.field.before(pool)
    if signal.window is None:
        spans = pool.span(signal.data.shape[2:])
        rest = [n - (span - 2 * p) for n, span, p in zip(size, spans, pool.padding, strict=True)]
        data = functional.conv_transpose2d(
            signal.data, weight, None, pool.stride, pool.padding, rest, groups, pool.dilation
        )
        return Signal(data, None, field)
    window = signal.window.before(pool)
    data = functional.conv_transpose2d(signal.data, weight, None, pool.stride, 0, 0, groups, pool.dilation)
    sent = Signal(data, window, field)
    if not _smaller(window, size):
        return Signal(sent.whole(size), None, field)
    return replace(sent, data=data.mul_(window.inside(size)))


def _smaller(window: Window, size: Sequence[int]) -> bool:
    return math.prod(window.size) < math.prod(size[-2:])


def _autograd(
    node: Any, arrived: dict[int, Signal], edges: list[Any], which: Tensor, images: int
) -> list[Signal | None]:
    """Through any other node, by autograd's own formula for each signal, on whole tensors."""
    wanted = [position for position, edge in enumerate(edges) if edge]
    M, every = len(which), torch.arange(len(which), device=which.device)
    sample = next(iter(arrived.values())).data
    gradients = []
    for number in range(len(node._input_metadata)):
        size = shape(node, number)
        gradient = sample.new_zeros(M, *size)
        if number in arrived and size[:1] == [images]:
            gradient[every, which] = arrived[number].whole(size[2:])
        elif number in arrived:
            gradient = _of_one_image(arrived[number].data, images)
        gradients.append(gradient)

    def back(*one: Tensor) -> tuple[Tensor, ...]:
        sent = node(*one)
        sent = sent if isinstance(sent, tuple) else (sent,)
        return tuple(sent[position] for position in wanted)

    results = torch.vmap(back)(*gradients)
    field = next(iter(arrived.values())).field if kind(node) in POINTWISE and len(arrived) == 1 else None
    sent: list[Signal | None] = [None] * len(edges)
    for position, result in zip(wanted, results, strict=True):
        size = shape(*edges[position])
        summed = result.sum_to_size(M, *size)  # undoes broadcasting
        own = summed[every, which] if size[:1] == [images] else _of_one_image(summed, images)
        kept = field if size[2:] == shape(node)[2:] and len(size) == 4 else None
        sent[position] = Signal(own, None, kept)
    return sent


def _of_one_image(data: Tensor, images: int) -> Tensor:
    """What belongs to no single image, and so must come from a pass over one."""
    assert images == 1
    return data
