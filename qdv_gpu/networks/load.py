"""Networks from what a user has: a name, a factory, a module, a checkpoint."""

import hashlib
import logging
import math
import numbers
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdv_gpu.errors import LARGEST, SIDE, InputError, as_path, check_count, check_side, listed, short
from qdv_gpu.files import text_of
from qdv_gpu.machine import resolve_device, seeded
from qdv_gpu.networks.build import build
from qdv_gpu.networks.copies import shared_copy
from qdv_gpu.networks.fit import head_classes, load_state
from qdv_gpu.networks.guard import guarded
from qdv_gpu.networks.layers import check_memory, check_size
from qdv_gpu.networks.network import Network, ReplacedError
from qdv_gpu.networks.spec import Spec, flat_edits
from qdv_gpu.networks.stages import default_layers
from qdv_gpu.networks.variant import Variant, edited, with_head
from qdv_gpu.networks.weights import Tensors, read_weights

logger = logging.getLogger(__name__)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SIZES = (224, 32, 64, 28, 96, 128, 16, 8, 256, 299)  # that a network is tried at which does not say its own
CROP = 0.875  # of the shorter side, where nothing is said: 224 of 256 pixels
CLASSES = 1 << 20  # of a head at most
CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")
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
        return _normalising(_with_classes(_ready(spec, device), num_classes, seed), mean, std)
    if not isinstance(spec, str | nn.Module | Variant):
        kind = type(spec).__name__
        raise InputError(f"a network is a name, an nn.Module, a Network or a Variant, got {kind}")
    if isinstance(spec, Variant) and isinstance(spec.base, Network):
        network = _variant_of(spec.base, spec, image_size, seed, device)
        return _normalising(_with_classes(network, num_classes, seed), mean, std)
    given = spec.base if isinstance(spec, Variant) else spec
    if isinstance(spec, nn.Module):
        asked = Spec(type(spec).__name__)
    else:
        asked = spec.spec if isinstance(spec, Variant) else Spec.parse(spec)
    source, state, metadata = _weights(asked.checkpoint or weights)
    held = metadata.get("network")
    if held not in (None, asked.base) and _structure(held) != asked.structure:
        raise InputError(f"checkpoint {source} holds {held}, not {asked.built}")

    with seeded(seed):
        shared = isinstance(given, nn.Module)
        if isinstance(given, nn.Module):
            module, about = shared_copy(given), dict[str, Any]()
        else:
            module, about = build(asked.name, asked.arguments, pretrained=str(source) == "imagenet")
        with guarded(f"network {asked.built} cannot be put in evaluation mode"):
            module.eval()
        _check_names(module, asked.built)
        as_made = state is None and (shared or (":" in asked.name and not _is_timm(module)))
        network = _described(module, asked, "given" if as_made else str(source), about, metadata, image_size)
        edit = partial(edited, edits=asked.edits, carry=asked.carry, name=asked.built, image_size=image_size, seed=seed)
        own = None
        if asked.edits and state is not None and held != asked.base:
            own = edit(replace(network, module=shared_copy(module)), trained=True)
            try:
                load_state(own.module, state, asked.name, source, shared=True)
            except InputError:
                if held is not None:
                    raise
                own = None  # so it is the base's
        if own is None and state is not None:
            load_state(module, state, asked.name, source, shared=shared)
        network = own or (edit(network) if asked.edits else network)
        network = replace(network, spec=asked.built, name=asked.label or asked.short)
        if num_classes is not None and head_classes(network.module) != num_classes:
            network = with_head(network, asked.name, num_classes)
    _check_numbers(network.module, asked.built)
    if image_size is not None:
        check_memory(network, image_size)
    moved = network.module.eval() if device is None else network.module.eval().to(resolve_device(device))
    network = replace(network, module=moved)
    network = _normalising(replace(network, layers=default_layers(network)), mean, std)
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
        labels = [Spec.parse(str(one)).label or None if _is_named(one) else None for one in chosen]
    if not chosen:
        raise InputError("at least one network is required")
    given = [label for label in labels if label]
    if twice := next((label for label in given if given.count(label) > 1), None):
        raise InputError(f"two networks are called {twice!r}: give each its own label")
    loaded = [
        load_network(network, weights=weights, image_size=image_size, mean=mean, std=std, device=device)
        for network in chosen
    ]
    names = [text_of(label or network.name) for label, network in zip(labels, loaded, strict=True)]
    long = list(names)
    for position, network in enumerate(loaded):
        path = Path(network.source)
        stem = path.parent.name if path.name == "weights.safetensors" else path.stem
        if path.suffix and names.count(names[position]) > 1 and not labels[position]:
            long[position] = f"{names[position]}-{stem}"
    taken = list(long)
    for position, name in enumerate(long):
        if long.count(name) > 1:
            taken[position] = f"{name}-{long[: position + 1].count(name)}"
    return [replace(network, name=name) for network, name in zip(loaded, taken, strict=True)]


def _is_named(network: Source) -> bool:
    return isinstance(network, str) or (isinstance(network, Variant) and network.named)


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
    module: nn.Module, asked: Spec, source: str, about: Mapping[str, Any], metadata: dict[str, Any],
    image_size: int | None,
) -> Network:  # fmt: skip
    """A module with what it says, or its checkpoint or library, of its images; without edits, and without layers."""
    own = {name: value for name in ("image_size", "image_mean", "image_std", "bgr")
           if (value := getattr(module, name, None)) is not None}  # fmt: skip
    said: dict[str, Any] = {
        name: metadata[name] for name in ("image_size", "image_mean", "image_std") if name in metadata
    }
    known: dict[str, Any] = {**about, **_of_timm(module), **own, **said}
    convolution = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    channels = 3 if convolution is None else convolution.in_channels
    usual = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
    size = _side(known.get("image_size"), asked)
    network = Network(
        spec=asked.base,
        source=source,
        name=asked.label or asked.short,
        module=module,
        layers={},
        image_size=size or SIZES[0],
        resize=0,
        interpolation=str(known.get("interpolation", "bilinear")),
        squash=known.get("crop_mode") == "squash",
        channels=channels,
        mean=usual[0],
        std=usual[1],
        bgr=bool(known.get("bgr", False)),
        class_token=any(
            path.rpartition(".")[2].rstrip("0123456789") in CLASS_TOKENS for path, _ in module.named_parameters()
        ),
        metadata=metadata,
    )
    if (
        channels not in (1, 3)
        and _takes(network, 3, network.image_size)
        and not _takes(network, channels, network.image_size)
    ):
        channels, usual = 3, (IMAGENET_MEAN, IMAGENET_STD)  # the first convolution comes behind something else
        network = replace(network, channels=3, mean=usual[0], std=usual[1])
    network = network if size else replace(network, image_size=_accepted_size(network, image_size))
    for name in ("image_mean", "image_std"):
        values = known.get(name)
        if isinstance(values, Sequence) and len(values) == 3 != channels:  # a library's, of colours
            known[name] = [sum(values) / 3] if channels == 1 else None
    resize = math.floor(network.image_size / known.get("crop", CROP) + 1e-6)
    return _normalising(replace(network, resize=resize), known.get("image_mean"), known.get("image_std"))


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


def _is_timm(module: nn.Module) -> bool:
    return isinstance(getattr(module, "pretrained_cfg", None), dict)


def _of_timm(module: nn.Module) -> dict[str, Any]:
    """What a module of timm's says of the images that it was trained on."""
    if not _is_timm(module):
        return {}
    config: Any = module.pretrained_cfg
    built_for = getattr(getattr(module, "patch_embed", None), "img_size", None)
    found = {
        "image_size": built_for or (config.get("input_size") or [None])[-1],
        "crop": config.get("crop_pct"),
        "crop_mode": config.get("crop_mode"),
        "interpolation": config.get("interpolation"),
        "image_mean": config.get("mean"),
        "image_std": config.get("std"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _side(size: Any, asked: Spec) -> int | None:
    """An image size, of a number or of height and width, which must be the same."""
    sides = set(size) if isinstance(size, Sequence) and not isinstance(size, str) else {size}
    side: Any = sides.pop() if len(sides) == 1 else ""
    if side is None or (isinstance(side, numbers.Integral) and not isinstance(side, bool) and 0 < int(side) <= SIDE):
        return None if side is None else int(side)
    raise InputError(
        f"the image size of {asked.built} must be a positive number of pixels, of a square, got {short(size)}"
    )


def _normalising(network: Network, mean: Any, std: Any) -> Network:
    """The network with other means and standard deviations of its channels, where they are given."""
    return replace(
        network,
        mean=network.mean if mean is None else _of_channels("mean", mean, network),
        std=network.std if std is None else _of_channels("std", std, network),
    )


def _of_channels(name: str, values: Any, network: Network) -> tuple[float, ...]:
    """A number for each channel, of as many or of one."""
    given = [values] if isinstance(values, numbers.Real) else listed(name, values, what="numbers")
    given = given * network.channels if len(given) == 1 else given
    least, most = (1 / LARGEST, LARGEST) if name == "std" else (0, 1)
    if len(given) == network.channels and all(_is_within(v, least, most) for v in given):
        return tuple(map(float, given))
    kind = "positive numbers" if name == "std" else "numbers in 0..1, as pixels are (those of 0..255 divided by 255)"
    raise InputError(f"{name} of {network.name} must be 1 or {network.channels} {kind}, got {short(values)}")


def _is_within(value: Any, least: float, most: float) -> bool:
    real: bool = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and least <= value <= most


def _takes(network: Network, channels: int, size: int) -> bool:
    """Whether the network takes images of so many channels and pixels; an error that no other images mend is raised."""
    try:
        check_size(network, (channels, size, size))
    except ReplacedError:
        raise
    except InputError:
        return False
    return True


def _accepted_size(network: Network, asked: int | None) -> int:
    """The first size that a network takes which does not say its own: that of its images, or a usual one."""
    for size in SIZES if asked is None else (asked, *SIZES):
        if _takes(network, network.channels, size):
            return size
    try:
        check_size(network, (network.channels, SIZES[0], SIZES[0]))
    except InputError as error:
        raise InputError(f"{error} (nor of {SIZES[1:]}: set its attribute image_size)") from error
    return SIZES[0]


def _variant_of(
    base: Network, variant: Variant, image_size: int | None, seed: int, device: str | torch.device | None
) -> Network:
    """A variant of a network that is loaded."""
    base = _ready(base, device)
    network = replace(base, module=shared_copy(base.module))
    spec = variant.spec
    network = edited(
        network, edits=flat_edits(variant.edits), carry=variant.carry, name=spec.built, image_size=image_size, seed=seed
    )
    network = replace(network, spec=spec.built, name=spec.short, module=network.module.eval().to(base.device))
    return replace(network, layers=default_layers(network))


def _with_classes(network: Network, num_classes: int | None, seed: int) -> Network:
    """The network, or one that shares its weights and has a new head for another number of classes."""
    if num_classes is None or head_classes(network.module) == num_classes:
        return network
    with seeded(seed):
        changed = with_head(
            replace(network, module=shared_copy(network.module)), Spec.parse(network.spec).name, num_classes
        )
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


def _weights(weights: Any) -> tuple[str | Path, Tensors | None, dict[str, Any]]:
    """Where weights are from, the tensors unless they come with the network or are random, and what is said of them."""
    if isinstance(weights, Mapping):
        if not all(isinstance(n, str) and isinstance(v, torch.Tensor) for n, v in weights.items()):
            raise InputError("weights must be a name, a file or a state dict of names and tensors")
        return "given", dict(weights), {}
    if weights is not None and not isinstance(weights, str | Path):
        raise InputError(f"weights must be a name, a file or a state dict, got {type(weights).__name__}")
    if weights is None or str(weights) in ("imagenet", "none"):
        return "none" if weights is None else str(weights), None, {}
    file = _weights_file(weights)
    tensors, metadata = read_weights(file)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("network", ""), str):
        raise InputError(f"{file} is damaged (what it says of its network is no text)")
    return file, tensors, metadata


def _weights_file(checkpoint: str | Path) -> Path:
    path = as_path("weights", checkpoint)
    if not path.is_dir():
        return path
    if not (path / "weights.safetensors").is_file():
        raise InputError(f"{path} holds no weights.safetensors: finish `qdv-gpu finetune --out {path}` first")
    return path / "weights.safetensors"
