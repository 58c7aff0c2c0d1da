"""The figures of an analysis, from its records."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from qdv_gpu.report.maps import plot_maps
from qdv_gpu.report.nh import plot_nh
from qdv_gpu.results.records import AnalysedLayer
from qdv_gpu.scores.quality import LayerScores
from qdv_gpu.scores.statistics import standard_error


def maps_figure(layers: Sequence[AnalysedLayer], labels: np.ndarray | None, classes: Sequence[str]) -> Figure:
    """The maps of the first seed, a row or more for each network, with the first k's NH.

    Beyond 20 classes those are named whose mean hit over all layers is lowest.

    Parameters
    ----------
    layers : sequence of AnalysedLayer
    labels : array, optional
        int64 [N].
    classes : sequence of str
    """
    maps, groups = [layer.Z[0] for layer in layers], [layer.network for layer in layers]
    titles = [layer.title for layer in layers]
    if labels is None:
        faithful = [
            "" if math.isnan(value) else f"trustworthiness {value:.3f}"
            for value in (layer.scores[0].mean.trustworthiness for layer in layers)
        ]
        return plot_maps(maps, titles=titles, subtitles=faithful, groups=groups)[0]
    hits = np.mean([layer.scores[0].hits.mean(dim=0).numpy() for layer in layers], axis=0)  # [N]
    counts = np.bincount(labels, minlength=len(classes))
    sums = np.bincount(labels, weights=hits, minlength=len(classes))
    figure, _ = plot_maps(
        maps,
        labels,
        classes,
        titles=titles,
        subtitles=[f"NH {layer.scores[0].mean.nh:.3f}" for layer in layers],
        groups=groups,
        difficulty=np.where(counts > 0, 1 - sums / np.maximum(counts, 1), np.nan),
    )
    return figure


def nh_figure(layers: Sequence[AnalysedLayer], labels: np.ndarray, k: int) -> Figure:
    """NH by layer of each network; of two with equally many layers also the second's less the first's.

    The standard error of a difference is that of the two networks' influence values on the same images, so it allows
    for what they share.

    Parameters
    ----------
    layers : sequence of AnalysedLayer
    labels : array
        int64 [N].
    k : int
        One of those that there are scores for.
    """
    networks: dict[str, list[AnalysedLayer]] = {}
    for layer in layers:
        networks.setdefault(layer.network, []).append(layer)
    differences, errors = {}, {}
    if len(networks) == 2:
        (first, ours), (second, theirs) = networks.items()
        if len(ours) == len(theirs):
            pairs = [(a.scored(k), b.scored(k)) for a, b in zip(ours, theirs, strict=True)]
            name = f"{second} − {first}"
            differences[name] = [b.mean.nh - a.mean.nh for a, b in pairs]
            errors[name] = [_difference_error(a, b, labels) for a, b in pairs]
    space = {network: [layer.of(k).nh_feature_space for layer in own] for network, own in networks.items()}
    figure, _ = plot_nh(
        {network: [layer.of(k).nh for layer in own] for network, own in networks.items()},
        {network: [layer.of(k).standard_error for layer in own] for network, own in networks.items()},
        layers={network: [layer.title for layer in own] for network, own in networks.items()},
        space=None if any(math.isnan(value) for values in space.values() for value in values) else space,
        chance=layers[0].of(k).chance,
        k=k,
        differences=differences,
        difference_errors=errors,
    )
    return figure


def _difference_error(a: LayerScores, b: LayerScores, labels: np.ndarray) -> float:
    """Standard error of b's NH less a's, map by map of the same seeds."""
    seeds = [two.nh - one.nh for one, two in zip(a.maps, b.maps, strict=True)]
    return standard_error(b.spread - a.spread, labels, seed_values=seeds)
