"""A finished run, read back: its folder says what it is of, the store holds what it found."""

import csv
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qdv_gpu.errors import InputError, short
from qdv_gpu.files import safe_name, text_of
from qdv_gpu.results.checks import ARRAYS, check_components, check_scores
from qdv_gpu.results.records import AnalysedLayer
from qdv_gpu.results.stages import VERSIONS
from qdv_gpu.results.store import DAMAGES, Record, Store
from qdv_gpu.scores.quality import LayerScores, MapScore, Score
from qdv_gpu.sealed import hash_of, read_sealed

RUN = "run.json"
NEEDED = {"classes", "data", "images", "outputs", "settings", "store"}  # of what a finished run's run.json says
TYPES = {
    "classes": list, "data": str, "images": dict, "networks": dict, "outputs": dict, "settings": dict, "store": str,
}  # fmt: skip
SAME = ("perplexity", "iterations", "learning_rate", "normalise", "pca", "engine")  # settings that a comparison shares


@dataclass(frozen=True)
class Run:
    """A run of `analyze`.

    Attributes
    ----------
    folder : Path
    about : dict
        What its run.json says.
    classes : tuple of str
    labels : array
        int64 [N].
    files : tuple of str
        Name of each image.
    networks : dict of str to list of AnalysedLayer
        By name; the layers in order, with scores for one k, and without maps.
    hits : dict of str to array
        bool [N]: which images a network gets right; of those whose classes are the images'.
    """

    folder: Path
    about: dict[str, Any]
    classes: tuple[str, ...]
    labels: np.ndarray
    files: tuple[str, ...]
    networks: dict[str, list[AnalysedLayer]]
    hits: dict[str, np.ndarray]


def is_run(path: Any) -> bool:
    """Whether a path is of a folder that `analyze` wrote."""
    known = isinstance(path, str | Path)
    return known and all(os.path.isfile(os.path.join(path, name)) for name in (RUN, "layers.csv"))


def read_about(folder: Path) -> dict[str, Any]:
    """What the run.json of a finished run says; nothing where there is none.

    Raises
    ------
    InputError
        If it is damaged, or of a run that did not come to its end.
    """
    if not (folder / RUN).is_file():
        return {}
    try:
        about = read_sealed(folder / RUN)
    except InputError as error:
        raise InputError(f"{error}: run its command again") from None
    for name, kind in TYPES.items():
        if name in about and not isinstance(about[name], kind):
            raise InputError(f"{folder / RUN} is damaged ({name} is {short(about[name])}): run its command again")
    if not is_finished(about):
        raise InputError(f"{folder} is of a run that did not come to its end: run its command again")
    return about


@contextmanager
def damage_said(*folders: Path) -> Iterator[None]:
    """Say of whatever reading a damaged file raises, in one line, that the folders are damaged.

    Raises
    ------
    InputError
        In its place.
    """
    try:
        yield
    except InputError:
        raise
    except DAMAGES as error:
        named, said = " or ".join(map(str, folders)), " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{named} is damaged ({said:.300}): run its command again") from None


def rows_of(file: Path) -> list[dict[str, str]]:
    """The rows of a table; ValueError unless each has a value for each column."""
    with file.open(newline="", encoding="utf-8") as lines:
        header, *rows = csv.reader(lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def is_finished(about: Mapping[str, Any]) -> bool:
    """Whether a run.json is of a run that came to its end; older versions listed no files before."""
    return about.get("finished") is not False and about.get("files") != []


def checked(folder: Path, about: Mapping[str, Any], name: str) -> Path:
    """Path of a file of a run folder; ValueError if it is not what the run wrote, as far as its run.json says."""
    files = about.get("files")
    written = files.get(name) if isinstance(files, Mapping) else None
    if written is not None and written != hash_of(folder / name):
        raise ValueError(f"{name} is not what the run wrote")
    return folder / name


def is_whole(folder: Path) -> bool:
    """Whether a folder holds a finished run, and all files are what it wrote, as far as its run.json says."""
    try:
        about = read_about(folder)
        for name in about["files"]:
            checked(folder, about, name)
    except DAMAGES:
        return False
    return True


def embedding_file(network: str, layer: str) -> str:
    """Name of the file with a layer's maps, in a run folder.

    >>> embedding_file("alexnet", "conv3")
    'embeddings/alexnet/conv3.npz'
    """
    return f"embeddings/{safe_name(network)}/{safe_name(layer)}.npz"


def hits_column(network: str, layer: str) -> str:
    """Name of the column of predictions.csv with the hits in a layer, which no column of predictions has.

    >>> hits_column("alexnet", "conv3"), hits_column("mine", "prediction")
    ('alexnet conv3', 'mine prediction hits')
    """
    return f"{network} {layer} hits" if layer in ("prediction", "probability") else f"{network} {layer}"


def read_run(folder: str | Path, *, k: int | None = None, store: str | Path | None = None) -> Run:
    """Read a finished run for one k, by default its first.

    Raises
    ------
    InputError
        If the folder holds none, or one of unlabelled images or of another version; if it has no scores for that k; if
        what it found is not in the store any more.
    """
    folder = Path(folder)
    about = read_about(folder)
    if not about.keys() >= NEEDED:
        raise InputError(f"{folder} holds no finished run of qdv-gpu analyze, or one of an older version: run it again")
    with damage_said(folder):
        return _read(folder, about, k, store)


def _read(folder: Path, about: dict[str, Any], k: int | None, store: str | Path | None) -> Run:
    kept = Store(store or about["store"])
    rows = rows_of(checked(folder, about, "predictions.csv"))
    samples = about["images"]["samples"]
    if not rows or len(rows) != samples:
        raise ValueError(f"predictions.csv has {len(rows)} of {samples} images")
    if "label" not in rows[0]:
        raise InputError(f"{folder} is of images without labels: a comparison needs them")
    classes = tuple(about["classes"])
    numbers = {text_of(name): number for number, name in enumerate(classes)}
    labels = np.array([numbers[row["label"]] for row in rows])
    networks = {
        network: [
            _layer(folder, kept, network, position, one, k, len(rows)) for position, one in enumerate(outputs, start=1)
        ]
        for network, outputs in about["outputs"].items()
    }
    if not networks or not all(networks.values()):
        raise ValueError("run.json names no layers")
    said = {network: f"{network} prediction" for network in networks}
    hits = {
        network: np.array([row[column] == row["label"] for row in rows])
        for network, column in said.items()
        if column in rows[0]
    }
    return Run(folder, about, classes, labels, tuple(row["file"] for row in rows), networks, hits)


def check_same(first: Run, second: Run) -> None:
    """Raise InputError unless two runs are of the same images, labels and settings; it names the first that differs."""
    check_same_images(first, second)
    for name in SAME:
        own, other = (run.about["settings"].get(name) for run in (first, second))
        if own != other:
            pair = f"{first.folder} and {second.folder}"
            raise InputError(f"{pair} were made with {name.replace('_', ' ')} {own} and {other}: run one of them again")


def check_same_images(first: Run, second: Run) -> None:
    """Raise InputError unless two runs are of the same images and labels; it names the first that differs."""
    pair = f"{first.folder} and {second.folder}"
    for number, (a, b) in enumerate(zip_longest(first.classes, second.classes)):
        if a != b:
            a, b = ("missing" if name is None else name for name in (a, b))
            raise InputError(f"{pair} are of other classes: class {number} is {a} in one and {b} in the other")
    for number, (a, b, x, y) in enumerate(zip(first.files, second.files, first.labels, second.labels, strict=False)):
        if a != b:
            raise InputError(f"{pair} are of other images: image {number} is {a} in one and {b} in the other")
        if x != y:
            names = first.classes[x], second.classes[y]
            raise InputError(f"{pair} are of other labels: {a} is {names[0]} in one and {names[1]} in the other")
    if len(first.files) != len(second.files):
        raise InputError(f"{pair} are of {len(first.files)} and {len(second.files)} images")
    if first.about["images"]["contents"] != second.about["images"]["contents"]:
        raise InputError(f"{pair} are of images of the same names with other contents")


def _layer(  # noqa: PLR0917 - where it is found
    folder: Path, store: Store, network: str, position: int, one: dict[str, Any], k: int | None, samples: int
) -> AnalysedLayer:
    known = {int(text): digest for text, digest in one["scores"].items()}
    wanted = list(known)[0] if k is None else k  # noqa: RUF015 - of none it is an IndexError
    if wanted not in known:
        have = ", ".join(map(str, known))
        more = ",".join(map(str, [*known, wanted]))
        raise InputError(f"{folder} has scores for k = {have}, not {wanted}: run its command with --k {more}")
    scores = _stage(folder, store, "scores", known[wanted], partial(check_scores, samples=samples, k=wanted))
    check = partial(check_components, samples=samples, features=one["features"])
    components = _stage(folder, store, "components", one["components"], check)
    return AnalysedLayer(
        network=network, layer=one["layer"], position=position, features=one["features"], samples=samples,
        tokens=one["tokens"], perplexity=0.0, engine="", Z=np.empty((0, samples, 2), np.float32), kl=[],
        scores=(scores_of(scores, wanted),), stages={}, X=components.arrays["X"],
    )  # fmt: skip


def scores_of(record: Record, k: int) -> LayerScores:
    """The scores of a layer that a stage keeps."""
    return LayerScores(
        k=k,
        maps=tuple(MapScore(**row) for row in record.about["maps"]),
        mean=Score(**record.about["mean"]),
        **{name: torch.from_numpy(record.arrays[name]) for name in ARRAYS},
    )


def _stage(folder: Path, store: Store, stage: str, digest: str, check: Callable[[Record], None]) -> Record:
    record, version = store.find(stage, digest, check, version=VERSIONS[stage])
    if version is not None and version != VERSIONS[stage]:
        raise InputError(f"{folder} was made by another version of qdv_gpu: run its command again")
    if record is None:
        raise InputError(f"what {folder} found is not in {store.path}: run its command again, or name its --store")
    return record
