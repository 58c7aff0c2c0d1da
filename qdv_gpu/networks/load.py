"""Networks from what a user has: a name, a factory, a module, a checkpoint."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from qdv_gpu.errors import InputError, as_path, check_count, check_side, listed
from qdv_gpu.files import text_of
from qdv_gpu.machine import resolve_device, seeded
from qdv_gpu.networks.build import build
from qdv_gpu.networks.copies import shared_copy
from qdv_gpu.networks.fit import head_classes, load_state
from qdv_gpu.networks.guard import guarded
from qdv_gpu.networks.inputs import described, is_timm, normalising
from qdv_gpu.networks.layers import LayerName, check_memory
from qdv_gpu.networks.network import Network
from qdv_gpu.networks.spec import Spec, flat_edits
from qdv_gpu.networks.stages import default_layers
from qdv_gpu.networks.variant import Variant, edited, is_named, with_head
from qdv_gpu.networks.weights import Tensors, read_weights

logger = logging.getLogger(__name__)
CLASSES = 1 << 20  # of a head at most
Source = Network | nn.Module | Variant | str  # what a network is taken from, everywhere
Sources = Source | Sequence[Source] | Mapping[str, Source]  # one or several, or several by their labels


def load_network(
    spec: Source,
    *,
    weights: str | Path | Mapping[str, torch.Tensor] | None = "imagenet",
    num_classes: int | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    device: str | torch.device | None = "auto",
) -> Network:
    """Load a network in evaluation mode.

    Parameters
    ----------
    spec : str, nn.Module, Network or Variant
        `[LABEL=]NAME[(key=value, ...)][ "[" EDIT, ... "]" ][=CHECKPOINT]`, or a module of yours. NAME is a torchvision
        classifier ("alexnet", "vgg19", ...), "timm:MODEL", "caffe_alexnet", "zfnet" or "package.module:factory", where
        the factory, called with the arguments if there are any, returns an `nn.Module` that takes images [B, C, H, W].
        EDIT is MODULE.ARGUMENT=VALUE, or another of `Variant`.
        CHECKPOINT is a file of weights, the output folder of `qdv-gpu finetune`, "imagenet" or "none"; of a variant it
        may be of the base, whose tensors are then kept or carried, or of the variant itself. Its new tensors are
        initialised as torch does it, from `seed`; `describe_variant` says which they are.
        A module's attributes `image_size`, `image_mean`, `image_std` (pixels in 0..1), `bgr` and `named_layers` (a dict
        of name to module path: its default layers) are used where it has them, and timm's `pretrained_cfg` and
        `feature_info`. A module or Network is not changed: the result shares its weights, and is in evaluation mode and
        on `device` on its own.
    weights : str, Path, dict or None
        Where `spec` names no checkpoint: "imagenet" (the weights that come with the network), "none" or None (random,
        from `seed`), a file, as for `read_weights`, or a state dict. With "imagenet" or "none" a module, and what a
        factory returns, is left as it is.
    num_classes : int, optional
        Replace the head by a new one for that many classes. AlexNet gets the paper's: one linear layer on
        maxpool5.
    image_size : int, optional
        Side in pixels of the images that a network will get which does not say its own.
    mean, std : sequence of float, optional
        Of each channel, for pixels in 0..1, instead of the network's own.
    seed : int
        Of random weights, a new head and new tensors.
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
    >>> load_network("small=resnet18(num_classes=10)=none").name
    'small'
    """
    if num_classes is not None:
        check_count("num_classes", num_classes, most=CLASSES)
    if image_size is not None:
        check_side(image_size, "image_size")
    check_count("seed", seed, least=0)
    if isinstance(spec, Network):
        return normalising(_with_classes(_ready(spec, device), num_classes, seed), mean, std)
    if not isinstance(spec, str | nn.Module | Variant):
        kind = type(spec).__name__
        raise InputError(f"a network is a name, an nn.Module, a Network or a Variant, got {kind}")
    if isinstance(spec, Variant) and isinstance(spec.base, Network):
        network = _variant_of(spec.base, spec, image_size, seed, device)
        return normalising(_with_classes(network, num_classes, seed), mean, std)
    network = normalising(_built(spec, weights, num_classes, image_size, seed, device), mean, std)
    logger.debug(
        "%s: %d px, mean %s, std %s, weights %s; layers %s",
        network.name, network.image_size, network.mean, network.std, network.source, ", ".join(network.layers),
    )  # fmt: skip
    return network


def file_digest(spec: str, weights: str) -> str | None:
    """SHA-256 of the file that `load_network` reads weights from, hexadecimal; None if there is none."""
    chosen = Spec.parse(spec).checkpoint or weights
    if chosen in ("imagenet", "none"):
        return None
    with suppress(OSError, InputError), _weights_file(chosen).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
    return None


def load_networks(
    networks: Sources,
    *,
    weights: str | Path = "imagenet",
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: str | torch.device = "auto",
) -> list[Network]:
    """Load one or several networks, as `load_network`, with names that tell them apart.

    A label, or the key of a dict, is a network's name. Others of one name get the folder or file of their weights
    added, or else a number.

    Raises
    ------
    InputError
        If there is none, two have one label, or as `load_network`.
    """
    labels: list[str | None]
    if isinstance(networks, Mapping):
        labels, chosen = [str(label) for label in networks], list(networks.values())
    else:
        chosen = [networks] if isinstance(networks, Source) else listed("networks", networks, what="networks")
        labels = [Spec.parse(str(one)).label or None if is_named(one) else None for one in chosen]
    if not chosen:
        raise InputError("at least one network is required")
    given = [label for label in labels if label]
    if twice := next((label for label in given if given.count(label) > 1), None):
        raise InputError(f"two networks are called {twice!r}: give each its own label")
    loaded = [
        load_network(network, weights=weights, image_size=image_size, mean=mean, std=std, device=device)
        for network in chosen
    ]
    names = _distinct_names(loaded, labels)
    return [replace(network, name=name) for network, name in zip(loaded, names, strict=True)]


def _distinct_names(networks: Sequence[Network], labels: Sequence[str | None]) -> list[str]:
    """A name for each: its label, or its own, where others have it with its weights' folder or file, or a number."""
    names = [text_of(label or network.name) for label, network in zip(labels, networks, strict=True)]
    long = list(names)
    for i, network in enumerate(networks):
        path = Path(network.source)
        if path.suffix and names.count(names[i]) > 1 and not labels[i]:
            long[i] += f"-{path.parent.name if path.name == 'weights.safetensors' else path.stem}"
    return [f"{name}-{long[: i + 1].count(name)}" if long.count(name) > 1 else name for i, name in enumerate(long)]


def select_layers(networks: Sequence[Network], asked: Sequence[LayerName] | None) -> list[dict[str, str]]:
    """The layers of each network, of those asked for; each must be in some network, and each network have one."""
    layers = None if asked is None else [layer.path for layer in asked]
    if layers is None or len(networks) == 1:
        return [network.select(layers) for network in networks]
    has = [[layer for layer in layers if network.has(layer)] for network in networks]
    for layer in layers:
        if not any(layer in own for own in has):
            networks[0].select([layer])
    return [network.select(own) for network, own in zip(networks, has, strict=True)]


class _Weights(NamedTuple):
    """Where weights are from (a file, "given", "imagenet" or "none"), their tensors, and what a file says of them.

    There are no tensors where they come with the network, or are random.
    """

    source: str | Path
    tensors: Tensors | None
    metadata: dict[str, Any]


def _built(  # noqa: PLR0917 - as `load_network`
    spec: str | nn.Module | Variant, weights: Any, num_classes: int | None, image_size: int | None, seed: int,
    device: str | torch.device | None,
) -> Network:  # fmt: skip
    """A network by its name, or of a module: with its weights, edits and head, on the device."""
    given: Any = spec.base if isinstance(spec, Variant) else spec
    if isinstance(spec, nn.Module):
        asked = Spec(type(spec).__name__)
    else:
        asked = spec.spec if isinstance(spec, Variant) else Spec.parse(spec)
    found = _weights(asked.checkpoint or weights)
    held = found.metadata.get("network")
    if held not in (None, asked.base) and _structure(held) != asked.structure:
        raise InputError(f"checkpoint {found.source} holds {held}, not {asked.built}")
    with seeded(seed):
        base = _unedited(given, asked, found, image_size)
        network = _edited(base, asked, found, image_size, seed, shared=isinstance(given, nn.Module))
        network = replace(network, spec=asked.built, name=asked.label or asked.short)
        if num_classes is not None and head_classes(network.module) != num_classes:
            network = with_head(network, asked.name, num_classes)
    _check_numbers(network.module, asked.built)
    if image_size is not None:
        check_memory(network, image_size)
    module = network.module.eval()
    network = replace(network, module=module if device is None else module.to(resolve_device(device)))
    return replace(network, layers=default_layers(network))


def _unedited(given: str | nn.Module, asked: Spec, weights: _Weights, image_size: int | None) -> Network:
    """The network without its edits, and before the tensors of a file are put into it."""
    if isinstance(given, nn.Module):
        module, about = shared_copy(given), dict[str, Any]()
    else:
        module, about = build(asked.name, asked.arguments, pretrained=str(weights.source) == "imagenet")
    with guarded(f"network {asked.built} cannot be put in evaluation mode"):
        module.eval()
    _check_names(module, asked.built)
    has_own = isinstance(given, nn.Module) or (":" in asked.name and not is_timm(module))
    source = "given" if has_own and weights.tensors is None else str(weights.source)
    return described(module, asked, source, about, weights.metadata, image_size)


def _edited(
    base: Network, asked: Spec, weights: _Weights, image_size: int | None, seed: int, *, shared: bool
) -> Network:
    """The network with its weights and its edits.

    The tensors of a file are the variant's own if it says so, or if it says nothing and they fit; else its base's.
    """
    edit = partial(edited, edits=asked.edits, carry=asked.carry, name=asked.built, image_size=image_size, seed=seed)
    if weights.tensors is not None:
        held = weights.metadata.get("network")
        if asked.edits and held != asked.base:
            variant = edit(replace(base, module=shared_copy(base.module)), trained=True)
            try:
                load_state(variant.module, weights.tensors, asked.name, weights.source, shared=True)
            except InputError:
                if held is not None:
                    raise
            else:
                return variant
        load_state(base.module, weights.tensors, asked.name, weights.source, shared=shared)
    return edit(base) if asked.edits else base


def _check_names(module: nn.Module, network: str) -> None:
    """Raise InputError for a submodule that no path leads to, whose name no file can hold, or that is not Python's."""
    if isinstance(module, torch.jit.ScriptModule):
        kind = type(module).__name__
        raise InputError(f"{network} is a {kind}, whose layers cannot be watched: give the module that it was made of")
    for child in module.modules():
        for name in child._modules.keys():  # noqa: SIM118 - a ScriptModule's are no dict
            if not name or "." in name or text_of(name) != name:
                raise InputError(
                    f"{network} has a submodule called {name!r}: a name without dots is required, in UTF-8"
                )


def _check_numbers(module: nn.Module, network: str) -> None:
    """Raise InputError unless all that a module keeps are tensors with numbers."""
    for key, tensor in module.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            kind = type(tensor).__name__
            raise InputError(f"{network} keeps {key} as a {kind}, as quantised networks do: a tensor is required")
        if tensor.is_meta:
            raise InputError(f"{network} has no numbers in {key}, which is on the meta device: give it weights")


def _variant_of(
    base: Network, variant: Variant, image_size: int | None, seed: int, device: str | torch.device | None
) -> Network:
    """A variant of a network that is loaded."""
    base, spec = _ready(base, device), variant.spec
    network = edited(
        replace(base, module=shared_copy(base.module)), edits=flat_edits(variant.edits), carry=variant.carry,
        name=spec.built, image_size=image_size, seed=seed,
    )  # fmt: skip
    network = replace(network, spec=spec.built, name=spec.short, module=network.module.eval().to(base.device))
    return replace(network, layers=default_layers(network))


def _with_classes(network: Network, num_classes: int | None, seed: int) -> Network:
    """The network, or one that shares its weights and has a new head for another number of classes."""
    if num_classes is None or head_classes(network.module) == num_classes:
        return network
    copied = replace(network, module=shared_copy(network.module))
    with seeded(seed):
        changed = with_head(copied, Spec.parse(network.spec).name, num_classes)
    return replace(changed, module=changed.module.to(network.device))


def _structure(held: str) -> str:
    """What decides the module of what a checkpoint holds."""
    with suppress(InputError):
        return Spec.parse(held).structure
    return held


def _ready(network: Network, device: str | torch.device | None) -> Network:
    """A network in evaluation mode on a device: itself, or one that shares its weights."""
    target = network.device if device is None else resolve_device(device)
    if network.device == target and not any(module.training for module in network.module.modules()):
        return network
    return replace(network, module=shared_copy(network.module).to(target).eval())


def _weights(weights: Any) -> _Weights:
    if isinstance(weights, Mapping):
        if not all(isinstance(n, str) and isinstance(v, torch.Tensor) for n, v in weights.items()):
            raise InputError("weights must be a name, a file or a state dict of names and tensors")
        return _Weights("given", dict(weights), {})
    if weights is not None and not isinstance(weights, str | Path):
        raise InputError(f"weights must be a name, a file or a state dict, got {type(weights).__name__}")
    if weights is None or str(weights) in ("imagenet", "none"):
        return _Weights("none" if weights is None else str(weights), None, {})
    file = _weights_file(weights)
    tensors, metadata = read_weights(file)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("network", ""), str):
        raise InputError(f"{file} is damaged (what it says of its network is no text)")
    return _Weights(file, tensors, metadata)


def _weights_file(checkpoint: str | Path) -> Path:
    path = as_path("weights", checkpoint)
    if not path.is_dir():
        return path
    if not (path / "weights.safetensors").is_file():
        raise InputError(f"{path} holds no weights.safetensors: finish `qdv-gpu finetune --out {path}` first")
    return path / "weights.safetensors"
