"""Names of layers, and what one image shows of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from qdv_gpu.errors import InputError, check_side, check_whole, listed, short
from qdv_gpu.files import readable
from qdv_gpu.machine import free_memory, product_precision
from qdv_gpu.networks.blank import on_meta, run_blank
from qdv_gpu.networks.guard import guarded
from qdv_gpu.networks.hooks import hooked
from qdv_gpu.networks.network import Network, check_network, check_replaced

SMALL = 1 << 26  # bytes of images that are taken to fit, whatever is free


@dataclass(frozen=True)
class LayerName:
    """One output of a layer.

    Attributes
    ----------
    path : str
        The layer's name or module path.
    call : int or None
        Which of the calls in a forward pass, from 1, where the module is called several times.

    >>> str(LayerName("relu", 2)), LayerName.parse("relu@2")
    ('relu@2', LayerName(path='relu', call=2))
    """

    path: str
    call: int | None = None

    def __str__(self) -> str:
        return self.path if self.call is None else f"{self.path}@{self.call}"

    @classmethod
    def parse(cls, text: str) -> "LayerName":
        """From "relu" or "relu@2"; InputError unless it is text."""
        if not isinstance(text, str):
            raise InputError(f"a layer is a name or a module path, got {short(text)}")
        path, _, call = text.rpartition("@")
        return cls(path, int(call)) if path and call.isascii() and call.isdigit() and call[0] != "0" else cls(text)


def read_layers(layers: Any) -> list[LayerName] | None:
    """Layers of one text, separated by commas, or of several; None if nothing is said.

    Raises
    ------
    InputError
        If it is neither.

    >>> [str(layer) for layer in read_layers("relu@2, pool")]
    ['relu@2', 'pool']
    """
    if layers is None:
        return None
    if isinstance(layers, str):
        layers = [part.strip() for part in layers.split(",")]
    return [LayerName.parse(layer) for layer in listed("layers", layers, what="names or module paths")]


def numbered(path: str, calls: int) -> list[LayerName]:
    """Names of the outputs of a layer that is called so often."""
    return [LayerName(path)] if calls == 1 else [LayerName(path, call) for call in range(1, calls + 1)]


@dataclass(frozen=True)
class Call:
    """A call of a submodule in a forward pass.

    Attributes
    ----------
    path : str
    input, output : tuple of int or None
        Their shapes without batch, None if they are no tensors.
    view : bool
        Whether the output is the input in another shape, or the input itself, unchanged.
    """

    path: str
    input: tuple[int, ...] | None
    output: tuple[int, ...] | None
    view: bool = False


def trace_calls(network: Network, image_size: int | None = None) -> list[Call]:
    """Run one blank image through the network and list the calls of all submodules, inner ones first.

    Raises
    ------
    InputError
        If the network cannot take images of that size.
    """
    check_network(network)
    size = network.image_size if image_size is None else image_size
    if check_whole("image size", size) < 1:
        raise InputError(f"image size must be at least 1 pixel, got {size}")
    check_side(size)
    calls: list[Call] = []

    def shape(value: Any) -> tuple[int, ...] | None:
        return tuple(value.shape[1:]) if is_dense(value) else None

    def record(path: str, module: nn.Module, inputs: tuple[Any, ...], _options: dict[str, Any], output: Any) -> None:
        given = inputs[0] if inputs else None
        calls.append(Call(path, shape(given), shape(output), _is_view(module, given, output)))

    # What torch makes a weight of, such as its norm and direction, is no layer.
    paths = [path for path, _ in network.module.named_modules() if path and "parametrizations" not in path.split(".")]
    with hooked(network.module, paths, after=record):
        check_size(network, (network.channels, size, size))
    return calls


def output_names(network: Network, layers: Mapping[str, str], image_size: int | None = None) -> list[str]:
    """Names of the outputs of layers (name to module path): "name@1", "name@2", ... of one that is called twice."""
    calls = Counter(call.path for call in trace_calls(network, image_size))
    return [str(name) for layer, path in layers.items() for name in numbered(layer, calls[path])]


def _is_view(module: nn.Module, given: Any, output: Any) -> bool:
    if not is_dense(given) or not is_dense(output) or next(module.children(), None) is not None:
        return False
    shared = given.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()
    return shared and (given.shape != output.shape or isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd))


def is_dense(value: Any) -> bool:
    """Whether it is a tensor with a shape and a storage, which sparse and nested ones lack."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested


def check_memory(network: Network, size: int, images: int = 1) -> None:
    """Raise InputError if images of `size` x `size` pixels, together in one forward pass, need more than is free."""
    most = 0

    def enter(_path: str, _module: nn.Module, given: Any) -> None:
        nonlocal most
        most = max(most, given.numel() if isinstance(given, Tensor) else 0)

    pixels = network.channels * check_side(size) ** 2
    if images * pixels * network.dtype.itemsize < SMALL:
        return
    with suppress(InputError, RuntimeError, ValueError, NotImplementedError):  # not every network runs without numbers
        run_blank(network.at_size(size), on_meta(network.module), enter)
    needed = 2 * images * max(most, pixels) * network.dtype.itemsize  # what goes into a module, and comes out
    if needed > (free := free_memory(network.device)):
        raise InputError(
            f"{images} image{'s' * (images > 1)} of {size} x {size} pixels need {readable(needed)} of memory in "
            f"{network.name}, {readable(free)} are free: "
            f"a smaller image size{' or batch size' * (images > 1)} is required"
        )


def check_size(network: Network, shape: Sequence[int]) -> None:
    """Run a blank image [C, H, W] through the network; InputError if it cannot take images of that shape.

    What fails with other images only is a mistake of the network's or of ours, and not the images' size.
    """
    check_memory(network, max(shape[1:]))
    image = torch.zeros(1, *shape, dtype=network.dtype, device=network.device)
    lazy = any(is_lazy(one) for one in network.module.parameters())  # it gets its weights here, for good
    before = dict(network.module.named_modules())
    with (
        torch.no_grad() if lazy else torch.inference_mode(),
        product_precision("ieee"),
        guarded(f"{network.name} cannot take images of {' x '.join(map(str, shape[1:]))} pixels"),
    ):
        network.module(image)
    check_replaced(network.name, before, network.module)
