"""Deconvnet pictures: reconstructions of a layer's maps, and the patches that activate them most."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.nn import functional

from qdv_gpu.arrays import as_floats, to_tensor
from qdv_gpu.errors import InputError, check_among, check_text, check_whole, listed
from qdv_gpu.report import drawing
from qdv_gpu.report.drawing import LINE, MARGIN, SMALL, TEXT, TITLE, NotebookFigure, plain
from qdv_gpu.report.folder import DPI

CONTRASTS = ("map", "layer")
TILE, PATCH = 96, 40  # sides in pixels of a reconstruction and of a patch in a figure
INPUT = 1.2  # inches: side of the input image
CAPTION = 2.4  # inches: room for the title of a narrower grid


def plot_reconstructions(
    grids: Sequence[np.ndarray], titles: Sequence[str], *, images: Any = None, contrast: str = "map"
) -> tuple[Figure, np.ndarray]:
    """Reconstructions of all maps of a layer as one grid, several networks side by side, the input image beside them.

    Gray is 0. The number beside a row is that of its first map.

    Parameters
    ----------
    grids : sequence of array
        float32 [M, C, H, W] each, C = 1 or 3.
    titles : sequence of str
        One for each grid.
    images : array or sequence of array, optional
        uint8, or float in 0..1, [C, H, W] with C = 1 or 3: what was reconstructed, at the left, or one for each grid,
        at the left of it.
    contrast : {"map", "layer"}
        Divide by the largest absolute value of each map, or of all of them.

    Returns
    -------
    Figure
    array of Axes
        [len(grids)], those of the grids; those of the images are among the figure's, titled "input".

    Raises
    ------
    InputError
        If there is no grid, or there are not as many titles or images.

    Examples
    --------
    >>> figure, axes = plot_reconstructions([np.zeros((5, 3, 8, 8), np.float32)], ["conv1"], images=np.zeros((3, 8, 8)))
    >>> figure.axes[0].get_title(), [ax.get_title(loc="left") for ax in axes]
    ('input', ['conv1'])
    """
    check_among("contrast", contrast, CONTRASTS)
    titles = listed("titles", titles, str, "texts")
    grids = [_check_pictures("grids", grid, None) for grid in listed("grids", grids, what="arrays")]
    inputs = _inputs(images, len(grids))
    if not len(grids) or len(titles) != len(grids):
        raise InputError(f"at least one grid, and a title for each, are required, got {len(grids)} and {len(titles)}")
    tiles = [_bright_tiles(grid, TILE, (1, 2, 3) if contrast == "map" else (0, 1, 2, 3)) for grid in grids]
    columns = [math.ceil(math.sqrt(len(grid))) for grid in grids]
    pictures = [_mosaic(own, width) for own, width in zip(tiles, columns, strict=True)]
    names = [plain(title) for title in titles]
    rooms = [
        max(picture.shape[1] / DPI, min(drawing.text_width(name, TEXT), CAPTION))
        for picture, name in zip(pictures, names, strict=True)
    ]
    captions = [drawing.wrapped(name, room, TEXT, lines=4) for name, room in zip(names, rooms, strict=True)]
    top = MARGIN + max(drawing.height_of(caption, TEXT) for caption in captions) + 0.03
    gap, numbers = 0.2, 0.1 + drawing.text_width(str(max(len(grid) for grid in grids)), SMALL)
    width = (
        2 * MARGIN - gap + sum(rooms) + (gap + numbers) * len(grids) + sum(INPUT for one in inputs if one is not None)
    )
    tall = max(picture.shape[0] / DPI for picture in pictures)
    if images is not None:
        tall = max(tall, INPUT)
    figure = NotebookFigure(figsize=(width, top + tall + MARGIN), dpi=DPI)
    left = MARGIN
    axes = np.empty(len(grids), dtype=object)
    for number, (picture, image, room) in enumerate(zip(pictures, inputs, rooms, strict=True)):
        if image is not None:
            side = _show(figure, image, left, top, INPUT / max(image.shape[:2]))
            side.set_title("input", fontsize=TEXT, pad=3)
            left += INPUT
        left += numbers
        axes[number] = ax = _show(figure, picture, left, top, 1 / DPI)
        starts = range(0, len(grids[number]), columns[number])
        places = [(row + 0.5) * (TILE + 1) for row in range(len(starts))]
        ax.set_yticks(places, [str(start) for start in starts], fontsize=SMALL)
        ax.set_title(captions[number], fontsize=TEXT, pad=3, loc="left", parse_math=False, linespacing=1.15)
        left += room + gap
    return figure, axes


def plot_top(patches: np.ndarray, pictures: np.ndarray, maps: Sequence[int], title: str) -> tuple[Figure, np.ndarray]:
    """For each map its strongest patches, and beside them their reconstructions (Zeiler & Fergus 2014, figure 2).

    Parameters
    ----------
    patches : array
        uint8 [M, k, C, h, w].
    pictures : array
        float32 [M, k, C, h, w].
    maps : sequence of int
        Numbers of the M maps.
    title : str

    Returns
    -------
    Figure
    array of Axes
        [M].

    Examples
    --------
    >>> patches = np.zeros((2, 4, 3, 8, 8), np.uint8)
    >>> figure, axes = plot_top(patches, patches.astype(np.float32), [0, 7], "conv1")
    >>> [ax.get_title() for ax in axes]
    ['map 0', 'map 7']
    """
    check_text("title", title)
    patches, pictures = (
        _check_pictures(name, one, None, None) for name, one in (("patches", patches), ("pictures", pictures))
    )
    maps = [check_whole("maps", one) for one in listed("maps", maps, what="integers")]
    M, k = patches.shape[:2]
    if patches.shape != pictures.shape or len(maps) != M:
        shapes = f"{list(patches.shape)}, {list(pictures.shape)} and {len(maps)}"
        raise InputError(f"patches, pictures and maps must be as many and of one size, got {shapes}")
    side, across = math.ceil(math.sqrt(k)), min(M, 4)
    flat = (M * k, *pictures.shape[2:])
    pair = (
        _tiles(patches.reshape(flat) / np.float32(255), PATCH),
        _bright_tiles(pictures.reshape(flat), PATCH, (1, 2, 3)),
    )
    cells = [[_mosaic(half[m * k : (m + 1) * k], side) for half in pair] for m in range(M)]
    height, width = cells[0][0].shape[:2]
    cell, gap, head = max((2 * width + 8) / DPI, 0.6), 0.15, SMALL * LINE + 0.05
    total = max(across * (cell + gap) - gap + 2 * MARGIN, 4.0)
    caption = drawing.wrapped(plain(title), total - 2 * MARGIN, TITLE, lines=3)
    top, down = MARGIN + drawing.height_of(caption, TITLE), math.ceil(M / across)
    figure = NotebookFigure(figsize=(total, top + down * (height / DPI + head + 0.04) + MARGIN), dpi=DPI)
    drawing.add_text(figure, MARGIN, MARGIN, caption, size=TITLE)
    axes = np.empty(M, dtype=object)
    for m, halves in enumerate(cells):
        left, above = MARGIN + m % across * (cell + gap), top + m // across * (height / DPI + head + 0.04) + head
        picture = np.concatenate((halves[0], np.ones((height, 8, 3)), halves[1]), axis=1)
        axes[m] = ax = _show(figure, picture, left, above, 1 / DPI)
        ax.set_title(f"map {maps[m]}", fontsize=SMALL, pad=2)
    return figure, axes


def _show(figure: Figure, picture: np.ndarray, left: float, top: float, scale: float) -> Axes:
    """A picture [h, w, 3] in 0..1 without frame, each of its pixels `scale` inches."""
    height, width = picture.shape[:2]
    ax = drawing.add_panel(figure, left, top, width * scale, height * scale, xticks=[], yticks=[], frame_on=False)
    ax.tick_params(length=0)
    ax.imshow(picture, interpolation="nearest", aspect="auto")
    return ax


def _inputs(images: Any, count: int) -> list[np.ndarray | None]:
    """For each grid the picture [H, W, 3] in 0..1 at its left, or None."""
    if images is None:
        return [None] * count
    shared = hasattr(images, "ndim") and images.ndim == 3
    given = [images] if shared else listed("images", images, what="images")
    if not shared and len(given) != count:
        raise InputError(f"images must be one, or one for each of the {count} grids, got {len(given)}")
    found: list[np.ndarray | None] = []
    for image in given:
        pixels = to_tensor(image).cpu().numpy()
        if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
            raise InputError(f"an image must be [C, H, W] with C = 1 or 3, got {list(pixels.shape)}")
        pixels = pixels / 255 if pixels.dtype == np.uint8 else np.clip(pixels, 0, 1)
        found.append(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0))
    return found + [None] * (count - len(found))


def _check_pictures(name: str, pictures: Any, *shape: None) -> np.ndarray:
    """Pictures float32 [..., C, H, W]."""
    found = as_floats(name, pictures, *shape, None, None, None, dtype=torch.float32)
    if not found.size or found.shape[-3] not in (1, 3):
        raise InputError(f"{name} must be pictures [C, H, W] with C = 1 or 3, got {list(found.shape)}")
    return found


def _bright_tiles(pictures: np.ndarray, side: int, axes: tuple[int, ...]) -> np.ndarray:
    """Values [M, C, H, W] as RGB tiles [M, side, side, 3], 0.5 for 0, the largest over `axes` at full contrast."""
    largest = np.maximum(pictures.max(axis=axes, keepdims=True), -pictures.min(axis=axes, keepdims=True))
    tiles = _tiles(pictures, side)  # first, which leaves fewer values
    return 0.5 + 0.5 * tiles / np.where(largest > 0, largest, 1)


def _tiles(pictures: np.ndarray, side: int) -> np.ndarray:
    """Pictures [M, C, H, W] as RGB tiles [M, side, side, 3]."""
    resized = functional.interpolate(torch.from_numpy(pictures), (side, side), mode="bilinear", antialias=True)
    return resized.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def _mosaic(tiles: np.ndarray, columns: int) -> np.ndarray:
    """Tiles [M, side, side, 3], whose rounding is cut to 0..1, in rows, a white line between."""
    side, rows = tiles.shape[1], math.ceil(len(tiles) / columns)
    canvas = np.ones((rows * columns, side + 1, side + 1, 3), dtype=np.float32)
    canvas[: len(tiles), :side, :side] = tiles.clip(0, 1)
    return canvas.reshape(rows, columns, side + 1, side + 1, 3).swapaxes(1, 2).reshape(rows * (side + 1), -1, 3)


def plot_images(images: Sequence[Any], titles: Sequence[Sequence[str]], title: str) -> tuple[Figure, np.ndarray]:
    """Images side by side, six a row, with lines of text above each.

    Parameters
    ----------
    images : sequence of array
        uint8 [C, H, W], C = 1 or 3.
    titles : sequence of sequence of str
        Lines of each image.
    title : str
        Of all.

    Returns
    -------
    Figure
    array of Axes
        [len(images)].

    Examples
    --------
    >>> figure, axes = plot_images([np.zeros((1, 4, 4), np.uint8)] * 8, [["cat", "0.2"]] * 8, "hits")
    >>> len(axes)
    8
    """
    across = min(6, len(images))
    down, side, gap = math.ceil(len(images) / across), 1.0, 0.14
    head = max(map(len, titles)) * SMALL * LINE + 0.06
    top = MARGIN + TEXT * LINE + 0.08
    width = max(2 * MARGIN + across * side + (across - 1) * gap, 3.0)
    figure = NotebookFigure(figsize=(width, top + down * (side + head + 0.06) + MARGIN))
    drawing.add_text(figure, MARGIN, MARGIN, drawing.shortened(drawing.plain(title), width - 2 * MARGIN, TEXT))
    axes = np.empty(len(images), dtype=object)
    for number, (image, lines) in enumerate(zip(images, titles, strict=True)):
        left, above = MARGIN + number % across * (side + gap), top + number // across * (side + head + 0.06)
        shown = [drawing.shortened(drawing.plain(line), side + gap / 2, SMALL) for line in lines]
        drawing.add_text(figure, left, above, "\n".join(shown), size=SMALL)
        ax = axes[number] = drawing.add_panel(figure, left, above + head, side, side)
        pixels = np.asarray(image).transpose(1, 2, 0)
        ax.imshow(pixels if pixels.shape[2] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=255)
        ax.set_axis_off()
    return figure, axes
