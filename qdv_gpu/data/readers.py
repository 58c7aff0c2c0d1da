"""Readers of images one at a time: files, and the items of data sets; what they read must stay the same."""

import logging
from collections.abc import Iterator, MutableMapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from qdv_gpu.data.decode import complaint, decode, image_tensor
from qdv_gpu.errors import InputError
from qdv_gpu.machine import threads

logger = logging.getLogger(__name__)


class Item(NamedTuple):
    """One decoded image: uint8 or float32 [C, H, W], the digest of its contents, and its label if it came with one."""

    pixels: Tensor
    digest: bytes
    label: Any = None


def workers() -> int:
    """How many threads or processes read images."""
    return min(threads(), 8)


def pixels_digest(pixels: Tensor) -> bytes:
    """sha256 of the dtype, shape and bytes of one image on the CPU."""
    digest = sha256(f"{pixels.dtype} {list(pixels.shape)}\0".encode())
    digest.update(pixels.contiguous().numpy().data)
    return digest.digest()


class FileReader(Dataset[Item | str]):
    """Decodes image files to uint8 [3, H, W] one at a time; what is wrong with a file stands in its place.

    Parameters
    ----------
    files : sequence of Path
    folder : Path
        What the files' names are relative to.
    side : int, optional
        They are resized to side x side; None keeps their size.
    size : tuple of int, optional
        The height and width that they all had before.
    """

    advice = " (--skip-bad leaves such files out)"

    def __init__(
        self, files: Sequence[Path], folder: Path, side: int | None = None, size: tuple[int, int] | None = None
    ) -> None:
        self.files, self.folder, self.side, self.size = files, folder, side, size
        self.options = {"num_workers": workers()}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Item | str:
        path = self.files[index]
        try:
            contents = path.read_bytes()
        except OSError as error:
            return complaint(path, error)
        pixels = decode(path, contents, self.side)
        if isinstance(pixels, str):
            return pixels
        if self.side is None and self.size not in (None, (*pixels.shape[1:],)):
            return f"{self.describe(index)} changed between passes: it is of another size"
        return Item(pixels, self._hash(contents))

    def digest(self, index: int) -> bytes:
        """sha256 of a file's bytes and of the side that it is decoded to; InputError if it cannot be read."""
        try:
            return self._hash(self.files[index].read_bytes())
        except OSError as error:
            raise InputError(complaint(self.files[index], error) + self.advice) from None

    def _hash(self, contents: bytes) -> bytes:
        digest = sha256(f"file {self.side}\0".encode())
        digest.update(contents)
        return digest.digest()

    def name(self, index: int) -> str:
        """The file relative to the data folder."""
        return self.files[index].relative_to(self.folder).as_posix()

    def describe(self, index: int) -> str:
        """The file for an error message."""
        return f"image file {self.files[index]}"


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
    side : int, optional
        Images of uint8 are resized to side x side.
    """

    advice = ""

    def __init__(
        self, items: Any, sample: Any, title: str, options: dict[str, Any] | None = None, side: int | None = None
    ) -> None:
        self.items, self.sample, self.title, self.options, self.side = items, sample, title, options or {}, side

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item | str:
        try:
            return self.item(self.items[index])
        except InputError as error:
            return f"{self.describe(index)} is not usable: {error}"
        except Exception as error:
            logger.debug("%s cannot be read", self.describe(index), exc_info=True)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return f"{self.describe(index)} cannot be read: {reason}"

    def item(self, value: Any) -> Item:
        """Make an item of what the data set gave."""
        image, label = self.sample(value)
        pixels = image_tensor(image)
        if self.side is not None and pixels.dtype == torch.uint8:
            size = (self.side, self.side)
            pixels = functional.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
        return Item(pixels, pixels_digest(pixels), label)

    def name(self, index: int) -> str:
        """The item's number as text."""
        return str(index)

    def describe(self, index: int) -> str:
        """The item for an error message."""
        return f"item {index} of {self.title}"


Reader = FileReader | ItemReader


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
        **(reader.options if len(batches) > 1 else {}),
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
