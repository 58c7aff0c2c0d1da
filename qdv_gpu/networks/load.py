"""Networks from what a user has: a name, a factory, a module, a checkpoint."""

import importlib
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdv_gpu.errors import InputError
from qdv_gpu.machine import resolve_device
from qdv_gpu.networks.copies import shared_copy
from qdv_gpu.networks.layers import check_size, default_layers, head_path
from qdv_gpu.networks.network import Network
from qdv_gpu.networks.weights import Tensors, read_weights
from qdv_gpu.networks.zoo import AUXILIARY, build

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SIZES = (224, 32, 64, 28, 96, 128, 16, 8, 256, 299)  # that a network is tried at which does not say its own
Source = Network | nn.Module | str  # what a network is taken from, everywhere


def load_network(
    spec: Source,
    *,
    weights: str | Path = "imagenet",
    num_classes: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = "auto",
) -> Network:
    """Load a network in evaluation mode.

    Parameters
    ----------
    spec : str, nn.Module or Network
        A torchvision classifier ("alexnet", "vgg19", ...), "caffe_alexnet", "zfnet", a module of yours, or
        "package.module:factory", where `factory()` returns an `nn.Module` that takes images [B, C, H, W]; its
        attributes `image_size`, `image_mean`, `image_std` (pixels in 0..1), `bgr` and `named_layers` (a dict of
        name to module path: its default layers) are used where it has them, as are those of a module.
        "SPEC=FILE" names the weights too; FILE may be the output folder of `qdv-gpu finetune`. A module or Network is
        not changed: the result shares its weights, and is in evaluation mode and on `device` on its own.
    weights : str or Path
        "imagenet" (torchvision's), "none" (random, from `seed`) or a `.safetensors`, `.pt` or (caffe_alexnet)
        `.npy` file. With "imagenet" or "none" a module, and what a factory returns, is left as it is.
    num_classes : int, optional
        Replace the head by a new one for that many classes. AlexNet gets the paper's: one linear layer on
        maxpool5.
    image_size : int, optional
        Side in pixels of the images that a network will get which does not say its own.
    device : str, torch.device or None
        "auto" is a GPU if there is one; None leaves a module where its weights are.

    Raises
    ------
    InputError
        For an unknown network, weights that do not fit it, are damaged or cannot be downloaded.

    Examples
    --------
    >>> load_network("resnet18", weights="none").layers
    {'relu': 'relu', 'layer1': 'layer1', 'layer2': 'layer2', 'layer3': 'layer3', 'layer4': 'layer4'}
    >>> load_network(torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, stride=2), torch.nn.Conv2d(4, 2, 3, stride=2))).layers
    {'0': '0', '1': '1'}
    """
    if isinstance(spec, Network):
        ready = _ready(spec, device)
        if num_classes is None or head_classes(ready.module) == num_classes:
            return ready
        module = shared_copy(ready.module)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _replace_head(module, spec.spec, num_classes)
        return replace(ready, module=module.to(ready.device))
    given = spec if isinstance(spec, nn.Module) else None
    spec, _, checkpoint = (type(spec).__name__ if isinstance(spec, nn.Module) else spec).partition("=")
    source = _weights_file(checkpoint) if checkpoint else weights
    from_file = str(source) not in ("imagenet", "none")
    state, metadata = read_weights(source) if from_file else ({}, {})
    if metadata.get("network", spec) != spec:
        raise InputError(f"checkpoint {source} holds {metadata['network']}, not {spec}")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if given is not None:
            module = shared_copy(given)
        else:
            module = _from_factory(spec) if ":" in spec else build(spec, imagenet=str(source) == "imagenet")
        if from_file:
            _load_state(module, state, spec, source, shared=given is not None)
        if num_classes is not None and head_classes(module) != num_classes:
            _replace_head(module, spec, num_classes)
    as_made = not from_file and (given is not None or ":" in spec)
    return _described(module, spec, "given" if as_made else str(source), metadata, device, image_size)


def load_networks(
    networks: Source | Sequence[Source],
    *,
    weights: str | Path = "imagenet",
    image_size: int | None = None,
    device: str | torch.device = "auto",
) -> list[Network]:
    """Load one or several networks, as `load_network`, with names that tell them apart.

    Networks of one name get the folder or file of their weights added, or else a number.

    Raises
    ------
    InputError
        If there is none, or as `load_network`.
    """
    chosen = [networks] if isinstance(networks, Source) else list(networks)
    if not chosen:
        raise InputError("at least one network is required")
    loaded = [load_network(network, weights=weights, image_size=image_size, device=device) for network in chosen]
    names = [network.name for network in loaded]
    for position, network in enumerate(loaded):
        path = Path(network.source)
        stem = path.parent.name if path.name == "weights.safetensors" else path.stem
        if path.suffix and [other.name for other in loaded].count(network.name) > 1:
            names[position] = f"{network.name}-{stem}"
    taken = list(names)
    for position, name in enumerate(names):
        if names.count(name) > 1:
            taken[position] = f"{name}-{names[: position + 1].count(name)}"
    return [replace(network, name=name) for network, name in zip(loaded, taken, strict=True)]


def select_layers(networks: Sequence[Network], layers: Sequence[str] | None) -> list[dict[str, str]]:
    """The layers of each network, of those asked for; each must be in some network, and each network have one."""
    if layers is None or len(networks) == 1:
        return [network.select(layers) for network in networks]
    has = [[layer for layer in layers if network.has(layer)] for network in networks]
    for layer in layers:
        if not any(layer in own for own in has):
            networks[0].select([layer])
    return [network.select(own) for network, own in zip(networks, has, strict=True)]


def _described(  # noqa: PLR0917 - what is known of it
    module: nn.Module, spec: str, source: str, metadata: dict[str, Any], device: str | torch.device | None,
    image_size: int | None,
) -> Network:  # fmt: skip
    """A module with what it says, or its checkpoint, of its images, and with its default layers."""
    convolution = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    channels = 3 if convolution is None else convolution.in_channels
    usual = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
    known = metadata.get("image_size") or getattr(module, "image_size", None)
    network = Network(
        spec=spec,
        source=source,
        name=re.sub(r"[^\w.-]", "_", spec.rpartition(":")[2]),
        module=module.eval() if device is None else module.eval().to(resolve_device(device)),
        layers={},
        image_size=int(known or SIZES[0]),
        channels=channels,
        mean=tuple(getattr(module, "image_mean", usual[0])),
        std=tuple(getattr(module, "image_std", usual[1])),
        bgr=bool(getattr(module, "bgr", False)),
        metadata=metadata,
    )
    network = network if known else replace(network, image_size=_accepted_size(network, image_size))
    return replace(network, layers=default_layers(network))


def _accepted_size(network: Network, asked: int | None) -> int:
    """The first size that a network takes which does not say its own: that of its images, or a usual one."""
    for size in SIZES if asked is None else (asked, *SIZES):
        with suppress(InputError):
            check_size(network, (network.channels, size, size))
            return size
    try:
        check_size(network, (network.channels, SIZES[0], SIZES[0]))
    except InputError as error:
        raise InputError(f"{error} (nor of {SIZES[1:]}: set its attribute image_size)") from error
    return SIZES[0]


def _ready(network: Network, device: str | torch.device | None) -> Network:
    """A network in evaluation mode on a device: itself, or one that shares its weights."""
    target = network.device if device is None else resolve_device(device)
    if network.device == target and not any(module.training for module in network.module.modules()):
        return network
    return replace(network, module=shared_copy(network.module).to(target).eval())


def _weights_file(checkpoint: str) -> Path:
    path = Path(checkpoint)
    if not path.is_dir():
        return path
    if not (path / "weights.safetensors").is_file():
        raise InputError(f"{path} holds no weights.safetensors: finish `qdv-gpu finetune --out {path}` first")
    return path / "weights.safetensors"


def _from_factory(spec: str) -> nn.Module:
    module_name, _, factory_name = spec.partition(":")
    if "" not in sys.path:
        sys.path.append("")  # the current folder may hold the factory
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, ValueError) as error:
        raise InputError(f"network {spec}: {module_name} cannot be imported ({error})") from None
    except AttributeError:
        raise InputError(f"network {spec}: {module_name} has no {factory_name!r}") from None
    module = factory() if callable(factory) else factory
    if not isinstance(module, nn.Module):
        raise InputError(f"network {spec}: the factory must return an nn.Module, got {type(module).__name__}")
    return module


def _load_state(module: nn.Module, state: Tensors, spec: str, source: str | Path, *, shared: bool) -> None:
    if spec in AUXILIARY:
        state = {name: tensor for name, tensor in state.items() if not name.lower().startswith("aux")}
        for name in [name for name in module._modules if name.lower().startswith("aux")]:
            setattr(module, name, None)
        setattr(module, "aux_logits", False)  # noqa: B010 (mypy takes a plain assignment for a submodule)
    head = head_path(module)
    for path in ("classifier", head):  # "classifier" alone is AlexNet's head after fine-tuning
        weight = state.get(f"{path}.weight")
        if weight is not None and weight.shape[0] != head_classes(module):
            _replace_head(module, spec, weight.shape[0])
    own = module.state_dict()
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    misfits = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    for problem, names in (
        ("lacks", missing),
        ("has no place for", surplus),
        ("has another shape of", sorted(misfits)),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"weights {source} do not fit {spec}: the file {problem} {names[0]}{more}")
    # Copied into weights that a given module shares, they would change it.
    fitting = {name: tensor.to(own[name].dtype) for name, tensor in state.items()}
    module.load_state_dict(fitting, assign=shared)


def head_classes(module: nn.Module) -> int:
    """Number of logits that the head gives."""
    head = module.get_submodule(head_path(module))
    return head.out_features if isinstance(head, nn.Linear) else head.out_channels  # type: ignore[return-value]  # one of the two


def _replace_head(module: nn.Module, spec: str, num_classes: int) -> None:
    if spec in ("alexnet", "caffe_alexnet"):
        module.classifier = nn.Linear(9216, num_classes)
        return
    path = head_path(module)
    old = module.get_submodule(path)
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
    else:
        assert isinstance(old, nn.Conv2d)
        size, stride, padding = old.kernel_size, old.stride, old.padding
        new = nn.Conv2d(old.in_channels, num_classes, size, stride, padding)  # type: ignore[arg-type]  # pairs
    module.set_submodule(path, new)
