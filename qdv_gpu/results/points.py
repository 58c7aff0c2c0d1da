"""What a finished run says of each image in each layer, read from its folder alone."""

import csv
import sys
import zipfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qdv_gpu.errors import InputError
from qdv_gpu.files import read_json, text_of
from qdv_gpu.neighbors import Neighbors, knn
from qdv_gpu.results.run import NEEDED, RUN, embedding_file, is_run
from qdv_gpu.results.store import Store
from qdv_gpu.scores.statistics import hits

OTHERS = {"comparison.json": "compare", "deconv": "deconv", "finetune.json": "finetune", "sweep.json": "sweep"}
DAMAGED = (OSError, AttributeError, LookupError, TypeError, ValueError, EOFError, csv.Error, zipfile.BadZipFile)


@dataclass(frozen=True)
class Points:
    """The images of a run as points of one layer.

    Attributes
    ----------
    network, layer : str
    Z : array
        float32 [N, 2]: the map of the first seed.
    columns : dict of str to sequence
        By name, one value for each image: `file`, and where they are known `label`, `prediction`, `probability` and
        `hits_k5` for each k of the run: the share of the k nearest neighbours that have the image's class, mean of the
        maps.
    """

    network: str
    layer: str
    Z: np.ndarray
    columns: dict[str, Sequence[Any]]

    def neighbors(self, k: int) -> Neighbors:
        """The k nearest other images of each in `Z`."""
        return knn(torch.from_numpy(self.Z), k)


class PointReader:
    """Reads the points of a finished run, layer by layer.

    Parameters
    ----------
    folder : str or Path
        That `analyze` wrote.

    Attributes
    ----------
    about : dict
        What its run.json says.
    layers : list of tuple
        Network and layer, in order.
    files : sequence of str
        Name of each image.
    k : list of int
        That the run has scores for.

    Raises
    ------
    InputError
        If the folder holds no finished run, or is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.about = _about(self.folder)
        try:
            self._outputs = {
                (network, one["layer"]): one for network, outputs in self.about["outputs"].items() for one in outputs
            }
            self.layers = list(self._outputs)
            self.k = [int(k) for k in self.about["settings"]["k"]]
            self._table = _columns(self.folder / "predictions.csv", {f"{n} prediction" for n, _ in self.layers})
            self.files: Sequence[str] = self._table["file"]
            samples = self.about["images"]["samples"]
            if len(self.files) != samples:
                raise ValueError(f"predictions.csv has {len(self.files)} of {samples} images")
            if not self.layers or not self.k:
                raise ValueError("run.json names no layers")
        except DAMAGED as error:
            raise self._damaged(error) from None

    def read(self, network: str, layer: str) -> Points:
        """The points of a layer; InputError if its file is damaged."""
        try:
            with np.load(self.folder / embedding_file(network, layer), allow_pickle=False) as arrays:
                Z, labels = arrays["Z"].astype(np.float32, copy=False), arrays.get("labels")
            if Z.ndim != 3 or Z.shape[1:] != (len(self.files), 2) or not len(Z):
                raise ValueError(f"the maps of {network} {layer} are {list(Z.shape)}, of {len(self.files)} images")
            columns: dict[str, Sequence[Any]] = {"file": self.files}
            if labels is not None:
                classes = [text_of(name) for name in self.about["classes"]]
                columns["label"] = [classes[c] for c in labels]
            for name in ("prediction", "probability"):
                if f"{network} {name}" in self._table:
                    columns[name] = self._table[f"{network} {name}"]
            if labels is not None:
                columns |= self._hits(f"{network} {layer}", Z, torch.from_numpy(labels))
            return Points(network, layer, Z[0], columns)
        except DAMAGED as error:
            raise self._damaged(error) from None

    def components(self, network: str, layer: str) -> np.ndarray | None:
        """The components float32 [N, n] of a layer, if the run's store, or the one beside it, has them still."""
        digest = self._outputs[network, layer]["components"]
        for store in (Store(self.about["store"]), Store.beside(self.folder)):
            record, _ = store.find("components", digest)
            if record is not None and len(record.arrays["X"]) == len(self.files):
                return record.arrays["X"]
        return None

    def _hits(self, column: str, Z: np.ndarray, labels: torch.Tensor) -> dict[str, Sequence[float]]:
        """By name the hits for each k, mean of the maps Z [S, N, 2]; the table has them for the first."""
        found = {self.k[0]: self._table[column]}
        if len(self.k) > 1:
            near = [knn(torch.from_numpy(z), max(self.k)).indices for z in Z]
            for k in self.k[1:]:
                found[k] = torch.stack([hits(one[:, :k], labels) for one in near]).mean(dim=0).tolist()
        return {f"hits_k{k}": values for k, values in found.items()}

    def _damaged(self, error: Exception) -> InputError:
        if isinstance(error, InputError):
            return error
        return InputError(f"{self.folder} is damaged ({type(error).__name__}: {error}): run its command again")


def _about(folder: Path) -> dict[str, Any]:
    """What run.json says of a finished run."""
    if not folder.is_dir():
        raise InputError(f"there is no run folder {folder}")
    if not is_run(folder):
        other = next((command for name, command in OTHERS.items() if (folder / name).exists()), None)
        what = "is" if other is None else f"is of qdv-gpu {other},"
        raise InputError(f"{folder} {what} no finished run of qdv-gpu analyze: give the --out of one")
    about = read_json(folder / RUN)
    if not isinstance(about, dict) or not about.keys() >= NEEDED:
        raise InputError(f"{folder} holds no finished run of qdv-gpu analyze, or one of an older version: run it again")
    return about


def _columns(path: Path, text: set[str]) -> dict[str, Sequence[Any]]:
    """Columns of a CSV file by name: those of `text`, file and label as text, others as numbers."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        names = next(rows)
        columns: list[Any] = [[] if name in {"file", "label", *text} else array("d") for name in names]
        for row in rows:
            for column, cell in zip(columns, row, strict=True):
                column.append(sys.intern(cell) if isinstance(column, list) else float(cell))
    return dict(zip(names, columns, strict=True))
