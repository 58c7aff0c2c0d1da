"""A finished run for other programs to show: Parquet, TensorBoard's projector, CSV."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from qdv_gpu.data.images import Images
from qdv_gpu.data.thumbnails import find_again, pictures, png_files
from qdv_gpu.errors import InputError, as_path, check_among
from qdv_gpu.files import explained, locked, remove_leftovers, safe_name, text_of
from qdv_gpu.report import projector
from qdv_gpu.report.rows import write_csv, write_parquet
from qdv_gpu.report.thumbnails import decoded
from qdv_gpu.results.points import components_of, points_of
from qdv_gpu.results.run import damage_said
from qdv_gpu.results.store import DAMAGES
from qdv_gpu.results.view import RunView, ViewedLayer, view_run
from qdv_gpu.sealed import read_sealed, write_sealed

logger = logging.getLogger(__name__)
KINDS = ("parquet", "tensorboard", "csv")
MANIFEST = "export.json"  # lists the files that are ours
SIDE = 128  # of a picture in pixels, at most
FILES = 32  # that pictures are written to at once


def export(run: str | Path, out: str | Path | None = None, *, to: str) -> list[Path]:
    """Write the maps of a finished run, with images, labels, predictions and hits, for other programs to show.

    The map of a layer is that of the run's first seed. `hits_k5` is what the run's tables hold the mean of: the share
    of the 5 nearest neighbours with the image's class, mean of all its maps.

    Parameters
    ----------
    run : str or Path
        The folder that `analyze` wrote. It is not changed, but for the default `out`.
    out : str or Path, optional
        Folder for the files; default `run`/export/`to`. Files there that no earlier export wrote are never replaced.
    to : {"parquet", "tensorboard", "csv"}
        "parquet": <network>/<layer>.parquet, as `write_parquet` writes it, with pictures of at most 128 pixels. Its
        neighbours are those that hits in this map are counted of: the k nearest other images in it, for the run's
        largest k. "csv": <network>/<layer>.csv, the same without pictures and neighbours. "tensorboard": what
        TensorBoard's projector reads, for each layer the map and, where the store has them still, the components.

    Returns
    -------
    list of Path
        The files; of "tensorboard" the last is the configuration.

    Raises
    ------
    InputError
        If the folder holds no finished run or is damaged, `to` is unknown, `out` holds files of others under the same
        names, or another export is writing there.

    Notes
    -----
    Images are read again from the run's data, whose path is taken as the run was given it, and used if their contents
    are those that were analysed; else they are the run's thumbnails, of 32 pixels.

    Examples
    --------
    >>> import torch
    >>> from qdv_gpu import analyze
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    >>> result = analyze(network, "digits", tmp_path / "run", layers="2", samples=100, perplexity=8, seeds=1)
    >>> [path.name for path in export(result.out, tmp_path / "atlas", to="parquet")]
    ['2.parquet']
    """
    check_among("kind of export", to, KINDS)
    view = view_run(as_path("run", run))
    target = view.folder / "export" / to if out is None else as_path("out", out)
    write: dict[str, Callable[[RunView, Path], list[str]]] = {
        "parquet": _parquet, "tensorboard": _tensorboard, "csv": _csv
    }  # fmt: skip
    with damage_said(view.folder):
        names = _names(view, to)
    with _owned(target, to, names) as written, damage_said(view.folder):
        written += write[to](view, target)
    return [target / name for name in written]


def _parquet(view: RunView, out: Path) -> list[str]:
    images = _images(view)
    names = [f"{_folder(layer)}.parquet" for layer in view.layers]
    for start in range(0, len(names), FILES):
        some = list(zip(names, view.layers, strict=True))[start : start + FILES]
        points = [(out / name, points_of(view, layer)) for name, layer in some]
        made = None if images is None else partial(png_files, images, side=SIDE)
        write_parquet(points, max(view.about["settings"]["k"]), made)
    return names


def _csv(view: RunView, out: Path) -> list[str]:
    names = [f"{_folder(layer)}.csv" for layer in view.layers]
    for name, layer in zip(names, view.layers, strict=True):
        write_csv(out / name, points_of(view, layer))
    return names


def _tensorboard(view: RunView, out: Path) -> list[str]:
    images, embeddings, side = _images(view), [], None
    names = []
    for layer in view.layers:
        points, top, title = points_of(view, layer), _folder(layer), text_of(f"{layer.network} {layer.layer}")
        metadata = f"{top}/metadata.tsv"
        projector.write_metadata(out / metadata, points.columns)
        names.append(metadata)
        for what, X in (("map", points.Z), ("components", components_of(view, layer))):
            if X is not None:
                names.append(f"{top}/{what}.bytes")
                shape = projector.write_tensor(out / names[-1], X)
                embeddings.append(projector.Embedding(f"{title}: {what}", shape, names[-1], metadata))
    if images is not None:
        side = projector.write_sprite(out / projector.SPRITE, len(images), partial(pictures, images))
        names.append(projector.SPRITE)
    projector.write_config(out / projector.CONFIG, embeddings, side)
    return [*names, projector.CONFIG]


def _folder(layer: ViewedLayer) -> str:
    return f"{safe_name(layer.network)}/{safe_name(layer.layer)}"


def _names(view: RunView, to: str) -> list[str]:
    """Files that an export may write."""
    tops = [_folder(layer) for layer in view.layers]
    if to != "tensorboard":
        return [f"{top}.{to}" for top in tops]
    own = ("map.bytes", "components.bytes", "metadata.tsv")
    return [*(f"{top}/{name}" for top in tops for name in own), projector.SPRITE, projector.CONFIG]


def _images(view: RunView) -> Images | None:
    """The run's images, else its thumbnails, else a warning."""
    about = view.about
    settings = about["settings"]
    try:
        return find_again(
            str(about["data"]), view.files, about["images"]["contents"], split=settings["split"],
            image_size=None if settings["crop"] else settings["image_size"],
        )  # fmt: skip
    except (InputError, OSError) as error:
        with suppress(*DAMAGES, RuntimeError):
            pixels = decoded([file.read_bytes() for file in view.thumbnails], len(view.files))
            logger.info("the pictures are the run's thumbnails: %s", error)
            return Images.from_arrays(pixels)
        logger.warning("exported without pictures: %s", error)
        return None


@contextmanager
def _owned(out: Path, to: str, names: Sequence[str]) -> Iterator[list[str]]:
    """Keep a folder's other files, and other exports out; gets the names that are written, and removes older ones.

    Raises
    ------
    InputError
        If one of `names` is there already and not of an earlier export, or `out` cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is no folder: choose another --out")
    _check_foreign(out, names)
    with locked(out) as free:
        if not free:
            raise InputError(f"another export is writing to {out}: choose another --out, or wait")
        for folder in {out, *((out / name).parent for name in names)}:
            remove_leftovers(folder, below=False)
        before = _manifest(out)
        older = set(before.get(to, ()))
        _write_manifest(out, {**before, to: older | set(names)})  # so that they stay ours if this is killed
        written: list[str] = []
        yield written
        for name in older - set(written):
            with explained(out / name):
                (out / name).unlink(missing_ok=True)
        _write_manifest(out, {**before, to: set(written)})


def _check_foreign(out: Path, names: Iterable[str]) -> None:
    ours = {name for own in _manifest(out).values() for name in own}
    for name in names:
        if name not in ours and os.path.lexists(out / name):
            raise InputError(f"{out / name} is there and not of an earlier export: choose another --out")


def _manifest(out: Path) -> dict[str, list[str]]:
    """Files of earlier exports, all of them below `out`, by kind."""
    path = out / MANIFEST
    if not os.path.lexists(path):
        return {}
    try:
        said = read_sealed(path)["files"]
        found = {kind: [str(name) for name in said[kind]] for kind in KINDS if kind in said}
    except DAMAGES:
        raise InputError(f"{path} is there and not of an earlier export: choose another --out") from None
    return {
        kind: [name for name in own if not os.path.isabs(name) and ".." not in Path(name).parts]
        for kind, own in found.items()
    }


def _write_manifest(out: Path, files: dict[str, Iterable[str]]) -> None:
    write_sealed(out / MANIFEST, {"files": {kind: sorted(own) for kind, own in files.items()}})
