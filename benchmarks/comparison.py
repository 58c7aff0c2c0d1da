"""How honest the errors and comparisons are: against fresh samples of images, with and without a true difference.

    python -m benchmarks.comparison [--maps] [--repeats 300] --json FILE

Two networks see the same N images at five layers; each layer is a cloud in the plane, in which both have a part of the
images' noise in common. Five seeds add noise of their own. With --maps the clouds have ten dimensions and the seeds are
those of t-SNE. "null" has no difference; "ahead" one of about 0.05 in the last three layers.
"""

import argparse
import json
import platform
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from qdv_gpu.neighbors import knn
from qdv_gpu.scores.comparison import Side, ahead_from, class_differences, differences
from qdv_gpu.scores.quality import hit_values
from qdv_gpu.scores.statistics import error_neighbors
from qdv_gpu.tsne.estimator import TSNE

CLASSES, LAYERS, SEEDS = 10, 5, 5
K = (1, 2, 5, 15)


def clouds(random: np.random.Generator, N: int, gap: np.ndarray, d: int) -> list[list[np.ndarray]]:
    """Of each network the points [N, d] of each layer, on the same images; B's classes are farther by `gap`."""
    labels = np.arange(N) % CLASSES
    centres = np.zeros((CLASSES, d))
    angle = 2 * np.pi * np.arange(CLASSES) / CLASSES
    centres[:, 0], centres[:, 1] = np.cos(angle), np.sin(angle)
    found: list[list[np.ndarray]] = [[], []]
    for layer in range(LAYERS):
        shared = random.normal(size=(N, d))
        for network in range(2):
            apart = 2.0 + 0.5 * layer + (gap[layer] if network else 0.0)
            own = random.normal(size=(N, d))
            found[network].append(apart * centres[labels] + np.sqrt(0.5) * shared + np.sqrt(0.5) * own)
    return found


def one_repeat(task: tuple[int, int, tuple[float, ...], bool]) -> dict[str, Any]:
    """Everything of one fresh sample of images."""
    seed, N, gap, maps = task
    torch.set_num_threads(1)
    random = np.random.default_rng(seed)
    labels = torch.arange(N) % CLASSES
    points = clouds(random, N, np.array(gap), 10 if maps else 2)
    wide = max(error_neighbors(k, N) for k in K)
    nh, errors, sides, neighbors = {}, {}, [[], []], [[], []]
    for network in range(2):
        for layer, X in enumerate(points[network]):
            if maps:
                tsne = TSNE(perplexity=30, iterations=500, device="cpu")
                Z = list(tsne.fit_transform(torch.from_numpy(X).float(), seeds=SEEDS).double())
            else:
                Z = [torch.from_numpy(X + 0.3 * random.normal(size=X.shape)) for _ in range(SEEDS)]
            near = [knn(z, wide).indices for z in Z]
            for k in K:
                found = hit_values(near, labels, k=k)
                nh[network, layer, k], errors[network, layer, k] = float(found.hits.mean()), found.standard_error
                if k == 5:
                    sides[network].append(Side(found.spread, tuple(found.hits.mean(dim=1).tolist())))
                    neighbors[network].append([indices[:, :5] for indices in near])
    result = differences([([a], [b]) for a, b in zip(*sides, strict=True)], labels)
    of_classes = [class_differences([a], [b], labels) for a, b in zip(*neighbors, strict=True)]
    return {
        "nh": {f"{n} {layer} {k}": value for (n, layer, k), value in nh.items()},
        "errors": {f"{n} {layer} {k}": value for (n, layer, k), value in errors.items()},
        "delta": [one.delta for one in result],
        "low": [one.low for one in result],
        "high": [one.high for one in result],
        "p_holm": [one.p_holm for one in result],
        "ahead_from": ahead_from(result),
        "class_delta": [found[0].tolist() for found in of_classes],
        "class_error": [found[1].tolist() for found in of_classes],
    }


def of_points(task: tuple[int, int]) -> dict[str, Any]:
    """NH and its error of the points of one network themselves, in the plane, without seeds."""
    seed, N = task
    torch.set_num_threads(1)
    labels = torch.arange(N) % CLASSES
    found: dict[str, Any] = {"nh": {}, "errors": {}}
    for layer, X in enumerate(clouds(np.random.default_rng(seed), N, np.zeros(LAYERS), 2)[0]):
        near = knn(torch.from_numpy(X), max(error_neighbors(k, N) for k in K)).indices
        for k in K:
            hits = hit_values([near], labels, k=k)
            found["nh"][f"{layer} {k}"], found["errors"][f"{layer} {k}"] = float(hits.hits.mean()), hits.standard_error
    return found


def error_ratios(rows: list[dict[str, Any]]) -> dict[int, list[float]]:
    """Mean standard error over the spread of NH, the least and the most of the layers, for each k."""
    ratios = {}
    for k in K:
        names = [name for name in rows[0]["nh"] if name.endswith(f" {k}")]
        spread = [np.std([row["nh"][name] for row in rows], ddof=1) for name in names]
        error = [np.mean([row["errors"][name] for row in rows]) for name in names]
        found = np.divide(error, spread)
        ratios[k] = [round(float(found.min()), 3), round(float(found.max()), 3)]
    return ratios


def summarised(rows: list[dict[str, Any]], gap: tuple[float, ...]) -> dict[str, Any]:
    """Rejections, coverage, power, and errors over spreads."""
    delta, low, high = (np.array([row[name] for row in rows]) for name in ("delta", "low", "high"))
    true = delta.mean(axis=0) if any(gap) else np.zeros(LAYERS)
    p = np.array([row["p_holm"] for row in rows])
    none = np.array(gap) == 0
    classes = np.array([row["class_delta"] for row in rows])  # [repeats, L, C]
    class_error = np.array([row["class_error"] for row in rows])
    class_ratio = class_error.mean(axis=0) / classes.std(axis=0, ddof=1)
    claims = [row["ahead_from"] for row in rows]
    first_true = int(np.argmax(~none)) if any(gap) else LAYERS
    return {
        "realised delta": np.round(true, 4).tolist(),
        "family-wise rejection of true nulls": float((p[:, none] <= 0.05).any(axis=1).mean()) if none.any() else None,
        "simultaneous coverage": float(((low <= true) & (true <= high)).all(axis=1).mean()),
        "power by layer": np.round((p <= 0.05).mean(axis=0), 3).tolist(),
        "false claims of ahead from": float(np.mean([claim is not None and claim < first_true for claim in claims])),
        "standard error over spread, least and most of the layers, by k": error_ratios(rows),
        "the same of class differences, mean and range": [float(class_ratio.mean()), float(class_ratio.min()),
                                                          float(class_ratio.max())],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--maps", action="store_true")
    parser.add_argument("--json", required=True)
    options = parser.parse_args()
    ahead = (0.0, 0.0, 0.29, 0.32, 0.38)
    found = {}
    for name, gap in (("null", (0.0,) * LAYERS), ("ahead", ahead)):
        tasks = [(seed, options.images, gap, options.maps) for seed in range(options.repeats)]
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            rows = list(pool.map(one_repeat, tasks, chunksize=5))
        found[name] = summarised(rows, gap)
        print(name, json.dumps(found[name], indent=1), flush=True)
    if not options.maps:
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            tasks_of_points = [(seed, options.images) for seed in range(options.repeats)]
            found["points"] = error_ratios(list(pool.map(of_points, tasks_of_points, chunksize=5)))
        print("points", json.dumps(found["points"]), flush=True)
    about = {"images": options.images, "repeats": options.repeats, "maps": options.maps, "machine": platform.machine(),
             "seeds": SEEDS, "classes": CLASSES}  # fmt: skip
    with open(options.json, "w") as file:
        json.dump({**about, **found}, file, indent=1)


if __name__ == "__main__":
    main()
