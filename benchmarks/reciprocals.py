"""What the exact repulsion on the CPU gains from reciprocals by an estimate and Newton's method instead of divisions.

python -m benchmarks.reciprocals
"""

import inspect
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from numba import njit

from qdv_gpu.kernels import cpu

POINTS, ROUNDS, STEPS = 10_000, 7, (0, 1, 2, 3)  # of Newton's method; 0 divides
ESTIMATE, TWO = np.int32(0x7EF311C7), np.float32(2)
SIMD = {key: value for key, value in cpu._SIMD.items() if key != "cache"}
DIVISION = "_ONE / ("


def repel(steps: int) -> Callable[..., Any]:
    """`cpu.repel`, from its source, with other reciprocals in the loop over pairs for Student's t."""

    @njit(inline="always", **SIMD)
    def reciprocal(v):
        y = np.int32(ESTIMATE - np.float32(v).view(np.int32)).view(np.float32)
        for _ in range(steps):
            y *= TWO - v * y
        return y

    pairs, bands = (inspect.getsource(function.py_func) for function in (cpu._repel_student, cpu.repel))
    assert pairs.count(DIVISION) == 2
    if steps:
        pairs = pairs.replace(DIVISION, "reciprocal(")
    made = vars(cpu) | {"_SIMD": SIMD, "reciprocal": reciprocal}
    exec(pairs + bands, made)
    return made["repel"]


def main() -> None:
    """Print milliseconds and the error of each."""
    Z = (30 * np.random.default_rng(0).normal(size=(2, POINTS))).astype(np.float32)
    weight = np.empty(cpu.BANDS)
    loops, forces, times = {}, {}, {steps: [] for steps in STEPS}
    partial = np.zeros((cpu.BANDS, *Z.shape), dtype=np.float32)
    for steps in STEPS:
        loops[steps] = repel(steps)
        loops[steps](0, cpu.BANDS, Z, None, partial, weight)
        forces[steps] = partial.sum(axis=0)
    for _ in range(ROUNDS):
        for steps in STEPS:
            start = time.perf_counter()
            loops[steps](0, cpu.BANDS, Z, None, partial, weight)
            times[steps].append(time.perf_counter() - start)
    largest = np.abs(forces[0]).max()
    for steps in STEPS:
        error = np.abs(forces[steps] - forces[0]).max() / largest
        what = f"{steps} steps of Newton's method" if steps else "division"
        print(f"{what:<28} {1e3 * median(times[steps]):6.2f} ms, error {error:.0e}")


if __name__ == "__main__":
    main()
