"""Max-pooling with switches and its adjoint, as torch operators.

`torch.nn.MaxUnpool2d` lets windows that overlap overwrite each other; here their contributions add, which makes
unpooling the adjoint of max-pooling for any kernel, stride, padding and dilation. It gathers, without atomics: the same
bits each time, on a GPU and, from the same order of additions, on a CPU.
"""

# ruff: noqa: PLR0917 - torch's operators take arguments by position

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, library

from qdv_gpu import kernels
from qdv_gpu.errors import InputError, short
from qdv_gpu.kernels import MAX_GRID

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # in the order of TYPE in unpool.cu
CHANNELS = 16  # of one thread, as in unpool.cu
THREADS = 256


@dataclass(frozen=True)
class Pool:
    """The geometry of a max-pooling of maps: kernel, stride, padding and dilation, each as (down, across)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1) -> "Pool":
        """From arguments as `torch.nn.functional.max_pool2d` takes them: integers, or sequences of one or two.

        Raises
        ------
        InputError
            If one is not positive, or the padding is more than half of the kernel.
        """
        kernel, padding, dilation = _pair(kernel_size), _pair(padding), _pair(dilation)
        stride = kernel if stride is None or stride in ([], ()) else _pair(stride)
        if min(*kernel, *stride, *dilation) < 1 or min(padding) < 0:
            raise InputError(
                "max-pooling requires positive kernel_size, stride and dilation and a padding of at least 0, got "
                f"{kernel}, {stride}, {dilation} and {padding}"
            )
        if any(p > k // 2 for p, k in zip(padding, kernel, strict=True)):
            raise InputError(f"max-pooling requires a padding of at most half of kernel_size {kernel}, got {padding}")
        return cls(kernel, stride, padding, dilation)

    def span(self, outputs: Sequence[int]) -> tuple[int, int]:
        """Height and width of the inputs that a rectangle of `outputs` (height, width) sees, padding included."""
        down, across = (
            (n - 1) * s + d * (k - 1) + 1
            for n, k, s, d in zip(outputs, self.kernel, self.stride, self.dilation, strict=True)
        )
        return down, across

    def pooled(self, size: Sequence[int], *, ceil_mode: bool) -> tuple[int, int]:
        """The pooled map's height and width for a map of `size`.

        Raises
        ------
        InputError
            If the map is smaller than a window.
        """
        result = []
        for n, k, s, p, d in zip(size[-2:], self.kernel, self.stride, self.padding, self.dilation, strict=True):
            room = n + 2 * p - d * (k - 1) - 1
            windows = (math.ceil(room / s) if ceil_mode else room // s) + 1
            if ceil_mode and (windows - 1) * s >= n + p:  # the last one would lie in the padding
                windows -= 1
            if windows < 1:
                raise InputError(f"a max-pooling window of {self.kernel} does not fit a map of {tuple(size[-2:])}")
            result.append(windows)
        return result[0], result[1]

    @property
    def code_dtype(self) -> torch.dtype:
        """What a switch is stored as: one byte if the window allows."""
        return torch.uint8 if math.prod(self.kernel) <= 256 else torch.int32

    def defines(self, like: Tensor) -> dict[str, int]:
        """The macros of unpool.cu for maps of `like`'s dtype."""
        names = ("KH", "KW", "SH", "SW", "PH", "PW", "DH", "DW")
        values = (*self.kernel, *self.stride, *self.padding, *self.dilation)
        size = 1 if self.code_dtype == torch.uint8 else 4
        return dict(zip(names, values, strict=True)) | {"TYPE": DTYPES.index(like.dtype), "CODE_BYTES": size}

    def arrays(self) -> list[np.ndarray]:
        """The same for the loops of the CPU."""
        return [np.array(pair) for pair in (self.kernel, self.stride, self.padding, self.dilation)]


def max_pool(
    maps: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, *, ceil_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """Max-pooling that records its switches (Zeiler & Fergus 2014, section 2.1).

    Parameters
    ----------
    maps : Tensor
        [B, C, H, W], float32, float16, bfloat16 or float64, on a CPU or CUDA device.
    kernel_size, stride, padding, dilation, ceil_mode
        As in `torch.nn.functional.max_pool2d`.

    Returns
    -------
    pooled : Tensor
        [B, C, h, w], with a gradient.
    switches : Tensor
        uint8 [B, C, h, w], or int32 for windows of more than 256 pixels: ky * kernel_size[1] + kx of the winner, the
        first of equal ones.

    Raises
    ------
    InputError
        If the maps hold NaN, which has no largest element, have another dtype or shape, or are smaller than a window.
    """
    pool = Pool.of(kernel_size, stride, padding, dilation)
    return torch.ops.qdv_gpu.max_pool(maps, pool.kernel, pool.stride, pool.padding, pool.dilation, ceil_mode)


def unpool(
    signal: Tensor,
    switches: Tensor,
    size: Sequence[int],
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    *,
    rectify: bool = False,
) -> Tensor:
    """Unpooling with switches, the adjoint of max-pooling: <max_pool(x), y> = <x, unpool(y)> for the x of the switches.

    Parameters
    ----------
    signal : Tensor
        [B, C, h, w], float32, float16, bfloat16 (summed in float32) or float64.
    switches : Tensor
        From `max_pool`, [B, C, h, w], or [1, C, h, w] to serve all signals.
    size : sequence of int
        Height and width of the maps that were pooled.
    kernel_size, stride, padding, dilation
        Of the pooling.
    rectify : bool
        Set negative results to 0, as the Deconvnet does next.

    Returns
    -------
    Tensor
        [B, C, *size] of the signal's dtype, with a gradient.

    Raises
    ------
    InputError
        If shapes or dtypes do not go together.
    """
    pool = Pool.of(kernel_size, stride, padding, dilation)
    return torch.ops.qdv_gpu.unpool(
        signal, switches, list(size), pool.kernel, pool.stride, pool.padding, pool.dilation, rectify
    )


def unpool_windows(
    signal: Tensor, switches: Tensor, origin: Tensor, out: tuple[int, int], size: Sequence[int], pool: Pool, *,
    rectify: bool,
) -> Tensor:  # fmt: skip
    """Unpool rectangles of the pooled maps into rectangles of the maps, without a gradient.

    Parameters
    ----------
    signal : Tensor
        [B, C, h, w]: each signal's rectangle of its pooled map.
    switches : Tensor
        [S, C, pooled height, pooled width] of the whole maps.
    origin : Tensor
        int32 [B, 5]: which of the S maps; row and column where the rectangle of the pooled map begins; row and column
        where that of the map begins. Rectangles may reach over the edge: what is outside is 0.
    out : tuple of int
        Height and width of the rectangles of the maps.
    size : sequence of int
        Height and width of the whole maps.
    pool : Pool
    rectify : bool

    Returns
    -------
    Tensor
        [B, C, *out].
    """
    B, C = signal.shape[:2]
    if signal.is_cuda:
        result = signal.new_empty(B, C, *out)
        if result.numel():
            arguments, grid = unpool_launch(signal, switches, origin, result, size)
            defines = pool.defines(signal) | {"RECTIFY": int(rectify)}
            kernels.run("unpool", "unpool", *arguments, grid=grid, block=THREADS, **defines)
        return result
    from qdv_gpu.kernels import pooling

    given = signal if signal.dtype in (torch.float32, torch.float64) else signal.float()
    result = given.new_empty(B, C, *out)
    arrays: list[Any] = [t.contiguous().numpy() for t in (given.detach(), switches, origin, result)]
    pooling.unpool(*[*arrays, *pool.arrays(), rectify])
    return result.to(signal.dtype)


def max_pool_launch(maps: Tensor, pooled: Tensor, switches: Tensor) -> tuple[tuple[Any, ...], tuple[int, int]]:
    """Arguments and grid of the kernel max_pool of unpool.cu."""
    planes, (h, w) = math.prod(maps.shape[:2]), pooled.shape[2:]
    numbers = np.array([planes, *maps.shape[2:], h, w], dtype=np.int32)
    return (maps.contiguous(), pooled, switches, *numbers), (-(-h * w // THREADS), min(planes, MAX_GRID))


def unpool_launch(
    signal: Tensor, switches: Tensor, origin: Tensor, result: Tensor, size: Sequence[int]
) -> tuple[tuple[Any, ...], tuple[int, int, int]]:
    """Arguments and grid of the kernel unpool of unpool.cu."""
    (B, C), out = signal.shape[:2], result.shape[2:]
    numbers = np.array([*signal.shape, *switches.shape[2:], *size, *out], dtype=np.int32)
    grid = (-(-math.prod(out) // THREADS), min(B, MAX_GRID), -(-C // CHANNELS))
    return (signal.contiguous(), switches.contiguous(), origin.contiguous(), result, *numbers), grid


@library.custom_op("qdv_gpu::max_pool", mutates_args=())
def _max_pool(
    maps: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    ceil_mode: bool,  # noqa: FBT001 - torch's operators take them by position
) -> tuple[Tensor, Tensor]:  # fmt: skip
    pool = Pool.of(kernel, stride, padding, dilation)
    _check_maps("maps", maps)
    B, C, H, W = maps.shape
    h, w = pool.pooled((H, W), ceil_mode=ceil_mode)
    switches = torch.empty((B, C, h, w), dtype=pool.code_dtype, device=maps.device)
    if maps.is_cuda:
        pooled = maps.new_empty(B, C, h, w)
        if pooled.numel():
            arguments, grid = max_pool_launch(maps, pooled, switches)
            kernels.run("unpool", "max_pool", *arguments, grid=grid, block=THREADS, **pool.defines(maps))
    else:
        from qdv_gpu.kernels import pooling

        given = maps if maps.dtype in (torch.float32, torch.float64) else maps.float()
        pooled = given.new_empty(B, C, h, w)
        planes = (t.detach().contiguous().view(B * C, *t.shape[2:]).numpy() for t in (given, pooled, switches))
        pooling.max_pool(*planes, *pool.arrays())
        pooled = pooled.to(maps.dtype)
    if pooled.isnan().any():
        raise InputError("maps must not hold NaN: no element of a window is the largest")
    return pooled, switches


@_max_pool.register_fake
def _(maps: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any) -> tuple[Tensor, Tensor]:
    pool = Pool.of(kernel, stride, padding, dilation)
    shape = (*maps.shape[:2], *pool.pooled(maps.shape, ceil_mode=ceil_mode))
    return maps.new_empty(shape), maps.new_empty(shape, dtype=pool.code_dtype)


@library.custom_op("qdv_gpu::unpool", mutates_args=())
def _unpool(
    signal: Tensor, switches: Tensor, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], rectify: bool,  # noqa: FBT001 - the same
) -> Tensor:  # fmt: skip
    pool = Pool.of(kernel, stride, padding, dilation)
    _check_maps("signal", signal)
    B, S = len(signal), len(switches)
    if switches.device != signal.device:
        raise InputError(f"signal and switches must be on one device, got {signal.device} and {switches.device}")
    if switches.dtype != pool.code_dtype or switches.shape[1:] != signal.shape[1:] or S not in (1, B):
        raise InputError(
            f"switches must be {pool.code_dtype} of shape {list(signal.shape)}, or with a first dimension of 1, got "
            f"{switches.dtype} of shape {list(switches.shape)}"
        )
    if len(size) != 2 or signal.shape[2:] not in {pool.pooled(size, ceil_mode=mode) for mode in (False, True)}:
        raise InputError(f"size {list(size)} is not pooled to the signal's {list(signal.shape[2:])} by {pool}")
    origin = torch.zeros((B, 5), dtype=torch.int32, device=signal.device)
    if S > 1:
        origin[:, 0] = torch.arange(B, dtype=torch.int32, device=signal.device)
    return unpool_windows(signal, switches, origin, (size[0], size[1]), size, pool, rectify=rectify)


@_unpool.register_fake
def _(
    signal: Tensor, switches: Any, size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, rectify: Any
) -> Tensor:
    return signal.new_empty((*signal.shape[:2], *size))


def _at_switches(maps: Tensor, switches: Tensor, pool: Pool) -> Tensor:
    """The pixel of maps [B, C, H, W] that each switch [1 or B, C, h, w] points to: the adjoint of unpooling."""
    h, w = switches.shape[2:]
    code = switches.long()
    tops = torch.arange(h, device=maps.device) * pool.stride[0] - pool.padding[0]
    lefts = torch.arange(w, device=maps.device) * pool.stride[1] - pool.padding[1]
    rows = tops[:, None] + code // pool.kernel[1] * pool.dilation[0]
    columns = lefts + code % pool.kernel[1] * pool.dilation[1]
    pixels = (rows * maps.shape[3] + columns).flatten(2).expand(*maps.shape[:2], h * w)
    return maps.flatten(2).gather(2, pixels).unflatten(2, (h, w))


def _keep_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    maps, *pairs, _ = inputs
    ctx.pool, ctx.size, ctx.switches = Pool.of(*pairs), maps.shape[2:], output[1]
    ctx.mark_non_differentiable(output[1])


def _max_pool_backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Any, ...]:
    pool = ctx.pool
    back = unpool(gradient, ctx.switches, ctx.size, pool.kernel, pool.stride, pool.padding, pool.dilation)
    return back, None, None, None, None, None


def _keep_unpool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, switches, _, *pairs, rectify = inputs
    ctx.pool, ctx.rectify = Pool.of(*pairs), rectify
    ctx.save_for_backward(switches, *([output] if rectify else []))


def _unpool_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    switches, *output = ctx.saved_tensors
    if ctx.rectify:
        gradient = gradient * (output[0] > 0)
    return _at_switches(gradient, switches, ctx.pool), None, None, None, None, None, None, None


_max_pool.register_autograd(_max_pool_backward, setup_context=_keep_pool)
_unpool.register_autograd(_unpool_backward, setup_context=_keep_unpool)


@_max_pool.register_vmap
def _(info: Any, dims: Any, maps: Tensor, *args: Any) -> Any:
    V, folded = info.batch_size, maps.movedim(dims[0], 0).flatten(0, 1)  # [V * B, C, H, W]
    pooled, switches = _max_pool(folded, *args)
    return (pooled.unflatten(0, (V, -1)), switches.unflatten(0, (V, -1))), (0, 0)


@_unpool.register_vmap
def _(info: Any, dims: Any, signal: Tensor, switches: Tensor, *args: Any) -> Any:
    V = info.batch_size
    if dims[1] is None and len(switches) == 1:  # one set of switches serves the whole batch
        shared = switches
    else:
        batched = switches.expand(V, *switches.shape) if dims[1] is None else switches.movedim(dims[1], 0)
        B = signal.shape[0 if dims[0] is None else 1 if dims[0] == 0 else 0]
        shared = batched.expand(-1, B, -1, -1, -1).flatten(0, 1)
    folded = (signal.expand(V, *signal.shape) if dims[0] is None else signal.movedim(dims[0], 0)).flatten(0, 1)
    return _unpool(folded, shared, *args).unflatten(0, (V, -1)), 0


def _check_maps(name: str, maps: Tensor) -> None:
    if maps.dtype not in DTYPES or maps.ndim != 4:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise InputError(f"{name} must be [B, C, H, W] of {allowed}, got {maps.dtype} of shape {list(maps.shape)}")


def _pair(value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    if len(values) not in (1, 2) or not all(hasattr(v, "__index__") for v in values):
        raise InputError(f"kernel_size, stride, padding and dilation must be one or two integers, got {short(value)}")
    return int(values[0]), int(values[-1])
