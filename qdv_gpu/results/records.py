"""What an analysis found, as plain records."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qdv_gpu.errors import InputError, short
from qdv_gpu.scores.quality import LayerScores, Score

if TYPE_CHECKING:
    from qdv_gpu.results.comparison import Comparison


@dataclass(frozen=True)
class AnalysedLayer:
    """One output of one network.

    Attributes
    ----------
    network, layer : str
    position : int
        Of the layer in its network, from 1.
    features, samples : int
    tokens : {"cls", "mean", "all"} or None
        What was taken of the layer's tokens, if it has any.
    perplexity : float
    engine : str
        Of t-SNE.
    Z : array
        float32 [S, N, 2]: the maps, one for each seed.
    kl : list of float
        KL(P || Q) of each map.
    scores : tuple of LayerScores
        One for each k.
    stages : dict
        Seconds and peak memory in bytes of activations, pca, tsne and quality.
    X : array or None
        float32 [N, n]: the components, where they are kept.
    """

    network: str
    layer: str
    position: int
    features: int
    samples: int
    tokens: str | None
    perplexity: float
    engine: str
    Z: np.ndarray
    kl: list[float]
    scores: tuple[LayerScores, ...]
    stages: dict[str, dict[str, float]]
    X: np.ndarray | None = None

    @property
    def labelled(self) -> bool:
        """Whether the images have labels; without, what needs them is NaN."""
        return not math.isnan(self.scores[0].mean.nh)

    @property
    def title(self) -> str:
        """Its name in tables and figures, with what was taken of its tokens."""
        return self.layer if self.tokens is None else f"{self.layer} [{self.tokens}]"

    @property
    def seconds(self) -> float:
        """Of all stages, for one map."""
        return round(sum(stage["seconds"] for stage in self.stages.values()) / len(self.Z), 3)

    def of(self, k: int) -> Score:
        """The mean scores for k neighbours."""
        return self.scored(k).mean

    def scored(self, k: int) -> LayerScores:
        """All scores for k neighbours; InputError if there are none."""
        found = next((one for one in self.scores if one.k == k), None)
        if found is None:
            there = ", ".join(str(one.k) for one in self.scores)
            raise InputError(f"layer {self.layer} of {self.network} has scores for k = {there}, not for {short(k)}")
        return found

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each k and map: a row of layers.csv."""
        about = {"network": self.network, "layer": self.layer, "features": self.features, "samples": self.samples}
        about["perplexity"] = self.perplexity
        return [
            {**about, **vars(row), "kl": kl, "seconds": self.seconds}
            for one in self.scores
            for row, kl in zip(one.maps, self.kl, strict=True)
        ]


@dataclass(frozen=True)
class Predictions:
    """What a network says of each image: class number int64 [N], and its probability float32 [N]."""

    classes: np.ndarray
    probabilities: np.ndarray

    def accuracy(self, labels: np.ndarray) -> float:
        """Share of the images whose label [N] it says."""
        return float((self.classes == labels).mean())


@dataclass(frozen=True)
class Analysis:
    """The outcome of `analyze`.

    Attributes
    ----------
    out : Path
        The run folder.
    layers : list of AnalysedLayer
        Network by network, in forward order.
    predictions : dict of str to Predictions
        By network; of those whose classes are the images'.
    figures : list of Path
    comparison : Comparison or None
        Of two networks on images with labels.
    """

    out: Path
    layers: list[AnalysedLayer]
    predictions: dict[str, Predictions]
    figures: list[Path]
    comparison: "Comparison | None" = None

    @property
    def k(self) -> list[int]:
        """The numbers of neighbours that there are scores for."""
        return [one.k for one in self.layers[0].scores]

    def layer(self, network: str, layer: str) -> AnalysedLayer:
        """One of the layers, by name."""
        return next(one for one in self.layers if (one.network, one.layer) == (network, layer))
