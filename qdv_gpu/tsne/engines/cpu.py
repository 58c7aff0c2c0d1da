"""The exact method on the CPU: numba, on every core."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from qdv_gpu.tsne.problem import Motion, Problem

PAIRS_PER_THREAD = 100_000  # about 0.02 ms of work: with less, a second thread costs more than it saves
PAIRS_AT_ONCE = 4_000_000_000  # about 0.2 s on two cores between two looks at the clock and at Ctrl-C


def descend_cpu(problem: Problem, motion: Motion, done: Callable[[int], None]) -> Motion:
    """The phase's iterations from `motion` on; `done` is called with the number of those just done."""
    rows, phase, learning_rate, gaussian = problem
    from qdv_gpu.kernels import cpu

    E, N, _ = motion.Z.shape
    Z, velocity, gains = moving = [part.reshape(E * N, 2).numpy().T.copy() for part in motion]
    packed = Z.T.copy().view(np.uint64)[:, 0].copy()
    state = (Z, packed, velocity, gains, np.repeat(np.arange(E), N), np.arange(E + 1) * N)
    P = rows.on_cpu()
    forces = (np.empty_like(Z), np.empty((cpu.BANDS, *Z.shape), dtype=np.float32), np.empty((E, cpu.BANDS)))
    scalars = np.array([phase.exaggeration, learning_rate, phase.momentum], dtype=np.float32)
    threads = max(1, min(torch.get_num_threads(), E * N**2 // PAIRS_PER_THREAD))
    at_once = max(1, PAIRS_AT_ONCE // (E * N**2))

    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, phase.iterations, at_once):
            turns, arrived = min(at_once, phase.iterations - first), np.zeros((threads, 8), dtype=np.int64)
            arguments = (turns, *state, *P, gaussian or None, *forces, *scalars, arrived)

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
    return Motion(*(torch.from_numpy(part.T.copy()).view(E, N, 2) for part in moving))
