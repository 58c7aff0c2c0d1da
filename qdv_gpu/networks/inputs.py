"""Which images a network takes: what its checkpoint, itself or its library says of them, or else what is tried."""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from qdv_gpu.errors import LARGEST, SIDE, InputError, is_real, listed, short
from qdv_gpu.networks.layers import check_size
from qdv_gpu.networks.network import Network, ReplacedError
from qdv_gpu.networks.spec import Spec

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SIZES = (224, 32, 64, 28, 96, 128, 16, 8, 256, 299)  # that a network is tried at which does not say its own
CROP = 0.875  # of the shorter side, where nothing is said: 224 of 256 pixels
CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")


def described(  # noqa: PLR0917 - what is known of it
    module: nn.Module, asked: Spec, source: str, about: Mapping[str, Any], metadata: dict[str, Any],
    image_size: int | None,
) -> Network:  # fmt: skip
    """A module as a `Network`, without layers: what it gets is what its checkpoint, itself or its library says.

    Where nobody says it, the number of channels is that of the first convolution, the size one that the network takes
    (`image_size`, if it does), and the normalisation ImageNet's for three channels, else to -1..1.
    """
    known = _known(module, about, metadata)
    convolution = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    channels = 3 if convolution is None else convolution.in_channels
    size = _side(known.get("image_size"), asked)
    names = (path.rpartition(".")[2].rstrip("0123456789") for path, _ in module.named_parameters())
    network = Network(
        spec=asked.base, source=source, name=asked.label or asked.short, module=module, layers={},
        image_size=size or SIZES[0], resize=0, interpolation=str(known.get("interpolation", "bilinear")),
        squash=known.get("crop_mode") == "squash", channels=channels, mean=IMAGENET_MEAN, std=IMAGENET_STD,
        bgr=bool(known.get("bgr", False)), class_token=any(name in CLASS_TOKENS for name in names), metadata=metadata,
    )  # fmt: skip
    of_colours = replace(network, channels=3)
    if channels not in (1, 3) and _takes(of_colours) and not _takes(network):
        network = of_colours  # the first convolution comes behind something else
    if size is None:
        network = replace(network, image_size=_accepted_size(network, image_size))
    if network.channels != 3:
        half = (0.5,) * network.channels
        network = replace(network, mean=half, std=half)
    for name in ("image_mean", "image_std"):
        values = known.get(name)
        if isinstance(values, Sequence) and len(values) == 3 != network.channels:  # a library's, of colours
            known[name] = [sum(values) / 3] if network.channels == 1 else None
    resize = math.floor(network.image_size / known.get("crop", CROP) + 1e-6)
    return normalising(replace(network, resize=resize), known.get("image_mean"), known.get("image_std"))


def _known(module: nn.Module, about: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of a network's images: by torchvision (`about`) or timm, the module, or, above all, a checkpoint."""
    names = ("image_size", "image_mean", "image_std")
    own = {name: getattr(module, name, None) for name in (*names, "bgr")}
    return {
        **about,
        **_of_timm(module),
        **{name: value for name, value in own.items() if value is not None},
        **{name: metadata[name] for name in names if name in metadata},
    }


def is_timm(module: nn.Module) -> bool:
    return isinstance(getattr(module, "pretrained_cfg", None), dict)


def _of_timm(module: nn.Module) -> dict[str, Any]:
    """What a module of timm's says of the images that it was trained on."""
    if not is_timm(module):
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


def normalising(network: Network, mean: Any, std: Any) -> Network:
    """The network with other means and standard deviations of its channels, where they are given."""
    return replace(
        network,
        mean=network.mean if mean is None else _of_channels("mean", mean, network),
        std=network.std if std is None else _of_channels("std", std, network),
    )


def _of_channels(name: str, values: Any, network: Network) -> tuple[float, ...]:
    """A number for each channel, of as many or of one."""
    given: list[Any] = [values] if isinstance(values, numbers.Real) else listed(name, values, what="numbers")
    given = given * network.channels if len(given) == 1 else given
    least, most = (1 / LARGEST, LARGEST) if name == "std" else (0, 1)
    if len(given) == network.channels and all(is_real(v) and least <= v <= most for v in given):
        return tuple(map(float, given))
    kind = "positive numbers" if name == "std" else "numbers in 0..1, as pixels are (those of 0..255 divided by 255)"
    raise InputError(f"{name} of {network.name} must be 1 or {network.channels} {kind}, got {short(values)}")


def _takes(network: Network) -> bool:
    """Whether the network takes images of its size and channels; an error that no other images mend is raised."""
    try:
        check_size(network, (network.channels, network.image_size, network.image_size))
    except ReplacedError:
        raise
    except InputError:
        return False
    return True


def _accepted_size(network: Network, asked: int | None) -> int:
    """The first size that a network takes which does not say its own: that of its images, or a usual one."""
    for size in SIZES if asked is None else (asked, *SIZES):
        if _takes(replace(network, image_size=size)):
            return size
    try:
        check_size(network, (network.channels, SIZES[0], SIZES[0]))
    except InputError as error:
        raise InputError(f"{error} (nor of {SIZES[1:]}: set its attribute image_size)") from error
    return SIZES[0]
