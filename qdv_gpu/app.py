"""The program `qdv-gpu` that commands are added to, and what all of them have."""

import inspect
import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated, Any

import typer

from qdv_gpu.options import Quiet, Traceback, Verbose, keywords, signed
from qdv_gpu.terminal import shown_whole

OPTIONS = {"verbose": Verbose, "quiet": Quiet, "traceback": Traceback}

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="At which layer, and by how much, does one image network represent the classes better than another?",
)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Add a command, and to it the options that all commands have."""

    def run(*, verbose: bool, quiet: bool, traceback: bool, **given: Any) -> None:
        logging.getLogger("qdv_gpu").setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
        with shown_whole() if traceback else nullcontext():
            function(**given)

    own = inspect.signature(function, eval_str=True).parameters.values()
    app.command()(signed(run, function, [*own, *keywords(OPTIONS, default=False)]))
    return function


def _show_version(asked: bool) -> None:  # noqa: FBT001 - as typer calls it
    if asked:
        import qdv_gpu

        print(f"qdv-gpu {qdv_gpu.__version__}")
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options before any command."""
