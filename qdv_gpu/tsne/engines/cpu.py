"""The exact method on the CPU: numba, on every core."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from qdv_gpu.tsne.problem import Problem

PAIRS_PER_THREAD = 100_000  # about 0.02 ms of work: with less, a second thread costs more than it saves
PAIRS_AT_ONCE = 4_000_000_000  # about 0.2 s on two cores between two looks at the clock and at Ctrl-C


def descend_cpu(problem: Problem, start: torch.Tensor, done: Callable[[int], None]) -> torch.Tensor:
    """Some iterations from `start` float32 [E, N, 2] on; `done` is called with the number of those just done."""
    rows, phase, learning_rate, gaussian = problem
    from qdv_gpu.kernels import cpu

    E, N, _ = start.shape
    points = start.reshape(E * N, 2).numpy()
    Z, packed = points.T.copy(), np.ascontiguousarray(points).view(np.uint64)[:, 0].copy()
    state = (Z, packed, np.zeros_like(Z), np.ones_like(Z), np.repeat(np.arange(E), N), np.arange(E + 1) * N)
    forces = (np.empty_like(Z), np.empty((cpu.BANDS, *Z.shape), dtype=np.float32), np.empty((E, cpu.BANDS)))
    scalars = np.array([phase.exaggeration, learning_rate, phase.momentum], dtype=np.float32)
    threads = max(1, min(torch.get_num_threads(), E * N**2 // PAIRS_PER_THREAD))
    at_once = max(1, PAIRS_AT_ONCE // (E * N**2))

    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, phase.iterations, at_once):
            turns, arrived = min(at_once, phase.iterations - first), np.zeros((threads, 8), dtype=np.int64)
            arguments = (turns, *state, *rows.on_cpu(), gaussian or None, *forces, *scalars, arrived)

            def work(part: int, arguments: tuple[Any, ...] = arguments) -> None:
                try:
                    cpu.descend(part, *arguments)
                finally:
                    arguments[-1][:] = 2 * arguments[0]  # one that failed or was interrupted is not waited for

            others = []
            try:
                others = [pool.submit(work, part) for part in range(1, threads)]
                work(0)
            finally:
                arrived[:] = 2 * turns
            for other in others:
                other.result()
            done(turns)
    return torch.from_numpy(Z.T.copy()).view(E, N, 2)
