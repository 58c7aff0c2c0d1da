"""A comparison of two networks in words, tables and one figure."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from qdv_gpu.report import drawing
from qdv_gpu.report.drawing import GRAY, LINE, MARGIN, PAGE, SMALL, TEXT, NotebookFigure
from qdv_gpu.report.folder import RunFolder
from qdv_gpu.report.tables import csv_text, markdown
from qdv_gpu.results.comparison import Comparison, LayerPair, as_json
from qdv_gpu.scores.statistics import NORMAL

TOKENS = re.compile(r" \[\w+\]$")  # what a title says beside the layer's name
ROWS = 20  # classes in the figure at most
COLUMNS = ["position", "first_layer", "second_layer", "nh_first", "nh_second", "delta", "low", "high", "p", "p_holm"]
COLUMNS += ["verdict", "delta_feature_space", "low_feature_space", "high_feature_space", "p_holm_feature_space"]
COLUMNS += ["verdict_feature_space", "probe_first", "probe_second", "probe_error", "cka"]


def write_comparison(folder: RunFolder, found: Comparison, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Write comparison.json, .csv and .md, and the figure, whose paths are returned."""
    folder.json("comparison.json", {**as_json(found), "summary": summary(found)})
    folder.text("comparison.csv", comparison_csv(found))
    folder.text("comparison.md", comparison_markdown(found))
    return folder.figure("figures/comparison", comparison_figure(found), formats)


def summary(found: Comparison) -> str:
    """The outcome in a few plain sentences, each of which the numbers say."""
    named = [_name(pair) for pair in found.pairs]
    if found.runs == 2:
        shown = ", ".join(f"{name} {pair.in_maps.delta:+.3f}" for name, pair in zip(named, found.pairs, strict=True))
        return (
            f"{drawing.plain(found.second)} less {drawing.plain(found.first)}, mean of two runs of each: {shown}. "
            "Two runs give no interval: a third of each says how much the runs differ."
        )
    text = [*_ahead(found, named), *_not_ahead(found, named), _own_space(found, named), *_not_compared(found)]
    if found.runs == found.seeds == 1:
        text.append("Where a layer has one map, the intervals do not know how maps of other seeds differ.")
    if found.runs == 1:
        text.append(
            f"This speaks of these two trained networks, on images like these {len(found.hits[0]):,}, "
            "and not of their architectures."
        )
    else:
        text.append(f"This speaks of networks trained as these {found.runs} of each, on images like these.")
    return " ".join(text)


def _ahead(found: Comparison, named: Sequence[str]) -> list[str]:
    """At which layers, and from which on, B is ahead, and then A."""
    a, b = drawing.plain(found.first), drawing.plain(found.second)
    text = []
    for verdict, better, worse in (("ahead", b, a), ("behind", a, b)):
        own = [
            f"{name} (by {_size(pair)}{_small(found, pair)})"
            for name, pair in zip(named, found.pairs, strict=True)
            if pair.in_maps.verdict == verdict
        ]
        from_on = _from_on(found, named, verdict)
        if own:
            it = f"; {from_on[0]} it is ahead {from_on[1]}" if from_on else ""
            text.append(f"{better} keeps the classes together better than {worse} at {_list(own)}{it}.")
        elif from_on:
            text.append(f"{_capital(from_on[0])} {better} is ahead of {worse} {from_on[1]}.")
    return text


def _not_ahead(found: Comparison, named: Sequence[str]) -> list[str]:
    """At which layers they are alike, and which are undecided."""
    same, undecided = (
        [name for name, pair in zip(named, found.pairs, strict=True) if pair.in_maps.verdict == verdict]
        for verdict in ("equivalent", "undecided")
    )
    text = [f"they differ by less than {found.margin:g} at {_list(same)}"] if same else []
    if undecided:
        reach = "interval holds 0 and reaches" if len(undecided) == 1 else "intervals hold 0 and reach"
        text.append(f"undecided at {_list(undecided)}, where the {reach} beyond ±{found.margin:g}")
    return [f"{_capital('; '.join(text))}."] if text else []


def _from_on(found: Comparison, named: Sequence[str], verdict: str) -> tuple[str, str] | None:
    """From which layer on a network is ahead, before and after it: None if that says no more than the verdicts."""
    start = found.ahead_from(sign=1 if verdict == "ahead" else -1)
    if start is None:
        return None
    verdicts = [pair.in_maps.verdict for pair in found.pairs[start:]]
    last = "the last layer" if _reaches_ends(found) else "the last layer compared"
    if verdicts == [verdict]:
        return None
    if set(verdicts) == {verdict}:
        return f"from {named[start]} on", f"to {last}"
    if len(verdicts) == 1:
        return f"in a test of {last} alone", f"at {named[start]}"
    return f"in tests one by one, from {last} back,", f"down to {named[start]}"


def _reaches_ends(found: Comparison) -> bool:
    """Whether the last pair is of the last layers of both."""
    end = found.pairs[-1]
    return (end.first.position, end.second.position) == tuple(len(titles) for titles in found.layers)


def _not_compared(found: Comparison) -> list[str]:
    """Which layers have no partner, if the last of a network is among them: the last ones are what most ask about."""
    if _reaches_ends(found):
        return []
    paired = [{pair.first.position for pair in found.pairs}, {pair.second.position for pair in found.pairs}]
    left = []
    for name, titles, positions in zip((found.first, found.second), found.layers, paired, strict=True):
        if len(titles) in positions:
            continue
        alone = [drawing.plain(title) for number, title in enumerate(titles, start=1) if number not in positions]
        left.append(f"{_list(alone)} of {drawing.plain(name)}")
    last = "=".join(drawing.plain(TOKENS.sub("", titles[-1])) for titles in found.layers)
    return [f"Not compared: {', and '.join(left)}; --pair {last} sets the last layers side by side."] if left else []


def _small(found: Comparison, pair: LayerPair) -> str:
    return f", less than the margin of {found.margin:g}" if pair.in_maps.equivalent else ""


def _capital(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


def _own_space(found: Comparison, named: Sequence[str]) -> str:
    """How the verdicts in the layers' own space agree with those in the maps, and which to trust."""
    words = {
        "ahead": f"{drawing.plain(found.second)} is ahead",
        "behind": f"{drawing.plain(found.first)} is ahead",
        "equivalent": "they are alike",
        "undecided": "it is undecided",
    }
    other = [
        f"{name} ({words[pair.in_layer.verdict]}, {pair.in_layer.delta:+.3f})"
        for name, pair in zip(named, found.pairs, strict=True)
        if pair.in_layer.verdict != pair.in_maps.verdict
    ]
    one = len(found.pairs) == 1
    whose = "layer's" if one else "layers'"
    space = f"In the {whose} own space, without t-SNE,"
    if not other:
        return f"{space} {'the verdict is' if one else 'the verdicts are'} the same."
    where = "the verdict is another" if len(other) == 1 else "other verdicts hold"
    which = "that one" if len(other) == 1 else "those"
    return (
        f"{space} {where} at {_list(other)}: trust {which}, since the error of a map does not know how the map itself "
        "answers to the images that were drawn."
    )


def _name(pair: LayerPair) -> str:
    a, b = drawing.plain(pair.first.layer), drawing.plain(pair.second.layer)
    return a if a == b else f"{a}/{b}"


def _size(pair: LayerPair) -> str:
    """The absolute difference and its interval, which does not begin at 0: to as many digits as show that."""
    one = pair.in_maps
    low, high = sorted((abs(one.low), abs(one.high)))
    digits = max(3, math.ceil(-math.log10(2 * low)))
    return f"{abs(one.delta):.{digits}f}, {low:.{digits}f} to {high:.{digits}f}"


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def comparison_table(found: Comparison) -> list[list[str]]:
    """Rows of cells, a header first: NH of both, the difference with its simultaneous interval, and the verdicts."""
    names = [drawing.plain(name) for name in (found.first, found.second)]
    rows = [["layer", *names, "difference", "verdict", "in the layers' own space", "verdict"]]
    for pair in found.pairs:
        maps, own = pair.in_maps, pair.in_layer
        cells = [_name(pair), f"{pair.nh[0]:.3f}", f"{pair.nh[1]:.3f}"]
        for one in (maps, own):
            shown = f"{one.delta:+.3f}" + ("" if np.isnan(one.low) else f" ({one.low:+.3f} to {one.high:+.3f})")
            cells += [shown, one.verdict if found.runs != 2 else ""]
        rows.append(cells)
    return rows


def comparison_markdown(found: Comparison) -> str:
    """Summary and table in Markdown."""
    a, b = drawing.plain(found.first), drawing.plain(found.second)
    verdicts = (
        f" The verdict is of {b}. Intervals hold for all layers at once with 95 % confidence; equivalent means surely "
        f"within ±{found.margin:g}."
    )
    return (
        f"# {b} against {a}\n\n{summary(found)}\n\n{markdown(comparison_table(found))}\n"
        f"Neighborhood hit (k = {found.k}).{verdicts if found.runs != 2 else ''}\n"
    )


def comparison_csv(found: Comparison) -> str:
    """One row for each pair of layers."""
    rows: list[dict[str, Any]] = []
    for position, pair in enumerate(found.pairs, start=1):
        maps, own = pair.in_maps, pair.in_layer
        row = [position, pair.first.layer, pair.second.layer, *pair.nh]
        row += [maps.delta, maps.low, maps.high, maps.p, maps.p_holm, maps.verdict]
        row += [own.delta, own.low, own.high, own.p_holm, own.verdict, *pair.probe, _cka_of(found, pair)]
        rows.append(dict(zip(COLUMNS, row, strict=True)))
    return csv_text(rows, COLUMNS)


def _cka_of(found: Comparison, pair: LayerPair) -> float:
    return float(found.cka[pair.first.position - 1, pair.second.position - 1])


def comparison_figure(found: Comparison) -> Figure:
    """NH of both, their difference, that of each class, and CKA of all layers; see `plot_comparison`."""
    pairs = found.pairs
    errors = [[layer.of(found.k).standard_error for layer in (pair.first, pair.second)] for pair in pairs]
    known = 1.0 if found.runs == 1 else np.nan  # of several runs there is no error of each network's mean
    figure, _ = plot_comparison(
        np.array([pair.nh for pair in pairs]).T,
        known * np.array(errors).T,
        [[pair.in_maps.delta, pair.in_maps.low, pair.in_maps.high] for pair in pairs],
        [[pair.in_layer.delta, pair.in_layer.low, pair.in_layer.high] for pair in pairs],
        class_delta=np.array([pair.class_delta for pair in pairs]).T,
        cka=found.cka,
        networks=(found.first, found.second),
        layers=[_name(pair) for pair in pairs],
        classes=found.classes,
        cka_layers=found.layers,
        margin=found.margin,
        k=found.k,
    )
    return figure


def plot_comparison(
    nh: Any,
    errors: Any,
    in_maps: Any,
    in_layer: Any,
    *,
    class_delta: Any,
    cka: Any,
    networks: tuple[str, str],
    layers: Sequence[str],
    classes: Sequence[str],
    cka_layers: tuple[Sequence[str], Sequence[str]],
    margin: float = 0.02,
    k: int = 5,
) -> tuple[Figure, np.ndarray]:
    """Four panels: NH of both networks, the difference with its intervals and margin, of each class, and CKA.

    Parameters
    ----------
    nh, errors : array
        float [2, L]: neighborhood hit and its standard error.
    in_maps, in_layer : array
        float [L, 3]: difference, lower and upper end of its simultaneous interval, in maps and in the layers' own
        space.
    class_delta : array
        float [C, L]; the 20 classes with the largest differences are drawn.
    cka : array
        float [layers of A, layers of B]; NaN is left blank.
    networks : tuple of str
    layers, classes : sequence of str
        Names of the L pairs and of the C classes.
    cka_layers : tuple of sequence of str
        Names of all layers of A and of B.

    Returns
    -------
    Figure
    array of Axes
        [4].

    Examples
    --------
    >>> figure, axes = plot_comparison(
    ...     [[0.4, 0.5], [0.5, 0.7]], np.full((2, 2), 0.01), [[0.1, 0.05, 0.15], [0.2, 0.1, 0.3]],
    ...     [[0.1, 0.08, 0.12], [0.2, 0.15, 0.25]], class_delta=np.ones((3, 2)), cka=np.eye(2), networks=("a", "b"),
    ...     layers=["x", "y"], classes=["cat", "dog", "fox"], cka_layers=(["x", "y"], ["x", "y"]))
    >>> len(axes), axes[1].get_ylabel()
    (4, 'b less a')
    """
    nh, errors, maps, own = (np.asarray(values, np.float64) for values in (nh, errors, in_maps, in_layer))
    delta, similarity = np.asarray(class_delta, np.float64), np.asarray(cka, np.float64)
    L, C = len(layers), len(classes)
    order = np.sort(np.argsort(-np.abs(delta).max(axis=1), kind="stable")[:ROWS])
    entries = [*networks, "difference in the maps", "in the layers' own space", f"margin ±{margin:g}"]
    handles: list[Any] = [drawing.curve_mark(number) for number in range(4)]
    handles.append(Patch(color="0.88"))
    figure = NotebookFigure(figsize=(PAGE, 1))
    legend = max(drawing.add_legend(figure, handles, entries), MARGIN)

    rows = [drawing.plain(classes[c]) for c in order]
    limit = drawing.text_width("n" * 14, SMALL)
    rows = drawing.shortened_apart(rows, limit, SMALL)
    other = drawing.shortened_apart([drawing.plain(name) for name in cka_layers[0]], limit, SMALL)
    width_of = [max(drawing.text_width(name, SMALL) for name in names) + 0.12 for names in (rows, other)]
    left = max(0.6, width_of[0])
    middle = max(0.72, width_of[1] + 0.2)  # of what stands left of the second column
    half = (PAGE - left - middle - 0.15) / 2
    names = [layers, cka_layers[1]]
    belows = [drawing.room_for_names(texts, half, 0.0)[1] for texts in names]
    second_left = left + half + middle
    tall, heat = 1.7, max(1.4, 0.15 * len(order), 0.15 * len(other))
    above = SMALL * LINE + 0.12
    first_below = drawing.room_for_names(layers, half, 0.0)[1] + 0.1
    height = MARGIN + tall + first_below + above + heat + max(belows) + SMALL * LINE + 0.1 + legend
    figure.set_size_inches(PAGE, height)
    axes = np.empty(4, dtype=object)
    axes[0] = drawing.add_panel(figure, left, MARGIN, half, tall, xlim=(0.5, L + 0.5))
    axes[1] = drawing.add_panel(figure, second_left, MARGIN, half, tall, xlim=(0.5, L + 0.5))
    lower = MARGIN + tall + first_below + above
    axes[2] = drawing.add_panel(figure, left, lower, half, heat)
    axes[3] = drawing.add_panel(figure, second_left, lower, half, heat)
    for number in range(2):
        x = np.arange(1, L + 1) + (number - 0.5) * 0.12
        drawing.draw_curve(axes[0], x, nh[number], np.nan_to_num(NORMAL * errors[number]), number)
    axes[0].set_ylabel(f"neighborhood hit (k = {k})", fontsize=TEXT)
    axes[1].axhspan(-margin, margin, color="0.88", linewidth=0, zorder=0)
    axes[1].axhline(0, color=GRAY, linewidth=0.6, zorder=1)
    for number, values in enumerate((maps, own)):
        x = np.arange(1, L + 1) + (number - 0.5) * 0.16
        ends = np.stack([values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]])
        drawing.draw_curve(axes[1], x, values[:, 0], np.nan_to_num(ends), 2 + number)
    axes[1].set_ylabel(f"{_short(networks[1])} less {_short(networks[0])}", fontsize=TEXT, parse_math=False)
    for ax in axes[:2]:
        drawing.plain_axes(ax)
        drawing.name_ticks(ax, range(1, L + 1), layers, half / L)
    largest = max(float(np.nanmax(np.abs(delta))), 1e-9)
    _heat(axes[2], delta[order], rows, largest, "RdBu_r")
    drawing.name_ticks(axes[2], range(L), layers, half / L)
    title = "each class" if len(order) == C else f"{len(order)} of {C} classes"
    title = f"{title}: ±{largest:.2f}, red where {_short(networks[1])} is higher"
    _heat(axes[3], similarity, other, 1.0, "Blues")
    drawing.name_ticks(axes[3], range(similarity.shape[1]), cka_layers[1], half / similarity.shape[1])
    down, across = (_short(name) for name in networks)
    for place, text in ((left, title), (second_left, f"CKA, white 0, dark 1: {down} down, {across} across")):
        drawing.add_text(figure, place, lower - above + 0.02, drawing.shortened(text, half, SMALL), size=SMALL)
    return figure, axes


def _heat(ax: Axes, values: np.ndarray, rows: Sequence[str], largest: float, colours: str) -> None:
    least = -largest if colours == "RdBu_r" else 0.0
    ax.imshow(values, cmap=colours, vmin=least, vmax=largest, aspect="auto", interpolation="nearest")
    ax.set_yticks(range(len(rows)), rows, fontsize=SMALL, parse_math=False)
    ax.tick_params(length=0)


def _short(name: str) -> str:
    return drawing.shortened(drawing.plain(name), 0.8, TEXT)
