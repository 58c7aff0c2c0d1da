"""Tables from plain records."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TextIO

import numpy as np

from qdv_gpu.files import text_of
from qdv_gpu.results.records import AnalysedLayer, Predictions
from qdv_gpu.results.run import hits_column
from qdv_gpu.scores.quality import MEASURES

COLUMNS = ["network", "layer", "features", "samples", "perplexity", "seed", *MEASURES, "kl", "seconds"]

ERRORS = {"nh": "standard_error", "nh_feature_space": "standard_error_feature_space"}
OF_LAYER = ["position", "network", "layer", "tokens"]
MEANS = OF_LAYER + [name for measure in MEASURES for name in (measure, ERRORS.get(measure)) if name is not None]


def nh_table(layers: Sequence[AnalysedLayer], k: int) -> list[list[str]]:
    """The paper's Table 3 as rows of cells, a header first: layers down, networks across, NH ± standard error.

    Of images without labels the cells are trustworthiness.
    """
    networks = list(dict.fromkeys(layer.network for layer in layers))
    cells = {(layer.position, layer.network): layer for layer in layers}
    depth = max(layer.position for layer in layers)
    names = [{cells[i, n].title for n in networks if (i, n) in cells} for i in range(1, depth + 1)]
    shared = all(len(found) == 1 for found in names)
    chance = layers[0].of(k).chance
    rows = [["layer", *networks, *(["chance"] if layers[0].labelled else [])]]
    for i in range(1, depth + 1):
        row = [next(iter(names[i - 1])) if shared else str(i)]
        for network in networks:
            layer = cells.get((i, network))
            text = "" if layer is None else _score(layer, k)
            row.append(text if shared or layer is None else f"{layer.title} {text}")
        rows.append([*row, f"{chance:.3f}"] if layers[0].labelled else row)
    return rows


def _score(layer: AnalysedLayer, k: int) -> str:
    one = layer.of(k)
    return f"{one.nh:.3f} ± {one.standard_error:.3f}" if layer.labelled else f"{one.trustworthiness:.3f}"


def caption(layers: Sequence[AnalysedLayer], k: int) -> str:
    """What the cells of `nh_table` are."""
    if not layers[0].labelled:
        return f"Trustworthiness (k = {k}) of images without labels"
    return f"Neighborhood hit (k = {k}) ± standard error"


def nh_markdown(layers: Sequence[AnalysedLayer], ks: Sequence[int], *, iterations: int) -> str:
    """`nh_table` for each k, in Markdown, with a line that says what it is of."""
    text, one = "", layers[0]
    for k in ks:
        text += markdown(nh_table(layers, k)) + (
            f"\n{caption(layers, k)}, {one.samples} images, {_maps_of(one)} (perplexity "
            f"{one.perplexity:g}, {iterations} iterations).{_about_tokens(layers)}\n\n"
        )
    return text.rstrip() + "\n"


def _maps_of(layer: AnalysedLayer) -> str:
    if len(layer.Z) > 1:
        return f"mean of {len(layer.Z)} t-SNE maps"
    return f"one t-SNE map{', ± without what its seed adds' if layer.labelled else ''}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, a header first, as a table in Markdown."""
    header, *body = rows
    lines = (header, ["---"] * len(header), *body)
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "".join("| " + " | ".join(line) + " |\n" for line in cells)


def _about_tokens(layers: Sequence[AnalysedLayer]) -> str:
    meanings = {"cls": "its class token", "mean": "the mean of its tokens", "all": "all numbers of its tokens"}
    used = dict.fromkeys(layer.tokens for layer in layers if layer.tokens is not None)
    return "".join(f" [{kind}]: of the layer {meanings[kind]}." for kind in used)


def scores_csv(layers: Sequence[AnalysedLayer]) -> str:
    """The mean scores, one row for each layer and k."""
    rows = [
        {name: getattr(layer, name) for name in OF_LAYER} | asdict(one.mean) for layer in layers for one in layer.scores
    ]
    return csv_text(rows, MEANS)


def predictions_table(
    names: Sequence[str],
    labels: np.ndarray | None,
    classes: Sequence[str],
    predictions: Mapping[str, Predictions],
    layers: Sequence[AnalysedLayer],
) -> dict[str, Sequence[Any]]:
    """Columns with one value for each image: its file or number and its label, and by network the prediction, its
    probability, and the hit in each layer.

    A hit is the mean over the maps, for the first k.
    """
    columns: dict[str, Sequence[Any]] = {"file": [text_of(name) for name in names]}
    if labels is not None:
        columns["label"] = [text_of(classes[c]) for c in labels]
    for network in dict.fromkeys(layer.network for layer in layers):
        if network in predictions:
            said = predictions[network]
            columns[f"{network} prediction"] = [text_of(classes[c]) for c in said.classes]
            columns[f"{network} probability"] = [float(f"{p:.6g}") for p in said.probabilities]
        for layer in layers:
            if layer.network == network and layer.labelled:
                columns[hits_column(network, layer.layer)] = layer.scores[0].hits.mean(dim=0).tolist()
    return columns


def columns_csv(columns: Mapping[str, Sequence[Any]]) -> str:
    """Columns as CSV with a header."""
    cells = [[f"{v:g}" if isinstance(v, float) else v for v in column] for column in columns.values()]
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*cells, strict=True)]
    return csv_text(rows, list(columns))


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as CSV with a header; a number that is not known is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(_Rows(text), columns, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows([{name: "" if value != value else value for name, value in row.items()} for row in rows])
    return text.getvalue()


def csv_writer(file: TextIO) -> Any:
    r"""A `csv.writer` whose rows end in one \n, with quotes around a cell that holds \r, which Python 3.11 leaves out.

    >>> text = io.StringIO()
    >>> _ = csv_writer(text).writerow(["a\rb", "c"])
    >>> text.getvalue()
    '"a\rb",c\n'
    """
    return csv.writer(_Rows(file), lineterminator="\r\n")


class _Rows:
    """What `csv.writer` writes a row at a time to a file, with another end."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, row: str) -> int:
        return self.file.write(row.removesuffix("\r\n") + "\n")
