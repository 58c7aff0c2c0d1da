"""What is in the store of one network's analysis, and what is missing."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdv_gpu.data.images import Images
from qdv_gpu.errors import unknown
from qdv_gpu.features.forward import ForwardPass, network_input
from qdv_gpu.features.pca import columns_for
from qdv_gpu.networks.layers import LayerName, numbered
from qdv_gpu.networks.network import Network
from qdv_gpu.results.records import AnalysedLayer, Predictions
from qdv_gpu.results.run import ARRAYS, scores_of
from qdv_gpu.results.stages import Subject, components_key, map_key, outputs_key, predictions_key, scores_key
from qdv_gpu.results.store import Key, Record, Store
from qdv_gpu.scores.quality import LayerScores
from qdv_gpu.studies.settings import Settings
from qdv_gpu.tsne.estimator import TSNE

OUTPUT = ""  # the network's own output, as a layer's name and path


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
        self.found = store.read(self.components_key)
        self.maps = {seed: store.read(self.map_key(seed)) for seed in range(self.settings.seeds)}
        self.scores = {k: store.read(self.scores_key(k)) for k in self.settings.neighbors}

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
        return 0.0 if self.complete or self.found is not None else 0.1 + 3e-8 * self.samples * self.features

    def maps_cost(self) -> float:
        """The same of the maps that are missing."""
        return len(self.missing_seeds) * (0.1 + 6.7e-11 * self.samples**2 * self.settings.iterations)

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


@dataclass
class Job:
    """The analysis of one network.

    Attributes
    ----------
    network : Network
    subject : Subject
    layers : dict of str to str
        Names and module paths.
    images : Images
        As this network is shown them.
    found : dict
        calls (features of each call of each path), tokens (what is taken of each call's), element (bytes of an
        activation), seconds (of an image), predicts (whether the output is of the images' classes).
    looked : Key
        Under which that is kept.
    settings : Settings
    outputs : list of Output
    said : Record or None
        The predictions.
    """

    network: Network
    images: Images
    subject: Subject
    layers: Mapping[str, str]
    found: dict[str, Any]
    looked: Key
    settings: Settings
    outputs: list[Output]
    said: Record | None = None

    @classmethod
    def find(
        cls,
        network: Network,
        images: Images,
        layers: Mapping[str, str],
        *,
        asked: Sequence[LayerName] | None,
        settings: Settings,
        store: Store,
    ) -> "Job":
        """Look up all that is in the store; runs two images through the network unless that was done before.

        Of layers that are `asked` for by the number of a call, only that output is taken.
        """
        subject = Subject.of(network, images, image_size=settings.image_size, precision=settings.precision)
        looked = outputs_key(subject, list(layers.values()), len(images.classes), tokens=settings.tokens)
        record = store.read(looked)
        found = _tried(network, images, layers, settings) if record is None else record.about
        engine = tsne_of(settings, network.device).engine_for(len(images), network.device.type)
        outputs = [
            Output(name, place, features, tokens, subject, settings, images.labels_digest, len(images), engine)
            for layer, path in layers.items()
            for name, place, features, tokens in zip(
                numbered(layer, len(found["calls"][path])), numbered(path, len(found["calls"][path])),
                found["calls"][path], found["tokens"][path], strict=True,
            )
        ]  # fmt: skip
        for one in asked or []:
            if one.call is not None and one.path in layers and one not in [output.name for output in outputs]:
                raise unknown(f"call of a layer of {network.name}", str(one), [str(o.name) for o in outputs])
        if asked is not None:
            outputs = [o for o in outputs if o.name in asked or LayerName(o.name.path) in asked]
        job = cls(network, images, subject, layers, found, looked, settings, outputs)
        job.look(store)
        return job

    def look(self, store: Store) -> None:
        """Find what is in the store."""
        for output in self.outputs:
            output.look(store)
        self.said = store.read(predictions_key(self.subject)) if self.found["predicts"] else None

    def path(self, source: str) -> str:
        """Module path of a layer, or of the network itself."""
        return OUTPUT if source == OUTPUT else self.layers[source]

    def calls(self, sources: Iterable[str]) -> dict[str, list[int]]:
        """Features of each call of some layers."""
        return {source: self.found["calls"][self.path(source)] for source in sources}

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return int(self.found["element"])

    def missing(self) -> list[tuple[str, list[Output]]]:
        """Layers that a forward pass is needed for, in order, with their outputs."""
        needed = [output for output in self.outputs if not output.complete and output.found is None]
        sources = [source for source in self.layers if any(output.name.path == source for output in needed)]
        missing = [(source, [o for o in self.outputs if o.name.path == source]) for source in sources]
        if self.found["predicts"] and self.said is None:
            name = LayerName(OUTPUT)
            missing.append(
                (OUTPUT, [Output(name, name, self.found["predicts"], None, self.subject, Settings(), "", 0, "")])
            )
        return missing

    def forward_cost(self) -> float:
        """How long the forward passes may take, in the units of `Output.pca_cost`."""
        of_two = float(self.found["seconds"])  # of one image; in a larger batch it takes less
        return 0.5 * of_two * len(self.images) if self.missing() else 0.0

    def cost(self) -> float:
        """The same of all that is missing."""
        outputs = sum(one.pca_cost() + one.maps_cost() + one.scores_cost() for one in self.outputs)
        return self.forward_cost() + outputs

    def reused(self) -> Iterator[str]:
        """What is in the store, in words."""
        maps = [record for output in self.outputs for record in output.maps.values()]
        there = sum(record is not None for record in maps)
        known = sum(output.complete or output.found is not None for output in self.outputs)
        if known or there:
            of = len(self.outputs)
            yield f"{self.network.name}: {known} of {of} layers and {there} of {len(maps)} maps are in the store"

    def keep_outputs(self, store: Store) -> None:
        """Keep what the first two images showed."""
        store.write(self.looked, about=self.found)

    def keep_predictions(self, logits: Tensor, store: Store) -> None:
        """Keep what the network says of the images, from its logits [N, C]."""
        probabilities, classes = logits.softmax(dim=1).max(dim=1)
        arrays = {"classes": classes.cpu().numpy(), "probabilities": probabilities.cpu().numpy()}
        store.write(predictions_key(self.subject), arrays=arrays)
        self.said = Record({}, arrays, store.path)

    def predictions(self) -> Predictions | None:
        """What the network says of the images, if its classes are theirs."""
        return None if self.said is None else Predictions(**self.said.arrays)

    def stages(self) -> Iterator[Key]:
        """Of all stages."""
        yield self.looked
        if self.found["predicts"]:
            yield predictions_key(self.subject)
        for output in self.outputs:
            yield from output.stages()

    def about(self) -> dict[str, Any]:
        """What run.json says of the network."""
        network = self.network
        return {
            "spec": network.spec,
            "weights": network.source,
            "metadata": network.metadata,
            "structure": self.subject.structure,
            "weights_digest": self.subject.weights,
            **self.subject.feeding,
            "images": self.subject.images,
            "layers": dict(self.layers),
        }

    def records(self, samples: int) -> list[AnalysedLayer]:
        """The layers, when all is there."""
        outputs = enumerate(self.outputs, start=1)
        return [output.record(self.network.name, position, samples) for position, output in outputs]


def _tried(network: Network, images: Images, layers: Mapping[str, str], settings: Settings) -> dict[str, Any]:
    """What the first two images show of the layers, and of the output."""
    two = images.take(torch.arange(2))
    pass_ = ForwardPass(
        network, two, dict(layers), settings.image_size, precision=settings.precision, tokens=settings.tokens
    )
    pass_.run()
    predicts, pixels = 0, torch.stack([two[0], two[1]]).to(network.device)
    started = time.perf_counter()
    with torch.inference_mode(), suppress(RuntimeError, ValueError, AssertionError):  # it may not run to its end
        output = network.module(network_input(network, pixels, settings.image_size))
        if isinstance(output, Tensor) and output.shape == (2, len(images.classes)):
            predicts = len(images.classes)
    calls = {path: pass_.calls[name] for name, path in layers.items()} | ({OUTPUT: [predicts]} if predicts else {})
    seconds = (time.perf_counter() - started) / len(two)
    tokens = {
        path: [pass_.taken[name, call] for call in range(len(pass_.calls[name]))] for name, path in layers.items()
    }
    return {"calls": calls, "tokens": tokens, "element": pass_.element, "predicts": predicts, "seconds": seconds}
