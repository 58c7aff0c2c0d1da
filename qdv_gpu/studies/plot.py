"""The figures of a run, drawn again from its folder."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qdv_gpu.errors import InputError, as_path, check_among, check_whole, listed
from qdv_gpu.neighbors import knn
from qdv_gpu.report import figures
from qdv_gpu.report.folder import only_writer, read_formats, write_figure
from qdv_gpu.results.records import AnalysedLayer
from qdv_gpu.results.run import RUN, checked, damage_said, read_about, rows_of
from qdv_gpu.results.view import maps_of
from qdv_gpu.scores.quality import MEASURES, LayerScores, MapScore, Score, chance, hit_values
from qdv_gpu.scores.statistics import error_neighbors

KEPT = tuple(name for name in MEASURES if name not in ("k", "nh", "chance"))  # what needs more than maps and labels


def plot(
    run: str | Path,
    out: str | Path | None = None,
    *,
    networks: Sequence[str] | None = None,
    layers: Sequence[str] | None = None,
    k: int | None = None,
    seed: int = 0,
    formats: Sequence[str] = ("png",),
) -> list[Path]:
    """Draw the figures of a finished run again, of some of its networks and layers, for another k or in other formats.

    Parameters
    ----------
    run : str or Path
        The folder that `analyze` wrote.
    out : str or Path, optional
        Folder for maps and nh; default `run`/figures.
    networks, layers : sequence of str, optional
        Names as in the run's tables; default all.
    k : int, optional
        Neighbours of the neighborhood hit; default the run's first. NH in a layer's own space and trustworthiness are
        drawn for the k of the run only.
    seed : int
        Number of the t-SNE map that is drawn, from 0.
    formats : sequence of {"png", "pdf", "svg"}

    Returns
    -------
    list of Path
        The figures.

    Raises
    ------
    InputError
        If the folder holds no finished run, its files are damaged, or it has no such network, layer, map or format.

    Examples
    --------
    >>> from qdv_gpu import analyze
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    >>> result = analyze(network, "digits", tmp_path / "run", layers="2", samples=100, perplexity=8, seeds=1)
    >>> [path.name for path in plot(result.out, tmp_path / "paper", k=3, formats=["pdf"])]
    ['maps.pdf', 'nh.pdf']
    """
    formats = read_formats(formats)
    check_whole("seed", seed)
    if k is not None:
        check_whole("k", k)
    folder = as_path("run", run)
    about = _about(folder)
    found = list(_layers(folder, about, k, seed))
    found = _chosen(found, "network", networks)
    found = _chosen(found, "layer", layers)
    labels, classes = found[0][1], [str(name) for name in about["classes"]]
    records = [record for record, _ in found]
    drawn = {"maps": figures.maps_figure(records, labels, classes)}
    if labels is not None:
        drawn["nh"] = figures.nh_figure(records, labels, records[0].scores[0].k)
    target = folder / "figures" if out is None else as_path("out", out)
    with only_writer(target, below=False):
        return [path for name, figure in drawn.items() for path in write_figure(target / name, figure, formats)]


def _about(run: Path) -> Mapping[str, Any]:
    if not (run / RUN).is_file() or not (run / "table3.csv").is_file():
        raise InputError(f"{run} holds no finished run of qdv-gpu analyze")
    about = read_about(run)
    if not isinstance(about.get("classes"), list) or "settings" not in about:
        raise InputError(f"{run / RUN} is not of qdv-gpu analyze, or damaged")
    return about


def _layers(
    folder: Path, about: Mapping[str, Any], k: int | None, seed: int
) -> Iterator[tuple[AnalysedLayer, np.ndarray | None]]:
    """The layers of a run in order, each with the map of `seed` first, and the labels."""
    with damage_said(folder):
        rows = rows_of(checked(folder, about, "table3.csv"))
        chosen = int(rows[0]["k"]) if k is None else k
        of_layer: dict[tuple[str, str], list[Any]] = {(row["network"], row["layer"]): [] for row in rows}
        for row in rows:
            of_layer[row["network"], row["layer"]].append(row)
        for (network, layer), own in of_layer.items():
            arrays = maps_of(folder, about, network, layer, samples=None, classes=len(about["classes"]))
            Z, labels = arrays["Z"], arrays.get("labels")
            if not 0 <= seed < len(Z):
                raise InputError(f"seed must be within 0 and {len(Z) - 1}, the maps of {folder}, got {seed}")
            row = next((row for row in own if int(row["k"]) == chosen), own[0] | dict.fromkeys(KEPT, "nan"))
            yield _layer(row, np.roll(Z, -seed, axis=0), labels, chosen, about["settings"]["perplexity"]), labels


def _layer(
    row: Mapping[str, str], Z: np.ndarray, labels: np.ndarray | None, k: int, perplexity: float
) -> AnalysedLayer:
    """A row of the table with its maps Z [S, N, 2], scored again."""
    if not 1 <= k < Z.shape[1]:
        raise InputError(f"k must be within 1 and {Z.shape[1] - 1}, got {k}")
    kept = {name: float(row.get(name) or "nan") for name in KEPT}
    nan = torch.full((Z.shape[1],), math.nan)
    near = [knn(torch.from_numpy(z), max(k, error_neighbors(k, len(z)))).indices for z in Z]
    found, expected = hit_values(near, labels, k=k), math.nan if labels is None else chance(labels)
    nh = found.hits.mean(dim=1).tolist()
    maps = tuple(MapScore(seed=seed, k=k, nh=value, chance=expected, **kept) for seed, value in enumerate(nh))
    mean = Score(
        k=k, nh=float(np.mean(nh)), chance=expected, standard_error=found.standard_error,
        standard_error_feature_space=math.nan, **kept,
    )  # fmt: skip
    neighbors = torch.stack([indices[:, :k] for indices in near]).int()
    scores = LayerScores(
        k, maps, mean, found.influence, found.hits, found.spread, neighbors, nan, nan, nan, neighbors[0]
    )
    return AnalysedLayer(
        network=row["network"], layer=row["layer"], position=int(row["position"]), features=0, samples=Z.shape[1],
        tokens=row["tokens"] or None, perplexity=perplexity, engine="", Z=Z, kl=[], scores=(scores,), stages={},
    )  # fmt: skip


def _chosen(found: list[Any], what: str, names: Sequence[str] | None) -> list[Any]:
    """The layers with these names of networks or layers."""
    if names is None:
        return found
    names = [names] if isinstance(names, str) else listed(f"{what}s", names, str, "names")
    if not names:
        raise InputError(f"{what}s must be one or more names, got none")
    known = [getattr(record, what) for record, _ in found]
    for name in names:
        check_among(f"{what} of the run", name, known)
    return [pair for pair in found if getattr(pair[0], what) in names]
