"""Figures of a ranking: the order of the candidates, and what each gains over a baseline at each layer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from qdv_gpu.errors import InputError
from qdv_gpu.report import drawing
from qdv_gpu.report.drawing import COLOURS, GRAY, LINE, MARGIN, PAGE, SMALL, TEXT, NotebookFigure, plain
from qdv_gpu.results.ranking import Ranking

BEST, OTHER = COLOURS[0], "#aaaaaa"
ROW = 1.25 * SMALL * LINE  # inches of a candidate's row
NAMES = drawing.text_width("n" * 40, SMALL)  # inches of a name at most


def ranking_figure(found: Ranking) -> Figure:
    """The candidates by NH, with intervals and ranks; see `plot_ranking`."""
    ranks = found.top.in_maps
    return plot_ranking(
        ranks.nh, ranks.low, ranks.high, ranks.ranks, ranks.can_be_best, names=[one.name for one in found.candidates],
        baseline=found.baseline, layer=found.top.name, k=found.k,
    )[0]  # fmt: skip


def gains_figure(found: Ranking) -> Figure:
    """NH less the baseline's at each layer, the highest candidate first; see `plot_gains`.

    Raises
    ------
    InputError
        If there is no baseline, or nothing beside it.
    """
    if found.baseline is None or len(found.candidates) < 2:
        raise InputError("gains need a baseline and another candidate")
    rows = [i for i in found.order if i != found.baseline]
    gains = [layer.gains for layer in found.layers if layer.gains is not None]
    return plot_gains(
        np.array([layer.delta[rows] for layer in gains]).T,
        np.array([[layer.verdicts[i] in ("ahead", "behind") for layer in gains] for i in rows]),
        names=[found.candidates[i].name for i in rows],
        layers=[layer.name for layer in found.layers],
        baseline=found.candidates[found.baseline].name,
    )[0]


def plot_ranking(
    nh: Any,
    low: Any,
    high: Any,
    ranks: Any,
    can_be_best: Any,
    *,
    names: Sequence[str],
    baseline: int | None = None,
    layer: str = "",
    k: int = 5,
) -> tuple[Figure, Axes]:
    """Candidates below each other, the highest NH first, with 95 % intervals and at the right the ranks of each.

    Parameters
    ----------
    nh, low, high : array
        float [V]; low and high may be NaN.
    ranks : array
        int [V, 2].
    can_be_best : array
        bool [V].
    names : sequence of str
    baseline : int, optional
        Position of the candidate that is marked so.
    layer : str
        What the axis names.

    Returns
    -------
    Figure
    Axes

    Examples
    --------
    >>> figure, ax = plot_ranking([0.4, 0.6], [0.3, 0.5], [0.5, 0.7], [[1, 2], [1, 2]], [False, True], names=["a", "b"])
    >>> [text.get_text() for text in ax.get_yticklabels()]
    ['b', 'a']
    """
    values, ends = np.asarray(nh, np.float64), np.asarray([low, high], np.float64)
    best = np.asarray(can_be_best, dtype=bool)
    order = np.argsort(-values, kind="stable")
    V = len(values)
    shown = drawing.shortened_apart([plain(names[i]) for i in order], NAMES, SMALL)
    spans = [span(ranks[i]) for i in order]
    left = max(drawing.text_width(name, SMALL) for name in shown) + MARGIN + 0.1
    right = max(drawing.text_width(text, SMALL) for text in ["ranks", *spans]) + MARGIN + 0.1
    width, above, tall = PAGE, MARGIN + SMALL * LINE + 0.04, max(ROW * V, 0.4)
    figure = NotebookFigure(figsize=(width, 1))
    bottom = legend_of_kinds(figure, best, baseline, interval=not np.isnan(ends).all())
    figure.set_size_inches(width, above + tall + 0.42 + max(bottom, MARGIN))
    ax = drawing.add_panel(figure, left, above, width - left - right, tall, ylim=(V - 0.4, -0.6))
    drawing.plain_axes(ax)
    ax.grid(axis="x", color="0.9", linewidth=0.5)
    ax.set_axisbelow(True)
    for row, i in enumerate(order):
        colour = BEST if best[i] else OTHER
        ax.plot(np.clip(ends[:, i], 0, 1), [row, row], color=colour, linewidth=1)
        point(ax, values[i], row, colour, baseline=i == baseline)
        place: dict[str, Any] = {"xy": (1, row), "xycoords": ax.get_yaxis_transform(), "textcoords": "offset points"}
        ax.annotate(spans[row], xytext=(6, 0), va="center", fontsize=SMALL, annotation_clip=False, **place)
    if baseline is not None:
        ax.axvline(values[baseline], color=GRAY, linewidth=0.7, linestyle="--", zorder=0)
    ax.set_yticks(range(V), shown, fontsize=SMALL, parse_math=False)
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    drawing.add_text(figure, width - right + 6 / 72, MARGIN, "ranks", size=SMALL, color=GRAY)
    ax.set_xlabel(nh_label(layer, k, width - left - right), fontsize=TEXT, parse_math=False)
    return figure, ax


def plot_gains(
    delta: Any, sure: Any, *, names: Sequence[str], layers: Sequence[str], baseline: str = "the baseline"
) -> tuple[Figure, Axes]:
    """NH of candidates less the baseline's, one column for each layer; bold, or with a dot, where that is sure.

    Parameters
    ----------
    delta : array
        float [V, L].
    sure : array
        bool [V, L].
    names, layers : sequence of str
        Of the V candidates, without the baseline, and of the L layers.
    baseline : str
        Its name.

    Returns
    -------
    Figure
    Axes

    Examples
    --------
    >>> figure, ax = plot_gains([[0.1, 0.2]], [[False, True]], names=["wide"], layers=["x", "y"])
    >>> [(text.get_text(), text.get_weight()) for text in ax.texts]
    [('+0.100', 'normal'), ('+0.200', 'bold')]
    """
    values, known = np.asarray(delta, np.float64), np.asarray(sure, dtype=bool)
    V, L = values.shape
    shown = drawing.shortened_apart([plain(name) for name in names], NAMES, SMALL)
    cell = drawing.text_width("−0.000", SMALL - 1, weight="bold") + 0.08
    least = max(drawing.text_width(name, SMALL) for name in shown) + MARGIN + 0.1
    across = min((PAGE - least - MARGIN), 0.75 * L)
    left, below = drawing.room_for_names(layers, least + across, least)
    width = max(left + across + MARGIN, 4.0)
    written = across / L >= cell
    title = f"NH less that of {drawing.shortened(plain(baseline), 1.6, SMALL)}; "
    title += f"{'bold' if written else 'a dot'} where the sign is sure, for all candidates and layers at once"
    title = drawing.wrapped(title, width - 2 * MARGIN, SMALL, lines=3)
    above, tall = MARGIN + drawing.height_of(title, SMALL) + 0.08, ROW * V
    figure = NotebookFigure(figsize=(width, above + tall + below + MARGIN))
    drawing.add_text(figure, MARGIN, MARGIN, title, size=SMALL)
    ax = drawing.add_panel(figure, left, above, across, tall)
    largest = max(float(np.abs(values).max()), 1e-9)
    ax.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest")
    for row, column in np.ndindex(V, L):
        colour = "white" if abs(values[row, column]) > 0.6 * largest else "black"
        style: dict[str, Any] = {"ha": "center", "va": "center_baseline", "color": colour}
        if written:
            weight = "bold" if known[row, column] else "normal"
            ax.text(
                column, row, f"{values[row, column]:+.3f}".replace("-", "−"), fontsize=SMALL - 1, weight=weight, **style
            )
        elif known[row, column]:
            ax.plot(column, row, ".", color=colour, markersize=3)
    ax.set_yticks(range(V), shown, fontsize=SMALL, parse_math=False)
    ax.tick_params(length=0)
    drawing.name_ticks(ax, range(L), layers, across / L)
    return figure, ax


def span(ranks: Any) -> str:
    """Ranks from the least to the largest.

    >>> span([1, 4]), span([2, 2])
    ('1–4', '2')
    """
    low, high = (int(rank) for rank in ranks)
    return str(low) if low == high else f"{low}–{high}"


def point(ax: Axes, x: float, y: float, colour: str, *, marker: str = "o", baseline: bool = False) -> None:
    """Draw a candidate, with a ring around the baseline."""
    ax.plot(x, y, marker=marker, color=colour, markersize=4, markeredgewidth=0, linestyle="", zorder=2)
    if baseline:
        around = ring()
        around.set_data([x], [y])
        ax.add_line(around)


def ring() -> Line2D:
    """What is drawn around the baseline."""
    return Line2D([], [], marker="o", markersize=8, markerfacecolor="none", markeredgecolor="black",
                  markeredgewidth=0.8, linestyle="", zorder=3)  # fmt: skip


def legend_of_kinds(figure: Figure, best: np.ndarray, baseline: int | None, *, interval: bool) -> float:
    """Legend of the kinds of points that there are; its height."""
    style: dict[str, Any] = {"marker": "o", "markersize": 4, "linestyle": "", "markeredgewidth": 0}
    handles, entries = [], []
    for colour, entry, there in ((BEST, "can still be best", best.any()), (OTHER, "surely not best", not best.all())):
        if there:
            handles.append(Line2D([], [], color=colour, **style))
            entries.append(entry)
    if baseline is not None:
        handles.append(ring())
        entries.append("baseline")
    if interval:
        handles.append(Line2D([], [], color=GRAY, linewidth=1))
        entries.append("95 % interval of each by itself")
    return drawing.add_legend(figure, handles, entries)


def nh_label(layer: str, k: int, room: float) -> str:
    """What an axis `room` inches long says of NH."""
    if not layer:
        return f"neighborhood hit (k = {k})"
    room -= drawing.text_width(f"NH at  (k = {k})", TEXT)
    return f"NH at {drawing.shortened(plain(layer), room, TEXT)} (k = {k})"
