"""Rows of a layer made comparable, tile by tile: the statistics that this takes, and what they do to a row."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch

from qdv_gpu.errors import InputError, check_among
from qdv_gpu.machine import in_parallel

T = TypeVar("T")

NORMALISATIONS = ("minmax", "l2", "standard", "none")
TINY = torch.finfo(torch.float32).tiny  # norms, deviations and extents up to here count as 0
TILE = 1 << 22  # elements of a tile on a CPU
CUDA_TILE = 1 << 26  # and on a GPU: each reads and writes all of the bases, which are as large as 160 rows
LEAST_ROWS = 32  # of a tile, however wide the layer is
CPU_BLOCKS = 16  # that a product is cut into on a CPU, or more where one would exceed CPU_BLOCK
CPU_BLOCK = 1 << 19  # elements
CUDA_BLOCK = 1 << 24  # elements of a block on a GPU, where only memory asks for more than one


class Statistics(NamedTuple):
    """What the rows of a layer have in common.

    Attributes
    ----------
    rows : int
        N.
    extremes : torch.Tensor
        float64 [2]: the smallest and the largest number; NaN if one is.
    mean, squares : torch.Tensor
        float64 [D]: mean of the rows (over their norms for l2), and sum of squared deviations from it.
    """

    rows: int
    extremes: torch.Tensor
    mean: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def none(cls, D: int, device: torch.device) -> "Statistics":
        """Of no rows yet."""
        zeros = torch.zeros(D, dtype=torch.float64, device=device)
        return cls(0, zeros.new_tensor([torch.inf, -torch.inf]), zeros, zeros.clone())

    @property
    def lowest(self) -> float:
        return float(self.extremes[0])

    @property
    def highest(self) -> float:
        return float(self.extremes[1])

    def merged(self, tile: torch.Tensor, normalise: str) -> tuple["Statistics", torch.Tensor]:
        """With the rows of another tile, which l2 divides by their norms; also returns the tile's own mean.

        By Chan, Golub & LeVeque 1983. Nothing is read from a GPU.
        """
        n = len(tile)
        least, most = torch.aminmax(tile)
        extremes = torch.stack([torch.minimum(self.extremes[0], least), torch.maximum(self.extremes[1], most)])
        scale_rows_(tile, normalise)

        def moments(columns: slice) -> torch.Tensor:
            values = tile[:, columns].to(torch.float64)
            mean = values.mean(dim=0)
            return torch.stack([mean, (values - mean).square_().sum(dim=0)])

        mean, squares = torch.cat(over_blocks(moments, tile.shape[1], n, tile.device), dim=1)
        shift, total = mean - self.mean, self.rows + n
        merged = Statistics(
            total,
            extremes,
            self.mean + shift * (n / total),
            self.squares + squares + shift.square() * (self.rows * n / total),
        )
        return merged, mean

    def affine(self, normalise: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Shift and scale, float32 [D], such that (row - shift) * scale is a normalised row less the mean one.

        For "none" the scale is that of "minmax", which keeps products within float32; the caller takes it back.
        """
        if normalise == "l2":
            scale = torch.ones_like(self.mean)
        elif normalise == "standard":
            deviation = (self.squares / self.rows).sqrt()
            scale = torch.where(deviation > TINY, 1 / deviation, 0.0)
        else:
            extent = self.highest - self.lowest
            scale = torch.full_like(self.mean, 1 / extent if extent > TINY else 0.0)
        return self.mean.to(torch.float32), scale.to(torch.float32)


def check_normalisation(normalise: str) -> None:
    """Raise InputError unless it is one of NORMALISATIONS."""
    check_among("normalisation", normalise, NORMALISATIONS)


def scale_rows_(tile: torch.Tensor, normalise: str) -> None:
    """Divide the rows by their norms for l2."""
    if normalise == "l2":
        for order in (math.inf, 2):  # the first, so that no square overflows
            tile /= torch.linalg.vector_norm(tile, order, dim=1, keepdim=True).clamp_(min=TINY)


def tile_rows(features: int, device: str) -> int:
    """Rows of the tiles that `retiled` gives on a "cpu" or on "cuda"."""
    return max(LEAST_ROWS, (TILE if device == "cpu" else CUDA_TILE) // max(1, features))


def retiled(tiles: Iterable[torch.Tensor], name: str) -> Iterator[tuple[slice, torch.Tensor]]:
    """The rows of tiles of any size, float32, in tiles of a size of their own, and their places.

    It depends on their width and on the kind of device alone. The reader may overwrite a tile; the next one does. None
    of the tiles given is kept while the next is computed.
    """
    buffer = torch.empty(0)
    filled = first = 0
    for tile in tiles:
        D = tile.shape[1]
        if buffer.ndim == 1:
            buffer = torch.empty(tile_rows(D, tile.device.type), D, dtype=torch.float32, device=tile.device)
        if buffer.shape[1] != D:
            raise InputError(f"{name or 'layer'}: features per row changed from {buffer.shape[1]} to {D}")
        start = 0
        while start < len(tile):
            n = min(len(buffer) - filled, len(tile) - start)
            buffer[filled : filled + n] = tile[start : start + n]
            start, filled = start + n, filled + n
            if filled == len(buffer):
                yield slice(first, first + filled), buffer
                first, filled = first + filled, 0
        del tile
    if filled:
        yield slice(first, first + filled), buffer[:filled]


def over_blocks(function: Callable[[slice], T], length: int, width: int, device: torch.device) -> list[T]:
    """Results of a function for blocks of 0 .. `length` - 1, whose elements hold `width` numbers each.

    On a CPU the blocks depend on these two numbers alone and each is one thread's, so that sums of their results, added
    in their order, do not depend on the number of threads. On a GPU they are large, and one after the other.
    """
    if device.type != "cpu":
        step = max(1, CUDA_BLOCK // max(1, width))
        return [function(slice(start, min(start + step, length))) for start in range(0, length, step)]
    count = max(CPU_BLOCKS, -(-length * width // CPU_BLOCK))
    step = max(1, -(-length // count))
    return in_parallel(function, [slice(start, min(start + step, length)) for start in range(0, length, step)])
