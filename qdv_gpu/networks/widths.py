"""Wider and narrower: every number of channels times a factor."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qdv_gpu.errors import InputError, is_real, short
from qdv_gpu.networks.blank import needed, on_meta, run_blank
from qdv_gpu.networks.fit import head_path
from qdv_gpu.networks.network import Network
from qdv_gpu.networks.rebuild import rebuild

_Conv = nn.modules.conv._ConvNd


def set_width(network: Network, factor: Any) -> dict[nn.Module, nn.Module]:
    """The modules of a network that is so many times as wide, by those in whose places they are.

    What convolutions and linear layers give is scaled, but for the head; what they and the normalisations take follows
    from a forward pass, so that the images' channels stay, and what is concatenated or flattened fits. Equal numbers of
    channels stay equal, as sums need, and are rounded to what groups divide; the groups of a depthwise convolution are
    its channels.

    Raises
    ------
    InputError
        If the factor is not positive, a module cannot be built again, or the network cannot run so.

    Examples
    --------
    >>> from qdv_gpu.networks.load import load_network
    >>> network = load_network(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 1)))
    >>> [(new.in_channels, new.out_channels) for new in set_width(network, 2).values()]
    [(1, 8), (8, 2)]
    """
    if not is_real(factor) or not 0 < float(factor) < math.inf:
        raise InputError(f"width must be a positive number, got {short(factor)}")
    module = network.module
    head = head_path(module)
    divisors = _divisors(module)
    changes: dict[str, dict[str, Any]] = {}
    for path, child in module.named_modules():
        if isinstance(child, _Conv | nn.Linear) and path != head and not _depthwise(child):
            name = "out_features" if isinstance(child, nn.Linear) else "out_channels"
            before = getattr(child, name)
            divisor = divisors.get(before, 1)
            changes[path] = {name: divisor * max(1, math.floor(before * float(factor) / divisor + 0.5))}
    meta, before = on_meta(module), on_meta(module)  # one that changes, and one that no hook is in
    for path, values in changes.items():
        _become(meta.get_submodule(path), before.get_submodule(path), values, path)

    def follow(path: str, child: nn.Module, given: Any) -> None:
        values = needed(child, given)
        if values:
            if isinstance(child, _Conv) and _depthwise(child):
                fits = values["in_channels"]
                values |= {"groups": fits, "out_channels": child.out_channels // child.groups * fits}
            changes[path] = changes.get(path, {}) | values
            _become(child, before.get_submodule(path), changes[path], path)

    try:
        run_blank(replace(network, name=f"{network.name} with width={factor}"), meta, follow)
    except InputError as error:
        run_blank(network, before)  # or it is not the width
        raise InputError(
            f"width cannot be changed of {network.name}, which has sizes that are no module's arguments: {error}"
        ) from None
    found: dict[nn.Module, nn.Module] = {}
    for path, values in changes.items():
        old = module.get_submodule(path)
        found[old] = rebuild(old, values, path)
    return found


def _depthwise(module: nn.Module) -> bool:
    return isinstance(module, _Conv) and module.groups == module.in_channels > 1


def _divisors(module: nn.Module) -> dict[int, int]:
    """What must divide the scaled number of channels, by the number before: the groups of what gives or takes it."""
    found: dict[int, int] = {}
    for child in module.modules():
        pairs: list[tuple[int, int]] = []
        if isinstance(child, _Conv) and not _depthwise(child):
            pairs = [(child.in_channels, child.groups), (child.out_channels, child.groups)]
        elif isinstance(child, nn.GroupNorm):
            pairs = [(child.num_channels, child.num_groups)]
        for channels, groups in pairs:
            found[channels] = math.lcm(found.get(channels, 1), groups)
    return found


def _become(module: nn.Module, before: nn.Module, values: dict[str, Any], path: str) -> None:
    """Make a module what another one is with new arguments, in place, also while it is called; without numbers."""
    with torch.device("meta"):
        new = rebuild(before, values, path)
    module.__dict__.update({name: value for name, value in new.__dict__.items() if "hook" not in name})
