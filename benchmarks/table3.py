"""`qdv-gpu analyze`, start to finish: every layer, five seeds, and where the time goes."""

import argparse
import csv
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors

from benchmarks.common import bar, interleaved, timing
from benchmarks.stages import inputs
from qdv_gpu import Settings, analyze

LARGEST_COPY = 3 * 10**6  # bytes from the device to the host: a layer's components, for the store


def validate(out: Path) -> None:
    """Compare the NH of every map in a run folder with scikit-learn's neighbours, and with chance."""
    with (out / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        saved = np.load(out / "embeddings" / row["network"] / f"{row['layer']}.npz")
        Z, labels, k = saved["Z"][int(row["seed"])], saved["labels"], int(row["k"])
        neighbours = NearestNeighbors(n_neighbors=k).fit(Z).kneighbors(return_distance=False)
        hit = float((labels[neighbours] == labels[:, None]).mean())
        assert abs(hit - float(row["nh"])) < 2e-3, f"{row}: {hit} by scikit-learn"  # ties have no order there
        assert hit > float(row["chance"]), f"{row}: no better than chance"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Time the whole; a small run before it is the validation and the warm-up."""
    networks, images, side = inputs(options)
    few = Settings(samples=min(500, len(images)), image_size=side, seeds=1, iterations=250, perplexity=20)
    seeds, iterations = (1, 250) if options.quick else (5, 1000)
    settings = Settings(samples=len(images), image_size=side, seeds=seeds, iterations=iterations)
    spent: list[dict[str, float]] = []

    def once(chosen: Settings, look: Callable[[Path], None]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            data = options.data or "fashion-mnist"
            run_folder = Path(folder) / "run"  # with a store of its own: nothing is there before
            analyze(networks, data, run_folder, settings=chosen, device=options.device)
            look(run_folder)

    once(few, validate)
    whole = partial(once, settings, lambda folder: spent.append(stages(folder)))
    times, _ = interleaved({"ours": lambda _: whole()}, 1 if options.quick else 3)
    names = ", ".join(network.name for network in networks)
    layers = sum(len(network.layers) for network in networks)
    what = f"Table 3 of {names}, {len(images):,} images at {side} px, {layers} layers, {seeds} seeds"
    parts = {stage: median(one[stage] for one in spent) for stage in spent[0] if " " not in stage}
    parts["elsewhere"] = median(times["ours"]) - sum(parts.values())
    print("  " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in parts.items()))
    bars = []
    if options.device.type == "cuda":
        bars.append(bar("Table 3, seconds", median(times["ours"]), "<=", 20))
    if options.device.type == "cuda" and "activations of vgg19" in spent[0]:
        forward = [one["activations of vgg19"] / total for one, total in zip(spent, times["ours"], strict=True)]
        bars.append(bar("Table 3, share outside of VGG19's forward pass", 1 - median(forward), "<=", 0.6))
    return {"timings": [timing(what, times, parts=parts)], "bars": bars}


def stages(out: Path) -> dict[str, float]:
    """Seconds of each stage over all layers, and of "activations of NETWORK"."""
    found: dict[str, float] = defaultdict(float)
    for layer, measured in json.loads((out / "timings.json").read_text()).items():
        for stage, value in measured.items():
            found[stage] += value["seconds"]
        if "activations" in measured:
            found[f"activations of {layer.partition('/')[0]}"] += measured["activations"]["seconds"]
    return found


def run_trace(options: argparse.Namespace) -> dict[str, Any]:
    """Trace one analysis: nothing larger than the maps may come back from the device once the images are there."""
    if options.device.type != "cuda":
        raise SystemExit("the trace requires --device cuda")
    networks, images, side = inputs(options)
    settings = Settings(samples=len(images), image_size=side, iterations=250)
    with tempfile.TemporaryDirectory() as folder:
        data, run_folder = options.data or "fashion-mnist", Path(folder) / "run"
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            analyze(networks, data, run_folder, settings=settings, device=options.device)
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    assert images.pixels is not None
    found = copies_to_host(events, images.pixels.nbytes)
    print(f"  {len(found)} copies to the host after the images' upload, the largest of {max(found):,} bytes")
    bars = [bar("largest copy to the host, MB", max(found) / 1e6, "<=", LARGEST_COPY / 1e6)]
    return {"timings": [], "copies_to_host": sorted(found)[-20:], "bars": bars}


def copies_to_host(events: Sequence[dict[str, Any]], images: int) -> list[int]:
    """Bytes of each copy from the device to the host after the last upload of `images` bytes, in a Chrome trace."""
    copies = [
        (event["ts"], event["name"], int(event["args"]["bytes"]))
        for event in events
        if event.get("cat") == "gpu_memcpy" and "bytes" in event.get("args", {})
    ]
    uploads = [ts for ts, name, size in copies if "HtoD" in name and size == images]
    assert uploads, f"no upload of {images} bytes among {len(copies)} copies"
    return [size for ts, name, size in copies if "DtoH" in name and ts > uploads[-1]]
