"""What the exact repulsion on the CPU gains from reciprocals by an estimate and Newton's method instead of divisions.

python -m benchmarks.reciprocals
"""

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from numba import njit

from qdv_gpu.kernels.cpu import _ONE, _SIMD, TILE

POINTS, ROUNDS, STEPS = 10_000, 7, (0, 1, 2, 3)  # of Newton's method; 0 divides
ESTIMATE, TWO, ZERO = np.int32(0x7EF311C7), np.float32(2), np.float32(0)
SIMD = {key: value for key, value in _SIMD.items() if key != "cache"}


def all_pairs(steps: int) -> Callable[..., Any]:
    """The loops of `cpu.repel` for Student's t over all pairs of x, y into fx, fy."""

    @njit(inline="always", **SIMD)
    def reciprocal(v):
        if steps == 0:
            return _ONE / v
        y = np.int32(ESTIMATE - np.float32(v).view(np.int32)).view(np.float32)
        for _ in range(steps):
            y *= TWO - v * y
        return y

    @njit(inline="always", **SIMD)
    def two(x, y, fx, fy, xi, yi, xk, yk):  # noqa: PLR0917 - numba passes arguments by position
        xi_sum, yi_sum, xk_sum, yk_sum, total = ZERO, ZERO, ZERO, ZERO, ZERO
        for j in range(x.size):
            dx, dy, ex, ey = xi - x[j], yi - y[j], xk - x[j], yk - y[j]
            u, v = reciprocal(_ONE + dx * dx + dy * dy), reciprocal(_ONE + ex * ex + ey * ey)
            total += u + v
            dx, dy, ex, ey = u * u * dx, u * u * dy, v * v * ex, v * v * ey
            xi_sum += dx
            yi_sum += dy
            xk_sum += ex
            yk_sum += ey
            fx[j] -= dx + ex
            fy[j] -= dy + ey
        return xi_sum, yi_sum, xk_sum, yk_sum, total

    @njit(**SIMD)
    def run(x, y, fx, fy):
        total = 0.0
        for left in range(0, x.size, TILE):
            right = min(left + TILE, x.size)
            for i in range(0, right - 2, 2):
                c, k = max(left, i + 2), i + 1
                sums = two(x[c:right], y[c:right], fx[c:right], fy[c:right], x[i], y[i], x[k], y[k])
                fx[i] += sums[0]
                fy[i] += sums[1]
                fx[k] += sums[2]
                fy[k] += sums[3]
                total += sums[4]
        return total

    return run


def main() -> None:
    """Print milliseconds and the error of each."""
    x, y = (30 * np.random.default_rng(0).normal(size=(2, POINTS))).astype(np.float32)
    loops, forces, times = {}, {}, {steps: [] for steps in STEPS}
    for steps in STEPS:
        forces[steps] = np.zeros((2, POINTS), dtype=np.float32)
        loops[steps] = partial(all_pairs(steps), x, y)
        loops[steps](*forces[steps])
    for _ in range(ROUNDS):
        for steps in STEPS:
            out = np.zeros((2, POINTS), dtype=np.float32)
            start = time.perf_counter()
            loops[steps](*out)
            times[steps].append(time.perf_counter() - start)
    largest = np.abs(forces[0]).max()
    for steps in STEPS:
        error = np.abs(forces[steps] - forces[0]).max() / largest
        what = f"{steps} steps of Newton's method" if steps else "division"
        print(f"{what:<28} {1e3 * median(times[steps]):6.2f} ms, error {error:.0e}")


if __name__ == "__main__":
    main()
