"""Pictures of an analysis and of a training run."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

# Ten hues that stay apart for colour-blind readers as well as for others.
COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#000000", "#ee7733", "#999933"]


def plot_maps(
    scores: Sequence[dict[str, Any]], maps: Sequence[np.ndarray], labels: np.ndarray, classes: Sequence[str]
) -> Figure:
    """One panel per network (down) and layer (across): the map, coloured by class.

    Parameters
    ----------
    scores : sequence of dict
        network, layer, position and nh of each map.
    maps : sequence of array
        Z [N, 2] each.
    labels : array
        int64 [N].
    """
    networks = list(dict.fromkeys(score["network"] for score in scores))
    depth = max(score["position"] for score in scores)
    figure = Figure(figsize=(2.6 * depth, 2.9 * len(networks) + 0.5), layout="constrained")
    axes = figure.subplots(len(networks), depth, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    palette = np.array(COLOURS if len(classes) <= len(COLOURS) else hues(len(classes)))
    colours = palette[labels]
    order = np.random.default_rng(0).permutation(len(labels))  # no class on top of the others
    size = float(np.clip(4000 / len(labels), 0.4, 12))
    for score, Z in zip(scores, maps, strict=True):
        ax = axes[networks.index(score["network"]), score["position"] - 1]
        ax.set_axis_on()
        ax.scatter(Z[order, 0], Z[order, 1], s=size, c=colours[order], linewidths=0)
        middle, half = (Z.max(0) + Z.min(0)) / 2, max(np.ptp(Z, axis=0).max() * 0.52, 1e-6)
        ax.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half))
        ax.set(xticks=[], yticks=[], box_aspect=1)
        ax.set_title(f"{score['network']} {score['layer']}\nNH {score['nh']:.3f}", fontsize=9)
    handles = [Line2D([], [], linestyle="", marker="o", color=palette[c], label=name) for c, name in enumerate(classes)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(classes), max(5, 2 * depth)), fontsize=8)
    return figure


def hues(count: int) -> list[str]:
    """That many different colours."""
    return [to_hex(colour) for colour in colormaps["turbo"](np.linspace(0, 1, count))]


def plot_nh(scores: Sequence[dict[str, Any]]) -> Figure:
    """Neighborhood hit by layer, one line per network, with 95 % intervals and the level of chance."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    ax = figure.subplots()
    for number, network in enumerate(dict.fromkeys(score["network"] for score in scores)):
        own = [score for score in scores if score["network"] == network]
        colour = COLOURS[number % len(COLOURS)]
        x = [score["position"] for score in own]
        nh = np.array([score["nh"] for score in own])
        error = 1.96 * np.array([score["standard_error"] for score in own])
        ax.errorbar(x, nh, error, color=colour, marker="o", markersize=4, capsize=3, label=f"{network}, t-SNE map")
        ax.plot(x, [s["nh_feature_space"] for s in own], color=colour, linestyle=":", label=f"{network}, layer's space")
    ax.axhline(scores[0]["chance"], color="gray", linewidth=0.8, linestyle="--", label="chance")
    deepest = max(scores, key=lambda score: score["position"])["network"]
    ticks = [score for score in scores if score["network"] == deepest]
    shared = all(score["layer"] == ticks[score["position"] - 1]["layer"] for score in scores)
    ax.set_xticks([score["position"] for score in ticks])
    if shared:
        ax.set_xticklabels([score["layer"] for score in ticks], rotation=20 if len(ticks) > 6 else 0)
    ax.set(xlabel="layer", ylabel=f"neighborhood hit (k = {scores[0]['k']})", ylim=(0, None))
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
