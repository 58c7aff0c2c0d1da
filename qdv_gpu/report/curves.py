"""Figures of a training run, of a profile and of the sanity check."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from qdv_gpu.arrays import as_floats
from qdv_gpu.errors import InputError, check_among, check_text, listed, short
from qdv_gpu.report import drawing
from qdv_gpu.report.drawing import COLOURS, GRAY, LINE, MARGIN, PAGE, SMALL, TEXT, TITLE, NotebookFigure, plain

BOUNDS = {"compute": COLOURS[0], "memory": COLOURS[1]}  # what a layer's time is bound by
_CURVE: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1.1, "markeredgewidth": 0}


def plot_training(history: Sequence[Mapping[str, float]], title: str) -> tuple[Figure, np.ndarray]:
    """Loss and accuracies by epoch.

    Parameters
    ----------
    history : sequence of mapping
        Of each epoch "loss" in nats, and "accuracy" and "test_accuracy" in 0..1.
    title : str

    Returns
    -------
    Figure
    array of Axes
        [2], of the loss and of the accuracies.

    Raises
    ------
    InputError
        If an epoch has not these numbers.

    Examples
    --------
    >>> figure, axes = plot_training([{"loss": 2.3, "accuracy": 0.1, "test_accuracy": 0.1}], "alexnet on cifar10")
    >>> [ax.get_ylabel() for ax in axes]
    ['cross-entropy (nats)', 'accuracy']
    """
    check_text("title", title)
    losses, accuracies, tested = (
        [float(as_floats(name, entry.get(name))) for entry in listed("history", history, Mapping, "dicts")]
        for name in ("loss", "accuracy", "test_accuracy")
    )
    width, tall, left, gap = 6.0, 2.0, 0.55, 0.7
    figure = NotebookFigure(figsize=(width, 1))
    top = _title_height(title, width)
    handles = [Line2D([], [], color=COLOURS[0], **_CURVE), Line2D([], [], color=COLOURS[1], **_CURVE)]
    bottom = drawing.add_legend(figure, handles, ["training images", "test images"])
    figure.set_size_inches(width, top + tall + 0.4 + bottom)
    _write_title(figure, title)
    across = (width - left - gap - 0.12) / 2
    axes = np.empty(2, dtype=object)
    for number, quantity in enumerate(("cross-entropy (nats)", "accuracy")):
        ax = axes[number] = drawing.add_panel(figure, left + number * (across + gap), top, across, tall)
        drawing.plain_axes(ax)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.set_xlabel("epoch", fontsize=TEXT)
        ax.set_ylabel(quantity, fontsize=TEXT)
    epochs = range(1, len(losses) + 1)
    axes[0].plot(epochs, losses, color=COLOURS[0], **_CURVE)
    axes[1].plot(epochs, accuracies, color=COLOURS[0], **_CURVE)
    axes[1].plot(epochs, tested, color=COLOURS[1], **_CURVE)
    axes[1].set_ylim(0, 1)
    return figure, axes


def plot_profile(shares: Mapping[int, Sequence[tuple[str, float, str]]], title: str) -> tuple[Figure, np.ndarray]:
    """Bars of each layer's share of the forward pass, one panel per batch size, coloured by what bounds the layer.

    Parameters
    ----------
    shares : mapping of int to sequence of (layer, share, bound)
        By batch size; the same layers in each, shares in 0..1, bound "compute" or "memory".
    title : str

    Returns
    -------
    Figure
    array of Axes
        [len(shares)].

    Raises
    ------
    InputError
        If there is no batch size, or no layer.

    Examples
    --------
    >>> figure, axes = plot_profile({16: [("conv1", 0.7, "compute"), ("relu1", 0.3, "memory")]}, "a network")
    >>> [label.get_text() for label in axes[0].get_yticklabels()]
    ['conv1', 'relu1']
    """
    check_text("title", title)
    if not isinstance(shares, Mapping):
        raise InputError(f"shares must be a dict of batch sizes to layers, got {short(shares)}")
    shares = {batch: [_share(row) for row in listed("shares", rows, what="layers")] for batch, rows in shares.items()}
    if not shares or not all(shares.values()):
        raise InputError("at least one batch size and one layer are required")
    names = [plain(name) for name, *_ in next(iter(shares.values()))]
    names = drawing.shortened_apart(names, PAGE / 2, SMALL)
    left = max(drawing.text_width(name, SMALL) for name in names) + MARGIN + 0.08
    across, gap = min(1.6, max(1.1, (PAGE - left) / len(shares) - 0.15)), 0.15
    width = max(left + len(shares) * (across + gap) - gap + 0.2, 3.5)
    across = (width - left - 0.2 + gap) / len(shares) - gap
    figure = NotebookFigure(figsize=(width, 1))
    bottom = drawing.add_legend(
        figure, [Patch(color=colour) for colour in BOUNDS.values()], [f"bound by {b}" for b in BOUNDS]
    )
    top = _title_height(title, width) + TEXT * LINE + 0.05
    tall = max(SMALL * LINE * 1.1 * len(names), 0.6)
    figure.set_size_inches(width, top + tall + 0.42 + bottom)
    _write_title(figure, title)
    axes = np.empty(len(shares), dtype=object)
    limit = 1.05 * max(share for rows in shares.values() for _, share, _ in rows) or 1
    for number, (batch, rows) in enumerate(shares.items()):
        ax = axes[number] = drawing.add_panel(figure, left + number * (across + gap), top, across, tall)
        drawing.plain_axes(ax)
        places = range(len(rows))
        ax.barh(places, [share for _, share, _ in rows], color=[BOUNDS[bound] for *_, bound in rows], height=0.7)
        ax.set_yticks(places, names if number == 0 else [""] * len(rows), fontsize=SMALL, parse_math=False)
        ax.tick_params(axis="y", length=0)
        ax.set(ylim=(len(rows) - 0.4, -0.6), xlim=(0, limit))
        ax.xaxis.set_major_locator(MaxNLocator(3, prune="upper" if number + 1 < len(shares) else None))
        ax.set_title(f"batch of {batch}", fontsize=TEXT, pad=3)
        ax.set_xlabel("share of the time", fontsize=TEXT)
    return figure, axes


def _share(row: Any) -> tuple[str, float, str]:
    found = listed("a layer", row, what="its name, its share and what bounds it")
    if len(found) != 3:
        raise InputError(f"a layer must be its name, its share and what bounds it, got {short(row)}")
    name, share, bound = found
    return check_text("a layer", name), float(as_floats("share", share)), check_among("bound", bound, BOUNDS)


def plot_sanity(modules: Sequence[str], similarity: Any, title: str) -> tuple[Figure, Axes]:
    """Similarity of reconstructions to those of the true weights, as modules are shuffled one after the other.

    Parameters
    ----------
    modules : sequence of str
    similarity : array
        float [len(modules), maps]; NaN is left out.
    title : str

    Returns
    -------
    Figure
    Axes

    Raises
    ------
    InputError
        If there is no module, or not a row for each.

    Examples
    --------
    >>> figure, ax = plot_sanity(["conv2", "conv1"], np.array([[0.5, 0.7], [0.1, 0.2]]), "AlexNet conv2")
    >>> [label.get_text() for label in ax.get_xticklabels()]
    ['none', 'conv2', 'conv1']
    """
    check_text("title", title)
    modules = listed("modules", modules, str, "names")
    similarity = as_floats("similarity", similarity, None, None)
    if not len(modules) or not similarity.size or len(similarity) != len(modules):
        raise InputError(f"similarity must have a row for each of {len(modules)} modules, got {list(similarity.shape)}")
    count, right = len(modules) + 1, 0.12
    width = float(np.clip(1.5 + 0.35 * count, 4.0, PAGE))
    figure = NotebookFigure(figsize=(width, 1))
    curve = Line2D([], [], color=COLOURS[0], **_CURVE)
    half = Patch(color=COLOURS[0], alpha=0.25, linewidth=0)
    bottom = drawing.add_legend(figure, [curve, half], ["median map", "half of the maps"])
    top, tall = _title_height(title, width), 2.2
    left, below = drawing.room_for_names(["none", *modules], width - right, 0.55)
    below += SMALL * LINE + 0.05
    figure.set_size_inches(width, top + tall + below + bottom)
    _write_title(figure, title)
    ax = drawing.add_panel(figure, left, top, width - left - right, tall, xlim=(-0.5, count - 0.5))
    drawing.plain_axes(ax)
    low, middle, high = np.hstack((np.ones((3, 1)), np.nanpercentile(similarity, [25, 50, 75], axis=1)))
    ax.fill_between(range(count), low, high, color=COLOURS[0], alpha=0.25, linewidth=0)
    ax.plot(range(count), middle, color=COLOURS[0], **_CURVE)
    ax.axhline(0, color=GRAY, linewidth=0.6, zorder=0)
    drawing.name_ticks(ax, range(count), ["none", *modules], (width - left - right) / count)
    ax.set_ylim(min(-0.05, float(np.nanmin(low)) - 0.05), 1.03)
    ax.set_ylabel("correlation of pixel sizes", fontsize=TEXT)
    drawing.add_x_label(ax, bottom, "weights shuffled, this module and those before it")
    return figure, ax


def _title_height(title: str, width: float) -> float:
    """Inches from the upper edge to what is below the title."""
    return MARGIN + drawing.height_of(_wrapped_title(title, width), TITLE) + 0.06


def _write_title(figure: Figure, title: str) -> None:
    drawing.add_text(figure, MARGIN, MARGIN, _wrapped_title(title, figure.get_figwidth()), size=TITLE)


def _wrapped_title(title: str, width: float) -> str:
    return drawing.wrapped(plain(title), width - 2 * MARGIN, TITLE, lines=3)
