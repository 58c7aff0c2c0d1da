"""A copy of a network that shares its weights: for another thread, another device or other hooks."""

import copy
import functools
from collections import deque
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from qdv_gpu.errors import InputError


def shared_copy(module: nn.Module) -> nn.Module:
    """Copy a module's structure and let it share the weights.

    New are the modules, the `Parameter`s (in the same storage; what is tied stays tied), the buffers (clones), and
    lists, tuples, dicts and sets, so that state a network keeps in `self` is each copy's own. Bound methods of modules,
    also in `functools.partial`, belong to the copies, and so do modules that a function closes over. Everything else is
    shared as it is: functions, forward hooks, locks, tensors that are neither parameters nor buffers. What
    `torch.compile` wraps is copied without it, and a `ScriptModule` whole. The copy can be moved, put in another mode
    and hooked without any effect on the original.

    Raises
    ------
    InputError
        If a lazy parameter has no shape yet.

    Examples
    --------
    >>> module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).train()
    >>> other = shared_copy(module).eval()
    >>> module[1].training, other[0].weight.data_ptr() == module[0].weight.data_ptr()
    (True, True)
    """
    copied: nn.Module = _copy(module, {})
    return copied


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    """The copy of anything that a module holds; `memo` has those made before, by the id of the original."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, nn.Module):
        return _copy_module(value, memo)
    if isinstance(value, nn.Parameter):
        return memo.setdefault(id(value), _alias(value))
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        return MethodType(value.__func__, _copy(value.__self__, memo))
    if isinstance(value, FunctionType) and any(map(_holds_module, value.__closure__ or ())):
        return _copy_function(value, memo)
    if type(value) is functools.partial:
        arguments = [_copy(argument, memo) for argument in value.args]
        named = {name: _copy(argument, memo) for name, argument in value.keywords.items()}
        return functools.partial(_copy(value.func, memo), *arguments, **named)
    if isinstance(value, tuple | frozenset):
        return _copy_fixed(value, memo)
    if isinstance(value, list | deque | dict | set):
        return _copy_container(value, memo)
    return value


def _holds_module(cell: CellType) -> bool:
    """Whether a function's closure reaches a module there, itself or by one of its methods."""
    try:
        value = cell.cell_contents
    except ValueError:  # nothing is bound yet
        return False
    return isinstance(getattr(value, "__self__", value), nn.Module)


def _copy_function(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """The function with the copies in place of the modules that it closes over."""
    cells = tuple(
        CellType(_copy(cell.cell_contents, memo)) if _holds_module(cell) else cell
        for cell in function.__closure__ or ()
    )
    copied = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__dict__.update(function.__dict__)
    return copied


def _copy_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    if isinstance(module, torch.jit.ScriptModule):
        return memo.setdefault(id(module), copy.deepcopy(module))
    wrapped = module.__dict__.get("_modules", {}).get("_orig_mod")
    if wrapped is not None:  # torch.compile's OptimizedModule
        return memo.setdefault(id(module), _copy(wrapped, memo))
    copied = object.__new__(type(module))  # torch.fx's own __new__ makes a class without forward
    memo[id(module)] = copied
    own = dict(module.__dict__)
    made: dict[str, Any] = {"_parameters": {}, "_buffers": {}}  # first, as others may refer to them
    for name, parameter in own["_parameters"].items():
        made["_parameters"][name] = _copy(parameter, memo)
    for name, buffer in own["_buffers"].items():
        made["_buffers"][name] = None if buffer is None else memo.setdefault(id(buffer), _clone(buffer))
    for name, value in own.items():
        copied.__dict__[name] = made[name] if name in made else _copy(value, memo)
    copied.__dict__["_compiled_call_impl"] = None  # of the original, by module.compile()
    return copied


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    _refuse_lazy(parameter)
    alias = torch.Tensor._make_subclass(type(parameter), parameter.detach(), parameter.requires_grad)
    alias.__dict__.update(parameter.__dict__)
    return alias


def _clone(buffer: Tensor) -> Tensor:
    _refuse_lazy(buffer)
    return buffer.detach().clone()


def _refuse_lazy(tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise InputError("the network has lazy modules without shapes: run one batch through it first")


def _copy_fixed(values: Any, memo: dict[int, Any]) -> Any:
    """A tuple, named tuple or frozen set; as it is where nothing in it is copied."""
    given = list(values)
    copied = [_copy(value, memo) for value in given]
    if all(new is old for new, old in zip(copied, given, strict=True)):
        return values
    return type(values)(*copied) if hasattr(values, "_fields") else type(values)(copied)


def _copy_container(values: Any, memo: dict[int, Any]) -> Any:
    copied = memo[id(values)] = copy.copy(values)
    given = list(values.items() if isinstance(values, dict) else values)
    copied.clear()
    if isinstance(values, dict):
        copied.update((_copy(key, memo), _copy(value, memo)) for key, value in given)
    elif isinstance(values, set):
        copied.update(_copy(value, memo) for value in given)
    else:
        copied.extend(_copy(value, memo) for value in given)
    return copied
