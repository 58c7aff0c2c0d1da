"""What the arithmetic instructions of PTX compute, on arrays with one element for each thread.

`function(name, dtype, modifiers)` is looked up once for an instruction; what is not listed raises NotImplementedError.
Approximate instructions are computed in float64 and rounded: their few units in the last place are not modelled.
"""

import ctypes
import ctypes.util

import numpy as np

from .memory import Fault

FLOATS = (np.float16, np.float32, np.float64)
COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
ROUND = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
DOUBLE_WIDTH = {np.dtype(a): np.dtype(b) for a, b in [("i2", "i4"), ("u2", "u4"), ("i4", "i8"), ("u4", "u8")]}


def function(name, dtype, modifiers):
    """The function of the operands' arrays of `dtype` that an instruction computes."""
    real = dtype in FLOATS
    known, make = (REAL if real else INTEGER)[name]
    if left := set(modifiers) - known - ({"ftz"} if real else set()):
        raise KeyError(left)
    if "ftz" in modifiers and dtype == np.float32:
        plain = make(dtype, modifiers)
        return lambda *operands: flushed(plain(*(flushed(operand) for operand in operands)))
    return make(dtype, modifiers)


def flushed(values):
    """Subnormal float32 numbers are 0 of the same sign; other arrays are left alone."""
    if values.dtype != np.float32:
        return values
    magnitude = values.view(np.uint32) & np.uint32(0x7FFFFFFF)
    subnormal = magnitude - np.uint32(1) < 0x7FFFFF  # 0 wraps around
    return np.where(subnormal, np.copysign(np.float32(0), values), values) if subnormal.any() else values


def fma(a, b, c, *, down):
    """a * b + c of float32, rounded once: to nearest, or down.

    The product is exact in float64. Its sum with c is rounded to odd, so that a second rounding does no harm.
    """
    product, c = a.astype(np.float64) * b, np.asarray(c).astype(np.float64)
    total = product + c
    virtual = total - product
    error = (product - (total - virtual)) + (c - virtual)  # exactly what `total` lacks (Knuth's TwoSum)
    inexact = np.isfinite(total) & (error != 0)
    if down:
        result = total.astype(np.float32)
        above = (result > total) | ((result == total) & inexact & (error < 0))
        return np.where(above, np.nextafter(result, np.float32(-np.inf)), result)
    even = (np.atleast_1d(total).view(np.uint64) & np.uint64(1)) == 0
    toward = np.where(error > 0, np.inf, -np.inf)
    return np.where(inexact & even.reshape(total.shape), np.nextafter(total, toward), total).astype(np.float32)


def in_float64(operation):
    return lambda dtype, modifiers: lambda *operands: operation(*(x.astype(np.float64) for x in operands)).astype(dtype)


def exact(operation):
    return lambda dtype, modifiers: operation


_libm_fma = ctypes.CDLL(ctypes.util.find_library("m")).fma
_libm_fma.argtypes, _libm_fma.restype = [ctypes.c_double] * 3, ctypes.c_double


def make_fma(dtype, modifiers):
    if dtype == np.float64 and "rm" not in modifiers:
        return np.vectorize(_libm_fma, otypes=[np.float64])
    if dtype != np.float32:
        raise KeyError(dtype)
    return lambda a, b, c: fma(a, b, c, down="rm" in modifiers)


REAL = {
    "add": ({"rn"}, exact(np.add)),
    "sub": ({"rn"}, exact(np.subtract)),
    "mul": ({"rn"}, exact(np.multiply)),
    "div": ({"rn", "approx", "full"}, in_float64(np.divide)),
    "rcp": ({"rn", "approx"}, in_float64(np.reciprocal)),
    "ex2": ({"approx"}, in_float64(np.exp2)),
    "fma": ({"rn", "rm"}, make_fma),
    "neg": (set(), exact(np.negative)),
    "abs": (set(), exact(np.abs)),
    "min": (set(), exact(np.fmin)),
    "max": (set(), exact(np.fmax)),
}


def multiply(dtype, modifiers):
    """Low, high or all bits of a product of integers."""
    if "wide" in modifiers:
        return lambda a, b: a.astype(DOUBLE_WIDTH[dtype]) * b.astype(DOUBLE_WIDTH[dtype])
    if "lo" in modifiers:
        return np.multiply
    if dtype.itemsize < 8:
        bits = DOUBLE_WIDTH[dtype].type(8 * dtype.itemsize)
        return lambda a, b: (a.astype(DOUBLE_WIDTH[dtype]) * b.astype(DOUBLE_WIDTH[dtype]) >> bits).astype(dtype)
    return high_of_64


def high_of_64(a, b):
    """The upper 64 bits of the product of two integers of 64 bits, by halves of 32."""
    half, low = np.uint64(32), np.uint64(2**32 - 1)
    u, v = a.astype(np.uint64), b.astype(np.uint64)
    middle = (u >> half) * (v & low) + ((u & low) * (v & low) >> half)
    other = (u & low) * (v >> half) + (middle & low)
    high = (u >> half) * (v >> half) + (middle >> half) + (other >> half)
    if a.dtype == np.int64:  # a negative number reads as itself plus 2^64
        high = high - np.where(a < 0, v, np.uint64(0)) - np.where(b < 0, u, np.uint64(0))
    return high.astype(a.dtype)


def multiply_add(dtype, modifiers):
    product = multiply(dtype, modifiers)
    return lambda a, b, c: product(a, b) + c


def remainder(a, b):
    if not np.all(b):
        raise Fault("division by zero")
    return np.fmod(a, b)


def quotient(a, b):
    return (a - remainder(a, b)) // b  # toward zero


def shift_left(value, by):
    bits = 8 * value.itemsize
    return np.where(by < bits, value << np.minimum(by, bits - 1).astype(value.dtype), value.dtype.type(0))


def shift_right(value, by):
    bits = 8 * value.itemsize
    shifted = value >> np.minimum(by, bits - 1).astype(value.dtype)
    return shifted if value.dtype.kind == "i" else np.where(by < bits, shifted, value.dtype.type(0))


def extreme(choose):
    """min or max of integers; with relu at least 0."""

    def make(dtype, modifiers):
        return (lambda a, b: np.maximum(choose(a, b), dtype.type(0))) if "relu" in modifiers else choose

    return make


def insert_bits(dtype, modifiers):
    one = dtype.type(1)

    def insert(field, base, position, length):
        mask = shift_left(shift_left(one, length) - one, position)
        return (base & ~mask) | (shift_left(field, position) & mask)

    return insert


INTEGER = {
    "add": (set(), exact(np.add)),
    "sub": (set(), exact(np.subtract)),
    "mul": ({"lo", "hi", "wide"}, multiply),
    "mad": ({"lo", "hi", "wide"}, multiply_add),
    "div": (set(), exact(quotient)),
    "rem": (set(), exact(remainder)),
    "neg": (set(), exact(np.negative)),
    "abs": (set(), exact(np.abs)),
    "min": ({"relu"}, extreme(np.minimum)),
    "max": ({"relu"}, extreme(np.maximum)),
    "and": (set(), exact(np.bitwise_and)),
    "or": (set(), exact(np.bitwise_or)),
    "xor": (set(), exact(np.bitwise_xor)),
    "not": (set(), exact(np.invert)),
    "shl": (set(), exact(shift_left)),
    "shr": (set(), exact(shift_right)),
    "bfi": (set(), insert_bits),
}


def comparison(name, *, ftz):
    """setp's comparison; those that end in u are also true of NaN, and `nan` and `num` only look for it."""
    if name in ("nan", "num"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    compare = COMPARISONS[name[:2]]

    def compared(a, b):
        if ftz:
            a, b = flushed(a), flushed(b)
        result = compare(a, b)
        if a.dtype.kind == "f" and (name.endswith("u") or name == "ne"):
            unordered = np.isnan(a) | np.isnan(b)
            return result | unordered if name.endswith("u") else result & ~unordered
        return result

    return compared


def conversion(to, source, modifiers):
    """cvt from one type to another: integers wrap, numbers that become integers saturate and NaN becomes 0."""
    if left := set(modifiers) - {"rn", "ftz", "sat", *ROUND}:
        raise KeyError(left)
    ftz = "ftz" in modifiers

    def convert(values):
        if ftz:
            values = flushed(values)
        if "sat" in modifiers:
            values = np.where(np.isnan(values), 0, np.clip(values, 0, 1)).astype(source)
        if source in FLOATS and to not in FLOATS:
            return saturated(next(ROUND[m] for m in modifiers if m in ROUND)(values), to)
        result = values.astype(to)
        return flushed(result) if ftz else result

    if "sat" in modifiers and (source not in FLOATS or to not in FLOATS):
        raise KeyError("sat")
    if source in FLOATS and to in FLOATS and set(modifiers) & set(ROUND):
        raise KeyError("rounding to an integer")
    return convert


def saturated(values, to):
    """Whole float numbers as integers."""
    limits = np.iinfo(to)
    inside = (values >= float(limits.min)) & (values < float(limits.max) + (1 if to.itemsize < 8 else 0))
    result = np.where(inside, values, 0).astype(to)
    beyond = np.where(values > 0, to.type(limits.max), to.type(limits.min))
    return np.where(inside | np.isnan(values), result, beyond)
