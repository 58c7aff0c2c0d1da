"""The parts of a report about networks that were analysed: words, charts and tables of what their run folders hold."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qdv_gpu.files import readable, readable_time
from qdv_gpu.report.charts import Series, line_chart, shade
from qdv_gpu.report.linked import names_of, scored
from qdv_gpu.report.page import Cell, Section, Table
from qdv_gpu.report.tables import ERRORS
from qdv_gpu.results.view import RunView, ViewedLayer
from qdv_gpu.scores.statistics import NORMAL

SCORES = {  # columns of table3.csv that are shown where their numbers are known, and what they are called
    "nh": "NH", "standard_error": "±",
    "nh_feature_space": "in its own space", "standard_error_feature_space": "±",
    "chance": "chance", "trustworthiness": "trustworthiness", "continuity": "continuity",
}  # fmt: skip
CLASSES = 50  # in a table at most
MATRIX = 12  # classes of a table of all with all


def by_network(runs: Sequence[RunView]) -> dict[str, list[ViewedLayer]]:
    """The layers of each network of all runs, by the names that tell them apart."""
    named, found = names_of(runs), dict[str, list[ViewedLayer]]()
    for i, run in enumerate(runs):
        for layer in run.layers:
            found.setdefault(named[i, layer.network], []).append(layer)
    return found


def said_of(runs: Sequence[RunView]) -> list[str]:
    """A sentence for each network: where NH is highest, and how it grew; or trustworthiness of unlabelled images."""
    found = []
    for name, layers in by_network(runs).items():
        if runs[0].labels is None:
            values = ", ".join(f"{layer.title} {layer.scores['trustworthiness']:.3f}" for layer in layers)
            found.append(f"{name}: trustworthiness of the maps of images without labels: {values}.")
            continue
        best = max(layers, key=lambda layer: layer.scores["nh"])
        text = f"{name} is highest at {best.title}, {scored(best)}, where chance gives "
        text += f"{best.scores['chance']:.3f}"
        if layers[0] is not best:
            text += f"; its first layer, {layers[0].title}, has {layers[0].scores['nh']:.3f}"
        if layers[-1] is not best:
            text += f", its last, {layers[-1].title}, {layers[-1].scores['nh']:.3f}"
        found.append(f"{text}.")
    return found


def seeds_of(runs: Sequence[RunView]) -> str:
    """How many maps the layers have: "3", or "1 to 3" where some have fewer."""
    counts = {len(layer.Z) for run in runs for layer in run.layers}
    return str(max(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def scores_section(runs: Sequence[RunView]) -> Section:
    """NH by layer with intervals, in the maps and in the layers' own space; or trustworthiness."""
    networks, labelled = by_network(runs), runs[0].labels is not None
    depth = max(map(len, networks.values()))
    titles = [[layer.title for layer in layers] for layers in networks.values()]
    same = all(one == titles[0][: len(one)] for one in titles)
    ticks = max(titles, key=len) if same else [str(i + 1) for i in range(depth)]
    kinds = ("nh", "nh_feature_space") if labelled else ("trustworthiness",)
    words = {
        "nh": f"Neighborhood hit in the maps (k = {runs[0].k})",
        "nh_feature_space": "Neighborhood hit in the layers' own space",
        "trustworthiness": "Trustworthiness of the maps",
    }
    charts = []
    for kind in kinds:
        series = []
        for name, layers in networks.items():
            values = np.array([layer.scores[kind] for layer in layers])
            error = np.array([layer.scores.get(ERRORS.get(kind, ""), np.nan) for layer in layers])
            low, high = values - NORMAL * error, values + NORMAL * error
            series.append(Series(name, values.tolist(), low.tolist(), high.tolist()))
        chance = runs[0].layers[0].scores["chance"] if labelled else None
        charts.append(line_chart(series, ticks, words[kind], chance=chance))
    listed = [(name, layer) for name, layers in networks.items() for layer in layers]
    columns = {name: [_number(layer.scores.get(name, np.nan)) for _, layer in listed] for name in SCORES}
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    header = ["network", "layer", *(SCORES[name] for name in columns)]
    rows = [
        [Cell(name), Cell(layer.title), *map(Cell, cells)]
        for (name, layer), *cells in zip(listed, *columns.values(), strict=True)
    ]
    seeds = seeds_of(runs)
    caption = f"{'One map' if seeds == '1' else f'Mean of {seeds} maps'} of {len(runs[0].files):,} images"
    caption += "; ± is the standard error" + (", without what the map's seed adds" if seeds == "1" else "")
    tables = [Table(caption, header, rows, "layers")]
    said = {names_of(runs)[i, name]: one for i, run in enumerate(runs) for name, one in run.predictions.items()}
    if labelled and said:
        accuracy = [
            [Cell(name), Cell(f"{100 * np.mean(classes == runs[0].labels):.1f} %")]
            for name, (classes, _) in said.items()
        ]
        tables.append(Table("Accuracy on these images", ["network", "accuracy"], accuracy, "layers"))
    return Section("Scores by layer", charts=charts, tables=tables)


def classes_section(runs: Sequence[RunView]) -> Section | None:
    """NH of each class in each layer, and whom its images have for neighbours instead."""
    labels, classes = runs[0].labels, runs[0].classes
    layers = [(name, layer) for name, own in by_network(runs).items() for layer in own]
    if labels is None or any(layer.hits is None for _, layer in layers):
        return None
    counts = np.bincount(labels, minlength=len(classes))
    nh = np.array(
        [np.bincount(labels, layer.hits, len(classes)) / np.maximum(counts, 1) for _, layer in layers]
    ).T  # [C, layers]
    order = [c for c in np.argsort(nh[:, -1], kind="stable") if counts[c]]
    rest = f", the {CLASSES} lowest of {len(order)}" if len(order) > CLASSES else ""
    order = sorted(order[:CLASSES])
    several = len({name for name, _ in layers}) > 1
    header = ["class", *(f"{name} {layer.title}" if several else layer.title for name, layer in layers)]
    heat = [[Cell(classes[c]), *(Cell(f"{v:.2f}", *shade(v, 0.0, 1.0)) for v in nh[c])] for c in order]
    tables = [Table(f"Neighborhood hit of each class{rest}", header, heat, "heat")]
    if all(layer.strangers is not None for _, layer in layers):
        rows = []
        for c in order:
            row = [Cell(classes[c])]
            for _, layer in layers:
                assert layer.strangers is not None
                other = np.where(np.arange(len(classes)) == c, -1.0, layer.strangers[c])
                row.append(Cell(f"{classes[int(other.argmax())]} {100 * other.max():.0f} %"))
            rows.append(row)
        tables.append(Table(f"Which other class its neighbours have most often{rest}", header, rows, "words"))
        if len(classes) <= MATRIX:
            last = {name: layer for name, layer in layers}
            tables += [_matrix(name, layer, classes) for name, layer in last.items()]
    return Section("Classes", tables=tables)


def _matrix(name: str, layer: ViewedLayer, classes: Sequence[str]) -> Table:
    """Shares of all classes among the neighbours of each."""
    assert layer.strangers is not None
    rows = [
        [Cell(own), *(Cell(f"{share:.2f}", *shade(float(share), 0.0, 1.0)) for share in row)]
        for own, row in zip(classes, layer.strangers, strict=True)
    ]
    return Table(f"Classes of the neighbours, {name} {layer.title}: of each row's images", ["", *classes], rows, "heat")


def comparison_section(said: Mapping[str, Any]) -> Section:
    """Δ by layer with simultaneous intervals, of each class, and CKA, of what comparison.json says."""
    pairs, margin = said["pairs"], said["margin"]
    names = [one["first"] if one["first"] == one["second"] else f"{one['first']}/{one['second']}" for one in pairs]
    series = [_differences(pairs, kind, name) for kind, name in (("in_maps", "maps"), ("in_layer", "own space"))]
    title = f"NH (k = {said['k']}) of {said['second']} less that of {said['first']}; shaded: within ±{margin:g}"
    charts = [line_chart(series, names, title, band=(-margin, margin), start=0.0)]
    tables = []
    delta = np.array([one["classes"]["delta"] for one in pairs], float).T  # [C, pairs]
    order = np.argsort(-np.abs(delta).max(axis=1), kind="stable")[:CLASSES]
    most = float(np.nanmax(np.abs(delta))) or 1.0
    p = np.array([one["classes"]["p"] for one in pairs], float).T
    rows = [
        [Cell(said["classes"][c])]
        + [
            Cell(f"{_rounded(v):+.2f}{' *' if p[c, i] < 0.05 else ''}", *shade(v, -most, most))
            for i, v in enumerate(delta[c])
        ]
        for c in sorted(order)
    ]
    some = f", the {CLASSES} that differ most" if len(delta) > CLASSES else ""
    sure = "" if np.isnan(p).all() else "; * p < 0.05, corrected for the classes of a layer"
    caption = f"Difference of NH of each class{some}{sure}"
    tables.append(Table(caption, ["class", *names], rows, "heat"))
    cka = np.array([[np.nan if v is None else v for v in row] for row in said["cka"]], float)
    if not np.isnan(cka).all():
        rows = [
            [Cell(name), *(Cell(f"{v:.2f}", *shade(max(v, 0.0), 0.0, 1.0)) for v in row)]
            for name, row in zip(said["layers"][0], cka, strict=True)
        ]
        caption = f"Debiased linear CKA: rows {said['first']}, columns {said['second']}"
        tables.append(Table(caption, ["", *said["layers"][1]], rows, "heat"))
    return Section(f"{said['second']} against {said['first']}", charts=charts, tables=tables)


def _differences(pairs: Sequence[Mapping[str, Any]], kind: str, name: str) -> Series:
    def part(key: str) -> list[float]:
        return [np.nan if one[kind][key] is None else float(one[kind][key]) for one in pairs]

    return Series(name, part("delta"), part("low"), part("high"))


def training_section(trainings: Mapping[str, Mapping[str, Any]]) -> Section:
    """Loss and accuracy by epoch of the networks that were fine-tuned, of what finetune.json says of each."""
    charts = []
    ticks = [str(epoch + 1) for epoch in range(max(len(said["history"]) for said in trainings.values()))]
    for key, title in (("test_accuracy", "Accuracy on test images"), ("accuracy", "Accuracy"), ("loss", "Loss")):
        series = [
            Series(name, [float(epoch.get(key, np.nan)) for epoch in said["history"]])
            for name, said in trainings.items()
        ]
        where = "" if key == "test_accuracy" else " on training images"
        charts.append(line_chart(series, ticks, f"{title}{where}, by epoch"))
    words = [
        f"{name}: test accuracy {said['test_accuracy']:.2%} on {said['test_images']:,} images."
        for name, said in trainings.items()
    ]
    return Section("Training", words=words, charts=charts)


def about_section(runs: Sequence[RunView]) -> Section:
    """Settings, versions, and times and memory of every stage."""
    facts = []
    for run in runs:
        about, settings = run.about, run.about["settings"]
        facts.append(("run", str(run.folder)))
        facts.append(("data", f"{about.get('data')}, {len(run.files):,} images, {len(run.classes)} classes"))
        facts += [
            (name, f"{said.get('spec')}, weights {said.get('weights')}, {said.get('image_size')} px")
            for name, said in about["networks"].items()
        ]
        chosen = (f"{name} {value}" for name, value in settings.items() if value is not None)
        facts.append(("settings", ", ".join(chosen)))
        device = " ".join(str(about[key]) for key in ("device", "device_name") if about.get(key))
        facts.append(("device", f"{device}, {about['threads']} threads" if about.get("threads") else device))
        facts.append(("versions", ", ".join(f"{name} {value}" for name, value in about.get("versions", {}).items())))
    stages = list(dict.fromkeys(stage for run in runs for layer in run.layers for stage in layer.stages))
    rows = [
        [Cell(name), Cell(layer.title), *(Cell(_cost(layer.stages.get(stage))) for stage in stages)]
        for name, layers in by_network(runs).items()
        for layer in layers
    ]
    caption = "Time and peak memory of each stage, when it was computed"
    tables = [Table(caption, ["network", "layer", *stages], rows, "layers")] if stages else []
    return Section("Settings, versions, times", facts=facts, tables=tables)


def _cost(spent: Mapping[str, float] | None) -> str:
    return "" if spent is None else f"{readable_time(spent['seconds'])}, {readable(spent['peak_bytes'])}"


def _rounded(value: float) -> float:
    """To hundredths, and never -0."""
    return round(value, 2) + 0.0


def _number(value: float) -> str:
    return "" if value != value else f"{value:.3f}"
