"""The files of TensorBoard's projector: tensors, metadata, a sprite of the images, and what says which belong together.

https://github.com/tensorflow/tensorboard/blob/master/tensorboard/plugins/projector
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qdv_gpu.errors import InputError
from qdv_gpu.files import replacing, write_text
from qdv_gpu.progress import advance
from qdv_gpu.report.rows import ROWS, cell

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

CONFIG, SPRITE = "projector_config.pbtxt", "sprite.png"
LARGEST = 8192  # side of a sprite in pixels that the projector takes
SIDE = 64  # of an image in the sprite, in pixels, at most
LEAST = 3  # columns of a tensor: of fewer the projector's PCA has a third axis of NaN
ESCAPED = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})

Pictures = Callable[[range, int], list["Picture"]]


@dataclass(frozen=True)
class Embedding:
    """A tensor that the projector lists.

    Attributes
    ----------
    name : str
    shape : tuple of int
    tensor, metadata : str
        Files, relative to the configuration.
    """

    name: str
    shape: tuple[int, int]
    tensor: str
    metadata: str


def write_tensor(path: Path, X: np.ndarray) -> tuple[int, int]:
    """Write points [N, n] as float32 in little-endian order, with columns of 0 if there are fewer than 3.

    Returns
    -------
    tuple of int
        The shape that was written.

    Examples
    --------
    >>> write_tensor(tmp_path / "a.bytes", np.array([[1, 2], [3, 4]], np.float32))
    (2, 3)
    >>> np.fromfile(tmp_path / "a.bytes", "<f4").tolist()
    [1.0, 2.0, 0.0, 3.0, 4.0, 0.0]
    """
    columns = max(X.shape[1], LEAST)
    with replacing(path) as temporary, temporary.open("wb") as file:
        for start in range(0, len(X), ROWS):
            part = X[start : start + ROWS].astype("<f4")
            file.write(np.pad(part, ((0, 0), (0, columns - X.shape[1]))).tobytes())
    return len(X), columns


def write_metadata(path: Path, columns: dict[str, Sequence[Any]]) -> None:
    r"""Write columns separated by tabs, a line an image; one column has no header, as the projector has it.

    Tabs and ends of lines in a cell are written \t, \n and \r.

    >>> write_metadata(tmp_path / "a.tsv", {"file": ["a\tb", "c"], "hits_k5": [0.5, 1.0]})
    >>> (tmp_path / "a.tsv").read_text().splitlines()
    ['file\thits_k5', 'a\\tb\t0.5', 'c\t1']
    """
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        if len(columns) > 1:
            file.write("\t".join(columns) + "\n")
        for values in zip(*columns.values(), strict=True):
            file.write("\t".join(cell(value).translate(ESCAPED) for value in values) + "\n")


def write_sprite(path: Path, count: int, pictures: Pictures) -> int:
    """Write images side by side, row by row from the top, in a square that is black where there is none.

    They keep their proportions, and are as large as the largest of the first thousand, up to 64 pixels, where
    that many fit into 8,192 pixels each way.

    Parameters
    ----------
    path : Path
    count : int
        Number of images.
    pictures : callable
        Gives some of them, at most as large as a side in pixels.

    Returns
    -------
    int
        Side of an image in pixels.

    Raises
    ------
    InputError
        If there are more images than pixels; or as `replacing`.
    """
    from PIL import Image, ImageOps

    columns = math.isqrt(count - 1) + 1  # square, since the projector takes rows for columns when it is clicked
    limit = min(SIDE, LARGEST // columns)
    if limit < 1:
        raise InputError(f"a sprite holds {LARGEST**2:,} images, got {count:,}")
    side, sheet = 0, Image.new("RGB", (1, 1))
    for start in range(0, count, ROWS):
        some = pictures(range(start, min(start + ROWS, count)), limit)
        if not start:
            side = max(max(picture.size) for picture in some)
            sheet = Image.new("RGB", (columns * side, columns * side))
        for number, picture in enumerate(some, start):
            fitted = picture if max(picture.size) == side else ImageOps.contain(picture, (side, side))
            left, top = ((side - length) // 2 for length in fitted.size)
            row, column = divmod(number, columns)
            sheet.paste(fitted, (column * side + left, row * side + top))
        advance("drawing images", start + len(some), count)
    with replacing(path) as temporary:
        sheet.save(temporary, "PNG", compress_level=3)
    return side


def write_config(path: Path, embeddings: Sequence[Embedding], side: int | None) -> None:
    """Write the configuration, a protocol buffer as text; `side` is that of an image in the sprite, if there is one.

    >>> write_config(tmp_path / CONFIG, [Embedding('a "b"', (5, 3), "a.bytes", "a.tsv")], None)
    >>> print((tmp_path / CONFIG).read_text().rstrip())
    embeddings {
      tensor_name: "a \\"b\\""
      tensor_path: "a.bytes"
      tensor_shape: 5
      tensor_shape: 3
      metadata_path: "a.tsv"
    }
    """
    text = ""
    for one in embeddings:
        text += f"embeddings {{\n  tensor_name: {quoted(one.name)}\n  tensor_path: {quoted(one.tensor)}\n"
        text += "".join(f"  tensor_shape: {length}\n" for length in one.shape)
        text += f"  metadata_path: {quoted(one.metadata)}\n"
        if side is not None:
            text += f"  sprite {{\n    image_path: {quoted(SPRITE)}\n"
            text += f"    single_image_dim: {side}\n    single_image_dim: {side}\n  }}\n"
        text += "}\n"
    write_text(path, text)


def quoted(text: str) -> str:
    r"""A text as protocol buffers write it: bytes of its UTF-8 that are no plain letters as octal numbers.

    >>> print(quoted('é "1"'))
    "\303\251 \"1\""
    """
    plain = {ord('"'): '\\"', ord("\\"): "\\\\"}
    return '"' + "".join(plain.get(b, chr(b) if 32 <= b < 127 else f"\\{b:03o}") for b in text.encode()) + '"'
