"""What is in the store of one network's analysis, and what is missing."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qdv_gpu.data.images import Images
from qdv_gpu.errors import unknown
from qdv_gpu.features.forward import ForwardPass, computing, network_input
from qdv_gpu.networks.copies import shared_copy
from qdv_gpu.networks.layers import LayerName, numbered, trace_calls
from qdv_gpu.networks.network import Network, check_replaced
from qdv_gpu.results.checks import check_outputs, check_predictions
from qdv_gpu.results.records import AnalysedLayer, Predictions
from qdv_gpu.results.stages import Subject, outputs_key, predictions_key
from qdv_gpu.results.store import Key, Record, Store
from qdv_gpu.studies.output import Output, tsne_of
from qdv_gpu.studies.settings import Settings

logger = logging.getLogger(__name__)
OUTPUT = ""  # the network's own output, as a layer's name and path


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
        activation), seconds (of an image), predicts (whether the output is of the images' classes), channels_last
        (whether the whole network takes that layout: a layer's bits shall not depend on those it is computed with).
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
        record = store.read(looked, partial(check_outputs, paths=list(layers.values()), classes=len(images.classes)))
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
        if asked is not None or any(output.name.call for output in outputs):
            outputs.sort(key=_place(network, layers, asked, settings))
        job = cls(network, images, subject, layers, found, looked, settings, outputs)
        job.look(store)
        return job

    def look(self, store: Store) -> None:
        """Find what is in the store."""
        for output in self.outputs:
            output.look(store)
        check = partial(check_predictions, samples=len(self.images), classes=len(self.images.classes))
        self.said = store.read(predictions_key(self.subject), check) if self.found["predicts"] else None

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
        needed = [output for output in self.outputs if output.found is None]
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
        """Keep what the network says of the images, from its logits [N, C], unless it says NaN of some."""
        if lost := int(logits.isnan().any(dim=1).sum()):
            logger.warning("%s gives NaN for %d of %d images: its predictions are left out", self.network.name, lost,
                           len(logits))  # fmt: skip
            self.found = {**self.found, "predicts": 0}
            return
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


def _place(
    network: Network, layers: Mapping[str, str], asked: Sequence[LayerName] | None, settings: Settings
) -> Callable[[Output], int]:
    """Where an output stands: as it was asked for, or in the forward pass, in which a module may be called again."""
    if asked is not None:
        return lambda output: min(n for n, one in enumerate(asked) if one in (output.name, LayerName(output.name.path)))
    turns: dict[str, list[int]] = {}
    for turn, call in enumerate(trace_calls(network, settings.image_size)):
        turns.setdefault(call.path, []).append(turn)
    return lambda output: turns[layers[output.name.path]][(output.name.call or 1) - 1]


def _tried(network: Network, images: Images, layers: Mapping[str, str], settings: Settings) -> dict[str, Any]:
    """What the first two images show of the layers, and of the output."""
    two = images.take(torch.arange(2))
    pass_ = ForwardPass(
        network, two, dict(layers), settings.image_size, precision=settings.precision, tokens=settings.tokens
    )
    pass_.run()
    predicts, pixels = 0, torch.stack([two[0], two[1]]).to(network.device)
    copied = replace(network, module=shared_copy(network.module))  # since it may keep something of each pass
    before = dict(copied.module.named_modules())
    layout = torch.channels_last if pass_.channels_last else torch.contiguous_format
    with torch.inference_mode(), computing(settings.precision, network.device):
        inputs, times = network_input(network, pixels, settings.image_size), []
        for _ in range(3):  # of which the shortest counts
            own, started = inputs.clone(memory_format=layout), time.perf_counter()
            with suppress(RuntimeError, ValueError, AssertionError):  # it may not run to its end
                output = copied(own)
                if isinstance(output, Tensor) and output.shape == (2, len(images.classes)):
                    predicts = len(images.classes)
            times.append(time.perf_counter() - started)
    check_replaced(network.name, before, copied.module)
    calls = {path: pass_.calls[name] for name, path in layers.items()} | ({OUTPUT: [predicts]} if predicts else {})
    seconds = min(times) / len(two)
    tokens = {
        path: [pass_.taken[name, call] for call in range(len(pass_.calls[name]))] for name, path in layers.items()
    }
    return {
        "calls": calls,
        "tokens": tokens,
        "element": pass_.element,
        "predicts": predicts,
        "seconds": seconds,
        "channels_last": pass_.channels_last,
    }
