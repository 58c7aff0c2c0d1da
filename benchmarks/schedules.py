"""Which learning rate and how much early exaggeration reach a KL divergence in the fewest iterations.

    python -m benchmarks.schedules [--quick] --json FILE

Perplexity 40, three seeds each, every number of iterations from the start. NH and trustworthiness say whether a lower
KL divergence is a better map as well. The default is `rate` 1, N / 48, with 250 iterations of early exaggeration.
"""

import argparse
from itertools import product
from statistics import median
from typing import Any

import torch

from benchmarks.common import device_name, versions
from benchmarks.data import fashion
from benchmarks.tsne import components, rate
from qdv_gpu import TSNE, load_images, neighborhood_hit
from qdv_gpu.files import write_json
from qdv_gpu.scores.quality import trustworthiness

ITERATIONS, EXAGGERATED, RATES, SEEDS = (350, 500, 750, 1000), (250, 125), (1, 2, 4), 3


def measured(X: torch.Tensor, labels: torch.Tensor, exaggerated: int, times: int, iterations: int) -> dict[str, Any]:
    """Medians over the seeds, and every KL divergence."""
    model = TSNE(
        perplexity=40, iterations=iterations, exaggeration_iterations=exaggerated, learning_rate=times * rate(len(X))
    )
    maps = model.fit_transform(X, seeds=SEEDS)
    kl = [round(float(one), 4) for one in model.kl_divergence_]
    return {
        "exaggeration_iterations": exaggerated, "rate": times, "iterations": iterations, "kl": median(kl), "all": kl,
        "nh": round(median(neighborhood_hit(Z, labels) for Z in maps), 4),
        "trustworthiness": round(median(trustworthiness(X, Z) for Z in maps), 4),
    }  # fmt: skip


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a rehearsal: few points")
    parser.add_argument("--json", required=True)
    options = parser.parse_args()
    cpu = torch.device("cpu")
    digits = components(*(load_images("digits", split) for split in ("train", "test")), device=cpu)
    clothes = components(fashion("test"), device=cpu)
    sets = {"digits": digits, "Fashion-MNIST": clothes}
    if options.quick:
        sets = {name: (X[:300], labels[:300]) for name, (X, labels) in sets.items()}
    report: dict[str, Any] = {"device": device_name(cpu), "versions": versions(), "rows": []}
    for (name, (X, labels)), *settings in product(sets.items(), EXAGGERATED, RATES, ITERATIONS):
        row = {"points": f"{name}, {len(X):,}", **measured(X, labels, *settings)}
        print(row, flush=True)
        report["rows"].append(row)
        write_json(options.json, report)


if __name__ == "__main__":
    main()
