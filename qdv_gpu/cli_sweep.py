"""The commands `sweep` and `status`."""

from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from qdv_gpu.app import command
from qdv_gpu.options import Formats, Out, StorePath
from qdv_gpu.studies.settings import read_list
from qdv_gpu.terminal import show_sweep, show_table, working


@command
def sweep(
    file: Annotated[
        Path,
        typer.Argument(metavar="SWEEP.toml", help="Its tables run, grid and points: see docs/howto/sweeps.md."),
    ],
    *,
    out: Out,
    workers: Annotated[int | None, typer.Option(help="Processes at a time; by default in this one.")] = None,
    gpus: Annotated[str | None, typer.Option(help="Their GPUs by turns, e.g. 0,1.")] = None,
    slurm: Annotated[Path | None, typer.Option(help="TOML of Slurm's options, as submitit's.")] = None,
    dask: Annotated[str | None, typer.Option(help="Address of a Dask scheduler that is running.")] = None,
    halve: Annotated[
        str | None, typer.Option(help="epochs or images: begin with a quarter of them, drop what is surely not best.")
    ] = None,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first point that fails.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Compute again what has failed.")] = False,
    extend: Annotated[bool, typer.Option("--extend", help="Add the file's points to those that DIR has.")] = False,
    max_points: Annotated[int, typer.Option(help="That a sweep may have.")] = 10_000,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")] = False,
    formats: Formats = "png",
    store: StorePath = None,
) -> None:
    """Train and analyse every point of a grid of variants and settings, and rank them."""
    options: Any = {
        "workers": workers, "gpus": None if gpus is None else read_list(gpus), "slurm": slurm, "dask": dask,
        "halve": halve, "max_points": max_points, "store": store,
    }  # fmt: skip
    if dry_run:
        from qdv_gpu.studies.outlook import foreseen

        with working():
            rows, lines = foreseen(file, out, **options)
        show_table(*rows)
        print("\n".join(lines))
        return
    from qdv_gpu.studies.sweep import sweep as run

    with working():
        found = run(
            file, out, fail_fast=fail_fast, retry_failed=retry_failed, extend=extend, formats=read_list(formats),
            **options,
        )  # fmt: skip
    show_sweep(found)
    if found.failed:
        raise typer.Exit(1)


@command
def status(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of `qdv-gpu sweep`.")],
    *,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    why: Annotated[str | None, typer.Option(help="A point: which part of its keys the store has not seen.")] = None,
) -> None:
    """Show how far a sweep has come: what is done, running, waiting, failed and lost, and the time left."""
    from qdv_gpu.studies.status import status as look

    found = look(out)
    if why is not None:
        from qdv_gpu.studies.outlook import why as explain

        with working():
            print("\n".join(explain(out, why)))
    elif json:
        print(dumps(found.said(), indent=2))
    else:
        show_table(*found.table())
        print(found.sentence())
