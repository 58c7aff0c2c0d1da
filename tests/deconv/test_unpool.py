"""Unpooling is the adjoint of max-pooling, a true torch operator, and the same bits from CUDA source and numba."""

import itertools

import numpy as np
import pytest
import torch
from device import compile, launches
from device.launches import devices, needs_nvrtc
from torch import library
from torch.nn import functional

from qdv_gpu.deconv.unpool import THREADS, Pool, max_pool, max_pool_launch, unpool, unpool_launch, unpool_windows
from qdv_gpu.errors import InputError

GEOMETRIES = [
    # kernel, stride, padding, dilation, ceil_mode
    (2, 2, 0, 1, False),
    (3, 2, 0, 1, False),
    (3, 2, 1, 1, True),
    (3, 1, 1, 1, False),
    ((3, 2), (1, 2), (1, 0), 1, True),
    (3, 2, 1, 2, False),
    (2, 3, 0, 1, True),
    ((1, 5), (1, 2), (0, 2), (1, 2), True),
    (17, 1, 8, 1, False),  # 289 pixels: too many for a byte
]
MAPS = {
    "random": lambda: torch.randn(2, 3, 13, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    "constant": lambda: torch.ones(1, 2, 12, 9, dtype=torch.float64),
    "after a ReLU": lambda: MAPS["random"]().relu(),
    "-inf": lambda: torch.where(MAPS["random"]() > 0.5, MAPS["random"](), -torch.inf),
}
geometries = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@geometries
@pytest.mark.parametrize("name", MAPS)
def test_pooling_is_torchs_and_unpooling_its_adjoint(geometry, name):
    x = MAPS[name]()
    *pairs, ceil_mode = geometry
    pooled, switches = max_pool(x, *pairs, ceil_mode=ceil_mode)
    truth, indices = functional.max_pool2d(x, *pairs, ceil_mode=ceil_mode, return_indices=True)
    assert torch.equal(pooled, truth)
    y = normal(*pooled.shape, seed=1)
    back = unpool(y, switches, x.shape[2:], *pairs)
    scattered = torch.zeros_like(x).flatten(2).scatter_add_(2, indices.flatten(2), y.flatten(2)).view_as(x)
    assert (back - scattered).abs().max() <= 1e-12
    finite = torch.where(x.isinf(), 0, x)  # <x, y> has no value where 0 meets infinity
    at_switches = torch.where(pooled.isinf(), 0, pooled)
    assert (at_switches * y).sum().item() == pytest.approx((finite * back).sum().item(), rel=1e-12, abs=1e-12)


def test_the_overlap_adds():
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, 2, 2] = 1.0  # in all four windows
    _, switches = max_pool(x, 3, 2)
    y = torch.tensor([[[[1.0, 2.0], [4.0, 8.0]]]])
    assert unpool(y, switches, (5, 5), 3, 2)[0, 0, 2, 2] == 15.0
    assert unpool(-y, switches, (5, 5), 3, 2, rectify=True).abs().max() == 0.0


def test_switches_take_a_byte_and_the_first_of_equals():
    _, switches = max_pool(torch.ones(1, 1, 6, 6), 3, 2)
    assert switches.dtype == torch.uint8
    assert switches.abs().max() == 0
    assert max_pool(torch.ones(1, 1, 20, 20), 17)[1].dtype == torch.int32


def test_a_window_without_a_pixel():
    x = torch.randn(1, 1, 3, 3)
    pooled, switches = max_pool(x, 2, 1, 1, 4)
    assert pooled.item() == -torch.inf
    assert unpool(torch.ones_like(pooled), switches, (3, 3), 2, 1, 1, 4).abs().max() == 0


def test_a_map_smaller_than_the_window_with_ceil_mode():
    x = torch.randn(1, 1, 2, 2)
    assert torch.equal(max_pool(x, 3, 2, ceil_mode=True)[0], functional.max_pool2d(x, 3, 2, ceil_mode=True))


@pytest.mark.parametrize("where", [(0, 0), (12, 16), (5, 5)])
def test_nan_is_refused(where):
    x = MAPS["random"]()
    x[1, 2, *where] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        max_pool(x, 3, 2, 0, ceil_mode=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: max_pool(x, 0), "positive kernel_size"),
        (lambda x: max_pool(x, 3, 2, 2), "at most half"),
        (lambda x: max_pool(x, 14), "does not fit"),
        (lambda x: max_pool(x[0], 2), "B, C, H, W"),
        (lambda x: max_pool(x.int(), 2), "float32"),
        (lambda x: max_pool(x, (1, 2, 3)), "one or two integers"),
        (lambda x: unpool(x[:, :2], max_pool(x, 2)[1], (13, 17), 2), "switches must be"),
        (lambda x: unpool(max_pool(x, 2)[0], max_pool(x, 2)[1].int(), (13, 17), 2), "switches must be"),
        (lambda x: unpool(max_pool(x, 2)[0], max_pool(x, 2)[1], (20, 17), 2), "is not pooled to"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(MAPS["random"]())


@pytest.mark.parametrize("geometry", [GEOMETRIES[2], GEOMETRIES[4], GEOMETRIES[8]], ids=str)
def test_operators_pass_opcheck(geometry):
    *pairs, ceil_mode = geometry
    pool = Pool.of(*pairs)
    lists = [list(pair) for pair in (pool.kernel, pool.stride, pool.padding, pool.dilation)]
    x = MAPS["random"]().requires_grad_()
    library.opcheck(torch.ops.qdv_gpu.max_pool.default, (x, *lists, ceil_mode))
    pooled, switches = max_pool(x.detach(), *pairs, ceil_mode=ceil_mode)
    for rectify, shared in itertools.product((False, True), repeat=2):
        y = normal(*pooled.shape).requires_grad_()
        given = switches[:1] if shared else switches
        library.opcheck(torch.ops.qdv_gpu.unpool.default, (y, given, [13, 17], *lists, rectify))


@pytest.mark.parametrize("geometry", GEOMETRIES[:-1], ids=str)
def test_gradients_pass_gradcheck(geometry):
    *pairs, ceil_mode = geometry
    x = normal(2, 2, 7, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: max_pool(x, *pairs, ceil_mode=ceil_mode)[0], (x,))
    pooled, switches = max_pool(x.detach(), *pairs, ceil_mode=ceil_mode)
    for rectify in (False, True):
        y = normal(3, *pooled.shape[1:], seed=2).requires_grad_()
        assert torch.autograd.gradcheck(lambda y, r=rectify: unpool(y, switches[:1], (7, 9), *pairs, rectify=r), (y,))


def test_operators_compile():
    x = MAPS["random"]()

    def both(x):
        pooled, switches = max_pool(x * 2, 3, 2)
        return unpool(pooled + 1, switches, x.shape[2:], 3, 2).sin()

    assert torch.equal(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x))


@pytest.mark.parametrize("dims", [(0, None), (2, None), (0, 0), (None, 0)])
@pytest.mark.parametrize("shared", [True, False])
def test_operators_vmap(dims, shared):
    x = normal(4, 2, 3, 9, 9)  # [V, B, C, H, W]
    pooled, switches = torch.vmap(lambda x: max_pool(x, 3, 2))(x)
    one_by_one = [max_pool(each, 3, 2) for each in x]
    assert torch.equal(pooled, torch.stack([p for p, _ in one_by_one]))
    assert torch.equal(switches, torch.stack([s for _, s in one_by_one]))
    switches = switches[:, :1] if shared else switches
    signals = pooled if dims[0] is not None else pooled[0]
    given = switches if dims[1] is not None else switches[0]
    moved = signals.movedim(0, dims[0]) if dims[0] else signals
    result = torch.vmap(lambda y, s: unpool(y, s, (9, 9), 3, 2), in_dims=dims)(moved, given)
    for v, found in enumerate(result):
        y, s = pooled[v] if dims[0] is not None else pooled[0], switches[v] if dims[1] is not None else switches[0]
        assert torch.equal(found, unpool(y, s, (9, 9), 3, 2))


def run(kernel, defines, arguments, grid, *, device, arch="compute_90"):
    """Run a kernel of unpool.cu with CPU tensors."""
    there = [
        arg.to("cuda" if device == "cuda" else "cpu") if isinstance(arg, torch.Tensor) else arg for arg in arguments
    ]
    launches.run(device, "unpool", kernel, *there, grid=grid, block=THREADS, seed=1, arch=arch, **defines)
    for arg, found in zip(arguments, there, strict=True):
        if isinstance(arg, torch.Tensor):
            arg.copy_(found)


def kernel_pool(x, pool, size, device, **more):
    """max_pool by the CUDA source."""
    shape = (*x.shape[:2], *size)
    pooled, switches = torch.empty(shape, dtype=x.dtype), torch.empty(shape, dtype=pool.code_dtype)
    arguments, grid = max_pool_launch(x, pooled, switches)
    run("max_pool", pool.defines(x), arguments, grid, device=device, **more)
    return pooled, switches


@needs_nvrtc
@pytest.mark.parametrize("architecture", compile.ARCHITECTURES)
def test_every_architecture_computes_the_same(architecture):
    pool, arch = Pool.of(3, 2), f"compute_{architecture}"
    x = normal(1, 3, 9, 9, dtype=torch.float32)
    pooled, switches = max_pool(x, 3, 2)
    assert torch.equal(kernel_pool(x, pool, (4, 4), "ptx", arch=arch)[1], switches)
    result = torch.full_like(x, torch.nan)
    arguments, grid = unpool_launch(pooled, switches, torch.zeros(1, 5, dtype=torch.int32), result, (9, 9))
    run("unpool", pool.defines(x), arguments, grid, device="ptx", arch=arch)
    assert torch.equal(result, unpool(pooled, switches, (9, 9), 3, 2))


@devices
@pytest.mark.parametrize(
    ("geometry", "dtype"),
    [
        *((geometry, torch.float32) for geometry in GEOMETRIES),
        *itertools.product(GEOMETRIES[2:6], [torch.float16, torch.bfloat16, torch.float64]),
    ],
    ids=str,
)
def test_kernels_give_the_bits_of_the_cpu(geometry, dtype, device):
    *pairs, ceil_mode = geometry
    pool = Pool.of(*pairs)
    channels = 18 if max(pool.kernel) < 17 else 2  # a pixel has 221 windows to go through
    x = normal(2, channels, 13, 17, dtype=dtype)
    pooled, switches = max_pool(x, *pairs, ceil_mode=ceil_mode)
    found = kernel_pool(x, pool, pooled.shape[2:], device)
    assert torch.equal(found[0], pooled)
    assert torch.equal(found[1], switches)
    y = normal(5, *pooled.shape[1:], seed=3, dtype=dtype)
    # Whole maps; and windows, some over the edges, of either image.
    whole = torch.zeros(5, 5, dtype=torch.int32)
    window = torch.tensor([[0, -1, 0, -2, 3], [1, 1, -2, 4, -5], [1, 0, -1, 9, 9], [0, 0, 1, 0, 0], [1, 2, 2, -20, 0]])
    for (origin, out), rectify in itertools.product([(whole, (13, 17)), (window.int(), (7, 10))], (False, True)):
        truth = unpool_windows(y, switches, origin, out, (13, 17), pool, rectify=rectify)
        result = torch.full_like(truth, torch.nan)
        arguments, grid = unpool_launch(y, switches, origin, result, (13, 17))
        run("unpool", pool.defines(y) | {"RECTIFY": int(rectify)}, arguments, grid, device=device)
        assert torch.equal(result, truth)


@devices
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_converts_exactly(dtype, device):
    every = torch.from_numpy(np.arange(-(2**15), 2**15, dtype=np.int16)).view(dtype)
    every = every[~every.isnan()].view(1, 1, 1, -1)
    pooled, _ = kernel_pool(every, Pool.of(1), every.shape[2:], device)
    assert torch.equal(pooled.view(torch.int16), every.view(torch.int16))
    # Sums of two, as windows that overlap make them: rounding, overflow and subnormal numbers.
    order = torch.randperm(every.numel(), generator=torch.Generator().manual_seed(0))
    pairs = torch.stack((every.flatten(), every.flatten()[order]), dim=1)
    pairs = pairs[~(pairs.float().sum(dim=1)).isnan()]
    y = pairs.view(1, -1, 1, 2)
    x = torch.zeros(1, y.shape[1], 1, 3)
    x[..., 1] = 1.0
    pool = Pool.of((1, 2), 1)
    switches = max_pool(x, (1, 2), 1)[1]
    result = torch.empty(1, y.shape[1], 1, 3, dtype=dtype)
    arguments, grid = unpool_launch(y, switches, torch.zeros(1, 5, dtype=torch.int32), result, (1, 3))
    run("unpool", pool.defines(y), arguments, grid, device=device)
    truth = pairs.float().sum(dim=1).to(dtype)
    assert torch.equal(result[0, :, 0, 1], truth)


@geometries
def test_operators_give_the_same_bits_on_a_gpu(geometry, cuda):
    *pairs, ceil_mode = geometry
    x = normal(2, 70, 13, 17, dtype=torch.float32)
    x[0] *= 1e-38  # subnormal numbers, which approximate arithmetic takes for 0
    pooled, switches = max_pool(x, *pairs, ceil_mode=ceil_mode)
    on_gpu = max_pool(x.to(cuda, memory_format=torch.channels_last), *pairs, ceil_mode=ceil_mode)
    assert torch.equal(on_gpu[0].cpu(), pooled)
    assert torch.equal(on_gpu[1].cpu(), switches)
    truth = unpool(pooled, switches, (13, 17), *pairs)
    for _ in range(20 if torch.cuda.get_device_name() != "simulated GPU" else 1):
        signal, codes = (t.contiguous(memory_format=torch.channels_last) for t in on_gpu)
        assert torch.equal(unpool(signal, codes, (13, 17), *pairs).cpu(), truth)
