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
from typing import Any, TypeVar

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors

from benchmarks import bars
from benchmarks.common import Stage, timing
from benchmarks.data import MADE
from benchmarks.stages import called, inputs
from qdv_gpu import Settings, analyze
from qdv_gpu.data.images import Images
from qdv_gpu.errors import InputError
from qdv_gpu.sealed import read_sealed

T = TypeVar("T")
LARGEST_COPY = 3 * 10**6  # bytes from the device to the host: a layer's components, for the store


def source(options: argparse.Namespace, images: Images) -> str | Images:
    """What `analyze` loads its images from, which takes part of the time; made ones are there."""
    return options.data or (images if images.name == MADE else "fashion-mnist")


def validate(out: Path, stage: Stage) -> None:
    """Compare the NH of every map in a run folder with scikit-learn's neighbours, and with chance."""
    with (out / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    differences, above = [], []
    for row in rows:
        saved = np.load(out / "embeddings" / row["network"] / f"{row['layer']}.npz")
        Z, labels, k = saved["Z"][int(row["seed"])], saved["labels"], int(row["k"])
        neighbours = NearestNeighbors(n_neighbors=k).fit(Z).kneighbors(return_distance=False)
        hit = float((labels[neighbours] == labels[:, None]).mean())
        differences.append(abs(hit - float(row["nh"])))
        above.append(hit - float(row["chance"]))
    stage.bar("NH: largest difference to scikit-learn's neighbours", max(differences), "<=", 2e-3)  # ties have no order
    stage.bar("NH: least of all maps less chance", min(above), ">=", 0)


def run(options: argparse.Namespace, stage: Stage) -> None:
    """Time the whole; a small run before it is the validation and the warm-up."""
    networks, images, side = inputs(options)
    few = Settings(samples=min(500, len(images)), image_size=side, seeds=1, iterations=400, perplexity=20)
    seeds, iterations = (1, 250) if options.quick else (5, 1000)
    settings = Settings(samples=len(images), image_size=side, seeds=seeds, iterations=iterations)
    data = source(options, images)

    def once(chosen: Settings, look: Callable[[Path], T]) -> T:
        with tempfile.TemporaryDirectory() as folder:
            run_folder = Path(folder) / "run"  # with a store of its own: nothing is there before
            analyze(networks, data, run_folder, settings=chosen, device=options.device)
            return look(run_folder)

    with stage.part("a small run"):
        once(few, partial(validate, stage=stage))
    names = ", ".join(network.name for network in networks)
    layers = sum(len(network.layers) for network in networks)
    what = f"Table 3 of {names}, {called(images, side)}, {layers} layers, {seeds} seeds"
    times: list[float] = []
    spent: list[dict[str, float]] = []
    for turn in range(1 if options.quick else 3):
        if times and stage.left < max(times):
            stage.leave_out(f"Table 3 from round {turn + 1} on")
            break
        measured, found = stage.interleaved({"ours": lambda _: once(settings, stages)}, 1)
        times += measured["ours"]
        spent += found["ours"]
        parts = {part: median(one[part] for one in spent) for part in spent[0] if " " not in part}
        parts["elsewhere"] = median(times) - sum(parts.values())
        print("  " + ", ".join(f"{part} {value:.1f} s" for part, value in parts.items()), flush=True)
        stage.row(timing(what, {"ours": times}, parts=parts))
        stage.note(stages=spent)
        if options.device.type != "cuda":
            continue
        if options.network is None and options.images == 10_000:
            stage.bar(bars.TABLE3, median(times))
        if "activations of vgg19" in spent[0]:
            forward = [one["activations of vgg19"] / total for one, total in zip(spent, times, strict=True)]
            stage.bar("Table 3, share outside of VGG19's forward pass", 1 - median(forward), "<=", 0.6)


def stages(out: Path) -> dict[str, float]:
    """Seconds of each stage over all layers, and of "activations of NETWORK"."""
    found: dict[str, float] = defaultdict(float)
    for layer, measured in read_sealed(out / "timings.json").items():
        for stage, value in measured.items():
            found[stage] += value["seconds"]
        if "activations" in measured:
            found[f"activations of {layer.partition('/')[0]}"] += measured["activations"]["seconds"]
    return found


def run_trace(options: argparse.Namespace, stage: Stage) -> None:
    """Trace one analysis: nothing larger than the maps may come back from the device once the images are there."""
    if options.device.type != "cuda":
        raise InputError("the trace requires --device cuda")
    networks, images, side = inputs(options)
    settings = Settings(samples=len(images), image_size=side, iterations=250)
    with tempfile.TemporaryDirectory() as folder:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            analyze(networks, source(options, images), Path(folder) / "run", settings=settings, device=options.device)
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    assert images.pixels is not None
    found = copies_to_host(events, images.pixels.nbytes)
    print(f"  {len(found)} copies to the host after the images' upload, the largest of {max(found):,} bytes")
    stage.note(copies_to_host=sorted(found)[-20:])
    stage.bar("largest copy to the host, MB", max(found) / 1e6, "<=", LARGEST_COPY / 1e6)


def copies_to_host(events: Sequence[dict[str, Any]], images: int) -> list[int]:
    """Bytes of each copy from the device to the host after the last upload of `images` bytes, in a Chrome trace."""
    copies = [
        (event["ts"], event["name"], int(event["args"]["bytes"]))
        for event in events
        if event.get("cat") == "gpu_memcpy" and "bytes" in event.get("args", {})
    ]
    uploads = [ts for ts, name, size in copies if "HtoD" in name and size == images]
    if not uploads:
        raise ValueError(f"no upload of {images} bytes among {len(copies)} copies")
    return [size for ts, name, size in copies if "DtoH" in name and ts > uploads[-1]]
