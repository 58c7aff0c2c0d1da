"""A run folder as `analyze` writes it, of made-up numbers: any names, classes, layers and networks, in no time."""

import csv
import json

import numpy as np
import torch

from qdv_gpu.files import text_of
from qdv_gpu.report.tables import MEANS
from qdv_gpu.report.thumbnails import SIDE, encoded, sheets_of
from qdv_gpu.results.run import embedding_file

HOSTILE = [
    "<script>alert(1)</script>", "</script><script>alert(2)</script>", "<img src=x onerror=alert(3)>", "{{7*7}}",
    "\"quoted\" & 'so'", "\" onmouseover=\"alert(4)", "🦊🇩🇪👩‍👩‍👧", "תמונה של חתול",
    "\u202eright to left", "long " + "x" * 195, b"caf\xe9".decode(errors="surrogateescape"),
    "comma, semicolon; tab\t", "${alert(5)}", "javascript:alert(6)",
    "<!--", "-->", "]]>", "&lt;b&gt;", "a\nb", "  ",
]  # fmt: skip


def pictures(count):
    """Images uint8 [count, 3, 32, 32] that no two are alike of, of large areas, which WebP keeps."""
    rng = np.random.default_rng(7)
    quarters = rng.integers(0, 256, (count, 3, 2, 2), np.uint8)
    return torch.from_numpy(quarters.repeat(SIDE // 2, 2).repeat(SIDE // 2, 3))


def made_run(
    out, *, networks=("cnn", "other"), layers=("conv1", "conv2"), classes=tuple("abcde"), files=None, count=60, seeds=2,
    labelled=True, older=False, predicted=True, k=5, seed=0, settings=None,
):  # fmt: skip
    """Write a run folder; `older` is without what older versions did not write."""
    rng = np.random.default_rng(seed)
    files = [f"{i:03}.png" for i in range(count)] if files is None else files
    count = len(files)
    labels = np.arange(count) % len(classes)
    columns = {"file": [text_of(name) for name in files]}
    if labelled:
        columns["label"] = [text_of(classes[c]) for c in labels]
    rows, timings = [], {}
    centres = rng.normal(0, 6, (len(classes), 2))
    for network in networks:
        if predicted and labelled:
            said = np.where(rng.random(count) < 0.7, labels, rng.integers(0, len(classes), count))
            columns[f"{network} prediction"] = [text_of(classes[c]) for c in said]
            columns[f"{network} probability"] = [f"{p:.6g}" for p in rng.uniform(0.1, 1, count)]
        for position, layer in enumerate(layers, start=1):
            Z = (centres[labels] * position / 2 + rng.normal(0, 2, (seeds, count, 2))).astype(np.float32)
            hits = rng.integers(0, k * seeds + 1, count) / (k * seeds)
            arrays = {"Z": Z, "indices": np.arange(count)}
            if labelled:
                columns[f"{network} {layer}"] = [f"{hit:g}" for hit in hits]
                arrays["labels"] = labels
                shares = rng.random((len(classes), len(classes))).astype(np.float32)
                if not older:
                    arrays["class_neighbors"] = shares / shares.sum(1, keepdims=True)
            file = out / embedding_file(network, layer)
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(file, **arrays)
            nh = float(hits.mean()) if labelled else ""
            error = 0.01 if labelled else ""
            row = {
                "position": position, "network": network, "layer": layer, "tokens": "", "k": k, "nh": nh,
                "standard_error": error, "nh_feature_space": nh, "standard_error_feature_space": error,
                "chance": 1 / len(classes) if labelled else "", "tied": 0.0, "trustworthiness": 0.9,
            }  # fmt: skip
            later = {name: 0.8 - number / 100 for number, name in enumerate(MEANS) if name not in row}
            rows.append(row if older else row | later)
            timings[f"{network}/{layer}"] = {"tsne": {"seconds": 1.5, "peak_bytes": 2e9}}
    _table(out / "table3.csv", rows)
    images = zip(*columns.values(), strict=True)
    _table(out / "predictions.csv", [dict(zip(columns, row, strict=True)) for row in images])
    about = {
        "settings": {"k": [k], "perplexity": 8, "seeds": seeds} if settings is None else settings,
        "data": "made up",
        "images": {"contents": f"{seed}-{count}", "samples": count},
        "classes": list(classes) if labelled else [],
        "networks": {name: {"spec": f"made:{name}", "weights": "given", "image_size": 32} for name in networks},
        "device": "cpu", "device_name": "none", "threads": 2, "versions": {"qdv_gpu": "0"},
    }  # fmt: skip
    if not older:
        about["command"] = "qdv-gpu analyze made"
        (out / "timings.json").write_text(json.dumps(timings))
        (out / "thumbnails").mkdir(exist_ok=True)
        for number, sheet in enumerate(encoded(sheets_of(pictures(count)))):
            (out / "thumbnails" / f"{number:03}.webp").write_bytes(sheet)
    (out / "run.json").write_text(json.dumps(about))
    return out


def _table(file, rows):
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
