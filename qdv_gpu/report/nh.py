"""Neighborhood hit by layer, as curves of networks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from qdv_gpu.arrays import as_floats
from qdv_gpu.errors import InputError, check_count, check_mapping, listed
from qdv_gpu.report import drawing
from qdv_gpu.report.drawing import COLOURS, GRAY, LINE, MARGIN, PAGE, SMALL, TEXT, NotebookFigure
from qdv_gpu.scores.statistics import NORMAL

PANEL = 2.3  # inches: height of the panel of NH


def plot_nh(
    nh: Mapping[str, Any],
    errors: Mapping[str, Any] | None = None,
    *,
    layers: Mapping[str, Sequence[str]],
    space: Mapping[str, Any] | None = None,
    chance: float | None = None,
    k: int = 5,
    differences: Mapping[str, Any] | None = None,
    difference_errors: Mapping[str, Any] | None = None,
) -> tuple[Figure, np.ndarray]:
    """Neighborhood hit by layer, a line for each network, with 95 % intervals and the level of chance.

    Parameters
    ----------
    nh : mapping of str to array
        By network, float [L], one for each of its layers.
    errors : mapping of str to array, optional
        Standard errors float [L]; the bars are `NORMAL` of them.
    layers : mapping of str to sequence of str
        Names of each network's layers. They are written below the axis where the networks agree on them, else the
        layers' positions are.
    space : mapping of str to array, optional
        NH in the layer's own space, float [L], dotted.
    chance : float, optional
        A line where it is near the data, else an arrow at the lower edge.
    k : int
        Neighbours.
    differences, difference_errors : mapping of str to array, optional
        By name float [L], in a second panel.

    Returns
    -------
    Figure
    array of Axes
        [1], or [2] with differences.

    Raises
    ------
    InputError
        If there is no network, or a network has not one value for each of its layers.

    Examples
    --------
    >>> figure, (ax,) = plot_nh({"net": [0.4, 0.6]}, {"net": [0.01, 0.01]}, layers={"net": ["a", "b"]}, chance=0.1)
    >>> [text.get_text() for text in ax.get_xticklabels()], [f"{edge:.1f}" for edge in ax.get_ylim()]
    (['a', 'b'], ['0.3', '0.6'])
    """
    layers = {network: listed("layers", own, str, "names") for network, own in check_mapping("layers", layers).items()}
    nh, errors, space, differences, difference_errors = (
        {one: as_floats(name, values, None) for one, values in check_mapping(name, given).items()}
        if given is not None
        else {}
        for name, given in (
            ("nh", nh), ("errors", errors), ("space", space), ("differences", differences),
            ("difference_errors", difference_errors),
        )
    )  # fmt: skip
    check_count("k", k)
    if chance is not None:
        chance = float(as_floats("chance", chance))
    if not nh:
        raise InputError("at least one network is required")
    for network, values in {**differences, **difference_errors}.items():
        if not len(values) or len(values) > max(map(len, nh.values())):
            raise InputError(f"differences must have a value for each layer, got {len(values)} of {network}")
    for given in (nh, errors, space):
        for network, values in given.items():
            if len(values) != len(layers.get(network, ())):
                raise InputError(f"one value for each layer of {network} is required, got {len(values)} values")
    depth = max(len(values) for values in nh.values())
    names = _shared_names([layers[network] for network in nh], depth)
    handles, entries = _legend([*nh, *differences], intervals=bool(errors), space=bool(space))
    width = drawing.width_for(float(np.clip(2 + 0.5 * depth, 3.4, PAGE)), entries)
    figure = NotebookFigure(figsize=(width, 1))
    bottom = drawing.add_legend(figure, handles, entries)
    right, ticks = 0.12, names or [str(i + 1) for i in range(depth)]
    left, below = drawing.room_for_names(ticks, width - right, 0.55)
    tall = [PANEL, 1.0] if differences else [PANEL]
    gap = 0.12
    below += SMALL * LINE + 0.05
    figure.set_size_inches(width, MARGIN + sum(tall) + gap * (len(tall) - 1) + below + max(bottom, MARGIN))
    axes = np.empty(len(tall), dtype=object)
    for number, height in enumerate(tall):
        top = MARGIN + number * (tall[0] + gap)
        ax = axes[number] = drawing.add_panel(figure, left, top, width - left - right, height, xlim=(0.5, depth + 0.5))
        drawing.plain_axes(ax)
        ax.set_xticks(range(1, depth + 1), [])
    low, high = _draw_lines(axes[0], nh, errors, first=0)
    for number, y in enumerate(space.values()):
        axes[0].plot(np.arange(1, len(y) + 1), y, color=COLOURS[number % len(COLOURS)], linewidth=1, linestyle=":")
        low, high = min(low, np.nanmin(y)), max(high, np.nanmax(y))
    _limit(axes[0], low, high, chance)
    axes[0].set_ylabel(f"neighborhood hit (k = {k})", fontsize=TEXT)
    if differences:
        low, high = _draw_lines(axes[1], differences, difference_errors, first=len(nh))
        axes[1].axhline(0, color=GRAY, linewidth=0.6, zorder=0)
        _limit(axes[1], min(low, 0), max(high, 0), None)
        axes[1].set_ylabel("difference", fontsize=TEXT)
    drawing.name_ticks(axes[-1], range(1, depth + 1), ticks, (width - left - right) / depth)
    drawing.add_x_label(axes[-1], max(bottom, MARGIN), "layer" if names else "position of the layer")
    figure.align_ylabels(list(axes))
    return figure, axes


def _legend(curves: Sequence[str], *, intervals: bool, space: bool) -> tuple[list[Line2D], list[str]]:
    """Marks of the legend, and what stands beside them."""
    handles, entries = [drawing.curve_mark(number) for number in range(len(curves))], list(curves)
    if intervals:
        handles.append(Line2D([], [], color=GRAY, linewidth=1, marker="|", markersize=6, linestyle=""))
        entries.append("95 % interval")
    if space:
        handles.append(Line2D([], [], color=GRAY, linewidth=1, linestyle=":"))
        entries.append("in the layer's own space")
    return handles, entries


def _draw_lines(
    ax: Axes, lines: Mapping[str, np.ndarray], errors: Mapping[str, np.ndarray], *, first: int
) -> tuple[float, float]:
    """Draw float [L] by name, side by side, with intervals, in the styles from number `first`; their least and most."""
    low, high = np.inf, -np.inf
    step = min(0.1, 0.5 / len(lines))
    for number, (name, y) in enumerate(lines.items()):
        x = np.arange(1, len(y) + 1) + (number - (len(lines) - 1) / 2) * step
        bar = np.nan_to_num(NORMAL * errors[name]) if name in errors else np.zeros(len(y))
        drawing.draw_curve(ax, x, y, bar, first + number)
        low, high = min(low, float(np.nanmin(y - bar))), max(high, float(np.nanmax(y + bar)))
    return low, high


def _limit(ax: Axes, low: float, high: float, chance: float | None) -> None:
    """Limits around the data, and chance: a line if that takes little room, else an arrow at the lower edge."""
    spread = max(high - low, 0.02)
    bottom, top = low - 0.06 * spread, high + 0.06 * spread
    if chance is not None:
        text, near = f"chance {chance:.3f}", low - 0.4 * spread <= chance <= high + 0.4 * spread
        if near:
            bottom, top = min(bottom, chance - 0.06 * spread), max(top, chance + 0.06 * spread)
            ax.axhline(chance, color=GRAY, linewidth=0.8, linestyle="--", zorder=0)
        else:
            bottom -= 0.08 * spread
        height = SMALL * LINE / PANEL * (top - bottom)
        ax.annotate(
            text if near else f"{text} ↓", (1, chance if near else bottom), xycoords=ax.get_yaxis_transform(),
            xytext=(-2, 2), textcoords="offset points", ha="right", va="bottom", fontsize=SMALL, color=GRAY,
        )  # fmt: skip
        top = max(top, chance + height) if near else top
    ax.set_ylim(bottom, top)


def _shared_names(layers: Sequence[Sequence[str]], depth: int) -> list[str] | None:
    """The layers' names by position, or None if networks differ in them."""
    names = [{own[i] for own in layers if i < len(own)} for i in range(depth)]
    return [next(iter(found)) for found in names] if all(len(found) == 1 for found in names) else None
