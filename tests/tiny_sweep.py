"""A small sweep for the tests to run, and what it must come to."""

import copy
import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from qdv_gpu.studies.status import status

HERE = Path(__file__).parent
TABLE = {
    "run": {
        "data": "digits",
        "weights": "none",
        "epochs": 1,
        "batch_size": 64,
        "finetune": {"samples": 200},
        "analyze": {"samples": 100},
        "perplexity": 8,
        "iterations": 60,
        "seeds": 2,
        "layers": "pool",
    },
    "grid": {"network": ["tiny_networks:cnn", "tiny_networks:other"], "lr": [1e-3, 1e-2], "runs": 3},
}
TOML = """
[run]
data = "digits"
weights = "none"
epochs = 1
batch_size = 64
finetune.samples = 200
analyze.samples = 100
perplexity = 8
iterations = 60
seeds = 2
layers = "pool"

[grid]
network = ["tiny_networks:cnn", "tiny_networks:other"]
lr = [1e-3, 1e-2]
runs = 3
"""


def changed(**tables):
    """The table with other keys in run or grid; None takes one away."""
    table = copy.deepcopy(TABLE)
    for name, keys in tables.items():
        if name == "points":
            table[name] = keys
            continue
        table[name] |= keys
        table[name] = {key: value for key, value in table[name].items() if value is not None}
    return table


def plain(**run):
    """A sweep without training."""
    table = changed(grid={"lr": None, "runs": None}, run=run)
    for name in ("epochs", "batch_size", "finetune"):
        table["run"].pop(name)
    return table


def rows(out):
    """The rows of sweep.csv, without times."""
    with (Path(out) / "sweep.csv").open() as file:
        return [{k: v for k, v in row.items() if not k.endswith("_seconds")} for row in csv.DictReader(file)]


def environment():
    """For processes that find the tests' networks."""
    return {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}"}


def command(*arguments, **options):
    """A `qdv-gpu` command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "qdv_gpu", *map(str, arguments)], cwd=HERE, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )  # fmt: skip


def kinds(out):
    """States of the points of the sweep in a folder."""
    return [state.kind for state in status(out).states]


def drawn(folder, seed):
    """30 small images in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (30, 8, 8), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")
