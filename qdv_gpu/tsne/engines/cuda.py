"""The exact method on a GPU: CUDA kernels."""

from collections.abc import Callable

import numpy as np
import torch

from qdv_gpu import kernels
from qdv_gpu.tsne.problem import Motion, Problem

GRAPH_ITERATIONS = 25  # in one CUDA graph


def descend_cuda(problem: Problem, motion: Motion, done: Callable[[int], None]) -> tuple[Motion, list[str]]:
    """As `descend_cpu`, with CUDA kernels; most iterations are replays of a graph of 25."""
    rows, phase, learning_rate, gaussian = problem
    E, N, _ = motion.Z.shape
    Z, velocity, gains = moving = [
        part.reshape(E * N, 2).clone(memory_format=torch.contiguous_format) for part in motion
    ]
    attraction, repulsion = torch.empty_like(Z), torch.empty_like(Z)
    weight, bounds = torch.empty_like(Z[:, 0]), torch.arange(E + 1, device=Z.device) * N
    scalars = np.array([phase.exaggeration, learning_rate, phase.momentum], dtype=np.float32)
    most = kernels.MAX_GRID
    batches = [(bounds[b : b + most + 1], rows.first[b : b + most]) for b in range(0, E, most)]
    dense = int(rows.indices.numel() == 0)
    replays = max(0, phase.iterations - 1) // GRAPH_ITERATIONS
    single = phase.iterations - replays * GRAPH_ITERATIONS  # what is captured has run before

    def step() -> None:
        for start, first in batches:
            B = len(first)
            kernels.launch(module, "repel", Z, start, repulsion, weight, grid=(-(-N // 16), B), block=128)
            kernels.launch(module, "attract", Z, start, first, *rows[1:], attraction, grid=(-(-N // 4), B), block=128)
            kernels.launch(
                module, "update", Z, velocity, gains, attraction, repulsion, weight, start, *scalars,
                grid=(-(-N // 256), B), block=256,
            )  # fmt: skip

    with torch.cuda.device(Z.device):
        module = kernels.load("tsne", fast_math=True, GAUSSIAN=int(gaussian), DENSE=dense)
        for _ in range(single):
            step()
        done(single)
        if replays:
            graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    for _ in range(GRAPH_ITERATIONS):
                        step()
                finally:  # or the stream would go on capturing for good
                    graph.capture_end()
            for _ in range(replays):
                graph.replay()
                torch.cuda.current_stream().synchronize()  # so that progress is real and Ctrl-C acts at once
                done(GRAPH_ITERATIONS)
    return Motion(*(part.view(E, N, 2) for part in moving)), ["exact"]
