"""Images with or without labels, kept as they are until the moment a batch is fed to a network."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import sha256
from operator import index as as_index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qdv_gpu.arrays import constants, to_tensor
from qdv_gpu.data.decode import as_pixels
from qdv_gpu.data.geometry import Geometry
from qdv_gpu.data.labels import check_labels
from qdv_gpu.data.readers import FileReader, ItemReader, Reader, at, each_file, hold, pixels_digest, read, workers
from qdv_gpu.errors import InputError, listed, short
from qdv_gpu.machine import free_memory, resolve_device

BYTES_AT_ONCE = 1 << 24  # that are checked or hashed
AHEAD = 2  # batches on their way to a GPU
LUMA = (19595, 38470, 7471)  # 0.299, 0.587, 0.114 of ITU-R BT.601, times 2^16, as in Pillow


@dataclass(frozen=True, eq=False, repr=False)
class Images:
    """One split of a data set, made by `load_images`, `as_images` or `Images.from_arrays`.

    `images[3]` is one image [C, H, W]; `images[2:9]`, `images[[4, 1]]` and `images[mask]` are Images again.

    Attributes
    ----------
    name : str
        The data set.
    labels : Tensor or None
        Class of each image, int64 [N], on the CPU.
    classes : tuple of str
    indices : Tensor
        Position of each image in the whole split, int64 [N].
    pixels : Tensor or None
        [N, C, H, W], uint8 or, as the network takes them, float32; on the host or on a device; None if they are read
        batch by batch, or of mixed sizes.
    reader : FileReader, ItemReader or None
        What reads the images of the whole split, also once they are in memory; None for arrays.
    skipped : int
        Unreadable files left out.
    sizes : int
        How many sizes the images have.

    Examples
    --------
    >>> images = Images.from_arrays(torch.zeros(10, 3, 8, 6, dtype=torch.uint8), labels=range(10))
    >>> images
    Images('arrays', 10 of uint8 [3, 8, 6], 10 classes)
    >>> images[-1].shape, images[2:9].labels.tolist()
    (torch.Size([3, 8, 6]), [2, 3, 4, 5, 6, 7, 8])
    """

    name: str
    labels: Tensor | None
    classes: tuple[str, ...]
    indices: Tensor
    pixels: Tensor | None
    reader: Reader | None = None
    skipped: int = 0
    hashes: dict[int, bytes] = field(default_factory=dict)  # of the images read so far, by position in the split
    sizes: int = 1

    @classmethod
    def from_arrays(
        cls, pixels: Any, labels: Any = None, classes: Sequence[str] | None = None, name: str = "arrays"
    ) -> "Images":
        """Images of arrays, which are viewed where possible: do not change them afterwards.

        Parameters
        ----------
        pixels : array
            [N, C, H, W] (numpy, torch or CuPy): uint8, or floating point, already normalised, which is kept as
            float32 and fed to the network as it is; or, in numpy and of uint8, [N, H, W, 3] of more than 3 rows.
        labels : array or sequence of int, optional
            Class of each image, [N], from 0 on.
        classes : sequence of str, optional
            Names of the classes; default "0", "1", ... to the largest label.

        Raises
        ------
        InputError
            For another shape or dtype, no images, NaN or infinite pixels, or labels that do not fit.
        """
        found = as_pixels(pixels)
        as_pillow = isinstance(pixels, np.ndarray) and found.dtype == torch.uint8 and found.ndim == 4
        if as_pillow and found.shape[3] == 3 < found.shape[1]:
            found = found.permute(0, 3, 1, 2).contiguous()
        if found.ndim != 4 or not found.numel():
            raise InputError(f"arrays of images must have shape [N, C, H, W], none of them 0, got {list(found.shape)}")
        step = _images_at_once(found)
        for number, block in enumerate(found.split(step) if found.is_floating_point() else ()):
            finite = block.flatten(1).isfinite().all(dim=1)
            if not finite.all():
                raise InputError(
                    f"images must be finite, got NaN or infinity in image {number * step + int(finite.int().argmin())}"
                )
        targets, names = check_labels(labels, len(found), classes)
        return cls(name, targets, names, torch.arange(len(found)), found)

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        what = f" of {self.sizes} sizes" if self.mixed else " read batch by batch"
        if self.pixels is not None:
            what = f" of {str(self.pixels.dtype).removeprefix('torch.')} {list(self.pixels.shape[1:])}"
        known = "no labels" if self.labels is None else f"{len(self.classes)} classes"
        return f"Images({self.name!r}, {len(self)}{what}, {known})"

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key: Any) -> Any:
        """One image [C, H, W] for a position, Images for a slice, positions or a boolean mask; IndexError beyond."""
        N = len(self)
        if isinstance(key, slice):
            return self.take(torch.arange(N)[key] if (key.step or 1) > 0 else torch.tensor(range(N)[key]).long())
        if not hasattr(key, "__len__") or getattr(key, "ndim", 1) == 0:
            i = as_index(key)
            if not -N <= i < N:
                raise IndexError(f"image {i} of {N}")
            (image,) = self._read(torch.tensor([i % N]))
            return image
        chosen = to_tensor(key).cpu()
        if chosen.dtype == torch.bool:
            if chosen.shape != (N,):
                raise IndexError(f"a mask of {N} images must have shape [{N}], got {list(chosen.shape)}")
            return self.take(chosen.nonzero()[:, 0])
        if chosen.ndim != 1 or (chosen.numel() and (chosen.is_floating_point() or chosen.is_complex())):
            raise IndexError(f"positions must be integers [n], got {chosen.dtype} of shape {list(chosen.shape)}")
        chosen = chosen.to(torch.int64)
        wrong = chosen[(chosen < -N) | (chosen >= N)]
        if len(wrong):
            raise IndexError(f"image {int(wrong[0])} of {N}")
        return self.take(chosen.remainder(max(N, 1)))

    @property
    def files(self) -> tuple[Path, ...]:
        """The image files; empty if the images are from elsewhere."""
        reader = self.reader
        return tuple(reader.files[i] for i in self.indices.tolist()) if isinstance(reader, FileReader) else ()

    @property
    def names(self) -> list[str]:
        """For each image its file relative to the data folder, or its position in the whole split."""
        return [str(i) if self.reader is None else self.reader.name(i) for i in self.indices.tolist()]

    @property
    def mixed(self) -> bool:
        """Whether they are of mixed sizes: they have no pixels before `at` makes them of one."""
        return self.sizes > 1

    @property
    def geometry(self) -> Geometry | None:
        """Which squares the images became when they were read; None if they kept their size."""
        return None if self.reader is None else self.reader.geometry

    @property
    def side(self) -> int | None:
        """Side in pixels of those squares."""
        return None if self.geometry is None else self.geometry.side

    def at(self, geometry: Geometry) -> "Images":
        """The same images, uint8 [C, side, side], made anew of what they were read from.

        Files and PIL images are resized by Pillow, arrays of uint8 by torch on the CPU. Images of floating point, which
        are normalised already, are returned as they are. The others are in memory if at most half of what is free is
        needed, else made batch by batch; InputError for a file or item that cannot be read.

        Examples
        --------
        >>> Images.from_arrays(torch.zeros(10, 3, 8, 6, dtype=torch.uint8)).at(Geometry(4, resize=5))
        Images('arrays', 10 of uint8 [3, 4, 4], no labels)
        """
        if not isinstance(geometry, Geometry):
            raise InputError(f"geometry must be a Geometry, got {short(geometry)}")
        reader = self.reader
        if reader is None:
            assert self.pixels is not None
            rows = dict(zip(self.indices.tolist(), self.pixels, strict=True))
            reader = ItemReader(rows, _without_label, self.name)
        if not len(self) or reader.geometry == geometry:
            return self
        reader, indices = at(reader, geometry, self.hashes), self.indices.tolist()
        first = reader[indices[0]]
        if isinstance(first, str):
            raise InputError(first + reader.advice)
        if first.pixels.is_floating_point():
            return self
        hashes: dict[int, bytes] = {}
        pixels = hold(reader, indices, first.pixels.shape, hashes)
        if pixels is not None and self.pixels is not None:
            pixels = pixels.to(self.pixels.device)
        return replace(self, pixels=pixels, reader=reader, hashes=hashes, sizes=1)

    @property
    def digest(self) -> str:
        """sha256 of the images' contents in order, wherever they are held: pixels, or bytes of files.

        Raises
        ------
        InputError
            For a file that cannot be read.
        """
        self.hashed()
        return sha256(b"".join(self.hashes[i] for i in self.indices.tolist())).hexdigest()

    def hashed(self) -> "Images":
        """The same images, once they are hashed for `digest`: later, on a GPU, they would have to come back for it."""
        missing = [i for i, index in enumerate(self.indices.tolist()) if index not in self.hashes]
        if missing and self.pixels is not None:
            blocks = torch.tensor(missing).split(_images_at_once(self.pixels))
            with ThreadPoolExecutor(workers()) as pool:
                found = [digest for digests in pool.map(self._hash, blocks) for digest in digests]
            self.hashes.update(zip(self.indices[missing].tolist(), found, strict=True))
        elif missing and isinstance(self.reader, FileReader):
            order = self.indices[missing].tolist()
            self.hashes.update(zip(order, each_file(self.reader.digest, order), strict=True))
        elif missing:
            assert self.reader is not None
            for _ in read(self.reader, [self.indices[missing].tolist()], self.hashes):
                pass
        return self

    @property
    def labels_digest(self) -> str:
        """sha256 of the labels and the names of the classes."""
        digest = sha256("\0".join(self.classes).encode(errors="surrogateescape") + b"\0\0")
        digest.update(b"unlabelled" if self.labels is None else self.labels.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def require_labels(self, what: str) -> Tensor:
        """The labels, int64 [N]; InputError, which says that `what` requires them, if there are none.

        >>> Images.from_arrays(torch.zeros(1, 1, 2, 2)).require_labels("the neighborhood hit")
        Traceback (most recent call last):
        qdv_gpu.errors.InputError: the neighborhood hit requires labels, and arrays has none: give (images, labels)
        """
        if self.labels is None:
            hint = "a folder for each class, or a table with labels" if self.files else "(images, labels)"
            raise InputError(f"{what} requires labels, and {self.name} has none: give {hint}")
        return self.labels

    def take(self, positions: Tensor) -> "Images":
        """The images at these positions, int64 [n], in this order."""
        _check_positions(positions)
        return replace(
            self,
            labels=None if self.labels is None else self.labels[positions],
            indices=self.indices[positions],
            pixels=None if self.pixels is None else self.pixels[positions.to(self.pixels.device, non_blocking=True)],
        )

    def to(self, device: str | torch.device, *, limit: int | None = None) -> "Images":
        """Move the pixels to `device` once, unless they exceed `limit` bytes, by default half of what is free."""
        target = resolve_device(device)
        if self.pixels is None or self.pixels.device == target:
            return self
        if target.type == "cuda" and self.pixels.nbytes > (free_memory(target) // 2 if limit is None else limit):
            return self
        return replace(self, pixels=self.pixels.to(target))

    def batches(self, positions: Iterable[Tensor], device: str | torch.device) -> Iterator[Tensor]:
        """Yield [b, C, H, W] on `device`, uint8 or float32, for each list of positions.

        Raises
        ------
        InputError
            For a file or item that cannot be read, or is not what it was when it was read before; for mixed sizes.
        """
        send = _Sender(device if isinstance(device, torch.device) else resolve_device(device))
        positions = listed("positions", positions, Tensor, "tensors")
        for batch in positions:
            _check_positions(batch)
        if self.pixels is not None:
            for batch in positions:
                yield send(self._read(batch))
            return
        for items in self._items(positions):
            yield send(torch.stack([item.pixels for item in items]))

    def _read(self, positions: Tensor) -> Tensor:
        if self.pixels is not None:
            return self.pixels[positions.to(self.pixels.device, non_blocking=True)]
        (items,) = self._items([positions])
        return torch.stack([item.pixels for item in items])

    def _items(self, positions: Sequence[Tensor]) -> Iterator[list[Any]]:
        assert self.reader is not None
        if self.mixed:
            raise InputError(f"the images of {self.name} are of {self.sizes} sizes: pass --image-size")
        return read(self.reader, [self.indices[batch].tolist() for batch in positions], self.hashes)

    def _hash(self, positions: Tensor) -> list[bytes]:
        return [pixels_digest(image) for image in self._read(positions).cpu()]


def _check_positions(positions: Any) -> None:
    """InputError unless these are positions of images, int64 [n]."""
    if not isinstance(positions, Tensor) or positions.dtype != torch.int64 or positions.ndim != 1:
        raise InputError(f"positions must be a tensor of int64 [n], got {short(positions)}")


def prepare(
    batch: Tensor, *, size: int | None, channels: int, mean: Sequence[float], std: Sequence[float], bgr: bool = False
) -> Tensor:
    """Make network input from images, on their device.

    Parameters
    ----------
    batch : Tensor
        uint8 [B, C, H, W]; gray images are repeated for a network of three channels, and colours become gray for a
        network of one, as in Pillow: 0.299 R + 0.587 G + 0.114 B, rounded. Or floating point, which is
        taken for normalised and in the network's order of channels, and at most resized.
    size : int or None
        Side of the square that they are resized to (bilinear, antialiased); None keeps their size.

    Returns
    -------
    Tensor
        float32 [B, channels, size, size], (x / 255 - mean) / std of uint8 images.

    Examples
    --------
    >>> white = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    >>> prepare(white, size=4, channels=3, mean=(0.5, 0.5, 0.0), std=(0.5, 1.0, 1.0))[0, :, 0, 0]
    tensor([1.0000, 0.5000, 1.0000])
    """
    normalised = batch.is_floating_point()
    if channels == 1 and batch.shape[1] == 3 and not normalised:
        luma = constants(LUMA, batch.device, torch.int32).view(3, 1, 1)
        batch = ((batch * luma).sum(1, keepdim=True) + (1 << 15)) >> 16
    x = batch.to(torch.float32) if normalised else batch.to(torch.float32).div_(255)
    if x.shape[1] != channels:
        if x.shape[1] != 1 or normalised:
            kind = "channel" if x.shape[1] == 1 else "channels"
            hint = ": arrays must be [N, C, H, W]" if x.shape[3] == channels else ""
            raise InputError(f"the network takes {channels}-channel images, the data has {x.shape[1]} {kind}{hint}")
        x = x.expand(-1, channels, -1, -1)
    if size is not None and x.shape[2:] != (size, size):
        x = functional.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    if normalised:
        return x
    shift, scale = (constants(values, x.device).view(1, -1, 1, 1) for values in (mean, std))
    x = (x - shift).div_(scale)
    return x.flip(1) if bgr else x


class _Sender:
    """Moves batches to a device; from the host to a GPU through page-locked memory, without waiting for the copy.

    At most AHEAD batches are page-locked, or a fast host would lock ever more.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copies: deque[torch.cuda.Event] = deque()

    def __call__(self, batch: Tensor) -> Tensor:
        if self.device.type != "cuda" or batch.is_cuda:
            return batch.to(self.device)
        if len(self.copies) == AHEAD:
            self.copies.popleft().synchronize()
        sent = batch.pin_memory().to(self.device, non_blocking=True)
        self.copies.append(torch.cuda.current_stream(self.device).record_event())
        return sent


def _without_label(image: Tensor) -> tuple[Tensor, None]:
    return image, None


def _images_at_once(pixels: Tensor) -> int:
    return max(1, BYTES_AT_ONCE // max(1, pixels[0].nbytes))
