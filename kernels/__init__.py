"""The hot loops: CUDA C++ (`*.cu`) for the GPU and numba (`*.py`) for the CPU."""

import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch

from qdv_gpu.errors import MissingPackageError

FOLDER = Path(__file__).parent
MAX_GRID = 65_535  # blocks along y and z


def available() -> bool:
    """Whether CuPy is installed, which compiles and launches them on a GPU."""
    return importlib.util.find_spec("cupy") is not None


def reachable(X: torch.Tensor) -> torch.Tensor:
    """X where the kernels reach it: on its own device, or, on a GPU without CuPy, on the CPU."""
    return X.cpu() if X.is_cuda and not available() else X


def load(name: str, /, *, fast_math: bool = False, **defines: int) -> Any:
    """Compile `name`.cu for torch's current device, in about 0.1 s; the result is kept for the life of the process.

    Parameters
    ----------
    name : str
        The file, without its suffix.
    fast_math : bool
        Approximate division and exponentials, and subnormal numbers are 0. Without it arithmetic is that of IEEE.
    **defines : int
        Macros.

    Returns
    -------
    cupy.cuda.function.Module

    Raises
    ------
    MissingPackageError
        If CuPy is not installed, or finds no folder for what it compiles.
    """
    try:
        import cupy
    except ImportError:
        command = 'pip install "qdv_gpu[cuda13]"'
        raise MissingPackageError(f"kernels on a GPU need CuPy, which is not installed: {command}") from None
    except OSError as error:  # it makes a folder for what it compiles
        raise MissingPackageError(f"CuPy needs a cache, set CUPY_CACHE_DIR to a folder it can write: {error}") from None
    return _loaded(cupy, torch.cuda.current_device(), name, options(fast_math=fast_math, **defines))


@functools.cache
def _loaded(cupy: Any, device: int, name: str, flags: tuple[str, ...]) -> Any:
    # Not by cupy.RawModule, which adds -ftz=true to all that it compiles: subnormal numbers would be 0.
    with cupy.cuda.Device(device):
        code, _ = cupy.cuda.compiler.compile_using_nvrtc((FOLDER / f"{name}.cu").read_text(), flags)
        module = cupy.cuda.function.Module()
        module.load(code)
    return module


def options(*, fast_math: bool = False, **defines: int) -> tuple[str, ...]:
    """The compiler's options for `load`."""
    macros = tuple(f"-D{macro}={value}" for macro, value in sorted(defines.items()))
    return ("-std=c++17", *(["-use_fast_math"] if fast_math else []), *macros)


def launch(module: Any, kernel: str, *args: Any, grid: tuple[int, ...], block: int) -> None:
    """Launch a kernel of a module from `load` on torch's current stream of the first argument's device.

    Arguments are CUDA tensors, contiguous and of the kernel's element types, or numpy scalars. Nothing waits, and
    nothing is allocated, so a launch can be captured in a CUDA graph once the kernel has run.
    """
    import cupy

    device = args[0].device.index
    pointers = tuple(arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args)
    stream = torch.cuda.current_stream(device).cuda_stream
    with cupy.cuda.Device(device), cupy.cuda.ExternalStream(stream, device):
        _function(module, kernel)(grid, (block,), pointers)


def run(name: str, kernel: str, *args: Any, grid: tuple[int, ...], block: int, **defines: int) -> None:
    """`load` for the device of the first argument, by IEEE arithmetic, and `launch`."""
    with torch.cuda.device(args[0].device):
        launch(load(name, fast_math=False, **defines), kernel, *args, grid=grid, block=block)


@functools.cache
def _function(module: Any, kernel: str) -> Any:
    return module.get_function(kernel)
