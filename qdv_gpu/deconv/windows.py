"""Rectangles of maps, and the signals that come back to them.

A unit sees only its receptive field, so a signal is a rectangle of the maps for as long as that is smaller than they
are; what would be multiplications by zeros is never done.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qdv_gpu.arrays import constants
from qdv_gpu.deconv.unpool import Pool

WORTH = 600  # numbers of a signal whose own copy takes less time than to gather them on a CPU


@dataclass(frozen=True)
class Window:
    """A rectangle of the maps for each signal: `start` int64 [M, 2] (row, column), may be negative; `size` (h, w)."""

    start: Tensor
    size: tuple[int, int]

    def before(self, pool: Pool) -> "Window":
        """The rectangle of inputs that these outputs of a convolution or pooling see."""
        stride, padding = (constants(pair, self.start.device) for pair in (pool.stride, pool.padding))
        return Window(self.start * stride - padding, pool.span(self.size))

    @property
    def end(self) -> Tensor:
        """Row and column behind the last ones, int64 [M, 2]."""
        return self.start + constants(self.size, self.start.device)

    def union(self, other: "Window") -> "Window":
        """The smallest rectangle that holds both."""
        if self is other:
            return self
        start = torch.minimum(self.start, other.start)
        rows, columns = (torch.maximum(self.end, other.end) - start).amax(dim=0).tolist()
        return Window(start, (rows, columns))

    def smaller(self, size: Sequence[int]) -> bool:
        """Whether it has fewer pixels than maps of that size."""
        return math.prod(self.size) < math.prod(size[-2:])

    def inside(self, size: Sequence[int]) -> Tensor:
        """Which pixels are on a map of that size, bool [M, 1, h, w]."""
        rows, columns = ((places >= 0) & (places < n) for places, n in zip(self._places(), size, strict=True))
        return rows[:, None, :, None] & columns[:, None, None]

    def crop(self, maps: Tensor, which: Tensor) -> Tensor:
        """The rectangles of maps [K, C, H, W], signal m from map which[m]: [M, C, h, w], 0 beyond the edges."""
        if maps.is_cpu and maps.shape[1] * math.prod(self.size) >= WORTH:
            return self._crop_each(maps, which)
        rows, columns = self._places()
        H, W = maps.shape[2:]
        cropped = maps[
            which[:, None, None, None],
            torch.arange(maps.shape[1], device=maps.device)[:, None, None],
            rows.clamp(0, H - 1)[:, None, :, None],
            columns.clamp(0, W - 1)[:, None, None],
        ]
        return cropped * self.inside((H, W))

    def _crop_each(self, maps: Tensor, which: Tensor) -> Tensor:
        """The same by a copy for each signal, of some 25 us, where that needs no launch."""
        (h, w), (H, W) = self.size, maps.shape[2:]
        cropped = maps.new_zeros(len(which), maps.shape[1], h, w)
        for signal, k, (top, left) in zip(cropped, which.tolist(), self.start.tolist(), strict=True):
            rows, columns = slice(max(top, 0), max(min(top + h, H), 0)), slice(max(left, 0), max(min(left + w, W), 0))
            seen = maps[k, :, rows, columns]
            signal[:, rows.start - top :, columns.start - left :][:, : seen.shape[1], : seen.shape[2]] = seen
        return cropped

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
