"""Figures of what a ranking says beside the order: NH against accuracy, and NH against cost."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from qdv_gpu.errors import InputError
from qdv_gpu.report import drawing
from qdv_gpu.report.drawing import COLOURS, GRAY, LINE, MARGIN, PAGE, SMALL, TEXT, NotebookFigure, plain
from qdv_gpu.report.ranking_figures import BEST, OTHER, legend_of_kinds, nh_label, point, ring
from qdv_gpu.results.ranking import Ranking

NAMED = len(COLOURS)  # candidates of a front that are named
MANY_TIMES = 20  # from the least cost to the most, that a logarithm shows better


def relation_figure(found: Ranking) -> Figure:
    """NH against accuracy at the layer that is ranked by, and the correlation at each; see `plot_relation`."""
    related = found.relation
    if related is None:
        raise InputError("the candidates' accuracies are not known")
    return plot_relation(
        related.nh[-1], related.accuracy, found.top.in_maps.can_be_best, baseline=found.baseline,
        r=related.r, low=related.low, high=related.high, p=float(related.p[-1]),
        layers=[layer.name for layer in found.layers], halves=found.halves,
    )[0]  # fmt: skip


def cost_figure(found: Ranking) -> Figure:
    """NH against multiplications and against seconds of training and analysis; see `plot_cost`."""
    ranks = found.top.in_maps
    costs = {
        "GMAC of an image": [one.gmac for one in found.candidates],
        "seconds of training and analysis": [one.seconds for one in found.candidates],
    }
    return plot_cost(
        ranks.nh, costs, low=ranks.low, high=ranks.high, names=[one.name for one in found.candidates],
        baseline=found.baseline, layer=found.top.name, k=found.k,
    )[0]  # fmt: skip


def plot_relation(
    nh: Any,
    accuracy: Any,
    can_be_best: Any,
    *,
    r: Any,
    low: Any,
    high: Any,
    p: float,
    layers: Sequence[str],
    baseline: int | None = None,
    halves: bool = True,
) -> tuple[Figure, np.ndarray]:
    """NH of the candidates against their accuracy, and beside it the correlation at each layer, if there is one.

    Parameters
    ----------
    nh, accuracy : array
        float [V], at the last layer; what is NaN is left out.
    can_be_best : array
        bool [V].
    r, low, high : array
        float [L]: correlation at each layer and its interval; NaN if there is none.
    p : float
        At the last layer.
    layers : sequence of str
    baseline : int, optional
    halves : bool
        Whether NH is of one half of the images and accuracy of the other.

    Returns
    -------
    Figure
    array of Axes
        [1], or [2] with the correlations of several layers.

    Examples
    --------
    >>> nan = [float("nan")]
    >>> figure, axes = plot_relation([0.4, 0.6], [0.7, 0.8], [True, True], r=nan, low=nan, high=nan, p=nan[0],
    ...                              layers=["fc"])
    >>> axes[0].get_xlabel()
    'NH at fc (half of the images)'
    """
    values, right, best = np.asarray(nh, np.float64), np.asarray(accuracy, np.float64), np.asarray(can_be_best, bool)
    r, ends = np.asarray(r, np.float64), np.asarray([low, high], np.float64)
    name, L = plain(layers[-1]), len(layers)
    beside = L > 1 and not np.isnan(r).all()
    figure = NotebookFigure(figsize=(PAGE if beside else 4.2, 1))
    width, tall, left = figure.get_figwidth(), 2.4, 0.65
    bottom = max(legend_of_kinds(figure, best, baseline, interval=False), MARGIN)
    half = 2.8 if beside else width - left - MARGIN
    second = left + half + 0.6
    starts, below = drawing.room_for_names(layers, width - MARGIN, second) if beside else (0.0, 0.0)
    below, above = max(below, 0.42), MARGIN + SMALL * LINE + 0.05
    figure.set_size_inches(width, above + tall + below + bottom)
    axes = np.empty(2 if beside else 1, dtype=object)
    ax = axes[0] = drawing.add_panel(figure, left, above, half, tall)
    drawing.plain_axes(ax)
    for i in range(len(values)):
        point(ax, values[i], right[i], BEST if best[i] else OTHER, baseline=i == baseline)
    ax.set(xlim=_limits(values), ylim=_limits(right))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    of, other = (" (half of the images)", " (the other half)") if halves else ("", "")
    room = half - drawing.text_width(f"NH at {of}", TEXT)
    ax.set_xlabel(f"NH at {drawing.shortened(name, room, TEXT)}{of}", fontsize=TEXT, parse_math=False)
    ax.set_ylabel(f"accuracy{other}", fontsize=TEXT)
    one = r[-1]
    text = f"r = {one:.2f} ({ends[0, -1]:.2f} to {ends[1, -1]:.2f}), p = {p:.2g}"
    drawing.add_text(figure, left, MARGIN, "no coefficient" if np.isnan(one) else text, size=SMALL)
    if beside:
        ax = axes[1] = drawing.add_panel(figure, starts, above, width - MARGIN - starts, tall, xlim=(0.5, L + 0.5))
        drawing.plain_axes(ax)
        ax.axhline(0, color=GRAY, linewidth=0.6, zorder=0)
        drawing.draw_curve(ax, np.arange(1, L + 1), r, np.nan_to_num(np.abs(ends - r)), 0)
        ax.set_ylim(-1.05, 1.05)
        ax.set_ylabel("correlation r", fontsize=TEXT)
        drawing.name_ticks(ax, range(1, L + 1), layers, (width - MARGIN - starts) / L)
    return figure, axes


def plot_cost(
    nh: Any,
    costs: dict[str, Any],
    *,
    low: Any,
    high: Any,
    names: Sequence[str],
    baseline: int | None = None,
    layer: str = "",
    k: int = 5,
) -> tuple[Figure, np.ndarray]:
    """NH against each cost, with the Pareto front: those that nothing cheaper, or as cheap, surpasses.

    Parameters
    ----------
    nh, low, high : array
        float [V]; low and high may be NaN.
    costs : dict of str to array
        By the name of the axis float [V]; what is NaN is left out.
    names : sequence of str
        Those on a front are in the legend, ten at most, the highest NH first.
    baseline : int, optional
    layer : str

    Returns
    -------
    Figure
    array of Axes
        One for each cost.

    Examples
    --------
    >>> front([0.5, 0.7, 0.6], [1.0, 3.0, 4.0])
    [0, 1]
    >>> nan = [float("nan")] * 3
    >>> figure, axes = plot_cost([0.5, 0.7, 0.6], {"GMAC": [1, 3, 4]}, low=nan, high=nan, names=["a", "b", "c"])
    >>> [text.get_text() for text in figure.legends[0].get_texts()]
    ['b', 'a', 'others']
    """
    values, ends = np.asarray(nh, np.float64), np.asarray([low, high], np.float64)
    prices = {name: np.asarray(cost, np.float64) for name, cost in costs.items()}
    fronts = {name: front(values, cost) for name, cost in prices.items()}
    on_front = {i for found in fronts.values() for i in found}
    named = sorted(on_front, key=lambda i: (-values[i], i))[:NAMED]
    handles, entries = [drawing.curve_mark(n) for n in range(len(named))], [names[i] for i in named]
    for handle in handles:
        handle.set_linestyle("")
    if len(named) < len(values):
        handles.append(Line2D([], [], color=OTHER, marker="o", markersize=3.5, linestyle="", markeredgewidth=0))
        entries.append("others")
    if baseline is not None:
        handles.append(ring())
        entries.append("baseline")
    figure = NotebookFigure(figsize=(PAGE, 1))
    bottom = drawing.add_legend(figure, handles, entries)
    left, gap, tall = 0.62, 0.3, 2.4
    across = (PAGE - left - MARGIN - gap * (len(prices) - 1)) / len(prices)
    figure.set_size_inches(PAGE, MARGIN + tall + 0.42 + bottom)
    axes = np.empty(len(prices), dtype=object)
    for number, (name, cost) in enumerate(prices.items()):
        ax = axes[number] = drawing.add_panel(figure, left + number * (across + gap), MARGIN, across, tall)
        drawing.plain_axes(ax)
        _draw_cost(ax, values, ends, cost, named=named, baseline=baseline)
        path = fronts[name]
        ax.step(cost[path], values[path], where="post", color=GRAY, linewidth=0.7, zorder=0)
        ax.set_xlabel(name if path else f"{name}: not known", fontsize=TEXT, parse_math=False)
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.set_ylim(*_limits(np.concatenate([values, ends.ravel()])))
        if number:
            ax.tick_params(labelleft=False)
    axes[0].set_ylabel(nh_label(layer, k, tall), fontsize=TEXT, parse_math=False)
    return figure, axes


def front(nh: Any, cost: Any) -> list[int]:
    """Positions on the Pareto front, the cheapest first; what has no known cost is not on it."""
    values, price = np.asarray(nh, np.float64), np.asarray(cost, np.float64)
    found: list[int] = []
    for i in np.lexsort((-values, price)).tolist():
        if not np.isnan(price[i]) and (not found or values[i] > values[found[-1]]):
            found.append(i)
    return found


def _draw_cost(
    ax: Axes, values: np.ndarray, ends: np.ndarray, cost: np.ndarray, *, named: Sequence[int], baseline: int | None
) -> None:
    known = cost[~np.isnan(cost)]
    if len(known) and known.min() > 0 and known.max() > MANY_TIMES * known.min():
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(numticks=5))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        ax.xaxis.set_major_locator(MaxNLocator(4))
    if not len(known):
        ax.set_xticks([])
    for i in np.flatnonzero(~np.isnan(cost)):
        number = named.index(i) if i in named else None
        colour = OTHER if number is None else drawing.COLOURS[number]
        ax.plot([cost[i]] * 2, ends[:, i], color=colour, linewidth=0.6, alpha=0.5, zorder=1)
        marker = "o" if number is None else drawing.MARKERS[number]
        point(ax, cost[i], values[i], colour, marker=marker, baseline=i == baseline)
    ax.margins(x=0.08)


def _limits(values: np.ndarray) -> tuple[float, float]:
    """Of an axis, around what is known."""
    known = values[~np.isnan(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    spare = 0.08 * max(high - low, 0.02)
    return low - spare, high + spare
