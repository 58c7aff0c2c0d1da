"""Tensors carried into other shapes: the common part, or kernels resampled as FlexiViT's."""

import torch
from torch import Tensor
from torch.nn import functional


def carried(old: Tensor, fresh: Tensor, *, resample: bool, spatial: bool) -> Tensor:
    """A tensor's values in the shape of a freshly initialised one.

    Channels are taken from the first on, and what the old tensor does not have stays fresh. With `spatial` the
    dimensions from the third on are those of a kernel: the centre is cut out of it, or it is put into the centre of
    zeros; or with `resample` it is resized by the pseudo-inverse.

    Parameters
    ----------
    old : Tensor
    fresh : Tensor
        Of as many dimensions; it is not changed.
    resample : bool
        Whether kernels are resampled.
    spatial : bool
        Whether it is the weight of a convolution.

    Returns
    -------
    Tensor
        Of the shape, dtype and device of `fresh`.

    Examples
    --------
    >>> carried(torch.ones(1, 1, 1, 1), torch.zeros(2, 1, 3, 3), resample=False, spatial=True)[0, 0]
    tensor([[0., 0., 0.],
            [0., 1., 0.],
            [0., 0., 0.]])
    """
    new = fresh.clone()
    if old.ndim != fresh.ndim:
        return new
    kernel = 2 if spatial else fresh.ndim
    common = tuple(slice(min(a, b)) for a, b in zip(old.shape[:kernel], fresh.shape[:kernel], strict=True))
    part = old[common].to(new.device)
    for axis in range(kernel, fresh.ndim):
        size = fresh.shape[axis]
        part = resampled(part, axis, size) if resample else _centred(part, axis, size)
    new[common] = part.to(new.dtype)
    return new


def resampled(kernel: Tensor, axis: int, size: int) -> Tensor:
    """A kernel of another size along one axis, whose response to a resized patch is that to the patch before.

    Beyer et al. 2023 (FlexiViT), section 3.4: w' = pinv(B^T) w, with B the matrix that resizes a patch bilinearly. For
    a larger kernel <B x, w'> = <x, w> for every patch x; for a smaller one it is the nearest in mean square, for
    patches of white noise. The kernel of two dimensions is resampled along one after the other, as B is the
    product of both.
    """
    if kernel.shape[axis] == size:
        return kernel
    inverse = torch.linalg.pinv(resizing(kernel.shape[axis], size).T)
    moved = kernel.double().movedim(axis, -1) @ inverse.T.to(kernel.device)
    return moved.movedim(-1, axis).to(kernel.dtype)


def resizing(old: int, new: int) -> Tensor:
    """The matrix B, float64 [new, old], that resizes bilinearly, smoothed where it becomes smaller.

    >>> resizing(1, 2)
    tensor([[1.],
            [1.]], dtype=torch.float64)
    """
    unit = torch.eye(old, dtype=torch.float64)[None, None]  # an image of which every column is one patch
    return functional.interpolate(unit, size=(new, old), mode="bilinear", antialias=True, align_corners=False)[0, 0]


def _centred(kernel: Tensor, axis: int, size: int) -> Tensor:
    """The middle of a kernel along one axis, or the kernel in the middle of zeros."""
    old = kernel.shape[axis]
    if old >= size:
        return kernel.narrow(axis, (old - size) // 2, size)
    shape = list(kernel.shape)
    shape[axis] = size
    larger = kernel.new_zeros(shape)
    larger.narrow(axis, (size - old) // 2, old).copy_(kernel)
    return larger
