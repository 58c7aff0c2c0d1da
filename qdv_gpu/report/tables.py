"""Tables from plain records."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from qdv_gpu.results.records import AnalysedLayer, Predictions

COLUMNS = ["network", "layer", "features", "samples", "perplexity", "seed", "k", "nh", "nh_feature_space"]
COLUMNS += ["chance", "tied", "trustworthiness", "continuity", "kl", "seconds"]

MEANS = ["position", "network", "layer", "k", "nh", "standard_error", "nh_feature_space"]
MEANS += ["chance", "tied", "trustworthiness", "continuity"]


def nh_table(layers: Sequence[AnalysedLayer], k: int) -> list[list[str]]:
    """The paper's Table 3 as rows of cells, a header first: layers down, networks across, NH ± standard error."""
    networks = list(dict.fromkeys(layer.network for layer in layers))
    cells = {(layer.position, layer.network): layer for layer in layers}
    depth = max(layer.position for layer in layers)
    names = [{cells[i, n].layer for n in networks if (i, n) in cells} for i in range(1, depth + 1)]
    shared = all(len(found) == 1 for found in names)
    rows = [["layer", *networks, "chance"]]
    for i in range(1, depth + 1):
        row = [next(iter(names[i - 1])) if shared else str(i)]
        for network in networks:
            layer = cells.get((i, network))
            text = "" if layer is None else f"{layer.of(k).nh:.3f} ± {layer.of(k).standard_error:.3f}"
            row.append(text if shared or layer is None else f"{layer.layer} {text}")
        rows.append([*row, f"{layers[0].of(k).chance:.3f}"])
    return rows


def nh_markdown(layers: Sequence[AnalysedLayer], ks: Sequence[int], *, iterations: int) -> str:
    """`nh_table` for each k, in Markdown, with a line that says what it is of."""
    text, one = "", layers[0]
    for k in ks:
        header, *body = nh_table(layers, k)
        for line in (header, ["---"] * len(header), *body):
            text += "| " + " | ".join(line) + " |\n"
        text += (
            f"\nNeighborhood hit (k = {k}) ± standard error, {one.samples} test images, mean of {len(one.Z)} "
            f"t-SNE maps (perplexity {one.perplexity:g}, {iterations} iterations).\n\n"
        )
    return text.rstrip() + "\n"


def scores_csv(layers: Sequence[AnalysedLayer]) -> str:
    """The mean scores, one row for each layer and k."""
    rows = [
        {"position": layer.position, "network": layer.network, "layer": layer.layer, **asdict(one.mean)}
        for layer in layers
        for one in layer.scores
    ]
    return csv_text(rows, MEANS)


def predictions_csv(
    names: Sequence[str],
    labels: np.ndarray,
    classes: Sequence[str],
    predictions: Mapping[str, Predictions],
    layers: Sequence[AnalysedLayer],
) -> str:
    """One row for each image: its label, and by network the prediction, its probability and the hit in each layer.

    A hit is the mean over the maps, for the first k.
    """
    columns: dict[str, Sequence[Any]] = {"image": names, "label": [classes[c] for c in labels]}
    for network in dict.fromkeys(layer.network for layer in layers):
        if network in predictions:
            said = predictions[network]
            columns[f"{network} prediction"] = [classes[c] for c in said.classes]
            columns[f"{network} probability"] = [f"{p:.6g}" for p in said.probabilities]
        for layer in layers:
            if layer.network == network:
                columns[f"{network} {layer.layer}"] = [f"{h:g}" for h in layer.scores[0].hits.mean(dim=0).tolist()]
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return csv_text(rows, list(columns))


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
