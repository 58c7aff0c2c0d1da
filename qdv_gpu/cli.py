"""The command `qdv-gpu`: each command parses its options and calls one function."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from qdv_gpu.studies import finetune as training
    from qdv_gpu.studies.analyze import Analysis

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
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out image files that cannot be read, and count them.")]


@app.command()
def analyze(
    networks: Networks,
    *,
    data: Data,
    out: Out,
    weights: Weights = "imagenet",
    samples: Annotated[str | None, typer.Option(help="Test images, as many of each class, or all.")] = None,
    image_size: ImageSize = None,
    layers: Annotated[str | None, typer.Option(help="Names or module paths, separated by commas.")] = None,
    normalise: Annotated[str | None, typer.Option(help="minmax, l2, standard or none.")] = None,
    pca: Annotated[int | None, typer.Option(help="Components before t-SNE; 0 for none.")] = None,
    perplexity: Annotated[float | None, typer.Option(help="Of t-SNE.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Of t-SNE.")] = None,
    seeds: Annotated[int | None, typer.Option(help="t-SNE maps of each layer.")] = None,
    k: Annotated[list[int] | None, typer.Option(help="Neighbours of the neighborhood hit; repeatable.")] = None,
    engine: Annotated[str | None, typer.Option(help="Of t-SNE: auto, exact or cuml.")] = None,
    precision: Annotated[str | None, typer.Option(help="Of the forward pass: fp32, tf32 or bf16.")] = None,
    memory: Annotated[str | None, typer.Option(help="To stay within, e.g. 4GB; default most of what is free.")] = None,
    device: Device = "auto",
    preset: Annotated[str, typer.Option(help="default, or paper for the values of the CIKM 2024 paper.")] = "default",
    skip_bad: SkipBad = False,
) -> None:
    """Score every layer of one or more networks: activations, PCA, t-SNE, neighborhood hit."""
    from dataclasses import replace

    from qdv_gpu.features.budget import parse_bytes
    from qdv_gpu.studies import analyze as analysis

    given: dict[str, Any] = {
        "samples": int(samples) if samples and samples.isdigit() else samples,
        "image_size": image_size,
        "layers": tuple(layer.strip() for layer in layers.split(",")) if layers else None,
        "normalise": normalise,
        "pca": pca,
        "perplexity": perplexity,
        "iterations": iterations,
        "seeds": seeds,
        "k": tuple(k) if k else None,
        "engine": engine,
        "precision": precision,
        "memory": parse_bytes(memory) if memory else None,
    }
    settings = replace(analysis.preset(preset), **{name: value for name, value in given.items() if value is not None})
    result = analysis.analyze(
        networks, data, out, settings=settings, weights=weights, device=device, skip_bad=skip_bad, report=say
    )
    show(result)


@app.command()
def finetune(
    network: NetworkName,
    *,
    data: Data,
    out: Out,
    weights: Weights = "imagenet",
    image_size: ImageSize = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Images in a step.")] = 16,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-5,
    limit: Annotated[str, typer.Option(help="Training images, as many of each class, or all.")] = "all",
    seed: Annotated[int, typer.Option(help="Of the head's weights, the order and dropout.")] = 0,
    device: Device = "auto",
    skip_bad: SkipBad = False,
) -> None:
    """Fine-tune every weight of a network on a data set; the defaults are the paper's."""
    from qdv_gpu.studies.finetune import finetune as train

    with training_bar() as progress:
        result = train(
            network,
            data,
            out,
            weights=weights,
            image_size=image_size,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            limit=int(limit) if limit.isdigit() else limit,
            seed=seed,
            device=device,
            skip_bad=skip_bad,
            report=say,
            progress=progress,
        )
    print(f"test accuracy {result['test_accuracy']:.2%} on {result['test_images']} images")
    print(f"weights: {out / 'weights.safetensors'}\ncurve: {out / 'training.png'}")


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
        report=say,
    )
    print("\n".join(map(str, paths)))


@app.command()
def layers(network: NetworkName, *, weights: Weights = "none", image_size: ImageSize = None) -> None:
    """List the layers that a network is analysed at: name, module path, shape, number of features."""
    from math import prod

    from rich.table import Table

    from qdv_gpu.networks.layers import describe_layers
    from qdv_gpu.networks.network import load_network

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
        report=say,
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

    show(run(out, device=device, report=say))


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

    for k in dict.fromkeys(score["k"] for score in result.scores):
        header, *rows = result.table(k)
        table = Table(*header, title=f"neighborhood hit (k = {k}) ± standard error")
        for row in rows:
            table.add_row(*row)
        console().print(table)
    for path in (result.out / "table3.md", result.out / "layers.csv", *result.figures):
        print(path)


@contextmanager
def training_bar() -> Iterator[Any]:
    """Yield a callback that draws a progress bar on a terminal, or None elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, Progress, TextColumn

    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}")]
    with Progress(*columns, console=console(stderr=True)) as bar:
        task = bar.add_task("training", rate="")

        def update(at: "training.Progress") -> None:
            minutes, seconds = divmod(int(at.seconds_left), 60)
            rate = f"{at.images_per_second:.0f} images/s, {minutes}:{seconds:02d} left"
            bar.update(
                task, description=f"epoch {at.epoch}/{at.epochs}", completed=at.images, total=at.total, rate=rate
            )

        yield update


def main() -> None:
    """Run the command line: 0 for success, 2 and one line on stderr for a mistake in the input."""
    warnings.showwarning = lambda message, *_args, **_kwargs: say(f"warning: {message}")
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
    sys.exit(status)
