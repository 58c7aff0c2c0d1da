"""Charges on a grid by B-splines, and the potential and its gradient back at the charges (numba).

A point at (x, y) of the grid, in cells, gives its charge of 1 to ORDER x ORDER nodes from (int(x), int(y)) on, by the
products of ORDER weights in each direction, and reads the potential by the same (Essmann et al. 1995). The
weights and their derivatives are polynomials of the place in the cell, -1/2 <= t < 1/2, one in each lane of a vector.
What a point's charge adds to its own potential depends on (t_x, t_y) alone, and is left out: between two nodes
whose distances are (k, l) it is core[k, l], times the weights' autocorrelations, which are even polynomials.
"""

# ruff: noqa: PLR0917 - numba passes arguments by position

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numpy.polynomial import Polynomial
from scipy.interpolate import BSpline, PPoly

from qdv_gpu.kernels.fft import Vectors, instruction

ORDER = 6
WIDTH = 8  # lanes, and floats that are read and written in each row from a point's first node on


@functools.cache
def _weights() -> list[Polynomial]:
    """The weights of a point's nodes as polynomials of t."""
    pieces = PPoly.from_spline(BSpline.basis_element(np.arange(ORDER + 1)), extrapolate=False)
    half = np.poly1d([1, 0.5])  # the place in the cell from its left end on
    first = np.searchsorted(pieces.x, np.arange(ORDER), side="right") - 1
    return [Polynomial(np.poly1d(pieces.c[:, i])(half).coeffs[::-1]) for i in first[::-1]]


def values_at_nodes() -> np.ndarray:
    """The spline at the integers around its centre, float64 [ORDER / 2]; it is even."""
    spline = BSpline.basis_element(np.arange(ORDER + 1))
    return spline(ORDER / 2 + np.arange(ORDER // 2))


def _table(polynomials: list[Polynomial], *, even: bool = False) -> list[list[float]]:
    """Coefficients of each power of t, or of t^2, from the highest on, for each lane."""
    terms = max(len(p) for p in polynomials)
    filled = [np.pad(p.coef, (0, terms - len(p))) for p in polynomials] + [np.zeros(terms)] * (WIDTH - ORDER)
    return [[float(p[k]) for p in filled] for k in range(terms - 1, -1, -1) if not (even and k % 2)]


@functools.cache
def _tables() -> tuple[list[list[float]], list[list[float]], list[list[float]], list[list[float]]]:
    """Of the weights, their derivatives, the autocorrelations, and the autocorrelations' derivatives over t."""
    w = _weights()
    auto = [sum((w[a] * w[a + k] for a in range(ORDER - k)), Polynomial([0.0])) for k in range(ORDER)]
    auto = [p if k == 0 else 2 * p for k, p in enumerate(auto)]  # at k and -k
    slope = [Polynomial(p.deriv().coef[1:]) for p in auto]
    return _table(w), _table([p.deriv() for p in w]), _table(auto, even=True), _table(slope, even=True)


def tables() -> np.ndarray:
    """All of them one below the other, float32 [22, WIDTH]: 6 rows of the weights, 5, 6 and 5."""
    return np.concatenate([np.array(table, dtype=np.float32) for table in _tables()])


def _polynomial(v: Vectors, table: list[list[float]], t: ir.Value) -> ir.Value:
    value = v.constant(table[0])
    for row in table[1:]:
        value = v.fma(value, t, v.constant(row))
    return value


def _lane(v: Vectors, a: ir.Value, lane: int) -> ir.Value:
    return v.shuffle(a, a, [lane] * WIDTH)


def _sum(v: Vectors, a: ir.Value) -> ir.Value:
    for half in (4, 2, 1):
        a = v.add(a, v.shuffle(a, a, [(k + half) % WIDTH for k in range(WIDTH)]))
    return v.builder.extract_element(a, ir.IntType(32)(0))


@instruction
def spread(typing, grid, at, stride, tx, ty):
    """Add a point's charge to a flat grid; `at` is its first node."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = Vectors(context, builder, WIDTH)
        start = v.data(signature.args[0], args[0])
        weights, _, _, _ = _tables()
        wx, wy = (_polynomial(v, weights, v.spread(t)) for t in args[3:])
        at = args[1]
        for row in range(ORDER):
            v.store(v.fma(_lane(v, wy, row), wx, v.load(start, at)), start, at)
            at = builder.add(at, args[2])
        return context.get_dummy_value()

    return types.void(grid, types.int64, types.int64, types.float32, types.float32), generate


def _bilinear(v: Vectors, rows: list[ir.Value], x: list[ir.Value], y: list[ir.Value]) -> list[ir.Value]:
    """sum_r y_r rows_r x for (x, y), (x', y) and (x, y'), the last sum, over lanes, still to be taken."""
    plain = sloped = v.constant(0.0)
    for r, row in enumerate(rows):
        plain, sloped = v.fma(_lane(v, y[0], r), row, plain), v.fma(_lane(v, y[1], r), row, sloped)
    return [v.mul(x[0], plain), v.mul(x[1], plain), v.mul(x[0], sloped)]


@instruction
def gather(typing, grid, at, stride, tx, ty, core):
    """The potential at a point and its derivatives by x and y in cells, without the point's own charge.

    core is float32 [ORDER * WIDTH]. Returns three float32.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v, integer = Vectors(context, builder, WIDTH), ir.IntType(64)
        start, own = v.data(signature.args[0], args[0]), v.data(signature.args[5], args[5])
        weights, slopes, auto, auto_slope = _tables()
        rows = [v.load(start, builder.add(args[1], builder.mul(args[2], integer(row)))) for row in range(ORDER)]
        t = [v.spread(value) for value in args[3:5]]
        x, y = ([_polynomial(v, weights, one), _polynomial(v, slopes, one)] for one in t)
        whole = _bilinear(v, rows, x, y)
        rows = [v.load(own, integer(row * WIDTH)) for row in range(ORDER)]
        squares = [v.mul(one, one) for one in t]
        # the derivative of the potential moves one of the two points only: half of the autocorrelation's
        half = v.constant(0.5)
        x, y = (
            [_polynomial(v, auto, square), v.mul(v.mul(one, half), _polynomial(v, auto_slope, square))]
            for one, square in zip(t, squares, strict=True)
        )
        self = _bilinear(v, rows, x, y)
        sums = [_sum(v, v.sub(a, b)) for a, b in zip(whole, self, strict=True)]
        return context.make_tuple(builder, signature.return_type, sums)

    result = types.UniTuple(types.float32, 3)
    return result(grid, types.int64, types.int64, types.float32, types.float32, core), generate
