"""The images of a run as points of one layer, with all that is known of each: rows for other programs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from qdv_gpu.neighbors import Neighbors, knn
from qdv_gpu.results.checks import check_components
from qdv_gpu.results.store import Store
from qdv_gpu.results.view import RunView, ViewedLayer
from qdv_gpu.scores.statistics import hits


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


def points_of(run: RunView, layer: ViewedLayer) -> Points:
    """The points of a layer of a run."""
    columns: dict[str, Sequence[Any]] = {"file": run.files}
    if run.labels is not None:
        columns["label"] = [run.classes[c] for c in run.labels]
    if layer.network in run.predictions:
        said, probabilities = run.predictions[layer.network]
        columns["prediction"] = [run.classes[c] for c in said]
        columns["probability"] = [float(f"{p:.6g}") for p in probabilities]
    if run.labels is not None and layer.hits is not None:
        columns |= _hits(run, layer, torch.from_numpy(run.labels))
    return Points(layer.network, layer.layer, layer.Z[0], columns)


def components_of(run: RunView, layer: ViewedLayer) -> np.ndarray | None:
    """The components float32 [N, n] of a layer, if the run's store, or the one beside it, has them still."""
    outputs = {one["layer"]: one["components"] for one in run.about.get("outputs", {}).get(layer.network, ())}
    for store in (Store(run.about["store"]), Store.beside(run.folder)) if layer.layer in outputs else ():
        check = partial(check_components, samples=len(run.files))
        record, _ = store.find("components", outputs[layer.layer], check)
        if record is not None:
            return record.arrays["X"]
    return None


def _hits(run: RunView, layer: ViewedLayer, labels: torch.Tensor) -> dict[str, Sequence[float]]:
    """By name the hits for each k, mean of the maps; the run's table has them for the first."""
    assert layer.hits is not None
    found = {run.k: [float(f"{v:.6g}") for v in layer.hits]}
    others = [k for k in run.about["settings"]["k"] if k != run.k]
    near = [knn(torch.from_numpy(z), max(others)).indices for z in layer.Z] if others else []
    for k in others:
        found[k] = torch.stack([hits(one[:, :k], labels) for one in near]).mean(dim=0).tolist()
    return {f"hits_k{k}": values for k, values in found.items()}
