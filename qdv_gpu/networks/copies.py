"""Copies of modules that share weights, so that nobody's module is moved, switched or hooked."""

import copy
import functools
from types import MethodType
from typing import Any

import torch
from torch import nn

from qdv_gpu.errors import InputError


def shared_copy(module: nn.Module) -> nn.Module:
    """Copy a module's structure and share its weights.

    Submodules, and containers and methods of submodules, are new objects; parameters are new objects that show the same
    storage, tied where they were tied; buffers are copies. All else (tensors, functions, files) is the same object. The
    copy can be moved to a device, put into evaluation mode and hooked without the other's noticing, but to change its
    weights in place would change both.

    Raises
    ------
    InputError
        If the module is lazy and has not seen a batch yet.

    Examples
    --------
    >>> module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).train()
    >>> other = shared_copy(module).eval()
    >>> module[1].training, other[0].weight.data_ptr() == module[0].weight.data_ptr()
    (True, True)
    """
    module = getattr(module, "_orig_mod", module)  # what torch.compile has wrapped
    if isinstance(module, torch.jit.ScriptModule):
        return copy.deepcopy(module)
    result: nn.Module = _copied(module, {})
    return result


def _copied(value: Any, known: dict[int, Any]) -> Any:
    """A copy of whatever leads to modules and parameters; anything else as it is."""
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, nn.Module):
        return _copied_module(value, known)
    if isinstance(value, nn.Parameter):
        if torch.nn.parameter.is_lazy(value):
            raise InputError("the network has lazy weights without a shape: run one batch through it first")
        result: Any = nn.Parameter(value.detach(), requires_grad=value.requires_grad)
        known[id(value)] = result
        return result
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _copied(value.__self__, known))
    if isinstance(value, functools.partial):
        options = {name: _copied(one, known) for name, one in value.keywords.items()}
        return functools.partial(_copied(value.func, known), *_copied(value.args, known), **options)
    if isinstance(value, dict):
        result = copy.copy(value)
        known[id(value)] = result
        result.update((key, _copied(one, known)) for key, one in value.items())
        return result
    if isinstance(value, list | tuple | set) and not hasattr(value, "_fields"):
        if not any(isinstance(one, nn.Module | MethodType | functools.partial | list | tuple | dict) for one in value):
            return value
        result = type(value)(_copied(one, known) for one in value)
        known[id(value)] = result
        return result
    return value


def _copied_module(module: nn.Module, known: dict[int, Any]) -> nn.Module:
    result = module.__class__.__new__(module.__class__)
    known[id(module)] = result
    attributes = dict(vars(module))
    buffers = attributes.pop("_buffers", {})
    vars(result).update({name: _copied(value, known) for name, value in attributes.items()})
    vars(result)["_buffers"] = {
        name: None if buffer is None else known.setdefault(id(buffer), buffer.detach().clone())
        for name, buffer in buffers.items()
    }
    return result
