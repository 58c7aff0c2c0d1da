"""Pictures of an analysis and of a training run."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch.nn import functional

from qdv_gpu.results.records import AnalysedLayer

CONTRASTS = ("map", "layer")
TILE, PATCH = 96, 40  # sides in pixels of a reconstruction and of a patch in a figure

# Ten hues that stay apart for colour-blind readers as well as for others.
COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#000000", "#ee7733", "#999933"]


def plot_maps(layers: Sequence[AnalysedLayer], labels: np.ndarray, classes: Sequence[str]) -> Figure:
    """One panel per network (down) and layer (across): the map of the first seed, coloured by class.

    Parameters
    ----------
    layers : sequence of AnalysedLayer
    labels : array
        int64 [N].
    classes : sequence of str
    """
    networks = list(dict.fromkeys(layer.network for layer in layers))
    depth = max(layer.position for layer in layers)
    figure = Figure(figsize=(2.6 * depth, 2.9 * len(networks) + 0.5), layout="constrained")
    axes = figure.subplots(len(networks), depth, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    palette = np.array(COLOURS if len(classes) <= len(COLOURS) else hues(len(classes)))
    colours = palette[labels]
    order = np.random.default_rng(0).permutation(len(labels))  # no class on top of the others
    size = float(np.clip(4000 / len(labels), 0.4, 12))
    for layer in layers:
        ax, Z = axes[networks.index(layer.network), layer.position - 1], layer.Z[0]
        ax.set_axis_on()
        ax.scatter(Z[order, 0], Z[order, 1], s=size, c=colours[order], linewidths=0)
        middle, half = (Z.max(0) + Z.min(0)) / 2, max(np.ptp(Z, axis=0).max() * 0.52, 1e-6)
        ax.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half))
        ax.set(xticks=[], yticks=[], box_aspect=1)
        ax.set_title(f"{layer.network} {layer.layer}\nNH {layer.scores[0].mean.nh:.3f}", fontsize=9)
    handles = [Line2D([], [], linestyle="", marker="o", color=palette[c], label=name) for c, name in enumerate(classes)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(classes), max(5, 2 * depth)), fontsize=8)
    return figure


def hues(count: int) -> list[str]:
    """That many different colours."""
    return [to_hex(colour) for colour in colormaps["turbo"](np.linspace(0, 1, count))]


def plot_nh(layers: Sequence[AnalysedLayer], k: int) -> Figure:
    """Neighborhood hit by layer, one line per network, with 95 % intervals and the level of chance."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    ax = figure.subplots()
    for number, network in enumerate(dict.fromkeys(layer.network for layer in layers)):
        own = [layer for layer in layers if layer.network == network]
        colour = COLOURS[number % len(COLOURS)]
        x, scores = [layer.position for layer in own], [layer.of(k) for layer in own]
        nh, error = (np.array([getattr(score, name) for score in scores]) for name in ("nh", "standard_error"))
        ax.errorbar(
            x, nh, 1.96 * error, color=colour, marker="o", markersize=4, capsize=3, label=f"{network}, t-SNE map"
        )
        space = [score.nh_feature_space for score in scores]
        ax.plot(x, space, color=colour, linestyle=":", label=f"{network}, layer's space")
    ax.axhline(layers[0].of(k).chance, color="gray", linewidth=0.8, linestyle="--", label="chance")
    deepest = max(layers, key=lambda layer: layer.position).network
    ticks = [layer for layer in layers if layer.network == deepest]
    ax.set_xticks([layer.position for layer in ticks])
    if all(layer.layer == ticks[layer.position - 1].layer for layer in layers):
        ax.set_xticklabels([layer.layer for layer in ticks], rotation=20 if len(ticks) > 6 else 0)
    ax.set(xlabel="layer", ylabel=f"neighborhood hit (k = {k})", ylim=(0, None))
    ax.legend(fontsize=8)
    return figure


def plot_training(history: Sequence[dict[str, float]], title: str) -> Figure:
    """Loss and accuracies by epoch."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = range(1, len(history) + 1)
    left.plot(epochs, [entry["loss"] for entry in history], color=COLOURS[0], marker="o", markersize=3)
    left.set(xlabel="epoch", ylabel="cross-entropy (nats)", title="training loss")
    right.plot(epochs, [e["accuracy"] for e in history], color=COLOURS[0], marker="o", markersize=3, label="training")
    right.plot(epochs, [e["test_accuracy"] for e in history], color=COLOURS[1], marker="o", markersize=3, label="test")
    right.set(xlabel="epoch", ylabel="accuracy", title="accuracy", ylim=(0, 1))
    right.legend()
    for ax in (left, right):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title, fontsize=10)
    return figure


def plot_reconstructions(grids: Sequence[np.ndarray], titles: Sequence[str], *, contrast: str = "map") -> Figure:
    """Reconstructions of all maps of a layer as one grid, several networks side by side.

    Gray is 0. The number beside a row is that of its first map.

    Parameters
    ----------
    grids : sequence of array
        float32 [M, C, H, W] each, C = 1 or 3.
    titles : sequence of str
    contrast : {"map", "layer"}
        Divide by the largest absolute value of each map, or of all of them.
    """
    tiles = [_tiles(_contrasted(grid, (1, 2, 3) if contrast == "map" else (0, 1, 2, 3)), TILE) for grid in grids]
    columns = [math.ceil(math.sqrt(len(grid))) for grid in grids]
    pictures = [_mosaic(own, width) for own, width in zip(tiles, columns, strict=True)]
    widths, height = [picture.shape[1] for picture in pictures], max(picture.shape[0] for picture in pictures)
    figure = Figure(
        figsize=((sum(widths) + 50 * len(widths)) / 100, (height + 40) / 100), dpi=100, layout="constrained"
    )
    axes = figure.subplots(1, len(grids), squeeze=False, width_ratios=widths)[0]
    for ax, picture, own, width, title in zip(axes, pictures, tiles, columns, titles, strict=True):
        ax.imshow(picture, interpolation="nearest")
        rows = range(math.ceil(len(own) / width))
        ax.set_yticks([(row + 0.5) * (TILE + 1) for row in rows], [str(row * width) for row in rows], fontsize=7)
        ax.set_xticks([])
        ax.tick_params(length=0)
        ax.set_frame_on(False)
        ax.set_title(title, fontsize=9, wrap=True)
    return figure


def plot_top(patches: np.ndarray, pictures: np.ndarray, maps: Sequence[int], title: str) -> Figure:
    """For each map its strongest patches, and beside them their reconstructions (Zeiler & Fergus 2014, figure 2).

    Parameters
    ----------
    patches : array
        uint8 [M, k, C, h, w].
    pictures : array
        float32 [M, k, C, h, w].
    maps : sequence of int
        Numbers of the M maps.
    """
    M, k = patches.shape[:2]
    side, across = math.ceil(math.sqrt(k)), 4 if M >= 4 else M
    bright = _contrasted(pictures.reshape(M * k, *pictures.shape[2:]), (1, 2, 3))
    pair = (_tiles(patches.reshape(bright.shape).astype(np.float32) / 255, PATCH), _tiles(bright, PATCH))
    cells = [[_mosaic(half[m * k : (m + 1) * k], side) for half in pair] for m in range(M)]
    height, width = cells[0][0].shape[:2]
    down = math.ceil(M / across)
    figure = Figure(figsize=(across * (2 * width + 24) / 100, (down * (height + 24) + 40) / 100), dpi=100)
    figure.set_layout_engine("constrained")
    figure.suptitle(title, fontsize=9)
    for ax in (axes := figure.subplots(down, across, squeeze=False)).flat:
        ax.set_axis_off()
    for ax, halves, number in zip(axes.flat, cells, maps, strict=False):
        ax.imshow(np.concatenate((halves[0], np.ones((height, 8, 3)), halves[1]), axis=1), interpolation="nearest")
        ax.set_title(f"map {number}", fontsize=8)
    return figure


def plot_sanity(modules: Sequence[str], similarity: np.ndarray, title: str) -> Figure:
    """Similarity of reconstructions to those of the true weights, as modules are shuffled one after the other.

    Parameters
    ----------
    modules : sequence of str
    similarity : array
        float32 [len(modules), maps]; NaN is left out.
    """
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    ax = figure.subplots()
    x = range(len(modules) + 1)
    quartiles = np.nanpercentile(similarity, [25, 50, 75], axis=1)
    low, middle, high = (np.concatenate(([1.0], line)) for line in quartiles)
    ax.fill_between(x, low, high, color=COLOURS[0], alpha=0.25, linewidth=0, label="half of the maps")
    ax.plot(x, middle, color=COLOURS[0], marker="o", markersize=4, label="median map")
    ax.axhline(0, color="gray", linewidth=0.8)
    ax.set_xticks(x, ["none", *modules], rotation=30, ha="right", fontsize=8)
    ax.set(
        xlabel="weights shuffled, this module and those before it", ylabel="correlation of pixel sizes", ylim=(None, 1)
    )
    ax.set_title(title, fontsize=10)
    ax.legend(fontsize=8)
    return figure


def _contrasted(pictures: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Values [M, C, H, W] as brightness in 0..1, 0.5 for 0, the largest over `axes` at full contrast."""
    largest = np.abs(pictures).max(axis=axes, keepdims=True)
    return 0.5 + 0.5 * pictures / np.where(largest > 0, largest, 1)


def _tiles(pictures: np.ndarray, side: int) -> np.ndarray:
    """Pictures [M, C, H, W] as RGB tiles [M, side, side, 3]."""
    resized = functional.interpolate(torch.from_numpy(pictures), (side, side), mode="bilinear", antialias=True)
    return resized.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).clamp(0, 1).numpy()


def _mosaic(tiles: np.ndarray, columns: int) -> np.ndarray:
    """Tiles [M, side, side, 3] in rows, a white line between."""
    side, rows = tiles.shape[1], math.ceil(len(tiles) / columns)
    canvas = np.ones((rows * columns, side + 1, side + 1, 3), dtype=np.float32)
    canvas[: len(tiles), :side, :side] = tiles
    return canvas.reshape(rows, columns, side + 1, side + 1, 3).swapaxes(1, 2).reshape(rows * (side + 1), -1, 3)


def plot_profile(shares: dict[int, list[tuple[str, float, str]]], title: str) -> Figure:
    """Bars of each layer's share of the forward pass, one panel per batch size, coloured by what bounds the layer.

    Parameters
    ----------
    shares : dict of int to list of (layer, share, bound)
        By batch size; the same layers in each.
    title : str
    """
    layers = [layer for layer, *_ in next(iter(shares.values()))]
    figure = Figure(figsize=(2.5 + 2.6 * len(shares), 1.4 + 0.19 * len(layers)), layout="constrained")
    axes = figure.subplots(1, len(shares), sharey=True, squeeze=False)[0]
    colours = {"compute": COLOURS[0], "memory": COLOURS[1]}
    for ax, (batch, rows) in zip(axes, shares.items(), strict=True):
        ax.barh(range(len(rows)), [share for _, share, _ in rows], color=[colours[bound] for *_, bound in rows])
        ax.set_yticks(range(len(rows)), layers, fontsize=7)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set(xlabel="share of the time", title=f"batch of {batch}")
    handles = [Line2D([], [], color=colour, linewidth=6, label=f"bound by {name}") for name, colour in colours.items()]
    axes[-1].legend(handles=handles, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure
