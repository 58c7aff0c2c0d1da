"""The command `report`."""

from pathlib import Path
from typing import Annotated

import typer

from qdv_gpu.app import command
from qdv_gpu.errors import InputError, short
from qdv_gpu.terminal import working


@command
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Folders of analyze (of the same images), compare, sweep, deconv, finetune."
        ),
    ],
    *,
    out: Annotated[Path | None, typer.Option(help="The file; default report.html in the first folder.")] = None,
    thumbnails: Annotated[str, typer.Option(help="Pictures of images at most, or none.")] = "10000",
) -> None:
    """Write one page about runs, with linked maps, charts and tables, which opens from disk."""
    from qdv_gpu.studies.report import write_report

    if thumbnails != "none" and not (thumbnails.isdecimal() and thumbnails.isascii() and int(thumbnails) > 0):
        raise InputError(f"--thumbnails must be a positive number or none, got {short(thumbnails)}")
    with working():
        print(write_report(runs, out, thumbnails=None if thumbnails == "none" else int(thumbnails)))
