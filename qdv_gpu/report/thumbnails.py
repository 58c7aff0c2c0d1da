"""Small pictures of many images on few sheets."""

import io
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from qdv_gpu.data.geometry import Geometry
from qdv_gpu.data.images import Images

SIDE = 32  # pixels of a picture
COLUMNS = 100  # pictures across a sheet
EACH = COLUMNS * 125  # pictures on a sheet: 3,200 x 4,000 pixels
BATCH = 2**26  # bytes of images that are made small at once
QUALITIES = (75, 50, 30, 10)  # of WebP: the best that a size allows
SAMPLED = 10  # rows of pictures for one that tells which quality that is


def small(images: Images) -> Tensor:
    """The images squeezed into squares, uint8 [N, 3, 32, 32]; normalised ones with their range as black to white."""
    found = images if _small_already(images) else images.at(Geometry(SIDE))
    step = max(1, min(1024, BATCH // found[0].nbytes))  # those of floating point have their own size still
    batches = found.batches(torch.arange(len(found)).split(step), "cpu")
    return torch.cat([_shown(batch) for batch in batches])


def _small_already(images: Images) -> bool:
    """Whether the whole images are in memory, and of this size: to read them again would give the same pixels."""
    pixels, whole = images.pixels, images.geometry is None
    return whole and pixels is not None and pixels.dtype == torch.uint8 and pixels.shape[2:] == (SIDE, SIDE)


def _shown(batch: Tensor) -> Tensor:
    """A batch as uint8 [B, 3, 32, 32]."""
    if batch.is_floating_point():
        low, high = batch.amin((1, 2, 3), keepdim=True), batch.amax((1, 2, 3), keepdim=True)
        scaled = (batch - low) / (high - low).clamp_min(1e-12)
        batch = (functional.interpolate(scaled, (SIDE, SIDE), mode="area") * 255).round().to(torch.uint8)
    return batch[:, :1].expand(-1, 3, -1, -1) if batch.shape[1] != 3 else batch


def sheets_of(pictures: Tensor) -> list[Image.Image]:
    """Pictures uint8 [N, 3, 32, 32] on sheets, row by row.

    >>> [sheet.size for sheet in sheets_of(torch.zeros(230, 3, SIDE, SIDE, dtype=torch.uint8))]
    [(3200, 96)]
    """
    sheets = []
    for own in pictures.split(EACH):
        rows = -(-len(own) // COLUMNS)
        blank = torch.zeros(rows * COLUMNS, 3, SIDE, SIDE, dtype=torch.uint8)
        blank[: len(own)] = own
        grid = blank.view(rows, COLUMNS, 3, SIDE, SIDE).permute(0, 3, 1, 4, 2)  # [rows, SIDE, COLUMNS, SIDE, 3]
        sheets.append(Image.fromarray(grid.reshape(rows * SIDE, COLUMNS * SIDE, 3).contiguous().numpy()))
    return sheets


def pictures_of(sheets: Sequence[Image.Image], count: int) -> Tensor:
    """What `sheets_of` put on sheets: uint8 [count, 3, 32, 32].

    >>> pictures = torch.randint(256, (7, 3, SIDE, SIDE)).to(torch.uint8)
    >>> torch.equal(pictures_of(sheets_of(pictures), 7), pictures)
    True
    """
    found = []
    for sheet in sheets:
        grid = np.array(sheet.convert("RGB")).reshape(-1, SIDE, COLUMNS, SIDE, 3).transpose(0, 2, 4, 1, 3)
        found.append(torch.from_numpy(grid.reshape(-1, 3, SIDE, SIDE)))
    return torch.cat(found)[:count]


def decoded(sheets: Sequence[bytes], count: int) -> Tensor:
    """The pictures on encoded sheets, uint8 [count, 3, 32, 32].

    Raises
    ------
    ValueError, OSError
        If there are fewer, or a sheet cannot be read.
    """
    pictures = pictures_of([Image.open(io.BytesIO(sheet)) for sheet in sheets], count)
    if len(pictures) < count:
        raise ValueError(f"{len(pictures)} of {count} pictures")
    return pictures


def encoded(sheets: Sequence[Image.Image], most: int | None = None) -> list[bytes]:
    """Sheets as WebP, in the best quality with which they have at most so many bytes, or else in the least."""
    for quality in QUALITIES if most is None else QUALITIES[_promising(sheets, most) :]:
        found = list(_webp(sheets, quality))
        if most is None or sum(map(len, found)) <= most:
            break
    return found


def _promising(sheets: Sequence[Image.Image], most: int) -> int:
    """The first of the qualities that may do, by every tenth row of pictures: to encode all takes 1 s for each."""
    rows = [np.array(sheet).reshape(-1, SIDE, sheet.width, 3) for sheet in sheets]
    if sum(map(len, rows)) < 2 * SAMPLED:
        return 0
    sample = [Image.fromarray(own[::SAMPLED].reshape(-1, own.shape[2], 3)) for own in rows]
    share = sum(len(own[::SAMPLED]) for own in rows) / sum(map(len, rows))
    for number, quality in enumerate(QUALITIES):
        if sum(map(len, _webp(sample, quality))) <= 1.05 * share * most:
            return number
    return len(QUALITIES) - 1


def _webp(sheets: Sequence[Image.Image], quality: int) -> Iterator[bytes]:
    for sheet in sheets:
        contents = io.BytesIO()
        sheet.save(contents, "WEBP", quality=quality, method=4)
        yield contents.getvalue()
