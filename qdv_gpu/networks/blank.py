"""A network run on a blank image without numbers: on the meta device, where only shapes are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qdv_gpu.errors import InputError, reason
from qdv_gpu.machine import staying
from qdv_gpu.networks.copies import shared_copy
from qdv_gpu.networks.hooks import hooked
from qdv_gpu.networks.network import Network

Enter = Callable[[str, nn.Module, Any], None]  # gets path, module and first input


def on_meta(module: nn.Module) -> nn.Module:
    """A copy of a module without numbers, in evaluation mode.

    >>> on_meta(nn.Linear(2, 3)).weight.device.type
    'meta'
    """
    return shared_copy(module).to("meta").eval()


def run_blank(network: Network, module: nn.Module, enter: Enter | None = None) -> None:
    """Run a module on a blank image of the network's size and channels, on the device that the module is on.

    Raises
    ------
    InputError
        If it cannot take it; the message names the module inside of it that could not go on, and what fits it.
    """
    first = next(module.parameters(), torch.empty(0))
    image = torch.zeros(1, network.channels, network.image_size, network.image_size, dtype=first.dtype,
                        device=first.device)  # fmt: skip
    running: list[tuple[str, nn.Module, Any]] = []

    def before(path: str, child: nn.Module, inputs: tuple[Any, ...], _options: dict[str, Any]) -> None:
        running.append((path, child, inputs[0] if inputs else None))
        if enter is not None:
            enter(*running[-1])

    def after(*_: Any) -> None:
        running.pop()

    paths = [path for path, _ in module.named_modules()]
    watched = hooked(module, paths, before=before, after=after)
    with staying(), _in_one_line(network, running), torch.inference_mode(), watched:
        module(image)


def needed(module: nn.Module, given: Any) -> dict[str, Any]:
    """The arguments of a convolution, linear layer or normalisation that its input needs and that it does not have.

    >>> needed(nn.Conv2d(3, 8, 3), torch.zeros(1, 4, 9, 9)), needed(nn.LayerNorm(4), torch.zeros(1, 4))
    ({'in_channels': 4}, {})
    """
    if not isinstance(given, Tensor) or given.ndim < 2:
        return {}
    has: Any
    fits: Any
    if isinstance(module, nn.modules.conv._ConvNd):
        name, has, fits = "in_channels", module.in_channels, given.shape[-len(module.kernel_size) - 1]
    elif isinstance(module, nn.Linear):
        name, has, fits = "in_features", module.in_features, given.shape[-1]
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        name, has, fits = "num_features", module.num_features, given.shape[1]
    elif isinstance(module, nn.GroupNorm):
        name, has, fits = "num_channels", module.num_channels, given.shape[1]
    elif isinstance(module, nn.LayerNorm):
        channels_first = type(module) is not nn.LayerNorm and given.ndim == 4 and len(module.normalized_shape) == 1
        shape = given.shape[1:2] if channels_first and "2d" in type(module).__name__ else given.shape
        fits = list(shape[-len(module.normalized_shape) :])
        name, has = "normalized_shape", list(module.normalized_shape)
    else:
        return {}
    return {} if has == fits else {name: fits}


@contextmanager
def _in_one_line(network: Network, running: list[tuple[str, nn.Module, Any]]) -> Iterator[None]:
    """Say where a forward pass could not go on."""
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit, GeneratorExit) as error:
        if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
            raise
        said = reason(error)
        if running:
            path, module, given = running[-1]
            kind = type(module).__name__
            for name, value in needed(module, given).items():
                has = f"{path} ({kind}) has {name}={getattr(module, name)}"
                raise InputError(f"{network.name} does not fit together: {has}; add {path}.{name}={value}") from None
            said = f"at {path} ({kind}), {said}" if path else said
        size = f"{network.image_size} x {network.image_size}"
        raise InputError(f"{network.name} cannot take images of {size} pixels: {said}") from error
