"""Maps of layers as panels of points, coloured by class."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle

from qdv_gpu.arrays import as_floats, to_tensor
from qdv_gpu.errors import InputError, listed
from qdv_gpu.report import drawing
from qdv_gpu.report.drawing import (
    COLOURS,
    GRAY,
    LINE,
    MARGIN,
    PAGE,
    PALE,
    TEXT,
    TITLE,
    NotebookFigure,
    plain,
    shortened,
)

ACROSS = 5  # panels in a row of maps
NAMED = 20  # classes that have a colour and a marker of their own
POINTS = ("o", "x")  # markers of the first and of the second ten classes


def plot_maps(
    maps: Sequence[np.ndarray],
    labels: Any = None,
    classes: Sequence[str] | None = None,
    *,
    titles: Sequence[str] | None = None,
    subtitles: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    difficulty: Any = None,
) -> tuple[Figure, np.ndarray]:
    """One panel for each map, its points coloured by class.

    Up to 20 classes have a colour and a marker each. Of more, the 20 most difficult do (the most numerous, if
    `difficulty` is not given), and the others are gray.

    Parameters
    ----------
    maps : sequence of array
        float [N, 2] each, finite.
    labels : array, optional
        Integers [N] from 0; without them all points have one colour.
    classes : sequence of str, optional
        Names of the C classes; default their numbers.
    titles, subtitles : sequence of str, optional
        One for each map, as a layer's name and a score.
    groups : sequence of str, optional
        For each map what it belongs to, as a network's name: each group begins a row of at most 5 panels, and its
        name stands above.
    difficulty : array, optional
        float [C], higher is harder; NaN is easiest.

    Returns
    -------
    Figure
    array of Axes
        [len(maps)], in the order of `maps`.

    Raises
    ------
    InputError
        If there is no map, one is not [N, 2] or not finite, a label has no class, or there is not one title,
        subtitle or group for each map.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> maps, labels = rng.normal(size=(2, 60, 2)), np.arange(60) % 3
    >>> figure, axes = plot_maps(maps, labels, ["cat", "dog", "owl"], titles=["relu1", "relu2"])
    >>> len(axes), [text.get_text() for text in figure.legends[0].get_texts()]
    (2, ['cat', 'dog', 'owl'])
    """
    maps = [as_floats("maps", Z, None, 2) for Z in listed("maps", maps, what="arrays")]
    titles, subtitles, groups = (
        _check_texts(name, given, len(maps))
        for name, given in (("titles", titles), ("subtitles", subtitles), ("groups", groups))
    )
    _check_maps(maps)
    styles, heading = None, None
    handles: list[Line2D] = []
    entries: list[str] = []
    if labels is not None:
        labels, names = _check_labels(labels, classes, len(maps[0]))
        difficulty = None if difficulty is None else as_floats("difficulty", difficulty, len(names))
        shown, heading = _named(labels, len(names), difficulty)
        styles = np.full(len(names), -1)  # [C], the number of each class's colour and marker, -1 for gray
        styles[shown] = np.arange(len(shown))
        handles = [_point(style) for style in range(len(shown))]
        entries = [names[int(c)] for c in shown]
        if others := len(names) - len(shown):
            handles.append(_point(-1))
            entries.append(f"{others} other class{'es' if others > 1 else ''}")
    rows = _rows([""] * len(maps) if groups is None else groups)
    across = max(len(row) for _, row in rows)
    gap = 0.08
    side = min((PAGE - 2 * MARGIN + gap) / across - gap, 2.2)  # inches of a panel
    width = drawing.width_for(across * (side + gap) - gap + 2 * MARGIN, entries)
    longest = max(drawing.text_width(plain(group), TITLE, weight="bold") for group, _ in rows if group is not None)
    width = max(width, min(longest + 2 * MARGIN, PAGE))
    left = (width - across * (side + gap) + gap) / 2
    figure = NotebookFigure(figsize=(width, 1))
    bottom = drawing.add_legend(figure, handles, entries, title=heading)

    # From the top down: where each row and each text begins, in inches; then the figure has its height.
    above = _texts_above(titles or [""] * len(maps), subtitles, side)
    top, tops = MARGIN, []
    headings: list[tuple[float, str]] = []
    for group, row in rows:
        if group is not None and groups is not None:
            top += 0.1 if headings else 0
            headings.append((top, group))
            top += TITLE * LINE + 0.03
        top += max(drawing.height_of(above[i], TEXT) if above[i] else 0 for i in row) + 0.03
        tops.append(top)
        top += side + gap
    figure.set_size_inches(width, top + max(bottom - gap, 0) + (0 if bottom else MARGIN - gap))
    for place, group in headings:
        text = shortened(plain(group), width - 2 * MARGIN, TITLE, weight="bold")
        start = min(left, width - MARGIN - drawing.text_width(text, TITLE, weight="bold"))
        drawing.add_text(figure, start, place, text, size=TITLE, weight="bold")
    axes = np.empty(len(maps), dtype=object)
    for (_, row), place in zip(rows, tops, strict=True):
        for column, i in enumerate(row):
            axes[i] = ax = drawing.add_panel(
                figure, left + column * (side + gap), place, side, side, xticks=[], yticks=[]
            )
            _draw_map(ax, maps[i], None if styles is None else styles[labels])
            if above[i]:
                ax.set_title(above[i], fontsize=TEXT, pad=3, parse_math=False, linespacing=1.15)
    return figure, axes


def _texts_above(titles: Sequence[str], subtitles: Sequence[str] | None, width: float) -> list[str]:
    """What stands above each map: its title in at most three lines, and its subtitle below that in one."""
    shown = [drawing.wrapped(plain(title), width, TEXT, lines=3) for title in titles]
    if subtitles is None:
        return shown
    return [
        f"{title}\n{shortened(plain(subtitle), width, TEXT)}".lstrip("\n")
        for title, subtitle in zip(shown, subtitles, strict=True)
    ]


def _check_texts(name: str, given: Any, count: int) -> list[str] | None:
    """A text for each map, if there are any."""
    if given is None:
        return None
    texts = listed(name, given, str, "texts")
    if len(texts) != count:
        raise InputError(f"{name} must be one for each of the {count} maps, got {len(texts)}")
    return texts


def _check_maps(maps: Sequence[np.ndarray]) -> None:
    if not maps:
        raise InputError("at least one map is required")
    for Z in maps:
        if Z.ndim != 2 or Z.shape[1] != 2 or Z.shape != maps[0].shape or not len(Z):
            raise InputError(f"maps must all be [N, 2] with the same N of at least 1, got {list(Z.shape)}")
        if not np.isfinite(Z).all():
            raise InputError("maps must be finite, got NaN or infinity")


def _check_labels(labels: Any, classes: Sequence[str] | None, N: int) -> tuple[np.ndarray, Sequence[str]]:
    labels = to_tensor(labels).cpu().numpy()
    if labels.shape != (N,) or labels.dtype.kind not in "iu":
        raise InputError(f"labels must be integers of shape [{N}], got {labels.dtype} of shape {list(labels.shape)}")
    names = (
        [str(c) for c in range(int(labels.max()) + 1)] if classes is None else listed("classes", classes, str, "names")
    )
    if labels.min() < 0 or labels.max() >= len(names):
        raise InputError(f"labels must be within 0 and {len(names) - 1}, got {labels.min()} to {labels.max()}")
    return labels, names


def _named(labels: np.ndarray, classes: int, difficulty: np.ndarray | None) -> tuple[np.ndarray, str | None]:
    """The classes that have a colour, and which they are in words, unless they are all."""
    if classes <= NAMED:
        return np.arange(classes), None
    counts = np.bincount(labels, minlength=classes)
    rank = counts if difficulty is None else np.nan_to_num(difficulty, nan=-np.inf)
    which = "most numerous" if difficulty is None else "most difficult"
    return np.argsort(-rank, kind="stable")[:NAMED], f"{NAMED} {which} of {classes} classes"


def _rows(groups: Sequence[str]) -> list[tuple[str | None, list[int]]]:
    """Numbers of the maps in each row, and the group that begins there; the rows of a group are equally full."""
    rows: list[tuple[str | None, list[int]]] = []
    for group in dict.fromkeys(groups):
        own = [i for i, name in enumerate(groups) if name == group]
        lines = -(-len(own) // ACROSS)
        fill = -(-len(own) // lines)
        rows += [(group if start == 0 else None, own[start : start + fill]) for start in range(0, len(own), fill)]
    return rows


def _draw_map(ax: Axes, Z: np.ndarray, styles: np.ndarray | None) -> None:
    """Points Z [N, 2] in a fixed random order, so that no class lies on top; those of style -1 below all others."""
    order = np.random.default_rng(0).permutation(len(Z))
    area = float(np.clip(2500 / len(Z), 0.7, 9))  # of a point, in square points
    if styles is None:
        ax.scatter(Z[order, 0], Z[order, 1], s=area, color=COLOURS[0], linewidths=0, rasterized=True)
    else:
        order = order[np.argsort(styles[order] >= 0, kind="stable")]
        own = styles[order]
        colours = np.array([*COLOURS, PALE])[np.where(own < 0, len(COLOURS), own % len(COLOURS))]
        points = ax.scatter(Z[order, 0], Z[order, 1], s=area, c=colours, rasterized=True)
        second = own >= len(COLOURS)
        if second.any():  # a path for each point: classes of both markers in one order
            shapes = [MarkerStyle(marker) for marker in POINTS]
            paths = [shape.get_path().transformed(shape.get_transform()) for shape in shapes]
            points.set_paths([paths[number] for number in second.astype(int)])
            points.set_sizes(np.where(second, 3 * area, 1.3 * area).tolist())  # crosses must be seen to be such
        points.set_linewidth(np.where(second, 0.3 * area**0.5, 0).tolist())
    middle, half = (Z.max(0) + Z.min(0)) / 2, max(float(np.ptp(Z, axis=0).max()) * 0.53, 1e-6)
    ax.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half))
    ax.spines[:].set_color(GRAY)


def _point(style: int) -> Line2D:
    """Mark of a class in the legend."""
    colour = PALE if style < 0 else COLOURS[style % len(COLOURS)]
    marker = POINTS[max(style, 0) // len(COLOURS)]
    width = 0 if marker == "o" else 1.2
    return Line2D([], [], linestyle="", marker=marker, markersize=4.5, markeredgewidth=width, color=colour)
