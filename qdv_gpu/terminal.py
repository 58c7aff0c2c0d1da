"""How a command talks to its user: what it says on stderr, tables, the progress bar, and how it is stopped."""

import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from qdv_gpu.errors import InputError, in_line, reason

if TYPE_CHECKING:
    from qdv_gpu.results.records import Analysis
    from qdv_gpu.studies.sweep import Sweep

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def console(*, stderr: bool = False) -> Any:
    """A rich console that cuts no lines when it writes to a file."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 200
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=width)  # names as they are


def say(line: str) -> None:
    """Tell the user something, on stderr, above the progress bar if there is one."""
    if _bar is not None:
        _bar.console.print(line, soft_wrap=True)
    else:
        print(line, file=sys.stderr, flush=True)


def show_table(header: Sequence[str], *rows: Sequence[str], title: str | None = None) -> None:
    """Print a table."""
    from rich.table import Table

    table = Table(*header, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def show(result: "Analysis") -> None:
    """Print the table for each k, and where the files are."""
    from qdv_gpu.report.tables import caption, nh_table

    for k in result.k:
        show_table(*nh_table(result.layers, k), title=caption(result.layers, k))
    if result.comparison is not None:
        from qdv_gpu.report.contrast import summary

        print(summary(result.comparison))
    for path in (result.out / "report.html", result.out / "table3.md", result.out / "layers.csv", *result.figures):
        print(path)


def show_sweep(result: "Sweep") -> None:
    """Print the ranking and what it says, what failed, and where the files are."""
    from qdv_gpu.report.ranking import ranking_notes, ranking_sentences, ranking_table

    if result.ranking is not None:
        show_table(*ranking_table(result.ranking))
        print(ranking_sentences(result.ranking), ranking_notes(result.ranking), sep="\n")
    names = ["report.html", "sweep.csv", *([] if result.ranking is None else ["ranking.md"])]
    for path in (*(result.out / name for name in names), *result.figures):
        print(path)
    for point, state in result.failed:
        said = f": {state.about['message']}" if "message" in state.about else ""
        say(f"{point.label}, run {point.run}: {state.kind}{said} ({result.log(point)})")


_bar: Any = None  # the progress bar, while it is drawn


@contextmanager
def working() -> Iterator[None]:
    """Ctrl-C and SIGTERM stop the block in order; on a terminal a bar on stderr shows how far it has come."""
    with _stoppable(), _shown():
        yield


@contextmanager
def _shown() -> Iterator[None]:
    global _bar
    if not sys.stderr.isatty() or not logging.getLogger("qdv_gpu").isEnabledFor(logging.INFO):
        yield
        return
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from qdv_gpu.progress import watched

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task, size = bar.add_task("starting", total=None), 0.0

        def update(stage: str, done: float, total: float) -> None:
            nonlocal size
            if total != size:
                bar.reset(task, total=total)
                size = total
            bar.update(task, description=stage, completed=max(done, bar.tasks[0].completed))

        _bar = bar
        try:
            with watched(update):
                yield
        finally:
            _bar = None


@contextmanager
def shown_whole() -> Iterator[None]:
    """Say of an error that leaves the block all that led to it."""
    try:
        yield
    except Exception as error:
        if in_line(error):
            say("".join(traceback.format_exception(error)).rstrip())
        raise


class StoppedError(Exception):
    """A command is stopped, by Ctrl-C, SIGTERM or a standard output that takes no more; `code` is what it exits with.

    It is none of the exceptions that a parser of options swallows.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


_signal = 0  # that came last


def _interrupt(number: int, _: Any) -> None:
    """Stop what is running in order; at a second signal at once."""
    global _signal
    if _signal:
        with suppress(OSError):
            os.write(2, b"interrupted\n")
        os._exit(128 + number)
    _signal = number
    raise KeyboardInterrupt


def _unraisable(found: Any) -> None:
    """A signal that came where nothing can be raised, as in a destructor, comes once more."""
    if issubclass(found.exc_type, KeyboardInterrupt) and _signal:
        signal.raise_signal(_signal)
    sys.__unraisablehook__(found)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Have signals stop the block in order, and end it with a StoppedError, whatever libraries make of them."""
    global _signal
    _signal, before, hook = 0, [signal.getsignal(one) for one in SIGNALS], sys.unraisablehook
    sys.unraisablehook = _unraisable
    for one in SIGNALS:
        signal.signal(one, _interrupt)
    try:
        yield
    except BaseException as error:
        if not _signal and isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):  # that nobody sent
            raise InputError(f"stopped by code that was run: {reason(error)}") from error
        if not _signal:
            raise
    finally:
        for one, handler in zip(SIGNALS, before, strict=True):
            signal.signal(one, signal.SIG_IGN if _signal else handler)
        sys.unraisablehook = hook
    if _signal:
        raise StoppedError("interrupted: the same command goes on from what is finished", 128 + _signal)


class _Guarded:
    """A stream whose errors are given to a function, and which writes what its encoding has not as escapes."""

    def __init__(self, stream: Any, failed: Callable[[OSError], None]) -> None:
        self._stream, self._failed = stream, failed
        with suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        with suppress(OSError, ValueError):  # what waits to be written must go somewhere
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        self._failed(error)


def _refused(error: OSError) -> None:
    """Standard output takes no more: a reader who has seen enough is told nothing."""
    if error.errno == errno.EPIPE:
        raise StoppedError("", 128 + signal.SIGPIPE)
    raise StoppedError(f"qdv-gpu: cannot write to standard output: {error.strerror}", 2)


@contextmanager
def standard_streams() -> Iterator[None]:
    """In the block an error of standard output is a StoppedError, and one of standard error is none."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Guarded(sys.stdout, _refused), _Guarded(sys.stderr, lambda _: None)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class Said(logging.Handler):
    """Says what the library logs, on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{'warning: ' if record.levelno >= logging.WARNING else ''}{record.getMessage()}")
