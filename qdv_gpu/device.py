"""Where arrays live: choosing a device, and numpy, torch and CuPy arrays in and out without a copy."""

import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from qdv_gpu.errors import InputError

T = TypeVar("T")


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Turn "auto", "cpu", "cuda" or "cuda:1" into a usable device.

    Raises
    ------
    InputError
        If the name is not a device, or CUDA is asked for and absent.
    """
    if device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, got {str(device)!r}")
    if resolved.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(f"device {device} was asked for, but torch finds no CUDA device: use cpu or auto")
    index = torch.cuda.current_device() if resolved.index is None else resolved.index
    if index >= torch.cuda.device_count():
        raise InputError(f"device {device} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", index)


def to_tensor(array: Any, device: str | torch.device | None = None) -> torch.Tensor:
    """View a numpy, torch or CuPy array (or a nested list) as a tensor, moved only if `device` differs.

    With `device` None or "auto" a tensor stays where it is.
    """
    if isinstance(array, torch.Tensor):
        tensor = array.detach()
    elif hasattr(array, "__cuda_array_interface__"):
        tensor = torch.from_dlpack(array)
    else:
        array = np.asarray(array)
        if array.dtype == object or np.issubdtype(array.dtype, np.str_):
            raise InputError(f"an array of numbers is required, got dtype {array.dtype}")
        if any(stride < 0 for stride in array.strides) or not array.flags.writeable:
            array = array.copy()  # torch can view neither
        tensor = torch.from_numpy(array)
    if device is None or device == "auto":
        return tensor
    return tensor.to(resolve_device(device))


def like(result: torch.Tensor, original: Any) -> Any:
    """Return `result` as the kind of array that `original` is: torch, CuPy or, for anything else, numpy."""
    if isinstance(original, torch.Tensor):
        return result
    if hasattr(original, "__cuda_array_interface__"):
        import cupy

        return cupy.from_dlpack(result.detach().cuda())
    return result.detach().cpu().numpy()


class Halving:
    """Calls a function on a batch, of one tensor or several, in as many pieces as memory needs; remembers how many.

    Parameters
    ----------
    report : callable
        Told when the pieces get smaller.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report
        self.pieces = 1

    def __call__(self, function: Callable[..., T], *batch: torch.Tensor) -> list[T]:
        """Results of the pieces, in order.

        Raises
        ------
        InputError
            If not even one row fits.
        """
        while True:
            try:
                return [function(*piece) for piece in zip(*(b.chunk(self.pieces) for b in batch), strict=True)]
            except torch.OutOfMemoryError:
                pass  # and let go of what the exception holds before trying again
            self.halve(len(batch[0]))

    def halve(self, size: int) -> None:
        """Cut batches of `size` rows into twice as many pieces from now on."""
        if self.pieces >= size:
            raise InputError("CUDA is out of memory even for one image: lower --image-size")
        self.pieces *= 2
        torch.cuda.empty_cache()
        self.report(f"CUDA is out of memory: the batch is halved to {-(-size // self.pieces)} images")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`, or on the host for the CPU."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


@contextmanager
def measured(device: torch.device) -> Iterator[dict[str, float]]:
    """Fill a dict with the block's seconds and the peak memory in bytes (on a CPU: of the process so far)."""
    measured: dict[str, float] = {}
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    yield measured
    if cuda:
        torch.cuda.synchronize(device)
    measured["seconds"] = round(time.perf_counter() - started, 3)
    peak = (
        torch.cuda.max_memory_allocated(device) if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    measured["peak_bytes"] = float(peak)
