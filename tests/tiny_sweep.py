"""A small sweep for the tests to run, and what it must come to."""

import copy
import csv
import os
import subprocess
import sys
from pathlib import Path

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
