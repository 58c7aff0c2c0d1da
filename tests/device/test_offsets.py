"""Offsets beyond 2^31 elements, as 50,000 points with every pair have them: pointers are moved back by as much."""

import numpy as np
import pytest
import torch
import tsne_reference as reference

from qdv_gpu import kernels
from qdv_gpu.deconv.unpool import MAX_GRID, THREADS, Pool, max_pool, max_pool_launch, unpool, unpool_launch
from qdv_gpu.kernels import mesh
from qdv_gpu.tsne.engines import fft_cuda
from qdv_gpu.tsne.engines.grid import grid_for

pytest.importorskip("cupy")
from device import compile, ptx

FAR = 2**31 + 2**33  # elements


def run(name, kernel, arguments, *, grid, block, blocks=None, fast_math=False, **defines):
    """Run a kernel with tensors, (tensor, elements that its pointer is moved back by), or numpy scalars.

    With `blocks` only the blocks of these numbers run.
    """
    memory, raw = ptx.Memory(), []
    for argument in arguments:
        tensor, moved = argument if isinstance(argument, tuple) else (argument, 0)
        if isinstance(tensor, np.generic):
            raw.append(tensor.tobytes())
            continue
        memory.add(tensor.data_ptr(), tensor.nbytes)
        raw.append(np.uint64((tensor.data_ptr() - moved * tensor.element_size()) % 2**64).tobytes())
    source = (kernels.FOLDER / f"{name}.cu").read_text()
    code = compile.ptx(source, kernels.options(fast_math=fast_math, **defines))
    ptx.kernels_of(code)[kernel].run(memory, raw, grid, block, blocks=blocks)


@pytest.mark.parametrize("dense", [0, 1])
def test_tsne(dense):
    """The last rows of P, and the last points of a batch."""
    N, z = 40, reference.cloud(40)
    columns = torch.arange(N, dtype=torch.int32).repeat(N)
    P = torch.rand(N * N, generator=torch.Generator().manual_seed(0))
    start, first_row = torch.tensor([FAR, FAR + N]), torch.tensor([0])
    indptr = FAR + N * torch.arange(N + 1)
    force, weight, pull = torch.empty(N, 2), torch.empty(N), torch.empty(N, 2)
    points = (z, 2 * FAR)  # of two coordinates
    outputs = [(force, 2 * FAR), (weight, FAR), (pull, 2 * FAR)]
    settings = {"block": 128, "fast_math": True, "GAUSSIAN": 0, "DENSE": dense}
    run("tsne", "repel", (points, start, outputs[0], outputs[1]), grid=(3, 1), **settings)
    rows = (first_row, indptr, (columns, FAR), (P, FAR))
    run("tsne", "attract", (points, start, *rows, outputs[2]), grid=(10, 1), **settings)
    difference = z[:, None] - z
    w = 1 / (1 + difference.square().sum(2)).fill_diagonal_(torch.inf)
    torch.testing.assert_close(force, (w.square()[..., None] * difference).sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pull, ((P.view(N, N) * w)[..., None] * difference).sum(1), rtol=1e-5, atol=1e-5)
    velocity, gains, before = torch.zeros(N, 2), torch.ones(N, 2), z.clone()
    scalars = np.array([1, 0.1, 0.5], dtype=np.float32)
    arrays = [(z, 2 * FAR), (velocity, 2 * FAR), (gains, 2 * FAR), outputs[2], outputs[0], outputs[1], start]
    run("tsne", "update", (*arrays, *scalars), grid=(1, 1), **settings | {"block": 256})
    slope = 4 * (pull - force / weight.sum())
    torch.testing.assert_close(z, before - 0.1 * 0.8 * slope, rtol=1e-5, atol=1e-5)


def test_tsne_on_a_grid():
    """The last points and nodes of a batch."""
    N, z = 40, reference.cloud(40)
    grid = grid_for(z.amin(0).numpy(), z.amax(0).numpy(), 0.001, gaussian=False)
    ny, nx, _, _ = grid
    kernel, packed = fft_cuda._kernel_of(grid, z.device, gaussian=False), np.zeros(1, fft_cuda.GRID)
    packed[0] = fft_cuda._packed(grid, kernel, N, FAR, 1)
    start, grids = torch.tensor([FAR, FAR + N]), torch.from_numpy(packed.view(np.uint8))
    state, inverse, table = torch.zeros(1, 4, dtype=torch.int32), torch.empty(1), torch.from_numpy(mesh.tables())
    charges, potential = torch.zeros(ny * nx, dtype=torch.int64), torch.empty(ny * nx)
    force, weight, twisted = torch.empty(N, 2), torch.empty(N), torch.empty(2, ny, nx, dtype=torch.complex64)
    points, moved = (z, 2 * FAR), [(force, 2 * FAR), (weight, FAR)]
    settings, sides = {"block": 256, "fast_math": True}, (np.int64(FAR), np.uint32(ny), np.uint32(nx))
    nodes = (-(-ny * nx // 256),)
    run("tsne_fft", "spread", (points, start, grids, state, table, (charges, FAR)), grid=(2, 1), **settings)
    run("tsne_fft", "twist", ((charges, FAR), kernel.angles, twisted, *sides), grid=nodes, **settings)
    back = torch.fft.ifft2(torch.fft.fft2(twisted) * kernel.influence, norm="forward")
    run("tsne_fft", "untwist", (back, kernel.angles, (potential, FAR), *sides), grid=nodes, **settings)
    given = (points, start, grids, state, table, (potential, FAR), *moved)
    run("tsne_fft", "gather", given, grid=(2, 1), **settings)
    run("tsne_fft", "settle", (start, grids, moved[1], state, inverse), grid=(1, 1), **settings)
    difference = z[:, None] - z
    w = 1 / (1 + difference.square().sum(2)).fill_diagonal_(torch.inf)
    torch.testing.assert_close(force, (w.square()[..., None] * difference).sum(1), rtol=0.01, atol=1e-3)
    assert float(inverse) * w.sum() == pytest.approx(1, rel=1e-4)
    velocity, gains, before, pull = torch.zeros(N, 2), torch.ones(N, 2), z.clone(), torch.zeros(N, 2)
    arrays = [(x, 2 * FAR) for x in (z, velocity, gains, pull, force)]
    scalars = np.array([1, 0.1, 0.5], dtype=np.float32)
    run("tsne_fft", "update", (*arrays, inverse, start, grids, state, *scalars), grid=(1, 1), **settings)
    torch.testing.assert_close(z, before + 0.1 * 0.8 * 4 * force * inverse, rtol=1e-5, atol=1e-6)


def test_unpool():
    """The switches of a late image among many."""
    pool, far = Pool.of(3, 2), 2**31 // (2 * 36) + 1000
    x = torch.randn(1, 2, 13, 13, generator=torch.Generator().manual_seed(0))
    pooled, switches = max_pool(x, 3, 2)
    result, origin = torch.empty(1, 2, 13, 13), torch.tensor([[far, 0, 0, 0, 0]], dtype=torch.int32)
    (signal, codes, origin, out, *numbers), grid = unpool_launch(pooled, switches, origin, result, (13, 13))
    moved = (signal, (codes, far * codes[0].numel()), origin, out, *numbers)
    run("unpool", "unpool", moved, grid=grid, block=THREADS, **pool.defines(x))
    assert torch.equal(result, unpool(pooled, switches, (13, 13), 3, 2))


def test_the_last_of_many_maps():
    """The block along y that has it, of 65,535: signals, outputs and pooled maps hold more than 2^31 elements."""
    last, pool = MAX_GRID - 1, Pool.of(2, 1)
    x = torch.randn(1, 1, 190, 190, generator=torch.Generator().manual_seed(0))
    pooled, switches = max_pool(x, 2, 1)
    assert last * pooled.numel() > 2**31
    results = torch.full_like(pooled, torch.nan), torch.zeros_like(switches)
    (maps, *outputs, planes, H, W, h, w), (across, _) = max_pool_launch(x, *results)
    planes += last
    moved = [(t, last * t.numel()) for t in (maps, *outputs)]
    blocks = [last * across, last * across + across - 1]
    sizes = {"grid": (across, MAX_GRID), "block": THREADS, "blocks": blocks}
    run("unpool", "max_pool", (*moved, planes, H, W, h, w), **sizes, **pool.defines(x))
    for found, truth in zip(results, (pooled, switches), strict=True):
        for part in (slice(THREADS), slice((across - 1) * THREADS, None)):
            assert torch.equal(found.flatten()[part], truth.flatten()[part])

    result, origin = torch.full_like(x, torch.nan), torch.zeros(MAX_GRID, 5, dtype=torch.int32)
    (signal, codes, origin, out, signals, *numbers), (across, *_) = unpool_launch(
        pooled, switches, origin, result, (190, 190)
    )
    moved = ((signal, last * signal.numel()), codes, origin, (out, last * out.numel()), signals + np.int32(last))
    sizes |= {"grid": (across, MAX_GRID, 1), "blocks": [last * across]}
    run("unpool", "unpool", (*moved, *numbers), **sizes, **pool.defines(x))
    truth = unpool(pooled, switches, (190, 190), 2, 1)
    assert torch.equal(result.flatten()[:THREADS], truth.flatten()[:THREADS])


def test_no_grid_is_larger_than_cuda_allows():
    maps = torch.empty(70_000, 1, 3, 3, device="meta")
    for _, grid in (max_pool_launch(maps, maps, maps), unpool_launch(maps, maps, maps, maps, (3, 3))):
        assert grid[1] == MAX_GRID
