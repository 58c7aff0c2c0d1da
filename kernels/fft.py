"""Convolution of a real grid with an even kernel on the CPU: a fast Fourier transform in 16 lanes (numba).

Why not a library
    pocketfft (scipy) and MKL (torch) transform the padded grid of [2n, 2n] in three to six times the time, and hand
    the work to threads of their own. Here 16 lines are transformed side by side, one in each lane of a vector, so
    nothing is shuffled but in the transposition; a block of lines is one piece of work, whoever does it, so the
    bits do not depend on the threads.
Convolution
    Values outside the grid are 0 and the kernel reaches over all of it, so columns and rows must be padded to twice
    their length; no transform is longer than n for that. Down the columns, the complex transform at the shifted
    frequencies 2 pi (k + 1/4) / n multiplies polynomials modulo t^n = -i: what wraps around once is imaginary, and is
    dropped. Along the rows, which are complex then, the even frequencies of 2n are a transform of n, and so
    are the odd ones after a shift by half a frequency. An even kernel's transform is real at all of these.
Layout
    grid float32 [ny, stride], ny and nx multiples of 16. work float32 [nx / 16, ny, 2, 16]: blocks of 16 columns, in
    each line the real parts of 16 columns and then the imaginary ones. Transforms are in place: forward by
    decimation in frequency, which leaves the frequencies in the order of `order_of`; back by decimation in time,
    which takes them so. influence float32 [ny / 16, 2, nx, 16] is in that order.
Cost
    (1 + 2) transforms of length n a line each way: 6 n^2 * 4.25 log2(n) operations, 16 lanes wide; each pass over a
    block of lines, 128 n bytes, is read from and written to the second-level cache.
"""

# ruff: noqa: PLR0917 - numba passes arguments by position

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qdv_gpu.kernels.rows import compiled, inner

instruction: Any = intrinsic  # numba's stubs count the typing context as an argument
LANES = 16
LINE = 2 * LANES  # floats: real and imaginary parts
_FLOAT = ir.FloatType()
Complex = tuple[ir.Value, ir.Value]


class Vectors:
    """Instructions on vectors of floats; nothing may be reordered, so the bits are those written down."""

    def __init__(self, context: Any, builder: Any, lanes: int = LANES, kind: Any = _FLOAT) -> None:
        self.context, self.builder, self.lanes = context, builder, lanes
        self.type = ir.VectorType(kind, lanes)
        self.add, self.sub, self.mul = builder.fadd, builder.fsub, builder.fmul
        self._fma = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(self.type, [self.type] * 3),
            f"llvm.fma.v{lanes}f{32 if kind is _FLOAT else 64}",
        )

    def data(self, kind: Any, array: Any) -> ir.Value:
        """Where the array starts."""
        return self.context.make_array(kind)(self.context, self.builder, array).data

    def _at(self, start: ir.Value, index: ir.Value) -> ir.Value:
        return self.builder.bitcast(self.builder.gep(start, [index]), self.type.as_pointer())

    def load(self, start: ir.Value, index: ir.Value) -> ir.Value:
        """The vector that starts at an element."""
        return self.builder.load(self._at(start, index), align=4)

    def store(self, value: ir.Value, start: ir.Value, index: ir.Value) -> None:
        """Write a vector from an element on."""
        self.builder.store(value, self._at(start, index), align=4)

    def constant(self, values: Sequence[float] | float) -> ir.Value:
        """A vector of these floats."""
        several = [values] * self.lanes if isinstance(values, float) else list(values)
        if self.type.element is _FLOAT:
            several = [float(np.float32(value)) for value in several]
        return ir.Constant(self.type, [ir.Constant(self.type.element, value) for value in several])

    def spread(self, scalar: ir.Value) -> ir.Value:
        """A vector with the scalar in every lane."""
        one = self.builder.insert_element(ir.Constant(self.type, ir.Undefined), scalar, ir.IntType(32)(0))
        return self.shuffle(one, one, [0] * self.lanes)

    def scalar(self, start: ir.Value, index: ir.Value) -> ir.Value:
        """A vector with an element in every lane."""
        return self.spread(self.builder.load(self.builder.gep(start, [index])))

    def shuffle(self, a: ir.Value, b: ir.Value, lanes: Sequence[int]) -> ir.Value:
        """The lanes of a, then those of b, by number."""
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes))
        return self.builder.shuffle_vector(a, b, mask)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a b + c, rounded once."""
        return self.builder.call(self._fma, [a, b, c])

    def negative(self, a: ir.Value) -> ir.Value:
        """-a."""
        return self.builder.fneg(a)

    def times(self, a: Complex, w: Complex) -> Complex:
        """The product of complex numbers."""
        (x, y), (c, s) = a, w
        return (
            self.fma(x, c, self.negative(self.mul(y, s))),
            self.fma(x, s, self.mul(y, c)),
        )


def _dft(v: Vectors, x: list[Complex]) -> list[Complex]:
    """The transform of 2, 3, 4 or 5 complex numbers."""

    def plus(a: Complex, b: Complex) -> Complex:
        return v.add(a[0], b[0]), v.add(a[1], b[1])

    def minus(a: Complex, b: Complex) -> Complex:
        return v.sub(a[0], b[0]), v.sub(a[1], b[1])

    def scaled(a: Complex, factor: float, b: Complex) -> Complex:  # factor a + b
        c = v.constant(factor)
        return v.fma(a[0], c, b[0]), v.fma(a[1], c, b[1])

    def turned(a: Complex) -> Complex:  # -i a
        return a[1], v.negative(a[0])

    if len(x) == 2:
        return [plus(x[0], x[1]), minus(x[0], x[1])]
    if len(x) == 4:
        a, b, c, d = plus(x[0], x[2]), minus(x[0], x[2]), plus(x[1], x[3]), turned(minus(x[1], x[3]))
        return [plus(a, c), plus(b, d), minus(a, c), minus(b, d)]
    zero = v.constant(0.0)
    pairs = [(plus(x[i], x[-i]), turned(minus(x[i], x[-i]))) for i in range(1, len(x) // 2 + 1)]
    first = x[0]
    for even, _ in pairs:
        first = plus(first, even)
    result = [first] + [first] * (len(x) - 1)
    for k in range(1, len(x) // 2 + 1):
        a, b = x[0], (zero, zero)
        for i, (even, odd) in enumerate(pairs, 1):
            angle = 2 * np.pi * i * k / len(x)
            a, b = scaled(even, float(np.cos(angle)), a), scaled(odd, float(np.sin(angle)), b)
        result[k], result[-k] = plus(a, b), minus(a, b)
    return result


def _butterfly(radix: int, *, back: bool) -> Any:
    """A step of a transform, in place; back, with real and imaginary parts exchanged and the product before."""

    @instruction
    def step(typing, data, at, stride, twiddles, first):
        def generate(context, builder, signature, args):
            v, integer = Vectors(context, builder), ir.IntType(64)
            start, table = v.data(signature.args[0], args[0]), v.data(signature.args[3], args[3])
            shift = (integer(LANES), integer(0)) if back else (integer(0), integer(LANES))
            places = [
                [builder.add(builder.add(args[1], builder.mul(args[2], integer(q))), part) for part in shift]
                for q in range(radix)
            ]
            x = [(v.load(start, re), v.load(start, im)) for re, im in places]
            w = [
                tuple(v.scalar(table, builder.add(args[4], integer(2 * q + part))) for part in range(2))
                for q in range(radix - 1)
            ]
            if back:
                x = [x[0], *(v.times(a, b) for a, b in zip(x[1:], w, strict=True))]
            x = _dft(v, x)
            if not back:
                x = [x[0], *(v.times(a, b) for a, b in zip(x[1:], w, strict=True))]
            for (a, b), (re, im) in zip(x, places, strict=True):
                v.store(a, start, re)
                v.store(b, start, im)
            return context.get_dummy_value()

        return types.void(data, types.int64, types.int64, twiddles, types.int64), generate

    return step


_forward2, _forward3, _forward4, _forward5 = (_butterfly(radix, back=False) for radix in (2, 3, 4, 5))
_back2, _back3, _back4, _back5 = (_butterfly(radix, back=True) for radix in (2, 3, 4, 5))


def _lanewise(arrays: int, body: Callable[..., None], scalars: int = 0) -> Any:
    """An intrinsic with so many pairs of an array and an index, and then floats for all lanes."""

    def generate(context, builder, signature, args):
        v = Vectors(context, builder)
        places = [(v.data(signature.args[2 * a], args[2 * a]), args[2 * a + 1]) for a in range(arrays)]
        body(v, *places, *(v.spread(value) for value in args[2 * arrays :]))
        return context.get_dummy_value()

    if (arrays, scalars) == (2, 2):

        @instruction
        def lanewise(typing, a, i, b, j, c, s):
            return types.void(a, types.int64, b, types.int64, types.float32, types.float32), generate

    else:
        assert (arrays, scalars) == (2, 0)

        @instruction
        def lanewise(typing, a, i, b, j):
            return types.void(a, types.int64, b, types.int64), generate

    return lanewise


Place = tuple[ir.Value, ir.Value]


def _imaginary(v: Vectors, place: Place) -> Place:
    return place[0], v.builder.add(place[1], ir.IntType(64)(LANES))


def _twist_body(v: Vectors, real: Place, line: Place, c: ir.Value, s: ir.Value) -> None:
    x = v.load(*real)
    v.store(v.mul(x, c), *line)
    v.store(v.mul(x, s), *_imaginary(v, line))


def _untwist_body(v: Vectors, line: Place, real: Place, c: ir.Value, s: ir.Value) -> None:
    x, y = v.load(*line), v.load(*_imaginary(v, line))
    v.store(v.fma(x, c, v.mul(y, s)), *real)


def _turn_body(v: Vectors, line: Place, out: Place, c: ir.Value, s: ir.Value) -> None:
    x, y = v.times((v.load(*line), v.load(*_imaginary(v, line))), (c, s))
    v.store(x, *out)
    v.store(y, *_imaginary(v, out))


def _add_turned_body(v: Vectors, line: Place, out: Place, c: ir.Value, s: ir.Value) -> None:
    x, y = v.times((v.load(*line), v.load(*_imaginary(v, line))), (c, s))
    v.store(v.add(v.load(*out), x), *out)
    v.store(v.add(v.load(*_imaginary(v, out)), y), *_imaginary(v, out))


def _scale_body(v: Vectors, line: Place, factors: Place) -> None:
    w = v.load(*factors)
    for part in (line, _imaginary(v, line)):
        v.store(v.mul(v.load(*part), w), *part)


def _transpose_body(v: Vectors, source: Place, target: Place) -> None:
    """16 lines to 16 lines, real and imaginary parts on their own."""
    integer = ir.IntType(64)
    for part in range(2):
        rows = [
            v.load(source[0], v.builder.add(source[1], integer(line * LINE + part * LANES))) for line in range(LANES)
        ]
        for half in (8, 4, 2, 1):  # exchange blocks of half x half across the diagonal
            low = [(k - half) + LANES if k & half else k for k in range(LANES)]
            high = [k + LANES if k & half else k + half for k in range(LANES)]
            for i in range(LANES):
                if not i & half:
                    a, b = rows[i], rows[i + half]
                    rows[i], rows[i + half] = v.shuffle(a, b, low), v.shuffle(a, b, high)
        for line in range(LANES):
            v.store(rows[line], target[0], v.builder.add(target[1], integer(line * LINE + part * LANES)))


_twist, _untwist = _lanewise(2, _twist_body, 2), _lanewise(2, _untwist_body, 2)
_turn, _add_turned = _lanewise(2, _turn_body, 2), _lanewise(2, _add_turned_body, 2)
_scale, _transpose = _lanewise(2, _scale_body), _lanewise(2, _transpose_body)


@inner
def _forward(data, n, radices, twiddles):
    """The transform of n lines, in place."""
    length, table = n, 0
    for radix in radices:
        part = length // radix
        for base in range(0, n, length):
            for j in range(part):
                at, first = (base + j) * LINE, table + j * 2 * (radix - 1)
                if radix == 4:
                    _forward4(data, at, part * LINE, twiddles, first)
                elif radix == 2:
                    _forward2(data, at, part * LINE, twiddles, first)
                elif radix == 3:
                    _forward3(data, at, part * LINE, twiddles, first)
                else:
                    _forward5(data, at, part * LINE, twiddles, first)
        table += part * 2 * (radix - 1)
        length = part


@inner
def _back(data, n, radices, twiddles):
    """n times the inverse of `_forward`, in place."""
    length, table = 1, len(twiddles)
    for k in range(len(radices) - 1, -1, -1):
        radix, part = radices[k], length
        length *= radix
        table -= part * 2 * (radix - 1)
        for base in range(0, n, length):
            for j in range(part):
                at, first = (base + j) * LINE, table + j * 2 * (radix - 1)
                if radix == 4:
                    _back4(data, at, part * LINE, twiddles, first)
                elif radix == 2:
                    _back2(data, at, part * LINE, twiddles, first)
                elif radix == 3:
                    _back3(data, at, part * LINE, twiddles, first)
                else:
                    _back5(data, at, part * LINE, twiddles, first)


@compiled
def down(block, grid, stride, column, n, radices, twiddles, angles):
    """Transform 16 columns of the grid, from `column` on, into `block` float32 [n * 32]."""
    for y in range(n):
        _twist(grid, y * stride + column, block, y * LINE, angles[2 * y], angles[2 * y + 1])
    _forward(block, n, radices, twiddles)


@compiled
def up(block, grid, stride, column, n, radices, twiddles, angles):
    """The way back of `down`."""
    _back(block, n, radices, twiddles)
    for y in range(n):
        _untwist(block, y * LINE, grid, y * stride + column, angles[2 * y], angles[2 * y + 1])


@compiled
def across(work, ny, rows, n, radices, twiddles, angles, influence, first, second):
    """Convolve 16 rows, from `rows` on, of the transformed columns; `first`, `second` float32 [n * 32] are overwritten.

    influence is the rows' share, float32 [2 * n * 16].
    """
    for x in range(0, n, LANES):
        _transpose(work, (x // LANES * ny + rows) * LINE, first, x * LINE)
    for x in range(n):
        _turn(first, x * LINE, second, x * LINE, angles[2 * x], angles[2 * x + 1])
    _forward(first, n, radices, twiddles)
    for k in range(n):
        _scale(first, k * LINE, influence, k * LANES)
    _back(first, n, radices, twiddles)
    _forward(second, n, radices, twiddles)
    for k in range(n):
        _scale(second, k * LINE, influence, (n + k) * LANES)
    _back(second, n, radices, twiddles)
    for x in range(n):
        _add_turned(second, x * LINE, first, x * LINE, angles[2 * x], -angles[2 * x + 1])
    for x in range(0, n, LANES):
        _transpose(first, x * LINE, work, (x // LANES * ny + rows) * LINE)


@functools.cache
def radices_of(n: int) -> tuple[int, ...]:
    """The steps of a transform of length 2^a 3^b 5^c."""
    found = []
    for radix in (5, 3, 4, 2):
        while n % radix == 0:
            found.append(radix)
            n //= radix
    assert n == 1
    return tuple(found)


@functools.cache
def order_of(n: int) -> np.ndarray:
    """int64 [n]: which frequency `_forward` leaves in each place."""
    order, radices = np.zeros(1, dtype=np.int64), radices_of(n)
    for radix in reversed(radices):
        order = (np.arange(radix)[:, None] + radix * order).ravel()
    return order


@functools.cache
def twiddles_of(n: int) -> np.ndarray:
    """The factors of all steps, float32."""
    tables, length = [], n
    for radix in radices_of(n):
        part = length // radix
        phase = -2 * np.pi * np.arange(part)[:, None] * np.arange(1, radix) / length  # [part, radix - 1]
        tables.append(np.stack([np.cos(phase), np.sin(phase)], axis=2).ravel())
        length = part
    return np.concatenate(tables).astype(np.float32)


@functools.cache
def angles_of(n: int, parts: int) -> np.ndarray:
    """cos and sin of -2 pi y / (parts n), float32 [2 n]: the shift by 1 / parts of a frequency."""
    phase = -2 * np.pi * np.arange(n) / (parts * n)
    return np.stack([np.cos(phase), np.sin(phase)], axis=1).ravel().astype(np.float32)


def even_transform(signal: np.ndarray, parts: int) -> np.ndarray:
    """The transform of a[|y|], |y| < n, at the frequencies (k + 1 / parts) / n, in the order of `order_of`.

    signal is float64 [..., n]; parts = 0 is for no shift.
    """
    n = signal.shape[-1]
    shift = np.exp(-2j * np.pi * np.arange(n) / (parts * n)) if parts else 1.0
    return (2 * np.fft.fft(signal * shift).real - signal[..., :1])[..., order_of(n)]


@instruction
def _add_product(typing, total, at, left, place, factor):
    """Add 16 float64 of `left`, times a factor, to 16 of `total`."""

    def generate(context, builder, signature, args):
        v = Vectors(context, builder, LANES, ir.DoubleType())
        start, source = v.data(signature.args[0], args[0]), v.data(signature.args[2], args[2])
        v.store(v.fma(v.load(source, args[3]), v.spread(args[4]), v.load(start, args[1])), start, args[1])
        return context.get_dummy_value()

    return types.void(total, types.int64, left, types.int64, types.float64), generate


@compiled
def sum_of_products(left, right, out):
    """sum_q left[q, i] right[q, k] for left float64 [q, m] and right [q, n]; out float32 [m / 16, n, 16], i in 16ths.

    One thread and one order, so the bits are the same anywhere; a library's matrix product promises none.
    """
    (terms, m), n, flat = left.shape, right.shape[1], left.reshape(left.size)
    total = np.empty(64 * LANES)  # fits the first-level cache
    for block in range(m // LANES):
        for start in range(0, n, 64):
            end = min(n, start + 64)
            total[:] = 0.0
            for q in range(terms):
                for k in range(start, end):
                    _add_product(total, (k - start) * LANES, flat, q * m + block * LANES, right[q, k])
            for k in range(start, end):
                for lane in range(LANES):
                    out[block, k, lane] = total[(k - start) * LANES + lane]
