"""Kernels run in three ways: from their source by g++, from what NVRTC makes of it, without a GPU, and on one."""

import cuda_shim
import pytest

from device import compile, ptx
from qdv_gpu import kernels

needs_compiler = pytest.mark.skipif(not cuda_shim.HAS_COMPILER, reason="needs g++")
needs_nvrtc = pytest.mark.skipif(not compile.HAS_COMPILER, reason="needs CuPy")
devices = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=needs_compiler),
        pytest.param("ptx", marks=needs_nvrtc),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)


def run(device, name, kernel, *args, grid, block, fast_math=False, seed=0, arch="compute_90", **defines):
    """Launch a kernel of `name`.cu; the seed is that of the threads' order on "cpu", the architecture that of "ptx"."""
    if device == "cpu":
        cuda_shim.load(name, **defines).launch(kernel, *args, grid=grid, block=block, seed=seed)
        return
    options = {"fast_math": fast_math, **defines}
    if device == "ptx":
        source = (kernels.FOLDER / f"{name}.cu").read_text()
        ptx.launch(source, kernels.options(**options), kernel, *args, grid=grid, block=block, arch=arch)
    else:
        kernels.launch(kernels.load(name, **options), kernel, *args, grid=grid, block=block)
