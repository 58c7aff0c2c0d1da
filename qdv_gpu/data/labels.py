"""Labels: integers from 0 on, one for each image, and the names of the classes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdv_gpu.arrays import to_tensor
from qdv_gpu.errors import InputError, ordered, short

MAX_CLASSES = 1 << 20  # without names: a larger label is a mistake


def check_labels(
    labels: Any, count: int, classes: Sequence[str] | None = None
) -> tuple[Tensor | None, tuple[str, ...]]:
    """Labels as int64 [N] on the CPU, and names of the classes, "0" to the largest label if they have none.

    Raises
    ------
    InputError
        Unless the labels are integers, one for each image, from 0 to below the number of classes.

    Examples
    --------
    >>> check_labels([2, 0], 2)
    (tensor([2, 0]), ('0', '1', '2'))
    """
    names = None if classes is None else tuple(map(str, ordered("classes", classes, "names")))
    if labels is None:
        return None, names or ()
    try:
        given = to_tensor(labels if hasattr(labels, "dtype") else np.asarray(labels)).cpu()
    except (TypeError, ValueError):
        raise InputError(f"labels must be integers, one for each of {count} images, got {short(labels)}") from None
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise InputError(f"labels must be integers, got {given.dtype}")
    if given.shape != (count,):
        raise InputError(f"labels must be one for each of {count} images, got shape {list(given.shape)}")
    found = given.to(torch.int64, copy=True)
    limit = MAX_CLASSES if names is None else len(names)
    wrong = ((found < 0) | (found >= limit)).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise InputError(f"labels must be within 0 and {limit - 1}, got {int(found[i])} for image {i}")
    return found, names if names is not None else tuple(str(c) for c in range(int(found.max()) + 1))
