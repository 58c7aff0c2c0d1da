"""What all figures share: colours, text as it is, text that fits, panels placed in inches, legends below them."""

import io
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.textpath import text_to_path

SMALL, TEXT, TITLE = 7, 8, 9  # font sizes in points
LINE = 1.2 / 72  # inches of a line of text for each point of its size
MARGIN = 0.08  # inches around a figure
PAGE = 7.0  # inches: the width of a page's text

# Ten colours at least 38 apart in CIE Lab, and at least 27 to readers with deuteranopia or protanopia.
COLOURS = ["#0072b2", "#e69f00", "#cc3311", "#005f56", "#88ccee", "#000000", "#ddcc77", "#661100", "#7fd1ae", "#0f2080"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "p"]  # of curves, beside their colours
GRAY, PALE = "#777777", "#d0d0d0"


class NotebookFigure(Figure):
    """A figure that a notebook shows where it is the last value of a cell, without pyplot.

    >>> NotebookFigure((1, 1))._repr_png_()[1:4]
    b'PNG'
    """

    def _repr_png_(self) -> bytes:
        contents = io.BytesIO()
        self.savefig(contents, format="png")
        return contents.getvalue()


def plain(text: Any) -> str:
    r"""Text as it can be drawn, in one line: what has no picture is shown as an escape.

    Those are control and formatting characters, bytes of a file name that are not UTF-8, and characters that no font
    in use has, which would otherwise all be the same empty box. Draw the result with `parse_math=False`.

    Parameters
    ----------
    text : str or anything that has a `str`

    Returns
    -------
    str

    Examples
    --------
    >>> print(plain("a$b_1$\n"), plain(b"caf\xe9".decode(errors="surrogateescape")), plain(5))
    a$b_1$\n caf\xe9 5
    """
    drawable = _drawable(tuple(rcParams["font.family"]))
    return "".join(letter if _shown(letter, drawable) else _escape(letter) for letter in str(text))


def text_width(text: str, size: float, *, weight: str = "normal") -> float:
    """Width in inches of a line of plain text at `size` points, with a little to spare for hinting.

    >>> 0.2 < text_width("conv3", 8) < 0.5 < text_width("a longer name", 8)
    True
    """
    if not text:
        return 0.0
    width, _, _ = text_to_path.get_text_width_height_descent(
        text, FontProperties(size=size, weight=weight), ismath=False
    )
    return 1.04 * width / 72


def shortened(text: str, width: float, size: float, *, weight: str = "normal") -> str:
    """Plain text that is at most `width` inches wide at `size` points: what is too much in its middle becomes "…".

    >>> shortened("features.denseblock1.denselayer12.conv2", 1.2, 8)
    'features.…12.conv2'
    >>> shortened("conv2", 1.2, 8)
    'conv2'
    """
    if text_width(text, size, weight=weight) <= width:
        return text
    low, high = 0, len(text) - 1  # characters that are kept
    while low < high:
        kept = (low + high + 1) // 2
        low, high = (kept, high) if text_width(_ends(text, kept), size, weight=weight) <= width else (low, kept - 1)
    return _ends(text, low)


def wrapped(text: str, width: float, size: float, *, lines: int) -> str:
    r"""Plain text in at most that many lines, each at most `width` inches wide at `size` points.

    A line ends after a space or a mark such as "." or "_" where there is one in its second half. What is too much
    for the last line is left out of its middle.

    >>> wrapped("features.denseblock1.denselayer12.conv2", 1.6, 8, lines=2)
    'features.denseblock1.\ndenselayer12.conv2'
    """
    found: list[str] = []
    while text_width(text, size) > width and len(found) < lines - 1:
        fits = max(1, next(n for n in range(1, len(text) + 1) if text_width(text[:n], size) > width) - 1)
        breaks = [n for n in range(fits // 2, fits + 1) if n and text[n - 1] in " ._-/:,"]
        end = breaks[-1] if breaks else fits
        found.append(text[:end].rstrip())
        text = text[end:].lstrip()
    return "\n".join([*found, shortened(text, width, size)])


def shortened_apart(texts: Sequence[str], width: float, size: float) -> list[str]:
    """Plain texts `shortened`; of those that would then be the same, what they all begin with is left out first.

    >>> shortened_apart(["features.denseblock1.conv", "features.denseblock2.conv", "fc"], 0.7, 8)
    ['…1.conv', '…2.conv', 'fc']
    """
    short = [shortened(text, width, size) for text in texts]
    for _ in range(3):  # some of those may be the same again
        for form in set(short):
            same = {text for text, own in zip(texts, short, strict=True) if own == form}
            if len(same) > 1:
                # Up to the first place at which they differ.
                start = next((i for i, letters in enumerate(zip(*same, strict=False)) if len(set(letters)) > 1), 0)
                apart = {text: shortened(f"…{text[start:]}", width, size) for text in same}
                short = [apart.get(text, own) for text, own in zip(texts, short, strict=True)]
    return short


def height_of(text: str, size: float) -> float:
    r"""Height in inches of the lines of a text at `size` points.

    >>> height_of("one\ntwo", 8) == 2 * height_of("one", 8)
    True
    """
    return (text.count("\n") + 1) * size * LINE


def add_panel(figure: Figure, left: float, top: float, width: float, height: float, **options: Any) -> Axes:
    """Axes at inches from the figure's upper left corner, once the figure has its size.

    >>> add_panel(Figure(figsize=(4, 2)), 1, 0.5, 2, 1).get_position()
    Bbox([[0.25, 0.25], [0.75, 0.75]])
    """
    across, down = figure.get_size_inches()
    ax = figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down), **options)
    ax.tick_params(labelsize=SMALL, width=0.6, length=2.5)
    for spine in ax.spines.values():
        spine.set_linewidth(0.6)
    return ax


def add_text(figure: Figure, left: float, top: float, text: str, *, size: float = TEXT, **options: Any) -> None:
    """Plain text with its upper left corner at inches from that of the figure."""
    across, down = figure.get_size_inches()
    style: dict[str, Any] = {"ha": "left", "va": "top", "parse_math": False, "linespacing": 1.15, **options}
    figure.text(left / across, 1 - top / down, text, fontsize=size, **style)


def curve_mark(number: int) -> Line2D:
    """The line of a curve by its number, in its own colour and marker, as a legend shows it."""
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    return Line2D([], [], color=colour, marker=marker, markersize=3.5, linewidth=1.1, markeredgewidth=0)


def draw_curve(ax: Axes, x: np.ndarray, y: np.ndarray, bars: np.ndarray, number: int) -> None:
    """Draw a curve by its number with error bars, lengths [L] or lower and upper [2, L]; none if all are 0."""
    style = curve_mark(number)
    ax.errorbar(
        x, y, bars if bars.any() else None, color=style.get_color(), marker=style.get_marker(), markersize=3.5,
        linewidth=1.1, markeredgewidth=0, elinewidth=0.8, capsize=0,
    )  # fmt: skip


def plain_axes(ax: Axes) -> None:
    """No line at the right and above."""
    ax.spines[["right", "top"]].set_visible(False)


def width_for(width: float, entries: Sequence[str]) -> float:
    """Width in inches of a figure: `width`, or what its widest legend entry needs, but no more of that than a page.

    >>> width_for(3.0, ["cat", "dog"]), width_for(3.0, ["w" * 500])
    (3.0, 7.0)
    """
    widest = max((text_width(plain(entry), SMALL) for entry in entries), default=0)
    return max(width, min(widest + _HANDLE + 2 * MARGIN, PAGE))


def add_legend(figure: Figure, handles: Sequence[Any], entries: Sequence[str], *, title: str | None = None) -> float:
    """Put a legend at the lower edge of a figure, in as many columns as fit its width, and return its height.

    Parameters
    ----------
    figure : Figure
        As wide as it will be; its height may change afterwards.
    handles : sequence of Artist
    entries : sequence of str
        Drawn as they are; one wider than the figure is shortened in its middle.
    title : str, optional

    Returns
    -------
    float
        Inches from the lower edge of the figure to what may be drawn above the legend, with a margin; 0 if there are
        no entries.
    """
    if not handles:
        return 0.0
    room = figure.get_figwidth() - 2 * MARGIN
    texts = shortened_apart([plain(entry) for entry in entries], room - _HANDLE, SMALL)
    widths = np.array([text_width(text, SMALL) + _HANDLE for text in texts])
    columns = next(n for n in range(len(texts), 0, -1) if n == 1 or _across(widths, n) <= room)
    columns = -(-len(texts) // -(-len(texts) // columns))  # no fuller rows than as many rows need
    options = {"handlelength": 1.6, "handletextpad": 0.6, "columnspacing": 1.6, "borderpad": 0, "labelspacing": 0.35}
    legend = figure.legend(
        handles, ["entry"] * len(texts), loc="lower center", bbox_to_anchor=(0.5, 0), ncols=columns, frameon=False,
        fontsize=SMALL, borderaxespad=MARGIN * 72 / SMALL, title=title, title_fontsize=SMALL, **options,
    )  # fmt: skip
    for drawn, text in zip(legend.get_texts(), texts, strict=True):
        drawn.set(text=text, parse_math=False)
    return legend.get_window_extent().height / figure.dpi + 2.5 * MARGIN


def slant(names: Sequence[str], spacing: float) -> tuple[list[str], int, float, float]:
    """How names are written below an x axis: level where the full names fit, else slanted, long ones shortened.

    Where even slanted names would touch, every second, third, ... is named.

    Parameters
    ----------
    names : sequence of str
        Drawn as they are.
    spacing : float
        Inches between two of them.

    Returns
    -------
    texts : list of str
        What is written.
    step : int
        One of so many positions is named; 0 if the names are level.
    below, before : float
        Inches that the names take below the axis, and to the left of the first position.

    Examples
    --------
    >>> slant(["conv1", "conv2"], 1.0)[:2], slant(["conv1", "conv2"], 0.1)[:2]
    ((['conv1', 'conv2'], 0), (['conv1'], 2))
    """
    texts = [plain(name) for name in names]
    if max(text_width(text, SMALL) for text in texts) + 0.06 <= spacing:
        return texts, 0, SMALL * LINE + 0.07, text_width(texts[0], SMALL) / 2
    step = int(np.ceil(SMALL * LINE / (spacing * SLOPE)))
    texts = shortened_apart(texts[::step], _TICK, SMALL)
    slanted = [SLOPE * (text_width(text, SMALL) + SMALL * LINE) for text in texts]
    # The later names reach less far to the left of the first position, since they start further to the right.
    before = max(length - place * step * spacing for place, length in enumerate(slanted))
    return texts, step, max(slanted) + 0.07, before


def room_for_names(names: Sequence[str], right: float, least: float) -> tuple[float, float]:
    """Where a panel that ends `right` inches from the figure's left edge begins, and what its names take below it.

    >>> room_for_names(["conv1", "conv2"], 3.0, 0.5)[0], room_for_names(["w" * 99] * 9, 3.0, 0.5)[0] > 0.5
    (0.5, True)
    """
    left = least
    for _ in range(4):  # a panel that begins later has less room for each name
        spacing = (right - left) / len(names)
        _, _, below, before = slant(names, spacing)
        left = max(left, before - spacing / 2 + MARGIN)
    return left, below


def name_ticks(ax: Axes, positions: Sequence[float], names: Sequence[str], spacing: float) -> None:
    """Write names `spacing` inches apart below an x axis, as `slant` says."""
    texts, step, _, _ = slant(names, spacing)
    slanted: dict[str, Any] = {"rotation": 45, "ha": "right", "va": "top", "rotation_mode": "anchor"}
    ax.set_xticks(positions[:: step or 1], texts, fontsize=SMALL, parse_math=False, **(slanted if step else {}))


def add_x_label(ax: Axes, bottom: float, text: str) -> None:
    """Text in the middle below a panel, `bottom` inches from the figure's lower edge."""
    figure, box = ax.get_figure(root=True), ax.get_position()
    assert figure is not None
    place = bottom / figure.get_figheight()
    figure.text((box.x0 + box.x1) / 2, place, text, fontsize=TEXT, ha="center", va="bottom", parse_math=False)


SLOPE = 0.5**0.5  # sine of the angle at which names are slanted
_HANDLE = (1.6 + 0.6) * SMALL / 72  # inches of a legend's mark and the gap behind it
_TICK = text_width("n" * 22, SMALL)  # inches, about 24 letters


def _across(widths: np.ndarray, columns: int) -> float:
    """Width in inches of a legend, whose columns are filled one after the other."""
    parts = np.array_split(widths, columns)
    return sum(float(part.max()) for part in parts) + 1.6 * SMALL / 72 * (columns - 1)


def _ends(text: str, kept: int) -> str:
    return text[: (kept + 1) // 2] + "…" + text[len(text) - kept // 2 :]


@lru_cache
def _drawable(families: tuple[str, ...]) -> frozenset[int]:
    """Code points that the fonts of these families have."""
    fonts = [get_font(findfont(FontProperties(family=[family]))) for family in families]
    return frozenset(code for font in fonts for code in font.get_charmap())


def _shown(letter: str, drawable: frozenset[int]) -> bool:
    return ord(letter) in drawable and (letter == " " or unicodedata.category(letter)[0] not in "CZ")


def _escape(letter: str) -> str:
    if 0xDC80 <= ord(letter) <= 0xDCFF:  # a byte that `surrogateescape` let through
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()
