"""How a command talks to its user: what it says on stderr, tables, the progress bar, and how it is stopped."""

import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qdv_gpu.results.records import Analysis
    from qdv_gpu.studies.sweep import Sweep


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
    written = [
        result.out / "report.html",
        result.out / "sweep.csv",
        *([] if result.ranking is None else [result.out / "ranking.md"]),
    ]
    for path in (*written, *result.figures):
        print(path)
    for point, state in result.failed:
        say(f"{point.label}, run {point.run}: {state.kind}: {state.about.get('message', '')} ({result.log(point)})")


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


class StoppedError(Exception):
    """Ctrl-C or SIGTERM stopped a command; `code` is what it exits with."""

    def __init__(self, code: int) -> None:
        super().__init__("interrupted: the same command goes on from what is finished")
        self.code = code


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM came, which stops what Ctrl-C stops."""


def _terminate(*_: Any) -> None:
    raise _TerminatedError


@contextmanager
def _stoppable() -> Iterator[None]:
    """Have signals stop the block in order, and end it with a StoppedError, which no parser of options swallows."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt as stopped:
        raise StoppedError(143 if isinstance(stopped, _TerminatedError) else 130) from None


class Said(logging.Handler):
    """Says what the library logs, on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{'warning: ' if record.levelno >= logging.WARNING else ''}{record.getMessage()}")
