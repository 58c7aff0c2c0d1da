"""The hot loops: CUDA C++ (`*.cu`) for the GPU and numba (`*.py`) for the CPU."""

import functools
from pathlib import Path
from typing import Any

import numba
import torch

from qdv_gpu.errors import InputError

FOLDER = Path(__file__).parent

# numba gets as many threads as torch has, which OMP_NUM_THREADS sets. To start numba's OpenMP layer, which this does,
# raises torch's number to that of all cores, so torch is told again.
_threads = torch.get_num_threads()
try:
    numba.set_num_threads(min(_threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]  # set at run time
except ValueError as error:
    raise InputError(f"numba cannot start with what NUMBA_... variables say: {error}") from None
torch.set_num_threads(_threads)


@functools.cache
def load(name: str, /, *, fast_math: bool = False, **defines: int) -> Any:
    """Compile `name`.cu for the current device.

    The result is kept for the life of the process, and CuPy keeps the binary on disk.

    Parameters
    ----------
    name : str
        The file, without its suffix.
    fast_math : bool
        Approximate division and exponentials, and flush denormal numbers to zero.
    **defines : int
        Macros.

    Returns
    -------
    cupy.RawModule

    Raises
    ------
    ImportError
        If CuPy is not installed.
    """
    try:
        import cupy
    except ImportError:
        raise ImportError('kernels on a GPU need CuPy, which is not installed: pip install "qdv_gpu[cuda13]"') from None
    return cupy.RawModule(code=(FOLDER / f"{name}.cu").read_text(), options=options(fast_math=fast_math, **defines))


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


@functools.cache
def _function(module: Any, kernel: str) -> Any:
    return module.get_function(kernel)
