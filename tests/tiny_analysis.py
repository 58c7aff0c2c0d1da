"""A small analysis for the tests to run, and what it must come to."""

import csv

from qdv_gpu import Settings, analyze

TINY = Settings(layers=("relu", "pool"), samples=100, pca=10, perplexity=8, iterations=60, seeds=2, k=(5, 3))
SPECS = ["tiny_networks:cnn", "tiny_networks:other"]
LAYERS = ["relu@1", "relu@2", "pool@1", "pool@2"]


def run(out, settings=TINY, specs=SPECS, **options):
    return analyze(specs, "digits", out, settings=settings, **{"device": "cpu"} | options)


def outcome(out):
    """Everything that must not depend on how often the run was killed."""
    with (out / "layers.csv").open() as file:
        rows = [{**row, "seconds": ""} for row in csv.DictReader(file)]
    arrays = {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.npz"))}
    return rows, arrays, (out / "predictions.csv").read_bytes()
