"""Edits of a network: arguments of its modules, and what is changed everywhere in it."""

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from qdv_gpu.errors import InputError, check_among, unknown
from qdv_gpu.networks.blank import on_meta, run_blank
from qdv_gpu.networks.depths import set_depth
from qdv_gpu.networks.fit import head_path
from qdv_gpu.networks.network import Network
from qdv_gpu.networks.rebuild import rebuild, set_module
from qdv_gpu.networks.spec import WHOLE
from qdv_gpu.networks.widths import set_width

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "celu": nn.CELU, "elu": nn.ELU, "gelu": nn.GELU, "hardswish": nn.Hardswish, "leaky_relu": nn.LeakyReLU,
    "mish": nn.Mish, "relu": nn.ReLU, "relu6": nn.ReLU6, "selu": nn.SELU, "sigmoid": nn.Sigmoid, "silu": nn.SiLU,
    "softplus": nn.Softplus, "tanh": nn.Tanh,
}  # fmt: skip
_GATES = (nn.Sigmoid, nn.Hardsigmoid, nn.Tanh)  # left as they are where there are other activations
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LocalResponseNorm)
NORMS = ("batch", "group", "instance", "none")
GROUPS = 32  # of a group normalisation, as many of them as divide the channels (Wu & He 2018)


@dataclass
class Draft:
    """A network that is being edited.

    Attributes
    ----------
    network : Network
        Its module is ours to change.
    origins : dict of Tensor to str
        The base's tensors, and new ones in their places, to the names that they have in the base.
    copied : set of Tensor
        Those of new blocks, which hold values of the base's beside them and not in their places.
    """

    network: Network
    origins: dict[Tensor, str]
    copied: set[Tensor] = field(default_factory=set)

    @property
    def module(self) -> nn.Module:
        return self.network.module

    def put(self, old: nn.Module, new: nn.Module) -> None:
        """Put a module in the place of another; its tensors are in the places of those of the same names."""
        before = dict([*old.named_parameters(), *old.named_buffers()])
        for name, tensor in [*new.named_parameters(), *new.named_buffers()]:
            if name in before and before[name] in self.origins:
                self.origins.setdefault(tensor, self.origins[before[name]])
                self.copied |= {tensor} if before[name] in self.copied else set()
                tensor.requires_grad_(before[name].requires_grad)
        set_module(self.module, old, new)


def apply_edits(draft: Draft, edits: dict[str, Any]) -> None:
    """Apply edits in their order; arguments of one module that stand together are changed together.

    Raises
    ------
    InputError
        If a path, an argument or a value is unknown or of another kind, or there is nothing that it changes.
    """
    whole: dict[str, Callable[[Draft, Any], None]] = {
        "activation": _set_activation, "norm": _set_norm, "pooling": _set_pooling, "zf": _set_zf, "width": _scale,
    }  # fmt: skip
    assert set(whole) == set(WHOLE)
    for path, group in groupby(edits.items(), lambda edit: edit[0].rpartition(".")[0]):
        if not path:
            for name, value in group:
                whole[name](draft, value)
            continue
        modules = dict(draft.module.named_modules(remove_duplicate=False))
        if path not in modules:
            raise unknown(f"module of {draft.network.name}", path, [name for name in modules if name], alike=0)
        values = {name.rpartition(".")[2]: value for name, value in group}
        old = modules[path]
        depth = values.pop("depth", None) if _is_stage(old) else None
        if values:
            new = rebuild(old, values, path)
            draft.put(old, new)
            old = new
        if depth is not None:
            _deepen(draft, path, old, depth)


def _is_stage(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList | nn.modules.conv._ConvNd)


def _deepen(draft: Draft, path: str, old: nn.Module, depth: Any) -> None:
    between = next((m for m in draft.module.modules() if isinstance(m, _activations(draft.module))), nn.ReLU())
    new, same = set_depth(old, depth, path, copy.deepcopy(between))
    for tensor, source in same.items():
        if source in draft.origins:
            draft.origins[tensor] = draft.origins[source]
            draft.copied.add(tensor)
    if new is not old:
        set_module(draft.module, old, new)


def _scale(draft: Draft, factor: Any) -> None:
    for old, new in set_width(draft.network, factor).items():
        draft.put(old, new)


def _set_zf(draft: Draft, _: Any) -> None:
    """Zeiler & Fergus' (2014) first layer in the place of AlexNet's, 7 x 7 with stride 2; and a second of stride 2."""
    module = draft.module
    paths: list[str] = []

    def note(path: str, child: nn.Module, _input: Any) -> None:
        if isinstance(child, nn.Conv2d) and path not in paths:
            paths.append(path)

    with suppress(InputError):  # of what comes behind them, and may fit when they are changed
        run_blank(draft.network, on_meta(module), note)
    if len(paths) < 2:
        raise InputError(f"zf changes the first two convolutions: {draft.network.name} has {len(paths)}")
    for path, values in zip(paths[:2], ({"kernel_size": 7, "stride": 2}, {"stride": 2}), strict=True):
        old = module.get_submodule(path)
        draft.put(old, rebuild(old, values, path))


def _set_pooling(draft: Draft, kind: Any) -> None:
    """Maximum or average in every pooling by windows; what pools to a given grid is left."""
    check_among("value of pooling", kind, ("avg", "max"), alike=0)
    found = [(p, m) for p, m in draft.module.named_modules() if isinstance(m, nn.MaxPool2d | nn.AvgPool2d)]
    if not found:
        raise InputError(f"pooling={kind} changes nothing: {draft.network.name} has no pooling module with windows")
    for path, old in found:
        same = {"kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding,
                "ceil_mode": old.ceil_mode}  # fmt: skip
        if kind == "avg" and isinstance(old, nn.MaxPool2d):
            if old.return_indices or set(_pair(old.dilation)) != {1}:
                raise InputError(f"pooling=avg: {path} pools with dilation or gives indices, which an average has not")
            draft.put(old, nn.AvgPool2d(**same, count_include_pad=False).train(old.training))  # type: ignore[arg-type]  # as it has them
        elif kind == "max" and isinstance(old, nn.AvgPool2d):
            draft.put(old, nn.MaxPool2d(**same).train(old.training))  # type: ignore[arg-type]  # the same


def _pair(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _activations(module: nn.Module) -> tuple[type[nn.Module], ...]:
    """Classes of its hidden activations: gates only if it has no others."""
    kinds = (*ACTIVATIONS.values(), nn.PReLU, nn.RReLU)
    others = tuple(kind for kind in kinds if kind not in _GATES)
    library = tuple({type(m) for m in module.modules() if type(m).__module__.startswith("timm.layers.activations")})
    gates = ("Sigmoid", "HardSigmoid", "Tanh", "HardSigmoidMe", "SigmoidMe")
    others += tuple(kind for kind in library if kind.__name__ not in gates)
    return others if any(isinstance(m, others) for m in module.modules()) else kinds


def _set_activation(draft: Draft, kind: Any) -> None:
    """Another activation in the place of every one; gates by a sigmoid, beside others, are left."""
    check_among("value of activation", kind, ACTIVATIONS, alike=0)
    found = [m for m in draft.module.modules() if isinstance(m, _activations(draft.module))]
    if not found:
        name = draft.network.name
        raise InputError(f"activation={kind} changes nothing: {name} has no activation module, or calls functions")
    for old in found:
        if type(old) is not ACTIVATIONS[kind]:
            new = ACTIVATIONS[kind]()
            if hasattr(new, "inplace"):
                setattr(new, "inplace", bool(getattr(old, "inplace", False)))  # noqa: B010 - to mypy a submodule
            draft.put(old, new.train(old.training))


def _set_norm(draft: Draft, kind: Any) -> None:
    """Another normalisation of maps in the place of every one; without any, one behind each hidden convolution."""
    check_among("value of norm", kind, NORMS, alike=0)
    module = draft.module
    found = [m for m in module.modules() if _normalises_maps(m)]
    if found:
        channels = _channels_of_responses(draft) if any(isinstance(m, nn.LocalResponseNorm) for m in found) else {}
        for old in found:
            new = _norm(kind, channels.get(old) or _channels(old))
            if type(new) is not type(old):
                inside = list(old.children())  # timm's normalisations hold the activation behind them
                draft.put(old, _like(nn.Sequential(new, *inside) if inside else new, module).train(old.training))
        return
    head = module.get_submodule(head_path(module))
    hidden = [m for m in module.modules() if isinstance(m, nn.Conv2d) and m is not head]
    if kind == "none" or not hidden:
        raise InputError(f"norm={kind} changes nothing: {draft.network.name} has no normalisation of maps")
    for convolution in hidden:
        norm = _like(_norm(kind, convolution.out_channels), module)
        set_module(module, convolution, nn.Sequential(convolution, norm).train(convolution.training))


def _normalises_maps(module: nn.Module) -> bool:
    name = type(module).__name__
    return (isinstance(module, _NORMS) and "1d" not in name) or (isinstance(module, nn.LayerNorm) and "2d" in name)


def _channels(norm: nn.Module) -> int:
    shape = getattr(norm, "normalized_shape", (0,))
    return int(getattr(norm, "num_features", 0) or getattr(norm, "num_channels", 0) or shape[-1])


def _channels_of_responses(draft: Draft) -> dict[nn.Module, int]:
    """Channels of the maps that local response normalisations get."""
    found: dict[str, int] = {}

    def note(path: str, child: nn.Module, given: Any) -> None:
        if isinstance(child, nn.LocalResponseNorm) and isinstance(given, Tensor):
            found[path] = given.shape[1]

    run_blank(draft.network, on_meta(draft.module), note)
    return {draft.module.get_submodule(path): channels for path, channels in found.items()}


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels)


def _like(new: nn.Module, module: nn.Module) -> nn.Module:
    """The module with the type and device of a network's numbers."""
    first = next(module.parameters(), None)
    return new if first is None else new.to(first)
