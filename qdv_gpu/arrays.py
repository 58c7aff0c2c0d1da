"""numpy, torch and CuPy arrays in and out without a copy."""

from typing import Any

import numpy as np
import torch

from qdv_gpu.errors import InputError, short
from qdv_gpu.machine import resolve_device


def to_tensor(array: Any, device: str | torch.device | None = None) -> torch.Tensor:
    """View a numpy, torch or CuPy array (or a nested list) as a tensor, moved only if `device` differs.

    With `device` None or "auto" a tensor stays where it is. Raises InputError for what is no dense array of numbers.
    """
    if isinstance(array, torch.Tensor):
        kind = next((kind for kind in ("is_meta", "is_quantized", "is_nested") if getattr(array, kind)), None)
        if kind or array.layout != torch.strided:
            kind = kind.removeprefix("is_") if kind else str(array.layout).removeprefix("torch.")
            raise InputError(f"a dense array of numbers is required, got a {kind} tensor")
        tensor = array.detach()
    elif hasattr(array, "__cuda_array_interface__"):
        strides = array.__cuda_array_interface__.get("strides") or ()
        tensor = torch.from_dlpack(array.copy() if any(stride < 0 for stride in strides) else array)
    else:
        if np.ma.is_masked(array):
            raise InputError(f"an array without gaps is required, got a masked one: {np.ma.count_masked(array)} are")
        try:
            array = np.asarray(array)
        except Exception as error:  # of somebody's own class
            raise InputError(f"an array of numbers is required, got {short(array)} ({error})") from None
        if array.dtype.kind not in "biufc" or array.dtype.itemsize > (16 if array.dtype.kind == "c" else 8):
            raise InputError(f"an array of numbers is required, got dtype {array.dtype}")
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        if any(stride < 0 for stride in array.strides) or not array.flags.writeable:
            array = array.copy()  # torch can view neither
        tensor = torch.from_numpy(np.asarray(array, np.uint64) if array.dtype.char == "Q" else array)
    if device is None or device == "auto":
        return tensor
    return tensor.to(resolve_device(device))


def as_floats(name: str, values: Any, *shape: int | None, dtype: torch.dtype = torch.float64) -> np.ndarray:
    """An array of numbers as floats on the host; InputError unless it has this shape, None standing for any length.

    >>> as_floats("maps", [[1, 2]], None, 2)
    array([[1., 2.]])
    """
    try:
        array: np.ndarray = to_tensor(values).cpu().to(dtype).numpy()
    except (InputError, TypeError, RuntimeError):
        raise InputError(f"{name} must be numbers, got {short(values)}") from None
    if len(array.shape) != len(shape) or any(b not in (None, a) for a, b in zip(array.shape, shape, strict=True)):
        wanted = ", ".join("N" if length is None else str(length) for length in shape)
        raise InputError(f"{name} must have shape [{wanted}], got {list(array.shape)}")
    return array


def constants(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A few numbers as a tensor on a device, which the host does not wait for as it would in `torch.tensor`.

    >>> constants((2, 3), torch.device("cpu"))
    tensor([2, 3])
    """
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def like(result: torch.Tensor, original: Any) -> Any:
    """Return `result` as the kind of array that `original` is: torch, CuPy or, for anything else, numpy.

    A CuPy array is on the result's device or, if that is the CPU, on the original's.
    """
    if isinstance(original, torch.Tensor):
        return result
    if hasattr(original, "__cuda_array_interface__"):
        import cupy

        home = result.device if result.is_cuda else to_tensor(original).device
        return cupy.from_dlpack(result.detach().to(home))
    return result.detach().cpu().numpy()
