"""What compiling costs the first run after an install: each step without numba's cache, less the same with it.

python -m benchmarks.first_run --json FILE
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.common import device_name, seconds, versions
from qdv_gpu.files import write_json

ROUNDS, GRID = 3, "t-SNE on a grid"  # the latter is not compiled for the few points of the demo


def steps() -> dict[str, Callable[[], Any]]:
    """What an analysis on a CPU does with few points, in its order, and what it does with many."""
    from qdv_gpu import TSNE, Deconvnet, load_network, neighborhood_hit
    from qdv_gpu.scores.quality import score_maps

    X = np.random.default_rng(0).normal(size=(600, 50)).astype(np.float32)
    labels, Z = torch.arange(600) % 10, torch.from_numpy(X[:, :2].copy())
    network = load_network("alexnet", weights="none", device="cpu")
    image = torch.rand(3, 64, 64)
    return {
        "t-SNE": lambda: TSNE(iterations=260, engine="exact").fit_transform(X),
        "scores": lambda: (neighborhood_hit(Z, labels), score_maps(torch.from_numpy(X), Z[None], labels)),
        "Deconvnet": lambda: Deconvnet(network).reconstruct(image, "conv3", maps=[0, 1]),
        GRID: lambda: TSNE(iterations=260, engine="fft").fit_transform(X),
    }


def in_a_process(cache: str) -> dict[str, float]:
    """Seconds of each step in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.first_run"]
    environment = os.environ | {"NUMBA_CACHE_DIR": cache}
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    """Print and save what the first run takes more than the second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True)
    rows: list[dict[str, float]] = []
    options = parser.parse_args()
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as cache:
            first, second = in_a_process(cache), in_a_process(cache)
        rows.append({step: round(first[step] - second[step], 3) for step in first})
        print(rows[-1], flush=True)
    middle = {step: median(row[step] for row in rows) for step in rows[0]}
    whole, few = sum(middle.values()), sum(middle.values()) - middle[GRID]
    print(f"compiled in {whole:.1f} s; where nothing is on a grid in {few:.1f} s")
    write_json(options.json, {"device": device_name(torch.device("cpu")), "versions": versions(), "rows": rows})


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(json.dumps({step: seconds(work)[0] for step, work in steps().items()}))
    else:
        main()
