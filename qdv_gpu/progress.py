"""How far long work has come: one hook that every loop of minutes tells, and nobody else needs to pass on.

>>> with watched(lambda stage, done, total: print(stage, done, "of", total)):
...     advance("t-SNE", 250, 1000)
t-SNE 250 of 1000
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Hook = Callable[[str, int, int], None]

_hook: ContextVar[Hook | None] = ContextVar("hook", default=None)


@contextmanager
def watched(hook: Hook) -> Iterator[None]:
    """Call `hook` with a stage, what is done of it and how much there is, for all work inside the block."""
    token = _hook.set(hook)
    try:
        yield
    finally:
        _hook.reset(token)


def advance(stage: str, done: int, total: int) -> None:
    """Tell the hook, if there is one, that `done` of `total` units of a stage are done."""
    hook = _hook.get()
    if hook is not None:
        hook(stage, done, total)
