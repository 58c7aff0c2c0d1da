"""Readers of images one at a time: files, and the items of data sets; what they read must stay the same."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qdv_gpu.data.decode import complaint, decode, from_pil, image_tensor
from qdv_gpu.data.geometry import Geometry
from qdv_gpu.errors import InputError
from qdv_gpu.files import contents_of
from qdv_gpu.machine import end_with, free_memory, staying, threads
from qdv_gpu.progress import advance

S = TypeVar("S")
T = TypeVar("T")

logger = logging.getLogger(__name__)
BATCH = 32  # items that a process or a thread reads at a time
AGAIN = 16  # items of a data set in memory that are read again


class Item(NamedTuple):
    """One decoded image: uint8 or float32 [C, H, W], the digest of its contents, and its label if it came with one."""

    pixels: Tensor
    digest: bytes
    label: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes through a pipe: for shared memory that there is not torch's would wait for ever."""
        label = self.label.numpy() if isinstance(self.label, Tensor) else self.label
        return _received, (self.pixels.numpy(), self.digest, label, isinstance(self.label, Tensor))


def _received(pixels: np.ndarray, digest: bytes, label: Any, is_tensor: bool) -> Item:  # noqa: FBT001 - as it is pickled
    return Item(torch.from_numpy(pixels), digest, torch.from_numpy(np.asarray(label)) if is_tensor else label)


def workers() -> int:
    """How many threads or processes read images."""
    return min(threads(), 8)


def each_file(function: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
    """Results of a function that reads a file, for each item, in order, on `workers()` threads.

    They take several items at a time, since to hand one over takes as long as to read a small file.

    >>> list(each_file(str, [1, 2, 3]))
    ['1', '2', '3']
    """
    step = max(1, min(BATCH, len(items) // (4 * workers())))
    parts = [items[start : start + step] for start in range(0, len(items), step)]
    with ThreadPoolExecutor(workers()) as pool:
        for found in pool.map(lambda part: [function(item) for item in part], parts):
            yield from found


def pixels_digest(pixels: Tensor) -> bytes:
    """sha256 of the dtype, shape and bytes of one image on the CPU."""
    digest = sha256(f"{pixels.dtype} {list(pixels.shape)}\0".encode())
    digest.update(pixels.contiguous().numpy().data)
    return digest.digest()


class FileReader(Dataset[Item | str]):
    """Decodes image files to uint8 [C, H, W] one at a time; what is wrong with a file stands in its place.

    Parameters
    ----------
    files : sequence of Path
    folder : Path
        What the files' names are relative to.
    geometry : Geometry, optional
        Which square they become; None keeps their size.
    size : tuple of int, optional
        The height and width that they all have, unless they are of mixed sizes.
    gray : bool
        Decode them to one channel, else to three.

    Attributes
    ----------
    before : tuple of Geometry or None, and mapping of int to bytes
        The geometry and the digests of what was read before, in another geometry.
    """

    advice = " (--skip-bad leaves such files out)"

    def __init__(
        self,
        files: Sequence[Path],
        folder: Path,
        geometry: Geometry | None = None,
        size: tuple[int, int] | None = None,
        *,
        gray: bool = False,
    ) -> None:
        self.files, self.folder, self.geometry, self.size = files, folder, geometry, size
        self.mode = "L" if gray else "RGB"
        self.options = {"num_workers": workers()}
        self.before: tuple[Geometry | None, Mapping[int, bytes]] = None, {}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Item | str:
        path = self.files[index]
        try:
            contents = contents_of(path)
        except OSError as error:
            return complaint(path, error)
        geometry, digests = self.before
        if index in digests and digests[index] != _file_digest(contents, geometry):
            return f"{self.describe(index)} changed between passes: images must stay the same"
        pixels = decode(path, contents, mode=self.mode, geometry=self.geometry)
        if isinstance(pixels, str):
            return pixels
        if self.geometry is None and self.size not in (None, (*pixels.shape[1:],)):
            return f"{self.describe(index)} changed between passes: it is of another size"
        return Item(pixels, _file_digest(contents, self.geometry))

    def digest(self, index: int) -> bytes:
        """sha256 of a file's bytes and of the geometry that it is decoded to; InputError if it cannot be read."""
        try:
            return _file_digest(contents_of(self.files[index]), self.geometry)
        except OSError as error:
            raise InputError(complaint(self.files[index], error) + self.advice) from None

    def name(self, index: int) -> str:
        """The file relative to the data folder, or its whole path if it lies elsewhere."""
        path = self.files[index]
        return (path.relative_to(self.folder) if path.is_relative_to(self.folder) else path).as_posix()

    def describe(self, index: int) -> str:
        """The file for an error message."""
        return f"image file {self.files[index]}"


def _file_digest(contents: bytes, geometry: Geometry | None) -> bytes:
    digest = sha256(f"file {geometry}\0".encode())
    digest.update(contents)
    return digest.digest()


class ItemReader(Dataset[Item | str]):
    """Makes tensors of the items of a data set; what is wrong with an item stands in its place.

    Parameters
    ----------
    items : map-style data set
        Or any sequence.
    sample : callable
        Makes (image, label or None) of an item.
    title : str
        Of the data set, for error messages.
    options : dict
        Of the DataLoader that reads it.
    geometry : Geometry, optional
        Which square PIL images and arrays of uint8 become; None keeps their size.
    """

    advice = ""

    def __init__(
        self,
        items: Any,
        sample: Any,
        title: str,
        options: dict[str, Any] | None = None,
        geometry: Geometry | None = None,
    ) -> None:
        self.items, self.sample, self.title, self.options = items, sample, title, options or {}
        self.geometry = geometry

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item | str:
        try:
            with staying():
                return self.item(self.items[index])
        except InputError as error:
            return f"{self.describe(index)} is not usable: {error}"
        except Exception as error:
            logger.debug("%s cannot be read", self.describe(index), exc_info=True)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return f"{self.describe(index)} cannot be read: {reason}"

    def item(self, value: Any) -> Item:
        """Make an item of what the data set gave."""
        from PIL import Image

        image, label = self.sample(value)
        if isinstance(image, Image.Image):
            pixels = from_pil(image, geometry=self.geometry)
        else:
            pixels = image_tensor(image)
            if self.geometry is not None and pixels.dtype == torch.uint8:
                pixels = self.geometry.of_pixels(pixels)
        return Item(pixels, pixels_digest(pixels), label)

    def name(self, index: int) -> str:
        """The item's number as text."""
        return str(index)

    def describe(self, index: int) -> str:
        """The item for an error message."""
        return f"item {index} of {self.title}"


Reader = FileReader | ItemReader


def at(reader: Reader, geometry: Geometry, digests: Mapping[int, bytes]) -> Reader:
    """The same reader with another geometry; files whose contents have not these digests any more are bad."""
    changed = copy(reader)
    if isinstance(changed, FileReader):
        changed.before = changed.geometry, digests
    changed.geometry = geometry
    return changed


def read(reader: Reader, batches: Sequence[Sequence[int]], digests: MutableMapping[int, bytes]) -> Iterator[list[Item]]:
    """Yield the items of each batch of positions, several batches ahead in the reader's processes.

    Parameters
    ----------
    digests : mutable mapping
        Of the contents of the items that were read before, by position; the others' are added.

    Raises
    ------
    InputError
        For an item that cannot be read, or whose contents are not what they were.
    """
    generator = torch.Generator()  # or the loader would draw its seed from torch's own
    generator.seed()
    loader = DataLoader(
        reader,
        batch_sampler=[list(batch) for batch in batches],
        collate_fn=list,
        generator=generator,
        **(_ending(reader.options) if len(batches) > 1 else {}),
    )
    for batch, items in zip(batches, loader, strict=True):
        for index, item in zip(batch, items, strict=True):
            if isinstance(item, str):
                raise InputError(item + reader.advice)
            if digests.setdefault(index, item.digest) != item.digest:
                raise InputError(
                    f"{reader.describe(index)} changed between passes: "
                    "images must stay the same, without random augmentation"
                )
        yield items


def _ending(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a DataLoader, whose processes end with this one."""
    if not options.get("num_workers"):
        return dict(options)
    return {**options, "worker_init_fn": partial(_begin, os.getpid(), options.get("worker_init_fn"))}


def _begin(parent: int, begin: Callable[[int], None] | None, number: int) -> None:
    end_with(parent)
    if begin is not None:
        begin(number)


def hold(
    reader: Reader, indices: Sequence[int], shape: Sequence[int], digests: MutableMapping[int, bytes]
) -> Tensor | None:
    """Read images of one shape [C, H, W] into memory, uint8 [n, C, H, W]; None if they need over half of what is free.

    Parameters
    ----------
    digests : mutable mapping
        As for `read`.

    Raises
    ------
    InputError
        As `read`; for files it says how many are bad.
    """
    if len(indices) * int(np.prod(shape)) > free_memory(torch.device("cpu")) // 2:
        return None
    pixels = torch.empty(len(indices), *shape, dtype=torch.uint8)
    if isinstance(reader, FileReader):
        bad = []
        for i, item in enumerate(each_file(reader.__getitem__, indices)):
            if isinstance(item, str):
                bad.append(item)
            else:
                pixels[i], digests[indices[i]] = item.pixels, item.digest
            advance("reading images", i + 1, len(indices))
        if bad:
            raise refusal(bad, len(indices))
        return pixels
    batches = [indices[start : start + BATCH] for start in range(0, len(indices), BATCH)]
    for i, item in enumerate(item for items in read(reader, batches, digests) for item in items):
        if item.pixels.shape != pixels.shape[1:]:
            raise InputError(f"{reader.describe(indices[i])} is {list(item.pixels.shape)}, others are {list(shape)}")
        pixels[i] = item.pixels
        advance("reading images", i + 1, len(indices))
    read_again(reader, indices, digests)
    return pixels


def read_again(reader: Reader, indices: Sequence[int], digests: MutableMapping[int, bytes]) -> None:
    """Read a few of the images once more: InputError if their contents are not what they were."""
    spread = np.unique(np.linspace(0, len(indices) - 1, AGAIN).round().astype(int)).tolist()
    for _ in read(reader, [[indices[i] for i in spread]], digests):
        pass


def refusal(complaints: Sequence[str], count: int) -> InputError:
    """An error of the first of several bad files, and how many they are."""
    return InputError(f"{complaints[0]}; {len(complaints)} bad of {count} files (--skip-bad leaves them out)")
