"""How far long work has come: one hook that every loop of minutes tells, and nobody else needs to pass on.

>>> with watched(lambda stage, done, total: print(stage, done, "of", total)):
...     advance("t-SNE", 250, 1000)
...     with whole(10):
...         with part(8, "conv3"):
...             advance("t-SNE", 250, 1000)
...         with part(2, "conv4"):
...             advance("t-SNE", 250, 1000)
t-SNE 250 of 1000
conv3: t-SNE 2.0 of 10
conv4: t-SNE 8.5 of 10
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

Hook = Callable[[str, float, float], None]


@dataclass
class _Whole:
    """Work of several parts: how much it is, how much of it is done, and the part that is running."""

    total: float
    done: float = 0.0
    part: float = 0.0
    name: str = ""


_hook: ContextVar[Hook | None] = ContextVar("hook", default=None)
_whole: ContextVar[_Whole | None] = ContextVar("whole", default=None)


@contextmanager
def watched(hook: Hook) -> Iterator[None]:
    """Call `hook` with a stage, what is done of it and how much there is, for all work inside the block."""
    token = _hook.set(hook)
    try:
        yield
    finally:
        _hook.reset(token)


@contextmanager
def whole(total: float) -> Iterator[None]:
    """Inside the block the hook is told of all work together, `total` units of it, instead of each stage by itself."""
    token = _whole.set(_Whole(total))
    try:
        yield
    finally:
        _whole.reset(token)


@contextmanager
def part(units: float, name: str) -> Iterator[None]:
    """The block is so many units of the whole; without a whole nothing happens."""
    work = _whole.get()
    if work is None:
        yield
        return
    work.part, work.name = units, name
    yield
    work.done, work.part = work.done + units, 0.0


def advance(stage: str, done: int, total: int) -> None:
    """Tell the hook, if there is one, that `done` of `total` units of a stage are done."""
    hook, work = _hook.get(), _whole.get()
    if hook is None:
        return
    if work is None:
        hook(stage, done, total)
    else:
        name = f"{work.name}: {stage}" if work.name else stage
        hook(name, work.done + work.part * done / max(total, 1), work.total)
