"""Many variants of a network that were analysed on the same images, ranked layer by layer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from qdv_gpu.errors import InputError, unknown
from qdv_gpu.results.comparison import side
from qdv_gpu.results.records import AnalysedLayer
from qdv_gpu.scores.ranking import Estimates, Gains, Ranks, estimates, gains, ranks
from qdv_gpu.scores.relation import Relation, halves, relation


@dataclass(frozen=True)
class Trained:
    """One training run of a candidate.

    Attributes
    ----------
    layers : sequence of AnalysedLayer
    hits : array or None
        bool [N]: which images the network gets right.
    accuracy : float
        On the images; NaN if it is not known.
    seconds : float
        Of the training; NaN if they are not known, 0 without training.
    """

    layers: Sequence[AnalysedLayer]
    hits: np.ndarray | None
    accuracy: float
    seconds: float


@dataclass(frozen=True)
class Candidate:
    """One variant of a network.

    Attributes
    ----------
    name : str
    values : mapping of str to value
        What varies, and its value here.
    runs : tuple of Trained
    gmac : float
        Billions of multiplications of one image's forward pass; NaN if they are not known.
    """

    name: str
    values: Mapping[str, Any]
    runs: tuple[Trained, ...]
    gmac: float

    @property
    def accuracy(self) -> float:
        """Mean of the runs."""
        return float(np.mean([run.accuracy for run in self.runs]))

    @property
    def seconds(self) -> float:
        """Of training and analysis, mean of the runs."""
        stages = [[stage for layer in run.layers for stage in layer.stages.values()] for run in self.runs]
        analysis = [sum(stage["seconds"] for stage in own) for own in stages]
        return float(np.mean([run.seconds for run in self.runs]) + np.mean(analysis))


@dataclass(frozen=True)
class RankedLayer:
    """All candidates at one layer.

    Attributes
    ----------
    name : str
    maps, space : Estimates
        NH in the t-SNE maps, and in the layer's own space.
    gains : Gains or None
        Of NH in the maps, over the baseline, if there is one.
    """

    name: str
    maps: Estimates
    space: Estimates
    gains: Gains | None

    @cached_property
    def in_maps(self) -> Ranks:
        """The order by NH in the maps."""
        return ranks(self.maps)

    @cached_property
    def in_layer(self) -> Ranks:
        """The order by NH in the layer's own space."""
        return ranks(self.space)


@dataclass(frozen=True)
class Ranking:
    """The candidates in the order in which they were given, and what is known of their order by NH.

    Attributes
    ----------
    candidates : tuple of Candidate
    k : int
        Neighbours.
    samples : int
    layers : tuple of RankedLayer
    baseline : int or None
        Position among the candidates.
    relation : Relation or None
        NH of one half of the images against accuracy on the other, if it is known which images each candidate gets
        right; else both on all images, without a coefficient; None if accuracies are not known.
    halves : bool
        Whether the relation is of halves.
    left_out : tuple of str
        Names of those that are not ranked, for want of a run.
    dropped : tuple of str
        Names of those that were surely not the best with fewer epochs or images, and went no further.
    """

    candidates: tuple[Candidate, ...]
    k: int
    samples: int
    layers: tuple[RankedLayer, ...]
    baseline: int | None
    relation: Relation | None
    halves: bool
    left_out: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    @property
    def runs(self) -> int:
        """Of each candidate."""
        return len(self.candidates[0].runs)

    @property
    def top(self) -> RankedLayer:
        """The layer that the candidates are ranked by: the last."""
        return self.layers[-1]

    @cached_property
    def order(self) -> list[int]:
        """Positions of the candidates, the highest NH first; equal ones as they were given."""
        return np.argsort(-self.top.maps.nh, kind="stable").tolist()

    @property
    def winner(self) -> int:
        """Position of the candidate with the highest NH."""
        return self.order[0]


def ranked(candidates: Sequence[Candidate], labels: np.ndarray, *, k: int, baseline: str | None = None) -> Ranking:
    """Rank candidates by NH, at every layer that they share; the last one says who is first.

    Layers belong together by position if all candidates have equally many, else by the names that all have, and the
    last of each in any case.

    Parameters
    ----------
    candidates : sequence of Candidate
        Analysed on the same images, with equally many runs. Three or more runs speak of networks trained so, one of
        these trained networks; two give values and no intervals.
    labels : array
        int64 [N].
    k : int
        Neighbours.
    baseline : str, optional
        Name of the candidate that the others are compared with.

    Raises
    ------
    InputError
        If there is no candidate, two have one name, the baseline is not there, or the runs are not equally many.
    """
    names = [candidate.name for candidate in candidates]
    if not names:
        raise InputError("at least one candidate is required")
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise InputError(f"candidates must have names of their own, {twice!r:.60} is there twice")
    if baseline is not None and baseline not in names:
        raise unknown("baseline", baseline, names)
    if not candidates[0].runs:
        raise InputError(f"candidates must have equally many runs, at least one, got none of {names[0]!r:.60}")
    place = None if baseline is None else names.index(baseline)
    shared = _shared(candidates)
    y = torch.from_numpy(labels)
    found = []
    for name, places in shared:
        own = [[run.layers[p].scored(k) for run in one.runs] for one, p in zip(candidates, places, strict=True)]
        in_maps, in_layer = (estimates([side(scores, maps=m) for scores in own], y) for m in (True, False))
        over = None if place is None else gains(in_maps, place, layers=len(shared))
        found.append(RankedLayer(name, in_maps, in_layer, over))
    related, apart = _relation(candidates, [places for _, places in shared], found, y, k)
    return Ranking(tuple(candidates), k, len(labels), tuple(found), place, related, apart)


def _shared(candidates: Sequence[Candidate]) -> list[tuple[str, list[int]]]:
    """Layers that belong together: a name, and the position in each candidate."""
    titles = []
    for one in candidates:
        own = [[layer.title for layer in run.layers] for run in one.runs]
        if any(other != own[0] for other in own):
            raise InputError(f"the runs of {one.name!r:.60} have other layers")
        titles.append(own[0])
    depth = len(titles[0])
    if all(len(own) == depth for own in titles):
        return [(_common([own[i] for own in titles], f"layer {i + 1}"), [i] * len(titles)) for i in range(depth)]
    named = [name for name in titles[0] if all(name in own for own in titles)]
    shared = [(name, [own.index(name) for own in titles]) for name in named]
    last = [len(own) - 1 for own in titles]
    return shared if shared and shared[-1][1] == last else [*shared, ("last layer", last)]


def _common(names: Sequence[str], other: str) -> str:
    return names[0] if len(set(names)) == 1 else other


def _relation(
    candidates: Sequence[Candidate],
    places: Sequence[Sequence[int]],
    found: Sequence[RankedLayer],
    labels: torch.Tensor,
    k: int,
) -> tuple[Relation | None, bool]:
    """NH against accuracy at each layer, and whether each is of its own half of the images."""
    if all(run.hits is not None for one in candidates for run in one.runs):
        first = halves(labels)
        right = [np.mean([np.mean(np.asarray(run.hits)[~first]) for run in one.runs]) for one in candidates]
        nh = [
            [
                np.mean([run.layers[p].scored(k).influence.mean(dim=0).numpy()[first].mean() for run in one.runs])
                for one, p in zip(candidates, layer, strict=True)
            ]
            for layer in places
        ]
        return relation(nh, right), True
    nan, accuracy = np.full(len(places), math.nan), np.array([one.accuracy for one in candidates])
    if np.isnan(accuracy).all():
        return None, False
    return Relation(np.array([layer.maps.nh for layer in found]), accuracy, nan, nan, nan, nan), False
