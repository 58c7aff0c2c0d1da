"""Two networks that were analysed on the same images, set against each other layer by layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qdv_gpu.errors import InputError, check_among, short
from qdv_gpu.results.records import AnalysedLayer
from qdv_gpu.scores.comparison import Difference, Side, ahead_from, check_margin, class_differences, differences
from qdv_gpu.scores.quality import LayerScores
from qdv_gpu.scores.similarity import cka_matrix, probe_hits

PAIRINGS = ("position", "name", "cka")
Layers = Sequence[AnalysedLayer]


@dataclass(frozen=True)
class LayerPair:
    """A layer of A and one of B.

    Attributes
    ----------
    first, second : AnalysedLayer
        Of A and of B, of their first runs.
    nh, nh_feature_space : tuple of float
        NH of A's layer and of B's in the maps, and in the layers' own space, averaged over the runs.
    in_maps, in_layer : Difference
        Of NH in the t-SNE maps, and in the layers' own space.
    probe : tuple of float
        Accuracy of a linear probe of A's layer, of B's, and the standard error of the difference, of the first runs;
        NaN where the components are not kept.
    class_delta, class_error, class_p : array
        float64 [C]: the difference of each class in the maps, its standard error, and its p-value after the correction
        for the classes, NaN where there is none.
    """

    first: AnalysedLayer
    second: AnalysedLayer
    nh: tuple[float, float]
    nh_feature_space: tuple[float, float]
    in_maps: Difference
    in_layer: Difference
    probe: tuple[float, float, float]
    class_delta: np.ndarray
    class_error: np.ndarray
    class_p: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """B against A.

    Attributes
    ----------
    first, second : str
        Names of A and B.
    k : int
    margin : float
        Differences of NH within it count as none.
    runs : int
        Of each network.
    seeds : int
        Maps of each layer and run, of the run with the fewest.
    layers : tuple of tuple of str
        Titles of all layers of A and of B.
    classes : tuple of str
    pairs : tuple of LayerPair
    cka : array
        float64 [layers of A, layers of B]: debiased linear CKA, of the first runs; NaN where the components are not
        kept.
    hits : array
        float64 [2, N]: hits of each image in the maps of A and of B, averaged over seeds, runs and pairs.
    """

    first: str
    second: str
    k: int
    margin: float
    runs: int
    seeds: int
    layers: tuple[tuple[str, ...], tuple[str, ...]]
    classes: tuple[str, ...]
    pairs: tuple[LayerPair, ...]
    cka: np.ndarray
    hits: np.ndarray

    def ahead_from(self, *, sign: int = 1) -> int | None:
        """Position among the pairs from which B is ahead in the maps (with sign -1 behind), to the last.

        None also if the pairs cross, so that they have no order.
        """
        seconds = [pair.second.position for pair in self.pairs]
        if seconds != sorted(seconds):
            return None
        return ahead_from([pair.in_maps for pair in self.pairs], sign=sign)

    def changed(self, count: int = 12) -> np.ndarray:
        """Positions of the images whose hits differ, the largest difference first, the first of them."""
        difference = np.abs(self.hits[1] - self.hits[0])
        return np.argsort(-difference, kind="stable")[: min(count, np.count_nonzero(difference))]


def compared(
    first: Sequence[Layers],
    second: Sequence[Layers],
    labels: np.ndarray,
    classes: Sequence[str],
    *,
    k: int,
    pair: str | Mapping[str, str] = "position",
    margin: float = 0.02,
) -> Comparison:
    """Compare the analysed layers of two networks.

    Parameters
    ----------
    first, second : sequence of sequence of AnalysedLayer
        Of each run of A, and of B, its layers in order.
    labels : array
        int64 [N].
    classes : sequence of str
    k : int
        Neighbours.
    pair : {"position", "name", "cka"} or mapping of str to str
        Which layers belong together: those at the same position; of the same name; the most alike, in order; or as
        said, of A to B.
    margin : float
        As for `differences`.

    Raises
    ------
    InputError
        If no layers can be paired, or one that is named is not there.
    """
    check_margin(margin)
    check_pairing(pair)
    a, b, margin = first[0], second[0], float(margin)
    cka = _cka(a, b)
    places = _pairs(a, b, cka, pair)
    y = torch.from_numpy(labels)

    scored = [[[run[p].scored(k) for run in runs] for runs, p in ((first, i), (second, j))] for i, j in places]
    in_maps, in_layer = (
        differences([(side(ours, maps=m), side(theirs, maps=m)) for ours, theirs in scored], y, margin=margin)
        for m in (True, False)
    )
    ours, theirs = {i: _probe(a[i], y) for i, _ in places}, {j: _probe(b[j], y) for _, j in places}
    pairs, hit = [], np.zeros((2, len(labels)))
    for number, ((i, j), both_scores) in enumerate(zip(places, scored, strict=True)):
        nh = [float(np.mean([one.mean.nh for one in scores])) for scores in both_scores]
        own = [float(np.mean([one.mean.nh_feature_space for one in scores])) for scores in both_scores]
        hit += [np.mean([one.hits.mean(dim=0).numpy() for one in scores], axis=0) for scores in both_scores]
        neighbors = [[list(one.neighbors) for one in scores] for scores in both_scores]
        of_classes = class_differences(neighbors[0], neighbors[1], y)
        probes = _accuracies(ours[i], theirs[j])
        both = (nh[0], nh[1]), (own[0], own[1])
        pairs.append(LayerPair(a[i], b[j], *both, in_maps[number], in_layer[number], probes, *of_classes))
    return Comparison(
        first=a[0].network,
        second=b[0].network,
        k=k,
        margin=margin,
        runs=len(first),
        seeds=min(len(layer.scored(k).maps) for run in (*first, *second) for layer in run),
        layers=(tuple(layer.title for layer in a), tuple(layer.title for layer in b)),
        classes=tuple(classes),
        pairs=tuple(pairs),
        cka=cka,
        hits=hit / len(places),
    )


def side(scores: Sequence[LayerScores], *, maps: bool) -> list[Side]:
    """What the scores of one layer in each run say of NH in the maps, or in the layer's own space."""
    if maps:
        return [Side(one.spread, tuple(row.nh for row in one.maps)) for one in scores]
    return [Side(one.spread_feature_space[None], (one.mean.nh_feature_space,)) for one in scores]


def check_pairing(pair: Any) -> None:
    """Raise InputError unless `pair` says which layers belong together."""
    if isinstance(pair, Mapping):
        if not pair or not all(isinstance(layer, str) for both in pair.items() for layer in both):
            raise InputError(f"pair must be names of layers of A, each with one of B, got {short(pair)}")
    else:
        check_among("pairing of layers", pair, PAIRINGS)


def _cka(a: Layers, b: Layers) -> np.ndarray:
    """Of each layer of A with each of B, NaN if components are not kept."""
    known = [[layer.X for layer in layers if layer.X is not None] for layers in (a, b)]
    if len(known[0]) < len(a) or len(known[1]) < len(b):
        return np.full((len(a), len(b)), np.nan)
    return cka_matrix(*known).numpy()


def _probe(layer: AnalysedLayer, labels: torch.Tensor) -> np.ndarray | None:
    return None if layer.X is None else probe_hits(layer.X, labels).double().numpy()


def _accuracies(ours: np.ndarray | None, theirs: np.ndarray | None) -> tuple[float, float, float]:
    if ours is None or theirs is None:
        return (float("nan"),) * 3
    return float(ours.mean()), float(theirs.mean()), float((theirs - ours).std(ddof=1) / len(ours) ** 0.5)


def _pairs(a: Layers, b: Layers, cka: np.ndarray, pair: str | Mapping[str, str]) -> list[tuple[int, int]]:
    """Positions of the layers that belong together."""
    names = [[layer.layer for layer in layers] for layers in (a, b)]
    if isinstance(pair, Mapping):
        sides = zip(names, (list(pair), list(pair.values())), (a[0].network, b[0].network), strict=True)
        for own, asked, network in sides:
            for layer in asked:
                check_among(f"layer of {network}", layer, own)
        found = sorted((names[0].index(x), names[1].index(y)) for x, y in pair.items())
    elif pair == "position":
        found = [(i, i) for i in range(min(len(a), len(b)))]
    elif pair == "name":
        found = [(i, names[1].index(name)) for i, name in enumerate(names[0]) if name in names[1]]
    else:
        if np.isnan(cka).any():
            raise InputError("pairing by CKA needs the layers' components: run the analysis again")
        found = _most_alike(cka)
    if not found:
        raise InputError(f"{a[0].network} and {b[0].network} have no layers of one name: pair them by position or cka")
    return found


def _most_alike(cka: np.ndarray) -> list[tuple[int, int]]:
    """As many pairs as the shallower network has layers, in order in both, of the largest sum of CKA.

    >>> _most_alike(np.array([[0.9, 0.1, 0.2], [0.2, 0.3, 0.8]]))
    [(0, 0), (1, 2)]
    """
    if cka.shape[0] > cka.shape[1]:
        return [(i, j) for j, i in _most_alike(cka.T)]
    A, B = cka.shape
    best = np.full((A + 1, B + 1), -np.inf)
    best[0] = 0
    for i in range(1, A + 1):
        for j in range(i, B + 1):
            best[i, j] = max(best[i, j - 1], best[i - 1, j - 1] + cka[i - 1, j - 1])
    found, j = [], B
    for i in range(A, 0, -1):
        while best[i, j] == best[i, j - 1]:
            j -= 1
        found.append((i - 1, j - 1))
        j -= 1
    return found[::-1]


def as_json(comparison: Comparison) -> dict[str, Any]:
    """All numbers of a comparison, for comparison.json."""
    return {
        **{name: getattr(comparison, name) for name in ("first", "second", "k", "margin", "runs", "seeds")},
        "images": comparison.hits.shape[1],
        "layers": [list(titles) for titles in comparison.layers],
        "ahead_from": comparison.ahead_from(),
        "behind_from": comparison.ahead_from(sign=-1),
        "classes": list(comparison.classes),
        "cka": _plain(comparison.cka),
        "pairs": [
            {
                "first": pair.first.layer,
                "second": pair.second.layer,
                "nh": list(pair.nh),
                "nh_feature_space": list(pair.nh_feature_space),
                "in_maps": _plain(vars(pair.in_maps)),
                "in_layer": _plain(vars(pair.in_layer)),
                "probe": _plain(dict(zip(("first", "second", "standard_error"), pair.probe, strict=True))),
                "classes": _plain({"delta": pair.class_delta, "error": pair.class_error, "p": pair.class_p}),
            }
            for pair in comparison.pairs
        ],
    }


def _plain(value: Any) -> Any:
    """A value as JSON has it: numbers that are not known are null."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and value != value else value
