"""The options of the commands: those that several have, and one for each setting of a table."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

Networks = Annotated[
    list[str],
    typer.Argument(
        help="[LABEL=]NETWORK[(key=value, ...)]['['EDIT, ...']'][=CHECKPOINT], one or more; see "
        "`qdv-gpu layers --help`."
    ),
]
NetworkName = Annotated[
    str,
    typer.Argument(
        help="[LABEL=]NAME[(key=value, ...)]['['EDIT, ...']'][=CHECKPOINT]: NAME is a torchvision classifier, "
        "timm:MODEL, caffe_alexnet, zfnet or package.module:factory; EDIT is MODULE.ARGUMENT=VALUE, MODULE.depth=N, "
        "width=FACTOR, pooling=avg|max, norm=batch|group|instance|none, activation=KIND, zf or "
        "carry=fresh|crop|resample; CHECKPOINT a file of weights, a folder of `qdv-gpu finetune`, imagenet or none."
    ),
]
Data = Annotated[
    str,
    typer.Option(
        help="cifar10, fashion-mnist, digits, a folder (DIR/<split>/<class>/*, DIR/<class>/* or DIR/*) or a .csv of "
        "file,label."
    ),
]
Out = Annotated[Path, typer.Option(help="Folder for the results; a run that was killed goes on from it.")]
Weights = Annotated[
    str, typer.Option(help="Of networks without CHECKPOINT: imagenet, none or a file (.safetensors, .pt, .ckpt, ...).")
]
Split = Annotated[str | None, typer.Option(help="Which images, e.g. val; by default test.")]
ImageSize = Annotated[
    int | None, typer.Option(help="Side in pixels that images are resized to; by default the network's own.")
]
Crop = Annotated[
    bool, typer.Option("--crop", help="Resize the shorter side and cut out the centre, as each network was tested.")
]
Numbers = Annotated[
    str | None, typer.Option(help="Of each channel, for pixels in 0..1; by default each network's own.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Preset = Annotated[str, typer.Option(help="default, or paper for the values of the CIKM 2024 paper.")]
Formats = Annotated[str, typer.Option("--format", help="Of the figures: png, pdf, svg, or several with commas.")]
StorePath = Annotated[
    Path | None,
    typer.Option(help="Where stages are kept; default $QDV_GPU_STORE, or .qdv-store in the folder that holds --out."),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out image files that cannot be read, and count them.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more on the way.")]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show of an error where it comes from, before its line.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but warnings and results.")]


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
        return signed(run, command, [*own, *keywords({f.name: _option(f) for f in fields}, default=None)])

    return decorate


def _option(field: Any) -> Any:
    """The option of a setting; several values may be given one by one, or separated by commas."""
    if field.type is bool:
        name = f"--{field.name.replace('_', '-')}"
        return Annotated[bool | None, typer.Option(name, help=field.metadata["help"], show_default=False)]
    several = "Sequence" in str(field.type)
    kind: Any = str if field.metadata["read"] else next(k for k in (float, int, str) if k.__name__ in str(field.type))
    default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    shown = field.metadata["help"]
    return Annotated[
        list[kind] | None if several else kind | None,
        typer.Option(help=shown, show_default=False if default is None else str(default)),
    ]


def signed(
    run: Callable[..., None], function: Callable[..., None], parameters: list[inspect.Parameter]
) -> Callable[..., None]:
    """`run`, which looks like `function` with other parameters to those who read its signature."""
    setattr(run, "__signature__", inspect.Signature(parameters))  # noqa: B010 - functions have none to mypy
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    return run


def keywords(annotations: Mapping[str, Any], *, default: Any) -> list[inspect.Parameter]:
    """Keyword-only parameters with these annotations."""
    kind = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(name, kind, default=default, annotation=one) for name, one in annotations.items()]
