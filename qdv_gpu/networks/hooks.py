"""Watching the calls of a network's modules, for as long as a block lasts."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

Before = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], Any]
After = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


@contextmanager
def hooked(
    module: nn.Module, paths: Iterable[str], *, before: Before | None = None, after: After | None = None
) -> Iterator[None]:
    """Call `before` and `after` around each call of some submodules; nothing of it stays, also after an exception.

    Parameters
    ----------
    module : nn.Module
    paths : iterable of str
        Dotted paths of the submodules; "" is the module itself.
    before : callable
        Gets path, submodule, positional and keyword arguments.
    after : callable
        Gets these and the output; what it returns, unless None, takes the output's place.
    """
    with ExitStack() as stack:
        for path in paths:
            child = module.get_submodule(path)
            if before is not None:
                handle = child.register_forward_pre_hook(partial(before, path), with_kwargs=True)
                stack.callback(handle.remove)
            if after is not None:
                handle = child.register_forward_hook(partial(after, path), with_kwargs=True)
                stack.callback(handle.remove)
        yield
