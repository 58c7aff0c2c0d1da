"""The figure of docs/numbers.md that shows seconds against KL, from what the stage tsne measured.

python -m benchmarks.curves benchmarks/results/FILE.json docs/figures/tsne_curves.png
"""

import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from qdv_gpu.files import read_json
from qdv_gpu.report.drawing import COLOURS, MARKERS, SMALL, TEXT, TITLE

NAMES = {"ours": "qdv_gpu", "exact": "qdv_gpu, exact", "sklearnex": "scikit-learn-intelex"}


def drawn(report: dict[str, Any]) -> Figure:
    """A curve for each method; a point is a run from the points on."""
    (what, curves), *_ = report["stages"]["tsne"]["curves"].items()
    figure = Figure((5.5, 3.4), layout="constrained")
    axes = figure.subplots()
    for (name, runs), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
        axes.plot(
            [run["seconds"] for run in runs], [run["kl"] for run in runs], color=colour, marker=marker, markersize=4,
            label=NAMES.get(name, name),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 5, 10, 20], labels=["0.5", "1", "2", "5", "10", "20"], minor=False)
    axes.minorticks_off()
    axes.tick_params(labelsize=SMALL)
    axes.set_xlabel("seconds, affinities included", fontsize=TEXT)
    axes.set_ylabel("KL divergence, all pairs", fontsize=TEXT)
    iterations = [run["iterations"] for run in curves["ours"]]
    axes.set_title(f"{what}, {iterations[0]} to {iterations[-1]:,} iterations", fontsize=TITLE, loc="left")
    axes.grid(visible=True, linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=SMALL, frameon=False)
    return figure


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    drawn(read_json(source)).savefig(target, dpi=150)
