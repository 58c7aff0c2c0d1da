"""A module built again from its own arguments, with some of them changed."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from qdv_gpu.errors import InputError, reason, short, unknown
from qdv_gpu.machine import deterministic
from qdv_gpu.networks.copies import shared_copy
from qdv_gpu.networks.identity import structure_digest

_COUNTS = ("kernel_size", "stride", "dilation", "groups", "in_channels", "out_channels", "in_features", "out_features",
           "num_features", "num_channels", "num_groups")  # fmt: skip
_LEAST = {**dict.fromkeys(_COUNTS, 1), "padding": 0, "output_padding": 0}  # without numbers torch checks none of these
_TENSORS = ("_parameters", "_buffers", "_non_persistent_buffers_set")


def rebuild(module: nn.Module, changes: Mapping[str, Any], where: str = "") -> nn.Module:
    """Build a module from its constructor's arguments, read from its attributes of the same names, some of them new.

    Its tensors are new ones, as the constructor initialises them: torch's own modules as torch does, and not as the
    network around them may have done. Mode, dtype and device are the old module's.

    Parameters
    ----------
    module : nn.Module
    changes : mapping of str to value
        New arguments.
    where : str
        The module's path, for what is said of it.

    Raises
    ------
    InputError
        If an argument is unknown or its value of another kind; if the module does not keep its arguments, so that it
        would be another one without any change; or if it cannot be built so.

    Examples
    --------
    >>> rebuild(nn.Conv2d(3, 64, 11, stride=4, padding=2), {"kernel_size": 7, "stride": 2})
    Conv2d(3, 64, kernel_size=(7, 7), stride=(2, 2), padding=(2, 2))
    """
    shown = f"{where or 'module'} ({type(module).__name__})"
    kinds = [kind for kind in (type(module), _torchs(module)) if kind is not None]
    kind = next((kind for kind in kinds if _lost(module, kind) == []), None)
    known = _parameters(kind or kinds[-1])
    for name, value in changes.items():
        if name not in known:
            raise unknown(f"argument of {shown}", name, known or ["none"], alike=0)
        full, old = f"{where or type(module).__name__}.{name}", _kept(module, name)
        _check_kind(full, old, value, known[name])
        if name in _LEAST and _numeric(old) and _numeric(value):
            _check_counts(full, old, value, _LEAST[name])
    if kind is None:
        parts = ", ".join(f"{where}.{part}".lstrip(".") for part, _ in list(module.named_children())[:3])
        raise InputError(
            f"{shown} cannot be built again: it does not keep {', '.join(_lost(module, type(module)))}"
            + (f"; change its parts, as {parts}" if parts else "")
        )
    first = next((t for t in [*module.parameters(), *module.buffers()] if t.is_floating_point()), None)
    written = ", ".join(f"{name}={value!r}" for name, value in changes.items())
    with _initialised(f"{shown} with {written}") as made:
        made.append(kind(**{**_given(module, kind), **changes}))
    new = made[0] if kind is type(module) else _dressed(module, made[0])
    return new.to(first).train(module.training) if first is not None else new.train(module.training)


def set_module(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, wherever a network holds it."""
    for parent in list(root.modules()):
        for name, child in list(parent._modules.items()):
            if child is old and parent is not new:
                parent._modules[name] = new


@contextmanager
def _initialised(what: str) -> Iterator[list[nn.Module]]:
    """Say in one line why a module cannot be built; refuse one whose constructor leaves memory as it was."""
    made: list[nn.Module] = []
    try:
        with deterministic():
            yield made
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{what} cannot be built: {reason(error)}") from error
    for name, tensor in (pair for module in made for pair in module.state_dict().items()):
        if tensor.is_floating_point() and not tensor.is_meta and tensor.isnan().any():
            raise InputError(f"{what} cannot be built: its constructor does not initialise {name}")


def _torchs(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch that a module of another library's is derived from, with what it adds: timm's StdConv2d."""
    kind = next((one for one in type(module).__mro__ if one.__module__.startswith("torch.nn.modules.")), nn.Module)
    others = (type(module), nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return kind if kind not in others and issubclass(kind, nn.Module) else None


def _dressed(module: nn.Module, plain: nn.Module) -> nn.Module:
    """The module with the tensors and the arguments of a plain one of the class that it is derived from."""
    new = shared_copy(module)
    new.__dict__.update({name: value for name, value in plain.__dict__.items() if name in _TENSORS or name[0] != "_"})
    return new


def _parameters(kind: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """The named arguments of a constructor, but those that the old module's tensors answer."""
    signature = list(inspect.signature(kind.__init__).parameters.values())[1:]
    named = [p for p in signature if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name: p for p in named if not p.name.startswith("_") and p.name not in ("device", "dtype")}


def _given(module: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    """What a module keeps of the arguments."""
    return {name: _kept(module, name) for name in _parameters(kind) if hasattr(module, name)}


def _kept(module: nn.Module, name: str) -> Any:
    """What a module keeps of an argument; of its bias, whether it has one."""
    value = getattr(module, name, None)
    if name == "bias":
        return value is not None if "bias" in module._parameters or not isinstance(value, bool | None) else bool(value)
    return value


def _check_kind(name: str, old: Any, value: Any, parameter: inspect.Parameter) -> None:
    """Raise InputError if a value is of another kind than the old one: a number, a yes or no, or a text."""
    texts = isinstance(old, str) or "str" in str(parameter.annotation) or "Literal" in str(parameter.annotation)
    if isinstance(old, bool):
        if not isinstance(value, bool):
            raise InputError(f"{name} must be True or False, got {short(value)}")
    elif old is not None and _numeric(old) and not (value is None or _numeric(value)):
        if not (texts and isinstance(value, str)):
            raise InputError(f"{name} must be a number like {old!r}, got {short(value)}")
    elif isinstance(old, str) and not (isinstance(value, str) or _numeric(value)):
        raise InputError(f"{name} must be a text like {old!r}, got {short(value)}")


def _check_counts(name: str, old: Any, value: Any, least: int) -> None:
    """Raise InputError unless a value is an integer, or as many as the old one has, each of which is large enough."""
    given = list(value) if isinstance(value, tuple | list) else [value]
    if not all(one is None or (isinstance(one, int) and one >= least) for one in given):
        raise InputError(f"{name} must be an integer of at least {least}, got {short(value)}")
    if isinstance(value, tuple | list) and isinstance(old, tuple) and len(value) != len(old):
        raise InputError(f"{name} must be one integer or {len(old)}, got {short(value)}")


def _numeric(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return bool(value) and all(one is None or _numeric(one) for one in value)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _lost(module: nn.Module, kind: type[nn.Module]) -> list[str]:
    """What a module does not keep, so that a constructor does not give the same module again; [] if it does."""
    known, given = _parameters(kind), _given(module, kind)
    lost = [name for name, p in known.items() if name not in given and p.default is p.empty]
    if lost:
        return lost
    if not (module._forward_hooks or module._forward_pre_hooks):
        with suppress(Exception), torch.device("meta"):
            again = kind(**given)
            again = again if kind is type(module) else _dressed(module, again)
            if structure_digest(again) == structure_digest(module) and _shapes(again) == _shapes(module):
                return []
    return [name for name in known if name not in given] or ["what was changed in it after it was built"]


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}
