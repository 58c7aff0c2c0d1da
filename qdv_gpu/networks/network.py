"""A network with what is needed to feed it and to name its layers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from qdv_gpu.errors import InputError, check_side, check_whole, short, unknown
from qdv_gpu.networks.guard import guarded
from qdv_gpu.networks.identity import replaced


@dataclass(frozen=True)
class Base:
    """What a variant was made of.

    Attributes
    ----------
    name : str
    module : nn.Module
        Without numbers, on the meta device; where the variant has a head for other classes, so has it.
    shapes : dict of str to tuple of int
        Of its own tensors.
    origins : dict of str to str
        The variant's tensors that hold those of the base, whole or carried into another shape, to their names there.
    trained : bool
        Whether the weights are the variant's own, and none of the base's.
    """

    name: str
    module: nn.Module
    shapes: dict[str, tuple[int, ...]]
    origins: dict[str, str]
    trained: bool


@dataclass(frozen=True)
class Network:
    """A network in evaluation mode with what is needed to feed it and to name its layers.

    Attributes
    ----------
    spec : str
        What it was built by: a name with its arguments and edits.
    source : str
        Where its weights are from: a file, "imagenet" or "none".
    name : str
        Its label in tables and file names.
    module : nn.Module
    layers : dict of str to str
        The default layers: name to dotted module path, in forward order.
    image_size : int
        Side of the square input in pixels that it was made or trained for.
    resize : int
        Length in pixels that the shorter side of an image is resized to before the centre is cut out, where images are
        cropped.
    interpolation : str
        Of that resizing: "bilinear", "bicubic", ...
    squash : bool
        Whether both sides are resized to that, whatever the image's proportions.
    channels : int
        Input channels.
    mean, std : tuple of float
        Of the channels, for pixels in 0..1.
    bgr : bool
        Whether it takes blue first.
    class_token : bool
        Whether the first token of its layers is one that stands for the image.
    metadata : dict
        What its checkpoint says of the fine-tuning; empty otherwise.
    base : Base or None
        Of a variant, what it was made of.
    """

    spec: str
    source: str
    name: str
    module: nn.Module
    layers: dict[str, str]
    image_size: int
    resize: int
    interpolation: str
    squash: bool
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool
    class_token: bool
    metadata: dict[str, Any]
    base: Base | None = None

    @property
    def device(self) -> torch.device:
        """Where its parameters are; the CPU if it has none."""
        return self._first.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its first parameter, and of the images that it takes; float32 if it has none."""
        return self._first.dtype

    @property
    def _first(self) -> torch.Tensor:
        return next(self.module.parameters(), torch.empty(0))

    def __call__(self, inputs: torch.Tensor) -> Any:
        """What the module gives for inputs [B, C, H, W]; InputError, with its line, for what its code raises."""
        with guarded(f"{self.name} cannot be run on a batch of {len(inputs)}"):
            return self.module(inputs)

    def at_size(self, image_size: int | None) -> "Network":
        """The same network for images of another side in pixels; None leaves it as it is."""
        if image_size is None:
            return self
        if check_whole("image size", image_size) < 1:
            raise InputError(f"image size must be at least 1 pixel, got {image_size}")
        if check_side(image_size) == self.image_size:
            return self
        return replace(self, image_size=image_size, resize=round(self.resize * image_size / self.image_size))

    def has(self, layer: str) -> bool:
        """Whether `layer` is a layer name or a module path of this network."""
        return layer in self.layers or layer in dict(self.module.named_modules())

    def select(self, layers: Iterable[str] | None = None) -> dict[str, str]:
        """Map layer names (or dotted module paths) to module paths; None selects the default layers.

        Raises
        ------
        InputError
            For a name that the network does not have, with close matches.
        """
        if layers is None:
            if not self.layers:
                raise InputError(f"no layer of {self.name} stands out: name some, e.g. {self._some_paths()}")
            return dict(self.layers)
        selected: dict[str, str] = {}
        for layer in layers:
            if not layer or not self.has(layer):
                paths = [path for path, _ in self.module.named_modules() if path]
                raise unknown(f"layer of {self.name}", layer, [*self.layers, *paths])
            selected[layer] = self.layers.get(layer, layer)
        if not selected:
            raise InputError(f"at least one layer of {self.name} is required")
        return selected

    def _some_paths(self) -> str:
        return ", ".join([path for path, _ in self.module.named_modules() if path][:5])


class ReplacedError(InputError):
    """A forward pass has put another module in the place of a submodule."""


def check_network(network: Any) -> None:
    """InputError unless this is a Network."""
    if not isinstance(network, Network):
        raise InputError(f"a network as load_network gives it is required, got {short(network)}")


def check_replaced(name: str, before: Mapping[str, nn.Module], module: nn.Module) -> list[str]:
    """Paths of the submodules that a forward pass has replaced; `before` are those there were, by path.

    Raises
    ------
    ReplacedError
        If one computes something else than what it replaces: the results would depend on how often the network was run.
    """
    found = replaced(before, module)
    for path, differs in found.items():
        if differs:
            kinds = [type(one.get(path)).__name__ for one in (before, dict(module.named_modules()))]
            old, new = ("none" if kind == "NoneType" else kind for kind in kinds)
            raise ReplacedError(
                f"{name} puts another module in the place of its submodule {path} during a forward pass ({new} for "
                f"{old}): make all of them before, in __init__, and choose among them in forward"
            )
    return list(found)
