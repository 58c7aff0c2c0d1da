"""The maps of runs as one page links them: what the page's scripts read, and what stands above each map."""

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np

from qdv_gpu.report.drawing import COLOURS
from qdv_gpu.report.packed import Packed
from qdv_gpu.report.page import PanelTitle
from qdv_gpu.report.thumbnails import COLUMNS, EACH, SIDE
from qdv_gpu.results.view import RunView, ViewedLayer
from qdv_gpu.scores.statistics import NORMAL

SPAN = 65535  # largest coordinate
STEPS = 60_000  # of a hit of 1: those of most k and numbers of maps are whole numbers of them
POINTS = 200_000  # of all maps together, beyond which a layer shows fewer of its maps
# COLOURS on a dark page: at least 31 apart in CIE Lab, with a contrast of 3.5 to it.
DARK = ["#58a8ea", "#ffb733", "#ff6b57", "#369f9b", "#9affff", "#ffffff", "#efe3a0", "#bc804c", "#9bf3b6", "#ab89e6"]


def linked(runs: Sequence[RunView], thumbnails: tuple[Sequence[bytes], np.ndarray | None]) -> tuple[str, int]:
    """What the scripts read, and how many maps a layer shows.

    Parameters
    ----------
    runs : sequence of RunView
        Of the same images.
    thumbnails : (sequence of bytes, array or None)
        Sheets of pictures, and which images they are of: int64 [n], or None for all in order.
    """
    packed, first = Packed(), runs[0]
    layers = [(names_of(runs)[i, layer.network], layer) for i, run in enumerate(runs) for layer in run.layers]
    networks = list(dict.fromkeys(name for name, _ in layers))
    said = {names_of(runs)[i, name]: one for i, run in enumerate(runs) for name, one in run.predictions.items()}
    turns = max(1, min(min(len(layer.Z) for _, layer in layers), POINTS // (len(layers) * len(first.files))))
    sheets, images = thumbnails
    about: dict[str, Any] = {
        "files": first.files,
        "classes": first.classes,
        "colours": {"light": colours(len(first.classes), dark=False), "dark": colours(len(first.classes), dark=True)},
        "labels": None if first.labels is None else packed.add(first.labels.astype(np.uint16)),
        "k": first.k,
        "steps": STEPS,
        "networks": [
            {
                "name": name,
                "predictions": packed.add(said[name][0].astype(np.uint16)) if name in said else None,
                "probabilities": packed.add(np.round(said[name][1] * SPAN).astype(np.uint16)) if name in said else None,
            }
            for name in networks
        ],
        "panels": [
            {
                "network": networks.index(name),
                "layer": layer.title,
                "hits": None if layer.hits is None else packed.add(np.round(layer.hits * STEPS).astype(np.uint16)),
                "maps": [[packed.add(axis) for axis in placed(Z)] for Z in layer.Z[:turns]],
            }
            for name, layer in layers
        ],
        "thumbnails": {
            "side": SIDE,
            "columns": COLUMNS,
            "each": EACH,
            "sheets": [packed.add(np.frombuffer(sheet, np.uint8)) for sheet in sheets],
            "images": None if images is None else packed.add(images.astype(np.float32)),
        }
        if sheets
        else None,
    }
    return packed.text(about), turns


def placed(Z: np.ndarray) -> np.ndarray:
    """A map [N, 2] within a square of 65,535, uint16 [2, N], x to the right and y down.

    >>> placed(np.array([[0.0, 0.0], [2.0, 1.0]])).tolist()
    [[0, 65535], [49151, 16384]]
    """
    low, high = Z.min(axis=0), Z.max(axis=0)
    scale = SPAN / max(float((high - low).max()), 1e-30)
    centred = (Z - (low + high) / 2) * scale * [1, -1] + SPAN / 2
    return np.round(centred).clip(0, SPAN).astype(np.uint16).T


def names_of(runs: Sequence[RunView]) -> dict[tuple[int, str], str]:
    """A name for each network of each run; those of the same name are told apart by their folders."""
    every = [(i, name) for i, run in enumerate(runs) for name in run.networks]
    names = [name for _, name in every]
    same = len({run.folder.name for run in runs}) == len(runs)
    return {
        (i, name): name if names.count(name) == 1 else f"{name} ({runs[i].folder.name if same else runs[i].folder})"
        for i, name in every
    }


def panel_titles(runs: Sequence[RunView]) -> list[PanelTitle]:
    """Of all layers, network by network."""
    named = names_of(runs)
    layers = [(named[i, layer.network], layer) for i, run in enumerate(runs) for layer in run.layers]
    several, deep = len(set(named.values())) > 1, len(layers) > len(named)
    found, before = [], ""
    for name, layer in layers:
        score = scored(layer)
        network = name if several else ""
        label = f"t-SNE map of {name}, {layer.title}: {score}"
        found.append(PanelTitle(network, layer.title, score, label, first=deep and name != before))
        before = name
    return found


def scored(layer: ViewedLayer) -> str:
    """NH of a layer with its 95 % interval, or trustworthiness of images without labels."""
    nh, error = layer.scores["nh"], layer.scores["standard_error"]
    if nh != nh:
        return f"trustworthiness {layer.scores['trustworthiness']:.3f}"
    if error != error:
        return f"NH {nh:.3f}"
    return f"NH {nh:.3f} ({max(nh - NORMAL * error, 0):.3f} to {min(nh + NORMAL * error, 1):.3f})"


def colours(count: int, *, dark: bool) -> list[str]:
    """Colours of so many classes, "#rrggbb": the figures' ten; of more, hues in turn, of three shades.

    >>> colours(2, dark=False), len(set(colours(200, dark=True)))
    (['#0072b2', '#e69f00'], 200)
    """
    if count <= len(COLOURS):
        return (DARK if dark else COLOURS)[: max(1, count)]
    shades = (0.66, 0.78, 0.54) if dark else (0.42, 0.56, 0.3)
    found = []
    for number in range(count):
        rgb = colorsys.hls_to_rgb(number * 0.61803 % 1, shades[number % 3], 0.55 + 0.25 * (number // 3 % 2))
        found.append("#" + "".join(f"{round(255 * one):02x}" for one in rgb))
    return found
