"""What a network is, as two digests: what it computes, and with which numbers."""

import functools
import inspect
import re
from collections.abc import Iterator, Mapping
from hashlib import sha256
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from qdv_gpu.errors import InputError

_LIBRARIES = ("torch", "torchvision")  # whose code changes with their version, and not under a user's hands
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def structure_digest(module: nn.Module) -> str:
    """Digest of what a module computes, its weights aside: hexadecimal SHA-256.

    It covers `repr(module)`, plain attributes of all submodules (numbers, texts, tuples of them, functions), and the
    bytecode of the classes that are not torch's or torchvision's, so that another kernel size in a factory, or in the
    middle of a `forward`, gives another digest, and another comment does not. What it cannot see is what these call
    outside of their classes.

    >>> structure_digest(nn.MaxPool2d(2)) == structure_digest(nn.MaxPool2d(3))
    False
    """
    digest = sha256(_ADDRESS.sub("", repr(module)).encode())
    classes: dict[type, None] = {}
    for path, child in module.named_modules():
        classes |= dict.fromkeys(type(child).__mro__)
        attributes = {name: _plain(value) for name, value in sorted(vars(child).items()) if name != "training"}
        shown = {name: text for name, text in attributes.items() if text is not None and not name.startswith("_")}
        digest.update(f"{path}{shown}".encode())
    for one in classes:
        if one is not object and one.__module__.partition(".")[0] not in _LIBRARIES:
            for name, value in sorted(vars(one).items()):
                for function in _functions(value):
                    digest.update(f"{one.__qualname__}.{name}{_code(function.__code__, function.__doc__)}".encode())
    return digest.hexdigest()


def weights_digest(module: nn.Module) -> str:
    """Digest of a module's parameters and buffers: names, types, shapes and bytes; hexadecimal SHA-256.

    Raises
    ------
    InputError
        If a tensor has no values (on the meta device).
    """
    digest = sha256()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_meta:
            raise InputError(f"tensor {name} of the network has no values: it is on the meta device")
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def replaced(before: Mapping[str, nn.Module], module: nn.Module) -> dict[str, bool]:
    """Paths of the submodules that are others than `before`, and whether they compute something else.

    What replaces one computes the same if both digests are the same, and the mode where it matters: a new `ReLU`, and
    not a new `Dropout`. One that was not there does if it has no weights.
    """
    after = dict(module.named_modules())
    return {
        path: not _is_equivalent(before.get(path), after.get(path))
        for path in {**before, **after}
        if before.get(path) is not after.get(path)
    }


def _is_equivalent(old: nn.Module | None, new: nn.Module | None) -> bool:
    if new is None:
        return False
    if old is None:
        return not new.state_dict()
    if structure_digest(old) != structure_digest(new) or weights_digest(old) != weights_digest(new):
        return False
    pairs = zip(old.modules(), new.modules(), strict=True)
    return all(a.training == b.training or not _heeds_mode(b) for a, b in pairs)


def _heeds_mode(module: nn.Module) -> bool:
    code = getattr(module.forward, "__code__", None)
    return code is None or "training" in code.co_names


def _plain(value: Any) -> str | None:
    """Text for a value that does not refer to other objects; None for another."""
    if isinstance(value, FunctionType):
        return f"{value.__qualname__}{_code(value.__code__, value.__doc__)}"
    if isinstance(value, functools.partial):
        return f"{_plain(value.func)}{_plain(value.args)}{_plain(tuple(value.keywords.items()))}"
    if isinstance(value, tuple | list):
        return str([_plain(one) for one in value])
    if inspect.isbuiltin(value) or isinstance(value, type):
        return str(value.__qualname__)
    if value is None or isinstance(value, bool | int | float | complex | str | torch.dtype | torch.memory_format):
        return repr(value)
    return None


def _functions(value: Any) -> Iterator[FunctionType]:
    """The functions of an attribute of a class: itself, what a static or class method holds, or a property's."""
    if isinstance(value, property):
        yield from (one for one in (value.fget, value.fset) if isinstance(one, FunctionType))
    value = inspect.unwrap(getattr(value, "__func__", value))
    if isinstance(value, FunctionType):
        yield value


def _code(code: CodeType, doc: str | None = None) -> str:
    """What a function does, without its text, its line numbers and its docstring."""
    constants = [
        _code(value) if isinstance(value, CodeType) else str(sorted(map(repr, value)))
        if isinstance(value, frozenset) else repr(value)
        for value in code.co_consts
        if value is None or value != doc
    ]  # fmt: skip
    return f"{code.co_code.hex()}{code.co_names}{constants}"
