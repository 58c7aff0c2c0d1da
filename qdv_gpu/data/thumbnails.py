"""The images of a finished run, found again where it had them from, and as small pictures."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from qdv_gpu.data.datasets import DATASETS, list_images, load_images
from qdv_gpu.data.decode import decode
from qdv_gpu.data.geometry import Geometry
from qdv_gpu.data.images import Images
from qdv_gpu.data.readers import FileReader, each_file
from qdv_gpu.data.tables import TABLE_SUFFIXES
from qdv_gpu.errors import InputError
from qdv_gpu.files import text_of

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

Made = TypeVar("Made")


def find_again(
    data: str, names: Sequence[str], digest: str, *, split: str | None = None, image_size: int | None = None
) -> Images:
    """The images that a run was of, in its order; nothing of files is decoded.

    Parameters
    ----------
    data : str
        What the run's images were called: a data set, a folder or a table.
    names : sequence of str
        Of each image, as `text_of` writes what `Images.names` says.
    digest : str
        `Images.digest` of the run's images.
    split : str, optional
        As for `load_images`.
    image_size : int, optional
        The side that images of mixed sizes were squeezed to.

    Raises
    ------
    InputError
        If they are not there any more, or are others.

    Examples
    --------
    >>> images = load_images("digits", samples=20)
    >>> find_again("digits", images.names, images.digest)
    Images('digits', 20 of uint8 [1, 8, 8], 10 classes)
    """
    if data in DATASETS:
        images = load_images(data, split)
        positions = {text_of(name): i for i, name in enumerate(images.names)}
        images = images.take(torch.tensor([_at(positions, name, data) for name in names]))
        if images.digest == digest:
            return images
        raise InputError(f"the images of {data} are not those of the run")
    path = Path(data)
    if not (path.is_dir() or (path.is_file() and path.suffix.lower() in TABLE_SUFFIXES)):
        raise InputError(f"there is no folder or table {path.absolute()} that images can be read from again")
    listing = list_images(path, split)
    reader = FileReader(listing.files, listing.folder)
    positions = {text_of(reader.name(i)): i for i in range(len(reader))}
    indices = torch.tensor([_at(positions, name, data) for name in names])
    for geometry in (None, *([] if image_size is None else [Geometry(image_size)])):  # of one size, or of several
        images = Images(data, None, (), indices, None, FileReader(listing.files, listing.folder, geometry))
        if images.digest == digest:
            return images
    raise InputError(f"images of {data} have changed since the run")


def pictures(images: Images, positions: Sequence[int], side: int) -> list["Picture"]:
    """Some images of uint8 as PIL images, gray or RGB, made smaller if they are larger than `side` pixels.

    Raises
    ------
    InputError
        For a file that cannot be read.

    Examples
    --------
    >>> wide = Images.from_arrays(torch.zeros(2, 3, 40, 80, dtype=torch.uint8))
    >>> [picture.size for picture in pictures(wide, [1], 20)]
    [(20, 10)]
    """
    return _each(images, positions, side, lambda picture: picture)


def png_files(images: Images, positions: Sequence[int], side: int) -> list[bytes]:
    """The same as the contents of PNG files."""
    return _each(images, positions, side, _encoded)


def _each(images: Images, positions: Sequence[int], side: int, make: Callable[["Picture"], Made]) -> list[Made]:
    return list(each_file(lambda i: make(_small(images, i, side)), positions))


def _small(images: Images, position: int, side: int) -> "Picture":
    from PIL import Image

    if images.pixels is None:
        assert isinstance(images.reader, FileReader)
        pixels = decode(images.reader.files[int(images.indices[position])])
        if isinstance(pixels, str):
            raise InputError(pixels)
    else:
        pixels = images.pixels[position].cpu()
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(array)
    picture.thumbnail((side, side))
    return picture


def _encoded(picture: "Picture") -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=3)  # 6 takes twice as long for 3 % less
    return file.getvalue()


def _at(positions: dict[str, int], name: str, data: str) -> int:
    if name not in positions:
        raise InputError(f"image {name} is not in {data} any more")
    return positions[name]
