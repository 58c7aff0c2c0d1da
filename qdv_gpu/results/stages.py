"""The stages of an analysis and what each depends on: the keys under which the store keeps them.

    weights                      a network after fine-tuning
    outputs                      how often each layer is called, and how wide its outputs are
    predictions                  classes and probabilities of the images
    thumbnails                   small pictures of the images
    components → map → scores    a layer's principal components; a t-SNE map for each seed; scores for each k

A number in VERSIONS is raised when the code of its stage would give other results. What changes no result (threads,
memory, the size of batches, the store's place) is in no key.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qdv_gpu.data.images import Images
from qdv_gpu.networks.identity import structure_digest, weights_digest
from qdv_gpu.networks.layers import LayerName
from qdv_gpu.networks.network import Network
from qdv_gpu.results.store import Key

VERSIONS = {"weights": 2, "outputs": 3, "predictions": 2, "components": 4, "map": 6, "scores": 4}


@dataclass(frozen=True)
class Subject:
    """A network and the images that it is shown, as the keys see them.

    Attributes
    ----------
    label : str
        The class of the module, for people.
    structure, weights : str
        Digests of what it computes, and with which numbers.
    feeding : dict
        How images become its input: mean, std, bgr, channels, image size, precision, kind of device.
    images : str
        Digest of the images' contents.
    """

    label: str
    structure: str
    weights: str
    feeding: Mapping[str, Any]
    images: str

    @classmethod
    def of(cls, network: Network, images: Images, *, image_size: int | None, precision: str) -> "Subject":
        """Of a network on its device."""
        feeding = {
            "mean": network.mean,
            "std": network.std,
            "bgr": network.bgr,
            "channels": network.channels,
            "image_size": image_size or network.image_size,
            "resized": image_size is not None,  # images that are normalised already keep their size otherwise
            "precision": precision,
            "device": network.device.type,
        }
        module = network.module
        return cls(type(module).__name__, structure_digest(module), weights_digest(module), feeding, images.digest)

    def key(self, stage: str, layer: str = "", **parameters: Any) -> Key:
        """The key of a stage that depends on the network and the images, and on `parameters`."""
        own = {"structure": self.structure, "weights": self.weights, "images": self.images, **self.feeding}
        return Key(
            stage, VERSIONS[stage], {**own, **parameters}, label=f"{self.label}-{layer}" if layer else self.label
        )


def outputs_key(subject: Subject, paths: Sequence[str], classes: int, *, tokens: str) -> Key:
    """How often the modules `paths` are called, how wide their outputs are, and whether the network has the classes."""
    return subject.key("outputs", paths=list(paths), classes=classes, tokens=tokens)


def predictions_key(subject: Subject) -> Key:
    """What the network says of the images."""
    return subject.key("predictions")


def components_key(
    subject: Subject, layer: LayerName, *, tokens: str | None, normalise: str, pca: int, columns: int
) -> Key:
    """A layer's components.

    `layer` is by module path, `tokens` what is taken of them if there are any, `columns` those that the PCA works with.
    """
    return subject.key(
        "components", str(layer), path=layer.path, call=layer.call, tokens=tokens, normalise=normalise, pca=pca,
        columns=columns,
    )  # fmt: skip


def map_key(components: Key, *, seed: int, **parameters: Any) -> Key:
    """One map of a layer: perplexity, iterations, learning rate, engine, seed."""
    label = f"{components.label}-{seed}"
    return Key("map", VERSIONS["map"], {**parameters, "seed": seed}, (components.digest,), label)


def scores_key(maps: Sequence[Key], labels: str, *, k: int) -> Key:
    """The scores of a layer's maps, of all its seeds in order, for one k; `labels` is the labels' digest."""
    parents = tuple(one.digest for one in maps)
    return Key("scores", VERSIONS["scores"], {"labels": labels, "k": k}, parents, f"{maps[0].label}-k{k}")


def thumbnails_key(images: Images) -> Key:
    """Small pictures of images, which any network's run may show."""
    return Key("thumbnails", 1, {"images": images.digest}, label=images.name)


def weights_key(network: Network, train: Images, test: Images, settings: Mapping[str, Any]) -> Key:
    """A network after fine-tuning, from the weights that it has now, on its kind of device."""
    module = network.module
    parameters = {
        "structure": structure_digest(module),
        "start": weights_digest(module),
        "images": [images.digest for images in (train, test)],
        "labels": [images.labels_digest for images in (train, test)],
        "feeding": [network.mean, network.std, network.bgr, network.channels],
        "device": network.device.type,
        **settings,
    }
    return Key("weights", VERSIONS["weights"], parameters, label=type(module).__name__)
