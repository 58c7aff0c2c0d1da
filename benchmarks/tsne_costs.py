"""The constants of `qdv_gpu.tsne.engines.cpu.seconds`: what the repulsion of an iteration takes on one core.

python -m benchmarks.tsne_costs
"""

import math
import time

import numpy as np
import torch

from qdv_gpu.tsne.engines import cpu
from qdv_gpu.tsne.engines.grid import grid_for
from qdv_gpu.tsne.problem import Motion, Phase, Problem, Repulsion, Rows

POINTS, SPANS, ITERATIONS = (500, 1000, 3000, 10_000, 30_000), (2.0, 20.0, 80.0, 200.0), 10


def spent(N: int, span: float, engine: str) -> tuple[float, int]:
    """Seconds of the processor an iteration without attraction, and the grid's nodes."""
    nothing = Rows(*(torch.zeros(n, dtype=kind) for n, kind in (
        (1, torch.int64), (N + 1, torch.int64), (0, torch.int32), (0, torch.float32)
    )))  # fmt: skip
    Z = span * torch.rand(N, 2, generator=torch.Generator().manual_seed(0))
    problem = Problem(nothing, Phase(ITERATIONS, 1.0, 0.0), 1e-9, gaussian=False)
    times = []
    for _ in range(7):
        one = cpu._Embedding(problem, 0, Motion.at_rest(Z), Repulsion(engine))
        start = time.process_time()
        one.move(ITERATIONS)
        times.append((time.process_time() - start) / ITERATIONS)
    grid = grid_for(Z.amin(0).numpy(), Z.amax(0).numpy(), Repulsion().tolerance, gaussian=False)
    return min(times), grid.ny * grid.nx


def main() -> None:
    """Print the constants, and what those that are set predict."""
    torch.set_num_threads(1)
    exact = [(N, spent(N, 20.0, "exact")[0]) for N in POINTS if N <= 10_000]
    rows = [(N, *spent(N, span, "fft")) for N in POINTS for span in SPANS if N > span * span / 20]
    pair, point = fitted([[N * N / 2, N] for N, _ in exact], [t for _, t in exact])
    print(f"EXACT_PAIR, EXACT_POINT = {1e9 * pair:.3f}, {1e9 * point:.1f}")
    node, point = fitted([[nodes * math.log2(nodes), N] for N, _, nodes in rows], [t for _, t, _ in rows])
    print(f"FFT_NODE, FFT_POINT = {1e9 * node:.3f}, {1e9 * point:.1f}")
    for N, t in exact:
        print(f"{N:>7,} points, exact: {1e3 * t:.3f} ms, model {1e3 * cpu.seconds(N, None):.3f}")
    for N, t, nodes in rows:
        print(f"{N:>7,} points, {nodes:>9,} nodes: {1e3 * t:.3f} ms, model {1e3 * cpu.seconds(N, nodes):.3f}")


def fitted(terms: list[list[float]], taken: list[float]) -> np.ndarray:
    """Least squares of the relative error."""
    return np.linalg.lstsq(np.array(terms) / np.array(taken)[:, None], np.ones(len(taken)), rcond=None)[0]


if __name__ == "__main__":
    main()
