"""Does the same seed give the same bits, time and again?"""

import argparse
from collections.abc import Callable
from functools import partial

import torch

from benchmarks import bars
from benchmarks.common import Stage
from benchmarks.data import fashion
from benchmarks.tsne import components, filled_up, ours
from qdv_gpu.deconv.unpool import max_pool, unpool

RUNS = 20


def same(stage: Stage, what: str, run: Callable[[], torch.Tensor]) -> None:
    """Count the runs whose bits are those of the first."""
    first, equal = run(), 1
    for number in range(2, RUNS + 1):
        if not stage.fits(f"{what}, from run {number} on"):
            return  # a smaller number would look like other bits
        equal += torch.equal(first, run())
    stage.bar(what, equal)


def run(options: argparse.Namespace, stage: Stage) -> None:
    """Whole embeddings, and unpooling where windows meet and where they overlap."""
    device, quick = options.device, options.quick
    with stage.part(bars.SAME_MAPS):
        images = fashion()
        X = components(images, device=device)[0][: 300 if quick else 10_000]
        stage.note(points=images.name)
        same(stage, bars.SAME_MAPS, partial(ours, X, 300 if quick else 1000, 0))
    with stage.part(bars.SAME_GRIDS):
        large = filled_up(X, 500 if quick else 100_000)
        same(stage, bars.SAME_GRIDS, partial(ours, large, 300 if quick else 1000, 0, "fft"))
    with stage.part(bars.SAME_PICTURES):
        jobs = []
        for C, side, kernel in ((64, 112, 2), (192, 27, 3)):
            pooled, switches = max_pool(torch.randn(1, C, side, side, device=device), kernel, 2)
            signal = torch.randn(2 if quick else 64, *pooled.shape[1:], device=device)
            jobs.append(partial(unpool, signal, switches, (side, side), kernel, 2))
        same(stage, bars.SAME_PICTURES, lambda: torch.cat([job().flatten() for job in jobs]))
