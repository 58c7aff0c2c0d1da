"""The command `qdv-gpu`: each command parses its options and calls one function."""

import logging
import sys
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from qdv_gpu import cli_report as cli_report  # adds its commands
from qdv_gpu import cli_sweep as cli_sweep
from qdv_gpu.app import app, command
from qdv_gpu.errors import InputError, in_line, short
from qdv_gpu.options import (
    Crop,
    Data,
    Device,
    Formats,
    ImageSize,
    NetworkName,
    Networks,
    Numbers,
    Out,
    Preset,
    SkipBad,
    Split,
    StorePath,
    Weights,
    with_settings,
)
from qdv_gpu.studies.settings import Settings, Training, read_list, read_numbers
from qdv_gpu.terminal import Said, StoppedError, console, say, show, show_table, standard_streams, working


@command
@with_settings(Settings)
def analyze(
    networks: Networks,
    *,
    data: Data,
    out: Out,
    weights: Weights = "imagenet",
    device: Device = "auto",
    preset: Preset = "default",
    formats: Formats = "png",
    store: StorePath = None,
    skip_bad: SkipBad = False,
    **settings: Any,
) -> None:
    """Score every layer of one or more networks: activations, PCA, t-SNE, neighborhood hit."""
    from qdv_gpu.studies.analyze import analyze as run

    with working():
        result = run(
            networks, data, out, settings=preset, weights=weights, device=device, formats=read_list(formats),
            store=store, skip_bad=skip_bad, **settings,
        )  # fmt: skip
    show(result)


@command
@with_settings(Settings)
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A network, as for analyze, or a run folder of it.")],
    second: Annotated[str, typer.Argument(metavar="B", help="What is compared with it.")],
    *,
    out: Out,
    data: Annotated[str | None, typer.Option(help="For networks, as for analyze.")] = None,
    runs: Annotated[
        list[str] | None,
        typer.Option(help="A further run of each, A2,B2; three or more of each speak of more than two."),
    ] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(help="Which layers belong together: position, name, cka, or LAYER=LAYER of A and B."),
    ] = None,
    margin: Annotated[float, typer.Option(help="Differences of NH within it count as none.")] = 0.02,
    weights: Weights = "imagenet",
    device: Device = "auto",
    preset: Preset = "default",
    formats: Formats = "png",
    store: StorePath = None,
    skip_bad: SkipBad = False,
    **settings: Any,
) -> None:
    """Say at which layers B keeps the classes together better than A, by how much, and what is undecided."""
    from qdv_gpu.networks.spec import split_outside
    from qdv_gpu.report.contrast import comparison_table, summary
    from qdv_gpu.report.drawing import plain
    from qdv_gpu.studies.compare import compare as run

    pairs: list[Any] = [tuple(part.strip() for part in split_outside(text, ",")) for text in runs or []]
    named = {text.partition("=")[0]: text.partition("=")[2] for text in pair or [] if "=" in text}
    if pair and len(pair) not in (1, len(named)):
        raise InputError(
            f"--pair is position, name, cka or LAYER=LAYER, several times with other layers of A, got {' '.join(pair)}"
        )
    with working():
        found = run(
            first, second, data, out, runs=pairs, pair=named or (pair or ["position"])[0], margin=margin,
            settings=preset, weights=weights, device=device, formats=read_list(formats), store=store,
            skip_bad=skip_bad, **settings,
        )  # fmt: skip
    title = f"Neighborhood hit (k = {found.k}); differences and verdicts are of {plain(found.second)}"
    show_table(*comparison_table(found), title=title)
    print(summary(found))
    picture = f"figures/comparison.{read_list(formats)[0]}"
    for name in ("report.html", "comparison.md", "comparison.csv", "comparison.json", picture):
        print(out / name)


@command
@with_settings(Training)
def finetune(
    network: NetworkName,
    *,
    data: Data,
    out: Out,
    weights: Weights = "imagenet",
    device: Device = "auto",
    store: StorePath = None,
    skip_bad: SkipBad = False,
    **settings: Any,
) -> None:
    """Fine-tune every weight of a network on a data set; the defaults are the paper's."""
    from qdv_gpu.studies.finetune import finetune as train

    with working():
        result = train(
            network, data, out, weights=weights, device=device, store=store, skip_bad=skip_bad, **settings
        )  # fmt: skip
    print(f"test accuracy {result['test_accuracy']:.2%} on {result['test_images']} images")
    print(f"weights: {out / 'weights.safetensors'}\ncurve: {out / 'training.png'}")


@command
def store(
    *,
    path: Annotated[Path | None, typer.Option("--store", help="Default: $QDV_GPU_STORE, or .qdv-store here.")] = None,
    remove_unused: Annotated[
        bool, typer.Option("--remove-unused", help="Delete what no run folder refers to.")
    ] = False,
) -> None:
    """List what is kept of earlier runs, with sizes, and which of it no run folder refers to."""
    from qdv_gpu.files import readable
    from qdv_gpu.results.store import Store

    kept = Store.beside(Path("run"), path)
    if not kept.path.is_dir():
        raise InputError(f"there is no store {kept.path}: pass --store DIR")
    entries, unused = kept.entries(), kept.unreferenced()
    rows = []
    for stage in sorted({entry.stage for entry in entries}):
        own, idle = ([e for e in some if e.stage == stage] for some in (entries, unused))
        rows.append([stage, str(len(own)), readable(sum(e.size for e in own)), readable(sum(e.size for e in idle))])
    show_table(["stage", "number", "size", "unused"], *rows, title=str(kept.path))
    size = readable(sum(entry.size for entry in unused))
    if remove_unused:
        kept.remove(unused)
        print(f"removed {len(unused)} of {len(entries)} stages, {size}")
    elif unused:
        print(f"{len(unused)} of {len(entries)} stages, {size}, are in no run folder: --remove-unused deletes them")


@command
def deconv(
    networks: Networks,
    *,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    data: Annotated[str | None, typer.Option(help="As for analyze.")] = None,
    split: Split = None,
    index: Annotated[int | None, typer.Option(help="Of the image to reconstruct from; default 0.")] = None,
    image: Annotated[Path | None, typer.Option(help="An image file to reconstruct from, instead of --index.")] = None,
    layers: Annotated[str, typer.Option(help="Names or module paths, separated by commas, or all.")] = "all",
    mode: Annotated[str, typer.Option(help="deconvnet, deconvnet-map, guided or gradient.")] = "deconvnet",
    top: Annotated[int, typer.Option(help="Also show this many patches that activate a map most, e.g. 9.")] = 0,
    contrast: Annotated[
        str, typer.Option(help="Largest value at full contrast: of each map, or of the layer.")
    ] = "map",
    weights: Weights = "imagenet",
    image_size: ImageSize = None,
    crop: Crop = False,
    mean: Numbers = None,
    std: Numbers = None,
    device: Device = "auto",
    formats: Formats = "png",
    skip_bad: SkipBad = False,
) -> None:
    """Draw what every feature map of every layer responds to in an image (Zeiler & Fergus 2014)."""
    from qdv_gpu.studies.deconv import picture

    with working():
        paths = picture(
            networks, out, data=data, split=split, index=index, image=image,
            layers=None if layers == "all" else read_list(layers), mode=mode, top=top, contrast=contrast,
            weights=weights, image_size=image_size, crop=crop, mean=None if mean is None else read_numbers(mean),
            std=None if std is None else read_numbers(std), formats=read_list(formats), skip_bad=skip_bad,
            device=device,
        )  # fmt: skip
    print("\n".join(map(str, paths)))


@command
def plot(
    run: Annotated[Path, typer.Argument(help="Folder of `qdv-gpu analyze`.")],
    *,
    out: Annotated[Path | None, typer.Option(help="Folder for the figures; default RUN/figures.")] = None,
    networks: Annotated[str | None, typer.Option(help="Names, separated by commas; default all.")] = None,
    layers: Annotated[str | None, typer.Option(help="Names, separated by commas; default all.")] = None,
    k: Annotated[int | None, typer.Option(help="Neighbours of the neighborhood hit; default the run's first.")] = None,
    seed: Annotated[int, typer.Option(help="Number of the t-SNE map that is drawn.")] = 0,
    formats: Formats = "png",
) -> None:
    """Draw the figures of a run again: some of its networks and layers, another k or map, other formats."""
    from qdv_gpu.networks.spec import split_outside
    from qdv_gpu.studies.plot import plot as draw

    with working():
        paths = draw(
            run, out, networks=None if networks is None else [part.strip() for part in split_outside(networks, ",")],
            layers=None if layers is None else read_list(layers), k=k, seed=seed, formats=read_list(formats),
        )  # fmt: skip
    print("\n".join(map(str, paths)))


@command
def export(
    run: Annotated[Path, typer.Argument(help="Folder of `qdv-gpu analyze`.")],
    *,
    to: Annotated[str, typer.Option(help="parquet (for embedding-atlas, pandas, ...), tensorboard or csv.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the files; default RUN/export/TO.")] = None,
) -> None:
    """Write the maps of a run, with images, labels, predictions and hits, for other programs to show."""
    import shlex

    from qdv_gpu.studies.export import export as write

    with working():
        paths = write(run, out, to=to)
    if to == "tensorboard":
        print(f"tensorboard --logdir {shlex.quote(str(paths[-1].parent))}")
    else:
        print("\n".join(map(str, paths)))


@command
def layers(
    network: NetworkName,
    *,
    every: Annotated[bool, typer.Option("--all", help="Every module instead of the default layers.")] = False,
    tokens: Annotated[str, typer.Option(help="Of a transformer's layers: auto, cls, mean or all.")] = "auto",
    weights: Weights = "none",
    image_size: ImageSize = None,
) -> None:
    """List the layers that a network is analysed at: name, module path, shape, number of features.

    With --all every module that can be analysed, in the order that they are called in. Of a variant also what it
    changes: tensors, sizes, receptive fields and operations.
    """
    from qdv_gpu.networks.account import describe_variant
    from qdv_gpu.networks.load import load_network
    from qdv_gpu.networks.tokens import describe_layers

    with working():
        loaded = load_network(network, weights=weights, image_size=image_size, device="cpu")
        rows = describe_layers(loaded, image_size, tokens=tokens, every=every)
    shown = []
    for row in rows:
        shape = " x ".join(map(str, row.shape))
        taken = f"{row.features:,}" + (f" [{row.tokens}]" if row.tokens else "")
        shown.append([row.layer, *([] if every else [row.path]), row.kind, shape, taken])
    show_table(["layer", *([] if every else ["module"]), "kind", "shape", "features"], *shown)
    if loaded.base is not None:
        for line in describe_variant(loaded, image_size).lines():
            console().print(line, soft_wrap=True)


@command
def profile(
    network: NetworkName,
    *,
    batch_sizes: Annotated[
        str | None, typer.Option(help="Separated by commas; default 1,16,64 and, on CUDA, 256.")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, tf32 or bf16.")] = "fp32",
    image_size: ImageSize = None,
    weights: Weights = "none",
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for profile.json and a bar chart.")] = None,
) -> None:
    """Time every layer of a forward pass, and compare it with the device's measured peaks."""
    from rich.table import Table

    from qdv_gpu.studies.profile import profile as run

    try:
        sizes = None if batch_sizes is None else [int(size) for size in batch_sizes.split(",")]
    except ValueError:
        raise InputError(f"batch sizes must be integers separated by commas, got {short(batch_sizes)}") from None
    with working():
        profiles = run(
            network, out, batch_sizes=sizes, precision=precision, weights=weights, image_size=image_size,
            device=device,
        )  # fmt: skip
    for found in profiles:
        rate = found.batch_size / found.seconds
        title = f"batch of {found.batch_size}: {found.seconds * 1e3:.2f} ms, {rate:,.0f} images/s, {found.precision}; "
        title += f"{found.share_of_peak:.0%} of the peak's operations; "
        title += f"layers sum to {found.sum_of_layers / found.seconds:.1%}"
        table = Table("layer", "kind", title=title)
        for name in ("ms", "images/s", "GFLOP", "MB", "bound by", "of peak", "of the time"):
            table.add_column(name, justify="right")
        for row in found.layers:
            table.add_row(
                row.layer,
                row.kind,
                f"{row.seconds * 1e3:.3f}",
                f"{row.images_per_second:,.0f}",
                f"{row.gflop:.2f}",
                f"{row.bytes / 1e6:.2f}",
                row.bound if row.bytes else "",
                f"{row.share_of_peak:.0%}{'*' * (row.share_of_peak > 1)}" if row.bytes else "",
                f"{row.share:.1%}",
            )
        console().print(table)
        if any(row.share_of_peak > 1 and row.bytes for row in found.layers):
            print("* above the measured peak: its data stays in a cache, or the library skips operations (padding)")
        for note in found.notes:
            print(f"note: {note}")
    if out is not None:
        print(out / "profile.json", out / "profile.png", sep="\n")


@command
def demo(*, out: Out = Path("qdv-demo"), device: Device = "auto") -> None:
    """Train two small networks on digits and compare their layers: a minute, no network needed."""
    from qdv_gpu.studies.demo import demo as run

    with working():
        result = run(out, device=device)
    show(result)


@command
def doctor(*, device: Device = "auto") -> None:
    """Show devices, versions and engines, what is missing, and test every backend against the reference."""
    from qdv_gpu.doctor import diagnose

    if not diagnose(console(), device):
        raise typer.Exit(1)


def _first_line(message: Warning | str) -> str:
    """Of what a library warns of, which may go on for lines, with a traceback."""
    return next(filter(None, map(str.strip, str(message).splitlines())), "")


def main() -> int:
    """Run the command line: 0 for success, 2 and one line on stderr for a mistake in the input."""
    warnings.showwarning = lambda message, *_args, **_kwargs: say(f"warning: {_first_line(message)}")
    logger, handler = logging.getLogger("qdv_gpu"), Said()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with standard_streams():
            return _run()
    finally:
        logger.removeHandler(handler)


def _check_values(arguments: Sequence[str]) -> None:
    """InputError for an empty argument, as of an unset variable: as a path it would be the current folder."""
    for before, argument in pairwise(["", *arguments]):
        name, equals, value = argument.partition("=")
        if not argument or (name.startswith("--") and equals and not value):
            raise InputError(f"an empty value is given for {name or before or 'the command'}")


def _run() -> int:
    """The exit code; what went wrong is said."""
    try:
        _check_values(sys.argv[1:])
        code = app(standalone_mode=False) or 0
        sys.stdout.flush()
        return code
    except StoppedError as stopped:
        if str(stopped):
            say(str(stopped))
        return stopped.code
    except Exception as error:
        if hasattr(error, "format_message"):  # the parser's own
            message = error.format_message()
            if not message:  # there were no arguments, and the help has been printed
                return 2
        elif not (message := in_line(error)):
            raise
        say("qdv-gpu: " + " ".join(message.split()))
        return 2
