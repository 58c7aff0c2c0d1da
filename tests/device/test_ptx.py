"""The interpreter of PTX computes what numpy does, and reports each fault that it is there to find."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from device import compile, ptx

pytestmark = pytest.mark.skipif(not compile.HAS_COMPILER, reason="needs CuPy")
OPTIONS = ("-std=c++17",)
RANDOM = np.random.default_rng(0)


def run(body, *arrays, grid=(1,), block=64, options=OPTIONS, parameters=None, before=""):
    """Run a kernel whose parameters a, b, c, ... are pointers to the arrays' elements; `t` numbers the threads."""
    types = {"i4": "int", "u4": "unsigned", "i8": "long long", "u8": "unsigned long long", "f2": "unsigned short",
             "f4": "float", "f8": "double", "u1": "unsigned char", "i2": "short", "u2": "unsigned short"}  # fmt: skip
    given = ", ".join(f"{types[x.dtype.str[1:]]}* {name}" for x, name in zip(arrays, "abcdef", strict=False))
    source = (
        f'{before}\nextern "C" __global__ void k({parameters or given}) {{\n'
        f"const int t = blockIdx.x * blockDim.x + threadIdx.x;\n{body}\n}}\n"
    )
    tensors = [torch.from_numpy(x) for x in arrays]
    ptx.launch(source, options, "k", *tensors, grid=grid, block=block)


def integers(dtype, n=256):
    """Random numbers of all magnitudes, with the least and the largest."""
    limits = np.iinfo(dtype)
    x = RANDOM.integers(limits.min, limits.max, n, dtype=dtype, endpoint=True) >> RANDOM.integers(
        0, limits.bits, n, dtype=dtype
    )
    x[:4] = limits.min, limits.max, 0, 1
    return x


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.uint64])
def test_integer_arithmetic(dtype):
    x, y = integers(dtype), integers(dtype)
    y[y == 0] = 7
    y[:2] = 3, 5  # the least number over -1 overflows
    out = [np.empty_like(x) for _ in range(4)]
    run("c[t] = a[t] / b[t]; d[t] = a[t] % b[t]; e[t] = a[t] * b[t] - (a[t] ^ ~b[t]);"
        "f[t] = min(a[t], max(b[t], a[t] - b[t]));",
        x, y, *out, grid=(4,))  # fmt: skip
    exact = [(int(p), int(q)) for p, q in zip(x, y, strict=True)]
    quotients = [abs(p) // abs(q) * (1 if (p < 0) == (q < 0) else -1) for p, q in exact]
    assert out[0].tolist() == quotients
    assert out[1].tolist() == [p - q * d for (p, q), d in zip(exact, quotients, strict=True)]
    with np.errstate(over="ignore"):
        assert np.array_equal(out[2], x * y - (x ^ ~y))
        assert np.array_equal(out[3], np.minimum(x, np.maximum(y, x - y)))


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.uint64])
def test_high_and_wide_products(dtype):
    x, y = integers(dtype), integers(dtype)
    high = np.empty_like(x)
    bits = 8 * x.itemsize
    function = {4: "mulhi", 8: "mul64hi"}[x.itemsize]
    prefix = "__u" if x.dtype.kind == "u" else "__"
    run(f"c[t] = {prefix}{function}(a[t], b[t]);", x, y, high, grid=(4,))
    assert high.tolist() == [int(p) * int(q) >> bits for p, q in zip(x, y, strict=True)]
    if bits == 32:
        wide = np.empty(256, f"{x.dtype.kind}8")
        run(f"c[t] = ({'unsigned ' if x.dtype.kind == 'u' else ''}long long)a[t] * b[t];", x, y, wide, grid=(4,))
        assert wide.tolist() == [int(p) * int(q) for p, q in zip(x, y, strict=True)]


def test_shifts_clamp_and_fields_are_inserted():
    x, by, out = integers(np.int32), RANDOM.integers(0, 40, 256, dtype=np.int32), np.empty((3, 256), np.int32)
    shifts = (
        'asm("shl.b32 %0, %1, %2;" : "=r"(c[t]) : "r"(a[t]), "r"(b[t]));'
        'asm("shr.s32 %0, %1, %2;" : "=r"(c[t + 256]) : "r"(a[t]), "r"(b[t]));'
        'asm("shr.u32 %0, %1, %2;" : "=r"(c[t + 512]) : "r"(a[t]), "r"(b[t]));'
    )
    run(shifts, x, by, out, grid=(4,))
    given = [(int(p), int(s)) for p, s in zip(x, by, strict=True)]
    assert (out[0].view(np.uint32)).tolist() == [(p << s) % 2**32 for p, s in given]
    assert out[1].tolist() == [p >> s for p, s in given]
    assert (out[2].view(np.uint32)).tolist() == [p % 2**32 >> s for p, s in given]
    run('asm("bfi.b32 %0, %1, %2, 5, 7;" : "=r"(c[t]) : "r"(a[t]), "r"(b[t]));', x, by, out, grid=(4,))
    mask = 127 << 5
    assert (out[0].view(np.uint32)).tolist() == [(p << 5 & mask) | (s & ~mask) for p, s in given]


def test_rectified_extremes():
    out = run_written("sub.s32 %r3, %r1, 9;\nmax.relu.s32 %r2, %r3, -4;")
    assert np.array_equal(out, np.maximum(np.arange(32) - 9, 0))


def test_predicates_select_and_compare_nan():
    x = np.array([0.0, -0.0, 1.0, -1.0, np.nan, np.inf, -np.inf, 1e-40], np.float32).repeat(8)
    y, out = np.tile(x[::8], 8), np.empty((6, 64), np.int32)
    run("c[t] = a[t] < b[t]; c[t + 64] = !(a[t] < b[t]); c[t + 128] = a[t] == b[t]; c[t + 192] = a[t] != b[t];"
        "c[t + 256] = a[t] < b[t] ? 3 : 5; c[t + 320] = (a[t] > 0) != (b[t] >= 0) ? t : -t;", x, y, out)  # fmt: skip
    i = np.arange(64)
    expected = [x < y, ~(x < y), x == y, x != y, np.where(x < y, 3, 5), np.where((x > 0) != (y >= 0), i, -i)]
    assert np.array_equal(out, np.array(expected))


def test_real_arithmetic_rounds_once():
    x, y, z = (RANDOM.standard_normal((3, 256)) * 2.0 ** RANDOM.integers(-30, 30, (3, 256))).astype(np.float32)
    z[:64] = -(x[:64] * y[:64])  # what is left of the product is smaller than its last digit
    out = np.empty((5, 256), np.float32)
    run("d[t] = fmaf(a[t], b[t], c[t]); d[t + 256] = __fmaf_rd(a[t], b[t], c[t]); d[t + 512] = a[t] / b[t];"
        "d[t + 768] = __fadd_rn(__fmul_rn(a[t], b[t]), c[t]); d[t + 1024] = fmaxf(a[t], b[t]);",
        x, y, z, out, grid=(4,))  # fmt: skip
    for i in range(256):
        truth = Fraction(float(x[i])) * Fraction(float(y[i])) + Fraction(float(z[i]))
        near = [Fraction(float(np.nextafter(out[0, i], np.float32(to)))) for to in (-np.inf, np.inf)]
        gap = abs(Fraction(float(out[0, i])) - truth)
        assert all(gap <= abs(other - truth) for other in near)
        down = Fraction(float(out[1, i]))
        assert down <= truth < Fraction(float(np.nextafter(out[1, i], np.float32(np.inf))))
    assert np.array_equal(out[2], x / y)
    assert np.array_equal(out[3], x * y + z)
    assert np.array_equal(out[4], np.maximum(x, y))


def test_fast_math_flushes_and_approximates():
    x = np.array([1e-40, 2.0**-126, -3e-39, 0.5, 3.0, 1e30, 87.0, -80.0], np.float32).repeat(8)
    out = np.empty((3, 64), np.float32)
    run("b[t] = a[t] + 0.0f; b[t + 64] = 1.0f / a[t]; b[t + 128] = expf(a[t]);", x, out,
        options=(*OPTIONS, "-use_fast_math"))  # fmt: skip
    flushed = np.copysign(np.where(abs(x) < 2.0**-126, 0, x), x).astype(np.float32)
    assert np.array_equal(out[0], flushed)
    with np.errstate(all="ignore"):
        assert np.array_equal(out[1], (1 / flushed.astype(np.float64)).astype(np.float32))
        np.testing.assert_allclose(out[2], np.exp(flushed), rtol=2e-5)


def test_conversions():
    x = np.array([0, 1.5, -1.5, 2.5, 3e9, -3e9, np.nan, np.inf, -np.inf, 2.0**31, -(2.0**31)] + [0.49] * 53)
    out = np.empty((2, 64), np.int32)
    run("b[t] = (int)a[t]; b[t + 64] = __double2int_rn(a[t]);", x, out)
    for row, whole in zip(out, (np.trunc, np.rint), strict=True):
        assert row.tolist() == [0 if np.isnan(v) else int(min(max(whole(v), -(2**31)), 2**31 - 1)) for v in x]
    small, wide = integers(np.int16, 64), np.empty((3, 64), np.int64)
    run("b[t] = a[t]; b[t + 64] = (unsigned short)a[t]; b[t + 128] = (signed char)a[t];", small, wide)
    assert np.array_equal(wide, [small, small.view(np.uint16), small.astype(np.int8)])
    big, real = integers(np.int64, 64), np.empty((2, 64), np.float32)
    run("b[t] = a[t]; b[t + 64] = (unsigned long long)a[t];", big, real)
    assert np.array_equal(real, [big.astype(np.float32), big.view(np.uint64).astype(np.float32)])


def test_half_conversions():
    every = np.arange(2**16, dtype=np.uint16)
    single, back = np.empty(2**16, np.float32), np.empty(2**16, np.uint16)
    run("b[t] = __half2float(__ushort_as_half(a[t])); c[t] = __half_as_ushort(__float2half(b[t] * 1.0009765f));",
        every, single, back, grid=(1024,), before="#include <cuda_fp16.h>")  # fmt: skip
    truth = every.view(np.float16).astype(np.float32)
    assert np.array_equal(single, truth, equal_nan=True)
    with np.errstate(all="ignore"):
        expected = (truth * np.float32(1.0009765)).astype(np.float16)
    assert np.array_equal(back.view(np.float16), expected, equal_nan=True)


def test_loops_end_when_each_thread_says():
    n, out = RANDOM.integers(0, 50, 256, dtype=np.int32), np.empty(256, np.int64)
    run("long long x = 1; for (int i = 0; i < a[t]; i++) { if (x % 2) x = 3 * x + i; else x /= 2; }\n"
        "if (t % 5 == 0) return; b[t] = x;", n, out, grid=(4,))  # fmt: skip
    for t in range(256):
        x = 1
        for i in range(n[t]):
            x = 3 * x + i if x % 2 else x // 2
        assert t % 5 == 0 or out[t] == x


def test_shared_memory_and_barriers_sum():
    x, out = RANDOM.integers(0, 100, 640, dtype=np.int32), np.empty(5, np.int32)
    run("__shared__ int s[128]; s[threadIdx.x] = a[t]; for (int half = 64; half; half /= 2) { __syncthreads();\n"
        "if (threadIdx.x < half) s[threadIdx.x] += s[threadIdx.x + half]; }\n"
        "if (threadIdx.x == 0) b[blockIdx.x] = s[0];", x, out, grid=(5,), block=128)  # fmt: skip
    assert np.array_equal(out, x.reshape(5, 128).sum(axis=1))


def test_integers_are_added_in_any_order():
    x, sums = integers(np.uint64), np.arange(5, dtype=np.uint64)
    run("atomicAdd(b + t % 5, a[t]);", x, sums, grid=(4,))
    with np.errstate(over="ignore"):
        assert sums.tolist() == [int(np.uint64(k) + x[k::5].sum()) for k in range(5)]


def test_shuffles():
    x, out = integers(np.int32, 64), np.empty((6, 64), np.int32)
    run("b[t] = __shfl_xor_sync(~0u, a[t], 5); b[t + 64] = __shfl_up_sync(~0u, a[t], 3);"
        "b[t + 128] = __shfl_down_sync(~0u, a[t], 3, 8); b[t + 192] = __shfl_sync(~0u, a[t], t * 7);"
        "b[t + 256] = __shfl_sync(~0u, a[t], 2, 16);"
        "if (t % 32 < 8) b[t + 320] = __shfl_xor_sync(255u, a[t], 1); else b[t + 320] = 0;", x, out)  # fmt: skip
    t = np.arange(64)
    warp, lane = t // 32 * 32, t % 32
    sources = [
        t ^ 5,
        np.where(lane >= 3, t - 3, t),
        np.where(lane % 8 < 5, t + 3, t),
        warp + t * 7 % 32,
        t // 16 * 16 + 2,
    ]
    for row, source in zip(out, sources, strict=False):
        assert np.array_equal(row, x[source])
    assert np.array_equal(out[5], np.where(lane < 8, x[t ^ 1], 0))


WRITTEN = """.visible .entry k(.param .u64 k_param_0) {
.reg .pred %p<2>; .reg .b32 %r<4>; .reg .b64 %rd<4>;
ld.param.u64 %rd1, [k_param_0];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd2, %r1, 4;
add.s64 %rd3, %rd1, %rd2;
setp.lt.u32 %p1, %r1, 9;
BODY
st.global.u32 [%rd3], %r2;
ret;
}
"""


def run_written(body):
    """Run lines of PTX that set %r2, for 32 threads numbered in %r1, of which those below 9 have %p1."""
    out, memory = np.zeros(32, np.int32), ptx.Memory()
    memory.add(out.ctypes.data, out.nbytes)
    text = WRITTEN.replace("BODY", body).replace("; .reg", ";\n.reg")
    ptx.kernels_of(text)["k"].run(memory, [np.uint64(out.ctypes.data).tobytes()], (1,), 32)
    return out


def test_lanes_that_come_late_to_a_shuffle_are_waited_for():
    """Some come back to it from further down in the code."""
    out = run_written(
        "@!%p1 bra LATE;\nMEET:\nshfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;\nbra.uni END;\nLATE:\nbra.uni MEET;\nEND:"
    )
    assert np.array_equal(out, np.arange(32) ^ 1)


def test_registers_have_no_value_before_they_are_written():
    assert np.array_equal(run_written("mov.u32 %r2, 1;\n@%p1 mov.u32 %r2, 2;"), np.where(np.arange(32) < 9, 2, 1))
    with pytest.raises(ptx.Fault, match=r"st\.global\.u32 .*%r2, which was not written"):
        run_written("@%p1 mov.u32 %r2, 2;")
    with pytest.raises(ptx.Fault, match=r"%r3, which was not written"):
        run_written("mov.u32 %r2, %r3;")


def test_words_are_packed_and_unpacked():
    packed = ".reg .b16 %rs<3>;\nmov.b32 {%rs1, %rs2}, %r1;\nadd.s16 %rs1, %rs1, -1;\nmov.b32 %r2, {%rs2, %rs1};"
    assert np.array_equal(run_written(packed), (np.arange(32) - 1) << 16)


def test_local_memory():
    x, out = RANDOM.integers(0, 16, 64, dtype=np.int32), np.empty(64, np.int32)
    run("int s[16]; for (int i = 0; i < 16; i++) s[i] = i * t; s[a[t]] += 7; b[t] = s[a[(t + 1) % 64]];", x, out)
    t = np.arange(64)
    assert np.array_equal(out, np.roll(x, -1) * t + 7 * (np.roll(x, -1) == x))


def test_grids_of_three_dimensions():
    out = np.full((2, 3, 5 * 32), -1, np.int32)
    run("a[(blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x * 32 + t] = blockIdx.z * 10000 + blockIdx.y * 1000 + t;",
        out, grid=(5, 3, 2), block=32)  # fmt: skip
    z, y, t = np.indices(out.shape)
    assert np.array_equal(out, z * 10000 + y * 1000 + t)


FAULTS = {
    "below an allocation": ("b[t] = a[t - 1];", "outside of every allocation"),
    "beyond an allocation": ("if (t == 63) a[t + 1] = t;", "outside of every allocation"),
    "misaligned": ("b[t] = *(int*)((char*)a + 2);", "misaligned"),
    "misaligned vector": ("*(int2*)(b + 1) = make_int2(1, 1);", "misaligned"),
    "uninitialised shared memory": (
        "__shared__ int s[64]; if (t < 63) s[t] = t; __syncthreads(); b[t] = s[63 - t];", "uninitialised"),
    "beyond shared memory": ("__shared__ int s[64]; s[t + a[t] + 1] = t; __syncthreads(); b[t] = s[t];", "of 256"),
    "uninitialised local memory": ("volatile int s[16]; s[a[t]] = 1; b[t] = s[a[t] + 1];", "uninitialised"),
    "a lane has ended": ("if (t == 3) return; b[t] = __shfl_xor_sync(~0u, a[t], 1);", "lanes of a warp never come"),
    "a lane of the mask is elsewhere": (
        "if (t % 32 < 7) b[t] = __shfl_xor_sync(255u, a[t], 1);", "lanes of a warp never come"),
    "a lane outside of its mask": ("b[t] = __shfl_xor_sync(0x7fffffffu, a[t], 1);", "mask"),
    "a barrier for half of the block": ("if (t < 32) __syncthreads(); else { b[t] = 1; __syncthreads(); }\nb[t] += 1;",
        "never come"),
    "shared memory read without a barrier": (
        "__shared__ int s[64]; s[t] = t; if (t == 99) __syncthreads(); b[t] = s[63 - t];", "race"),
    "shared memory written without a barrier": (
        "__shared__ int s[64]; s[t] = t; __syncthreads(); int x = s[63 - t]; s[t] = 1; b[t] = x;", "race"),
    "shared memory written by two": ("__shared__ int s[2]; s[t % 2] = t; __syncthreads(); b[t] = s[0];", "race"),
    "different values to one address": ("b[t / 2] = t;", "race"),
    "written by one thread and read by another": ("a[t] = t; b[t] = a[t ^ 1];", "race"),
    "read by one thread and written by another": ("b[t] = a[t ^ 1]; a[t] = t;", "race"),
    "by threads of different blocks": ("if (blockIdx.x == 0) a[threadIdx.x] = 1; else b[threadIdx.x] = a[threadIdx.x];",
        "race"),
    "an addition to what another thread reads": ("b[t] = a[t ^ 1]; atomicAdd(a + t, 1);", "race"),
    "an addition to what another thread wrote": ("a[t ^ 1] = 1; atomicAdd(a + t, 1);", "race"),
    "a read of what others add to": ("atomicAdd(a + t / 2, 1); b[t] = a[t / 2];", "race"),
    "what was there before an addition": ("b[t] = atomicAdd(a, 1);", "not written"),
    "division by zero": ("b[t] = t / a[t];", "division by zero"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name):
    body, message = FAULTS[name]
    grid = (2,) if "blocks" in name else (1,)
    with pytest.raises(ptx.Fault, match=message) as raised:
        run(body, np.zeros(64, np.int32), np.zeros(64, np.int32), grid=grid)
    assert re.match(r"k: \S+", str(raised.value))  # the kernel and the line


SOUND = {
    "the same value to one address": "b[0] = 7;",
    "a thread reads what it wrote": "a[t] = t; b[t] = a[t];",
    "a barrier orders shared memory": "__shared__ int s[64]; s[t] = t; __syncthreads(); b[t] = s[63 - t];"
    "__syncthreads(); s[t] = 1;",
    "a barrier without those that ended": "if (t >= 32) return; __syncthreads(); b[t] = 1;",
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_programs_run(name):
    run(SOUND[name], np.zeros(64, np.int32), np.zeros(64, np.int32))


def test_memory_that_was_never_written():
    source = 'extern "C" __global__ void k(int* a, int* b) { int t = threadIdx.x; a[t] = t; b[t] = a[t] + b[t]; }'
    kernel = ptx.kernels_of(compile.ptx(source, OPTIONS))["k"]
    a, b = np.zeros(32, np.int32), np.zeros(32, np.int32)
    written = [np.zeros(128, bool), np.ones(128, bool)]
    memory = ptx.Memory()
    for x, mark in zip((a, b), written, strict=True):
        memory.add(x.ctypes.data, x.nbytes, mark)
    raw = [np.uint64(x.ctypes.data).tobytes() for x in (a, b)]
    kernel.run(memory, raw, (1,), 32)
    assert written[0].all()
    assert np.array_equal(b, np.arange(32))
    written[1][17] = False
    with pytest.raises(ptx.Fault, match="uninitialised"):
        kernel.run(memory, raw, (1,), 32)
    memory.clear()
    with pytest.raises(ptx.Fault, match="outside"):
        kernel.run(memory, raw, (1,), 32)


def test_what_is_read_as_constant_is_never_written():
    same = np.zeros(64, np.int32)
    run("b[t] = a[t] + 1;", same, same)
    with pytest.raises(ptx.Fault, match="race"):
        run("b[t] = a[t] + 1;", same, same, parameters="const int* __restrict__ a, int* __restrict__ b")


def test_arguments_and_sizes_are_checked():
    source = 'extern "C" __global__ void __launch_bounds__(64) k(int* a, float x, char y) {}'
    kernel = ptx.kernels_of(compile.ptx(source, OPTIONS))["k"]
    assert [dtype for _, dtype in kernel.params] == [np.uint64, np.float32, np.uint8]
    assert kernel.max_threads == 64
    memory, good = ptx.Memory(), [bytes(8), bytes(4), bytes(1)]
    kernel.run(memory, good, (1,), 64)
    for arguments, grid, block in [
        (good[:2], (1,), 64),
        ([bytes(8)] * 3, (1,), 64),
        (good, (1,), 65),
        (good, (1, 65_536), 1),
        (good, (0,), 1),
    ]:
        with pytest.raises(ptx.Fault):
            kernel.run(memory, arguments, grid, block)


def test_unknown_instructions_are_named():
    with pytest.raises(NotImplementedError, match=r"atom|red"):
        run("atomicMax(a, 1);", np.zeros(1, np.int32))
    with pytest.raises(NotImplementedError, match=r"atom|red"):  # the sum depends on the order
        run("atomicAdd(a, 1.0f);", np.zeros(1, np.float32))
    with pytest.raises(NotImplementedError, match=r"add\.rz"):
        run("a[t] = __fadd_rz(a[t], 3.0f);", np.zeros(64, np.float32))


def test_errors_of_the_compiler_are_told():
    with pytest.raises(RuntimeError, match="undefined"):
        compile.ptx("int f() { return x; }", OPTIONS)
