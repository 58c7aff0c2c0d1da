"""A run folder as people look at it: maps, tables and predictions, read without the store."""

import csv
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qdv_gpu.errors import InputError
from qdv_gpu.files import read_json, text_of
from qdv_gpu.neighbors import knn
from qdv_gpu.results.run import RUN, embedding_file, hits_column
from qdv_gpu.scores.statistics import class_neighbors, hits

SHEETS = "[0-9]*.webp"  # and not what a killed run was writing
NEEDED = {"classes", "settings", "networks", "data"}  # of what run.json says
OTHERS = {"comparison.json": "compare", "deconv": "deconv", "finetune.json": "finetune", "sweep.json": "sweep"}


@dataclass(frozen=True)
class ViewedLayer:
    """A layer.

    Attributes
    ----------
    network, layer : str
    title : str
        The layer, with what was taken of its tokens.
    scores : dict of str to float
        Of its row of table3.csv for the first k: nh, standard_error, chance, trustworthiness, ...; NaN is unknown.
    Z : array
        float32 [S, N, 2]: a map for each seed.
    hits : array or None
        float32 [N]: hits of each image, mean over the maps.
    strangers : array or None
        float32 [C, C]: share of each class (column) among the neighbours of each class (row), mean over the maps.
    stages : dict
        Seconds and peak memory in bytes of each stage.
    """

    network: str
    layer: str
    title: str
    scores: Mapping[str, float]
    Z: np.ndarray
    hits: np.ndarray | None
    strangers: np.ndarray | None
    stages: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class RunView:
    """A finished run of `analyze`.

    Attributes
    ----------
    folder : Path
    about : dict
        What run.json says.
    classes, files : tuple of str
        As text that every encoding has.
    labels : array or None
        int64 [N].
    k : int
        Neighbours of the scores.
    layers : list of ViewedLayer
        Network by network, in order.
    predictions : dict of str to (array, array)
        Of networks whose classes are the images': class int64 [N] and probability float32 [N].
    thumbnails : list of Path
        Sheets of `report/thumbnails.py`; empty in a folder of an older version.
    """

    folder: Path
    about: Mapping[str, Any]
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: np.ndarray | None
    k: int
    layers: list[ViewedLayer]
    predictions: Mapping[str, tuple[np.ndarray, np.ndarray]]
    thumbnails: list[Path]

    @property
    def networks(self) -> list[str]:
        """Names, in order."""
        return list(dict.fromkeys(layer.network for layer in self.layers))


def view_run(folder: str | Path, *, k: int | None = None) -> RunView:
    """Read a run folder of `analyze` as it is, for one k, by default its first.

    Raises
    ------
    InputError
        If it holds no finished run, or none for that k, or what it holds is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no run folder {folder}")
    if not (folder / RUN).is_file() or not (folder / "table3.csv").is_file():
        other = next((command for name, command in OTHERS.items() if (folder / name).exists()), None)
        what = "is" if other is None else f"is of qdv-gpu {other},"
        raise InputError(f"{folder} {what} no finished run of qdv-gpu analyze: give the --out of one")
    about = read_json(folder / RUN)
    if not isinstance(about, dict) or not about.keys() >= NEEDED:
        raise InputError(f"{folder / RUN} is of no finished run, or damaged: run its command again")
    try:
        return _view(folder, about, k)
    except (OSError, EOFError, AttributeError, LookupError, TypeError, ValueError, csv.Error, zipfile.BadZipFile) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{folder} is damaged ({type(e).__name__}: {e}): run its command again") from None


def _view(folder: Path, about: Mapping[str, Any], k: int | None) -> RunView:
    classes = tuple(text_of(name) for name in about["classes"])
    columns = _columns(folder / "predictions.csv")
    files = tuple(columns["file"])
    timings = read_json(folder / "timings.json") if (folder / "timings.json").is_file() else {}
    with (folder / "table3.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    first = int(rows[0]["k"])
    k = first if k is None else k
    known = dict.fromkeys(int(row["k"]) for row in rows)
    if k not in known:
        have = ", ".join(map(str, known))
        raise InputError(f"{folder} has scores for k = {have}, not {k}: run its command with --k {have},{k}")
    layers, labels = [], None
    for row in rows:
        if int(row["k"]) != k:
            continue
        own, arrays = f"{row['network']} {row['layer']}", _arrays(folder, row["network"], row["layer"])
        labels, Z = arrays.get("labels"), arrays["Z"]
        if Z.shape[1:] != (len(files), 2) or (labels is not None and len(labels) != len(files)):
            raise ValueError(f"maps of {own} are {list(Z.shape)}, of {len(files)} images")
        column = hits_column(row["network"], row["layer"])
        hit = np.array(columns[column], np.float32) if column in columns else None
        title = row["layer"] + (f" [{row['tokens']}]" if row["tokens"] else "")
        stages = timings.get(f"{row['network']}/{row['layer']}", {})
        strangers = arrays.get("class_neighbors")
        if k != first and labels is not None:  # the tables hold them for the first
            hit, strangers = _scored(Z, labels, k, len(classes))
        layers.append(ViewedLayer(row["network"], row["layer"], title, _numbers(row), Z, hit, strangers, stages))
    numbers = {name: number for number, name in enumerate(classes)}
    predictions = {
        network: (
            np.array([numbers[name] for name in columns[f"{network} prediction"]]),
            np.array(columns[f"{network} probability"], np.float32),
        )
        for network in dict.fromkeys(layer.network for layer in layers)
        if f"{network} prediction" in columns
    }
    thumbnails = sorted((folder / "thumbnails").glob(SHEETS))
    return RunView(folder, about, classes, files, labels, k, layers, predictions, thumbnails)


def _scored(Z: np.ndarray, labels: np.ndarray, k: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Hits float32 [N] and classes of the neighbours float32 [C, C], mean of maps Z [S, N, 2]."""
    y = torch.from_numpy(labels)
    near = torch.stack([knn(torch.from_numpy(z), k).indices for z in Z])
    found = torch.stack([hits(one, y) for one in near]).mean(dim=0)
    return found.float().numpy(), class_neighbors(near, y, classes)


def _columns(file: Path) -> dict[str, list[str]]:
    """Columns of a CSV."""
    with file.open(newline="", encoding="utf-8") as lines:
        header, *rows = csv.reader(lines)
    return dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))


def _arrays(folder: Path, network: str, layer: str) -> dict[str, np.ndarray]:
    with np.load(folder / embedding_file(network, layer)) as arrays:
        return dict(arrays)


def _numbers(row: Mapping[str, str]) -> dict[str, float]:
    known = {name: value for name, value in row.items() if name not in ("network", "layer", "tokens")}
    return {name: float(value or "nan") for name, value in known.items()}
