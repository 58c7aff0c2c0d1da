"""One output of one layer: the keys of its stages, and what of them is in the store."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdv_gpu.features.pca import columns_for
from qdv_gpu.networks.layers import LayerName
from qdv_gpu.results.checks import ARRAYS, check_components, check_map, check_scores
from qdv_gpu.results.records import AnalysedLayer
from qdv_gpu.results.run import scores_of
from qdv_gpu.results.stages import Subject, components_key, map_key, scores_key
from qdv_gpu.results.store import Key, Record, Store
from qdv_gpu.scores.quality import LayerScores
from qdv_gpu.studies.settings import Settings
from qdv_gpu.tsne.estimator import TSNE


def tsne_of(settings: Settings, device: torch.device) -> TSNE:
    """The estimator that the settings ask for."""
    return TSNE(
        perplexity=settings.perplexity,
        iterations=settings.iterations,
        learning_rate=settings.learning_rate,
        engine=settings.engine,
        device=str(device),
    )


@dataclass
class Output:
    """One output of a layer: the keys of its stages, and what of them is in the store.

    Attributes
    ----------
    name, place : LayerName
        By the layer's name, and by its module path.
    features : int
    tokens : str or None
        What is taken of its tokens, if it has any.
    subject : Subject
    settings : Settings
    labels : str
        Digest of the images' labels.
    samples : int
        Number of images.
    engine : str
        Of t-SNE.
    found : Record or None
        The components.
    maps : dict of int to Record or None
        By seed.
    scores : dict of int to Record or None
        By k.
    """

    name: LayerName
    place: LayerName
    features: int
    tokens: str | None
    subject: Subject
    settings: Settings
    labels: str
    samples: int
    engine: str
    columns: int = 0
    found: Record | None = None
    maps: dict[int, Record | None] = field(default_factory=dict)
    scores: dict[int, Record | None] = field(default_factory=dict)

    @property
    def missing_seeds(self) -> list[int]:
        """Of the maps that are not there."""
        return [seed for seed, record in self.maps.items() if record is None]

    def look(self, store: Store) -> None:
        """Find what is in the store, of a PCA with as many columns as memory allowed then."""
        for columns in columns_for(self.settings.pca):
            self._look(store, columns)
            if self.complete or self.found is not None:
                return
        self._look(store, columns_for(self.settings.pca)[0])

    def _look(self, store: Store, columns: int) -> None:
        self.columns = columns
        samples, seeds = self.samples, self.settings.seeds
        self.found = store.read(self.components_key, partial(check_components, samples=samples, features=self.features))
        self.maps = {seed: store.read(self.map_key(seed), partial(check_map, samples=samples)) for seed in range(seeds)}
        self.scores = {
            k: store.read(self.scores_key(k), partial(check_scores, samples=samples, k=k, seeds=seeds))
            for k in self.settings.neighbors
        }

    @property
    def complete(self) -> bool:
        """Whether all maps and scores are there."""
        return None not in self.maps.values() and None not in self.scores.values()

    @property
    def components_key(self) -> Key:
        s = self.settings
        return components_key(
            self.subject, self.place, tokens=self.tokens, normalise=s.normalise, pca=s.pca, columns=self.columns
        )

    def map_key(self, seed: int) -> Key:
        s = self.settings
        return map_key(
            self.components_key, seed=seed, perplexity=float(s.perplexity), iterations=s.iterations,
            learning_rate=s.learning_rate if s.learning_rate == "auto" else float(s.learning_rate), engine=self.engine,
        )  # fmt: skip

    def scores_key(self, k: int) -> Key:
        return scores_key([self.map_key(seed) for seed in range(self.settings.seeds)], self.labels, k=k)

    def address(self) -> dict[str, Any]:
        """Where its stages are in the store, for run.json."""
        return {
            "layer": str(self.name),
            "features": self.features,
            "tokens": self.tokens,
            "components": self.components_key.digest,
            "scores": {str(k): self.scores_key(k).digest for k in self.scores},
        }

    def pca_cost(self) -> float:
        """How long the PCA may take, in units that compare the stages (about a second of two cores)."""
        return 0.0 if self.found is not None else 0.1 + 3e-8 * self.samples * self.features

    def maps_cost(self) -> float:
        """The same of the maps that are missing."""
        N, iterations = self.samples, self.settings.iterations
        descent = 6.7e-11 * N**2 * iterations if self.engine == "exact" else 1e-7 * N * iterations
        return len(self.missing_seeds) * (0.1 + descent)

    def scores_cost(self) -> float:
        """The same of the scores that are missing."""
        return 0.1 + 4e-9 * self.samples**2 * len(self.maps) if None in self.scores.values() else 0.0

    def stages(self) -> Iterator[Key]:
        """Of all its stages."""
        yield self.components_key
        yield from (self.map_key(seed) for seed in self.maps)
        yield from (self.scores_key(k) for k in self.scores)

    def beside(self, others: Iterable[Settings], store: Store) -> list["Output"]:
        """The same layer of analyses that differ in perplexity alone, of the same components, as far as it goes."""
        found = []
        for settings in others:
            output = replace(self, settings=settings)
            output._look(store, self.columns)
            found.append(output)
        return found

    def components(self) -> Record:
        """The components, which are in the store."""
        assert self.found is not None
        return self.found

    def keep_components(self, X: Tensor, columns: int, timings: dict[str, Any], store: Store) -> None:
        """Keep the components X [N, n]; maps and scores of others are none of theirs."""
        if columns != self.columns:
            self._look(store, columns)
        arrays, about = {"X": X.cpu().numpy()}, {"features": self.features, "timings": timings}
        store.write(self.components_key, arrays=arrays, about=about)
        self.found = Record(about, arrays, store.path)

    def keep_map(self, seed: int, Z: Tensor, about: dict[str, Any], store: Store) -> None:
        """Keep one map Z [N, 2]."""
        arrays = {"Z": Z.cpu().numpy()}
        store.write(self.map_key(seed), arrays=arrays, about=about)
        self.maps[seed] = Record(about, arrays, store.path)

    def keep_scores(self, scores: LayerScores, timing: dict[str, float], store: Store) -> None:
        """Keep the scores for one k."""
        arrays = {name: getattr(scores, name).cpu().numpy() for name in ARRAYS}
        about = {"maps": [asdict(row) for row in scores.maps], "mean": asdict(scores.mean), "timing": timing}
        store.write(self.scores_key(scores.k), arrays=arrays, about=about)
        self.scores[scores.k] = Record(about, arrays, store.path)

    @property
    def Z(self) -> np.ndarray:
        """All maps, float32 [S, N, 2]."""
        return np.stack([record.arrays["Z"] for record in self.maps.values() if record is not None])

    def scored(self, k: int) -> LayerScores:
        """The scores for one k, which are in the store."""
        record = self.scores[k]
        assert record is not None
        return scores_of(record, k)

    def record(self, network: str, position: int, samples: int) -> AnalysedLayer:
        """All of it, for tables and figures."""
        maps = [record for record in self.maps.values() if record is not None]
        timings = {} if self.found is None else self.found.about["timings"]
        tsne = [record.about["timing"] for record in maps]
        quality = [record.about["timing"] for record in self.scores.values() if record is not None]
        stages = {
            **timings,
            "tsne": {"seconds": round(sum(t["seconds"] for t in tsne), 3), "peak_bytes": _most(tsne)},
            "quality": {"seconds": max(t["seconds"] for t in quality), "peak_bytes": _most(quality)},
        }
        return AnalysedLayer(
            network=network,
            layer=str(self.name),
            position=position,
            features=self.features,
            samples=samples,
            tokens=self.tokens,
            perplexity=self.settings.perplexity,
            engine=maps[0].about["engine"],
            Z=self.Z,
            kl=[record.about["kl"] for record in maps],
            scores=tuple(self.scored(k) for k in self.scores),
            stages=stages,
            X=None if self.found is None else self.found.arrays["X"],
        )


def _most(timings: Iterable[Mapping[str, float]]) -> float:
    return max(timing["peak_bytes"] for timing in timings)
