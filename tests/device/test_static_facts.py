"""What the compiler makes of each kernel: no spills, and no more registers and instructions than were counted once."""

import functools

import pytest

from device import binary, compile
from qdv_gpu import kernels

pytestmark = pytest.mark.skipif(
    not (compile.HAS_COMPILER and binary.HAS_TOOLS), reason="needs CuPy, nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm"
)

POOL = {"SH": 2, "SW": 2, "PH": 0, "PW": 0, "DH": 1, "DW": 1, "TYPE": 0, "CODE_BYTES": 1, "RECTIFY": 1}
VARIANTS = {
    "student": ("tsne", {"GAUSSIAN": 0, "DENSE": 0}),
    "gaussian": ("tsne", {"GAUSSIAN": 1, "DENSE": 0}),
    "dense": ("tsne", {"GAUSSIAN": 0, "DENSE": 1}),
    "grid": ("tsne_fft", {}),
    "divergence": ("objective", {"GAUSSIAN": 0}),
    "gaussian divergence": ("objective", {"GAUSSIAN": 1}),
    "distances": ("distances", {}),
    "2x2/2": ("unpool", POOL | {"KH": 2, "KW": 2}),
    "3x3/2": ("unpool", POOL | {"KH": 3, "KW": 3}),
    "3x3/2 half": ("unpool", POOL | {"KH": 3, "KW": 3, "TYPE": 1}),
    "3x3/2 double": ("unpool", POOL | {"KH": 3, "KW": 3, "TYPE": 3}),
    "17x17/1": ("unpool", POOL | {"KH": 17, "KW": 17, "SH": 1, "SW": 1, "PH": 8, "PW": 8, "CODE_BYTES": 4}),
}
# At most, on sm_80, 90 and 100: registers; bytes of shared memory that the kernel declares; instructions of the longest
# inner loop, or of all where there is none, which do what the last column says.
BOUNDS = {
    ("repel", "student"): (48, 0, 176, "16 pairs"),
    ("repel", "gaussian"): (48, 0, 176, "16 pairs"),
    ("attract", "student"): (40, 0, 112, "4 neighbours"),
    ("attract", "gaussian"): (40, 0, 112, "4 neighbours"),
    ("attract", "dense"): (40, 0, 112, "4 neighbours"),
    ("update", "student"): (40, 2048, 80, "16 weights"),
    ("spread", "grid"): (40, 0, 160, "a point's column"),
    ("twist", "grid"): (32, 0, 80, "a node"),
    ("untwist", "grid"): (32, 0, 80, "a node"),
    ("gather", "grid"): (48, 0, 320, "a point's column"),
    ("settle", "grid"): (40, 2048, 80, "16 weights"),
    ("update", "grid"): (40, 0, 128, "a point"),
    ("similarities", "divergence"): (80, 0, 240, "8 pairs"),
    ("similarities", "gaussian divergence"): (96, 0, 600, "the same"),
    ("listed", "distances"): (40, 0, 96, "16 coordinates"),
    ("to_all", "distances"): (40, 0, 160, "4 coordinates of 4 pairs"),
    ("ranks", "distances"): (64, 16384, 160, "the same"),
    ("unpool", "2x2/2"): (64, 0, 130, "a window in 8 channels, with the channels beyond the last"),
    ("unpool", "3x3/2"): (80, 0, 130, "the same"),
    ("unpool", "3x3/2 half"): (80, 0, 240, "the same"),
    ("unpool", "3x3/2 double"): (104, 0, 160, "the same"),
    ("unpool", "17x17/1"): (80, 0, 130, "the same"),
    ("max_pool", "2x2/2"): (40, 0, 80, "a window"),
    ("max_pool", "3x3/2"): (40, 0, 140, "a window"),
}
RESERVED = 1024  # bytes of shared memory that the system takes of each block, from sm_80 on


@functools.cache
def code(variant, architecture):
    name, defines = VARIANTS[variant]
    options = kernels.options(fast_math=name in ("tsne", "tsne_fft"), **defines)
    source = (kernels.FOLDER / f"{name}.cu").read_text()
    return binary.disassemble(compile.cubin(source, options, f"sm_{architecture}"))


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(("kernel", "variant"), BOUNDS, ids=["-".join(key) for key in BOUNDS])
def test_a_kernel_keeps_to_its_bounds(kernel, variant, architecture):
    registers, shared, instructions, _ = BOUNDS[kernel, variant]
    found = code(variant, architecture)[kernel]
    assert found.spills == 0
    assert found.stack == 0
    assert found.registers <= registers
    assert found.shared in (shared, shared + RESERVED)
    assert len(found.inner_loop.instructions if found.loops else found.instructions) <= instructions


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("variant", ["2x2/2", "3x3/2", "17x17/1"])
def test_unpooling_asks_for_several_channels_before_it_adds_one(variant, architecture):
    loops = code(variant, architecture)["unpool"].loops
    full = min((loop for loop in loops if loop.count("LDG") == 16), key=lambda loop: len(loop.instructions))
    assert full.count("FADD") == 8
    assert len(full.instructions) <= 90
    first = next(at for at, text in enumerate(full.instructions) if text.startswith("FADD"))
    assert sum(text.startswith("LDG") for text in full.instructions[:first]) >= 6


def test_repulsion_costs_what_its_header_says():
    loop = code("student", 90)["repel"].inner_loop
    pairs = loop.count("MUFU.RCP")
    assert pairs == 16
    assert loop.count("FFMA", "FADD", "FMUL", "MUFU") == 9 * pairs
    assert len(loop.instructions) <= 10 * pairs


def test_spills_and_stacks_are_seen():
    source = (
        'extern "C" __global__ void k(int* a) { int s[64]; for (int i = 0; i < 64; i++) s[i] = a[i];'
        "for (int i = 0; i < a[64]; i++) s[a[i]] += s[a[i + 1]]; a[0] = s[a[65]]; }"
    )
    found = binary.disassemble(compile.cubin(source, ()))["k"]
    assert found.stack >= 256
    assert found.spills > 0
    assert found.loops
