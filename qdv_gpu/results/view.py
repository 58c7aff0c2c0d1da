"""A run folder as people look at it: maps, tables and predictions, read without the store."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qdv_gpu.errors import InputError
from qdv_gpu.files import text_of
from qdv_gpu.neighbors import knn
from qdv_gpu.results.checks import check_array, check_cost
from qdv_gpu.results.run import RUN, checked, damage_said, embedding_file, hits_column, read_about, rows_of
from qdv_gpu.scores.statistics import class_neighbors, hits
from qdv_gpu.sealed import read_sealed

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
        Of its row of table3.csv for that k: nh, standard_error, chance, trustworthiness, ...; NaN is unknown, and what
        an older version did not compute is not there.
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
    about = read_about(folder)
    if not about.keys() >= NEEDED:
        raise InputError(f"{folder / RUN} is of no finished run, or damaged: run its command again")
    with damage_said(folder):
        return _view(folder, about, k)


def _view(folder: Path, about: Mapping[str, Any], k: int | None) -> RunView:
    classes = tuple(text_of(name) for name in about["classes"])
    columns = _columns(checked(folder, about, "predictions.csv"))
    files = tuple(columns["file"])
    timings = read_sealed(checked(folder, about, "timings.json")) if (folder / "timings.json").is_file() else {}
    for costs in timings.values():
        for cost in costs.values():
            check_cost(cost)
    rows = rows_of(checked(folder, about, "table3.csv"))
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
        arrays = maps_of(folder, about, row["network"], row["layer"], samples=len(files), classes=len(classes))
        labels, Z = arrays.get("labels"), arrays["Z"]
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
    thumbnails = thumbnails_of(folder, about)
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


def maps_of(
    folder: Path, about: Mapping[str, Any], network: str, layer: str, *, samples: int | None, classes: int
) -> dict[str, np.ndarray]:
    """What a run folder has of a layer: maps Z float32 [S, N, 2], and labels int64 [N] and class_neighbors if known.

    Raises whatever reading a damaged file raises.
    """
    file = checked(folder, about, embedding_file(network, layer))
    try:
        with np.load(file, allow_pickle=False) as contents:
            arrays = dict(contents)
    except MemoryError:
        raise ValueError(f"{file} says that it is larger than memory") from None
    Z = check_array(arrays, "Z", np.float32, None, samples, 2)
    if not len(Z):
        raise ValueError(f"there are no maps of {network} {layer}")
    if "labels" in arrays:
        labels = check_array(arrays, "labels", np.int64, Z.shape[1])
        if not ((labels >= 0) & (labels < classes)).all():
            raise ValueError(f"labels of {network} {layer} are not below {classes}")
    if "class_neighbors" in arrays:
        check_array(arrays, "class_neighbors", np.float32, classes, classes, finite=False)
    return arrays


def thumbnails_of(folder: Path, about: Mapping[str, Any]) -> list[Path]:
    """Sheets of small pictures that a run wrote and that are there; ValueError if one is not what it wrote."""
    listed = about.get("files")
    names = {f"thumbnails/{path.name}" for path in (folder / "thumbnails").glob(SHEETS)}
    if isinstance(listed, Mapping):
        names &= listed.keys()
    return [checked(folder, about, name) for name in sorted(names)]


def _numbers(row: Mapping[str, str]) -> dict[str, float]:
    known = {name: value for name, value in row.items() if name not in ("network", "layer", "tokens")}
    return {name: float(value or "nan") for name, value in known.items()}
