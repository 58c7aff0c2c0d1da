"""numpy, torch and CuPy arrays in and out without a copy."""

from typing import Any

import numpy as np
import torch

from qdv_gpu.errors import InputError
from qdv_gpu.machine import resolve_device


def to_tensor(array: Any, device: str | torch.device | None = None) -> torch.Tensor:
    """View a numpy, torch or CuPy array (or a nested list) as a tensor, moved only if `device` differs.

    With `device` None or "auto" a tensor stays where it is.
    """
    if isinstance(array, torch.Tensor):
        tensor = array.detach()
    elif hasattr(array, "__cuda_array_interface__"):
        strides = array.__cuda_array_interface__.get("strides") or ()
        tensor = torch.from_dlpack(array.copy() if any(stride < 0 for stride in strides) else array)
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
