"""The command `qdv-gpu`: each command parses its options and calls one function."""

import dataclasses
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qdv_gpu.studies.settings import Settings, Training

if TYPE_CHECKING:
    from qdv_gpu.results.records import Analysis

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="At which layer, and by how much, does one image network represent the classes better than another?",
)

Networks = Annotated[
    list[str], typer.Argument(help="NETWORK, NETWORK=CHECKPOINT or package.module:factory, one or more.")
]
NetworkName = Annotated[
    str, typer.Argument(help="A torchvision classifier, caffe_alexnet, zfnet or package.module:factory.")
]
Data = Annotated[str, typer.Option(help="cifar10, fashion-mnist, digits or a folder DIR/{train,test}/<class>/*.")]
Out = Annotated[Path, typer.Option(help="Folder for the results; a run that was killed goes on from it.")]
Weights = Annotated[str, typer.Option(help="imagenet, none or a .safetensors, .pt or .npy file.")]
ImageSize = Annotated[int | None, typer.Option(help="Side in pixels that images are resized to.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
StorePath = Annotated[
    Path | None,
    typer.Option(help="Where stages are kept; default $QDV_GPU_STORE, or .qdv-store in the folder that holds --out."),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out image files that cannot be read, and count them.")]


def with_settings(table: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each setting of a table, in place of its `**settings`.

    The command gets, by name, the settings that were given on the command line.
    """
    fields = dataclasses.fields(table)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            for field in fields:
                value, read = given.pop(field.name), field.metadata["read"]
                if value is not None and value != []:
                    text = ",".join(value) if isinstance(value, list) else value
                    given[field.name] = read(text) if read else value
            command(**given)

        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = [inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(f))
                   for f in fields]  # fmt: skip
        setattr(run, "__signature__", inspect.Signature([*own, *options]))  # noqa: B010 - functions have none to mypy
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *options)}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _option(field: Any) -> Any:
    """The option of a setting; several values may be given one by one, or separated by commas."""
    several = "Sequence" in str(field.type)
    kind: Any = str if field.metadata["read"] else next(k for k in (float, int, str) if k.__name__ in str(field.type))
    default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    shown = field.metadata["help"]
    return Annotated[
        list[kind] | None if several else kind | None,
        typer.Option(help=shown, show_default=False if default is None else str(default)),
    ]


@app.command()
@with_settings(Settings)
def analyze(
    networks: Networks,
    *,
    data: Data,
    out: Out,
    weights: Weights = "imagenet",
    device: Device = "auto",
    preset: Annotated[str, typer.Option(help="default, or paper for the values of the CIKM 2024 paper.")] = "default",
    store: StorePath = None,
    skip_bad: SkipBad = False,
    **settings: Any,
) -> None:
    """Score every layer of one or more networks: activations, PCA, t-SNE, neighborhood hit."""
    from qdv_gpu.studies.analyze import analyze as run

    with progress_bar():
        result = run(
            networks, data, out, settings=preset, weights=weights, device=device, store=store, skip_bad=skip_bad,
            **settings,
        )  # fmt: skip
    show(result)


@app.command()
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

    with progress_bar():
        result = train(
            network, data, out, weights=weights, device=device, store=store, skip_bad=skip_bad, **settings
        )  # fmt: skip
    print(f"test accuracy {result['test_accuracy']:.2%} on {result['test_images']} images")
    print(f"weights: {out / 'weights.safetensors'}\ncurve: {out / 'training.png'}")


@app.command()
def store(
    *,
    path: Annotated[Path | None, typer.Option("--store", help="Default: $QDV_GPU_STORE, or .qdv-store here.")] = None,
    remove_unused: Annotated[
        bool, typer.Option("--remove-unused", help="Delete what no run folder refers to.")
    ] = False,
) -> None:
    """List what is kept of earlier runs, with sizes, and which of it no run folder refers to."""
    from rich.table import Table

    from qdv_gpu.errors import InputError
    from qdv_gpu.files import readable
    from qdv_gpu.results.store import Store

    kept = Store.beside(Path("run"), path)
    if not kept.path.is_dir():
        raise InputError(f"there is no store {kept.path}: pass --store DIR")
    entries, unused = kept.entries(), kept.unreferenced()
    table = Table("stage", "number", "size", "unused", title=str(kept.path))
    for stage in sorted({entry.stage for entry in entries}):
        own, idle = ([e for e in some if e.stage == stage] for some in (entries, unused))
        table.add_row(stage, str(len(own)), readable(sum(e.size for e in own)), readable(sum(e.size for e in idle)))
    console().print(table)
    size = readable(sum(entry.size for entry in unused))
    if remove_unused:
        kept.remove(unused)
        print(f"removed {len(unused)} of {len(entries)} stages, {size}")
    elif unused:
        print(f"{len(unused)} of {len(entries)} stages, {size}, are in no run folder: --remove-unused deletes them")


@app.command()
def deconv(
    networks: Networks,
    *,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    data: Annotated[str | None, typer.Option(help="As for analyze; its test images.")] = None,
    index: Annotated[int | None, typer.Option(help="Of the test image to reconstruct from; default 0.")] = None,
    image: Annotated[Path | None, typer.Option(help="An image file to reconstruct from, instead of --index.")] = None,
    layers: Annotated[str, typer.Option(help="Names or module paths, separated by commas, or all.")] = "all",
    mode: Annotated[str, typer.Option(help="deconvnet, deconvnet-map, guided or gradient.")] = "deconvnet",
    top: Annotated[int, typer.Option(help="Also show this many patches that activate a map most, e.g. 9.")] = 0,
    contrast: Annotated[
        str, typer.Option(help="Largest value at full contrast: of each map, or of the layer.")
    ] = "map",
    weights: Weights = "imagenet",
    image_size: ImageSize = None,
    device: Device = "auto",
    skip_bad: SkipBad = False,
) -> None:
    """Draw what every feature map of every layer responds to in an image (Zeiler & Fergus 2014)."""
    from qdv_gpu.studies.deconv import picture

    chosen = None if layers == "all" else tuple(layer.strip() for layer in layers.split(","))
    paths = picture(
        networks,
        out,
        data=data,
        index=index,
        image=image,
        layers=chosen,
        mode=mode,
        top=top,
        contrast=contrast,
        weights=weights,
        image_size=image_size,
        skip_bad=skip_bad,
        device=device,
    )
    print("\n".join(map(str, paths)))


@app.command()
def layers(network: NetworkName, *, weights: Weights = "none", image_size: ImageSize = None) -> None:
    """List the layers that a network is analysed at: name, module path, shape, number of features."""
    from math import prod

    from rich.table import Table

    from qdv_gpu.networks.layers import describe_layers
    from qdv_gpu.networks.load import load_network

    loaded = load_network(network, weights=weights, device="cpu")
    table = Table("layer", "module", "shape", "features")
    for name, path, shape in describe_layers(loaded, image_size):
        table.add_row(name, path, " x ".join(map(str, shape)), f"{prod(shape):,}")
    console().print(table)


@app.command()
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

    from qdv_gpu.errors import InputError
    from qdv_gpu.studies.profile import profile as run

    try:
        sizes = None if batch_sizes is None else [int(size) for size in batch_sizes.split(",")]
    except ValueError:
        raise InputError(f"batch sizes must be integers separated by commas, got {batch_sizes!r}") from None
    profiles = run(
        network,
        out,
        batch_sizes=sizes,
        precision=precision,
        weights=weights,
        image_size=image_size,
        device=device,
    )
    for found in profiles:
        rate = found.batch_size / found.seconds
        title = f"batch of {found.batch_size}: {found.seconds * 1e3:.2f} ms, {rate:,.0f} images/s, {found.precision}; "
        title += f"{found.share_of_peak:.0%} of the peak's operations; "
        title += f"layers sum to {found.sum_of_layers / found.seconds:.1%}"
        table = Table("layer", "kind", title=title)
        for name in ("ms", "images/s", "GFLOP", "MB", "bound by", "of peak", "of the time"):
            table.add_column(name, justify="right")
        for row in found.layers:
            cells = (
                f"{row.seconds * 1e3:.3f}",
                f"{row.images_per_second:,.0f}",
                f"{row.gflop:.2f}",
                f"{row.bytes / 1e6:.2f}",
                row.bound if row.bytes else "",
                f"{row.share_of_peak:.0%}" if row.bytes else "",
                f"{row.share:.1%}",
            )
            table.add_row(row.layer, row.kind, *cells)
        console().print(table)
    if out is not None:
        print(out / "profile.json", out / "profile.png", sep="\n")


@app.command()
def demo(*, out: Out = Path("qdv-demo"), device: Device = "auto") -> None:
    """Train two small networks on digits and compare their layers: a minute, no network needed."""
    from qdv_gpu.studies.demo import demo as run

    show(run(out, device=device))


@app.command()
def doctor(*, device: Device = "auto") -> None:
    """Show devices, versions and engines, what is missing, and test every backend against the reference."""
    from qdv_gpu.doctor import diagnose

    if not diagnose(console(), device):
        raise typer.Exit(1)


def console(*, stderr: bool = False) -> Any:
    """A rich console that cuts no lines when it writes to a file."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else 200)


def say(line: str) -> None:
    """Tell the user something, on stderr."""
    print(line, file=sys.stderr, flush=True)


def show(result: "Analysis") -> None:
    """Print the table for each k, and where the files are."""
    from rich.table import Table

    from qdv_gpu.report.tables import nh_table

    for k in result.k:
        header, *rows = nh_table(result.layers, k)
        table = Table(*header, title=f"neighborhood hit (k = {k}) ± standard error")
        for row in rows:
            table.add_row(*row)
        console().print(table)
    for path in (result.out / "table3.md", result.out / "layers.csv", *result.figures):
        print(path)


@contextmanager
def progress_bar() -> Iterator[None]:
    """On a terminal, draw a bar on stderr for the stage that is running."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.progress import Progress

    from qdv_gpu.progress import watched

    with Progress(console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def update(stage: str, done: int, total: int) -> None:
            if bar.tasks[0].description != stage:
                bar.reset(task, description=stage)
            bar.update(task, completed=done, total=total)

        with watched(update):
            yield


class _Said(logging.Handler):
    """Says what the library logs, on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{'warning: ' if record.levelno >= logging.WARNING else ''}{record.getMessage()}")


def main() -> None:
    """Run the command line: 0 for success, 2 and one line on stderr for a mistake in the input."""
    warnings.showwarning = lambda message, *_args, **_kwargs: say(f"warning: {message}")
    logger, handler = logging.getLogger("qdv_gpu"), _Said()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        status = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        say("interrupted: the same command goes on from what is finished")
        status = 130
    except Exception as error:
        from qdv_gpu.errors import InputError

        if isinstance(error, InputError):
            message = str(error)
        elif hasattr(error, "format_message"):  # the parser's own
            message = error.format_message()
            if not message:  # there were no arguments, and the help has been printed
                sys.exit(2)
        elif type(error).__name__ == "OutOfMemoryError":
            message = f"{error}: lower --image-size or --samples"
        elif isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {error.strerror}"
        else:
            raise
        say("qdv-gpu: " + " ".join(message.split()))
        status = 2
    finally:
        logger.removeHandler(handler)
    sys.exit(status)
