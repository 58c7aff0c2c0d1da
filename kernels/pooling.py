"""Max-pooling with switches and its adjoint on the CPU (numba, every core), as `unpool.cu` does them.

A plane (one map of one image) is worked on by one thread. A pixel adds the windows that chose it row by row, as on the
GPU, and nothing may be reordered: the same bits on both, with any number of threads.
"""

# ruff: noqa: PLR0917 - numba passes arguments by position

import numpy as np

from qdv_gpu.kernels.rows import compiled, spread


def max_pool(maps, pooled, switches, kernel, stride, padding, dilation):
    """The largest pixel of each window, and its number in the window.

    Parameters
    ----------
    maps : float32 or float64 [P, H, W]
    pooled : the same dtype [P, h, w], written
    switches : uint8 or int32 [P, h, w], written
        ky * kernel[1] + kx of the first pixel that is largest.
    kernel, stride, padding, dilation : int64 [2]
    """
    work = 4 * kernel.prod() * pooled[:1].size
    spread(_max_pool, len(maps), maps, pooled, switches, kernel, stride, padding, dilation, work=work)


@compiled
def _max_pool(low, high, maps, pooled, switches, kernel, stride, padding, dilation):
    for plane in range(low, high):
        for oy in range(pooled.shape[1]):
            for ox in range(pooled.shape[2]):
                winner, best = -1, maps[plane, 0, 0]
                for ky in range(kernel[0]):
                    for kx in range(kernel[1]):
                        y = oy * stride[0] - padding[0] + ky * dilation[0]
                        x = ox * stride[1] - padding[1] + kx * dilation[1]
                        if 0 <= y < maps.shape[1] and 0 <= x < maps.shape[2]:
                            value = maps[plane, y, x]
                            if winner < 0 or value > best or np.isnan(value):
                                winner, best = ky * kernel[1] + kx, value
                pooled[plane, oy, ox] = best if winner >= 0 else -np.inf  # dilated over the whole map: no pixel
                switches[plane, oy, ox] = max(winner, 0)


def unpool(signal, switches, origin, out, kernel, stride, padding, dilation, rectify):
    """Put each element of the signal back to the pixel that its window chose; elements of one pixel add.

    Parameters
    ----------
    signal : float32 or float64 [B, C, h, w]
    switches : uint8 or int32 [S, C, pooled height, pooled width]
    origin : int32 [B, 5]
        Map, pooled y, pooled x, y, x: signal b has the switches of that map, begins at that window, and its output
        begins at that pixel. Elements outside the pooled map are left out.
    out : the signal's dtype [B, C, height, width], written
    kernel, stride, padding, dilation : int64 [2]
    rectify : bool
        Set negative outputs to 0.
    """
    work = 10 * signal[:1, :1].size + out[:1, :1].size
    arguments = (signal, switches, origin, out, kernel, stride, padding, dilation, rectify)
    spread(_unpool, len(signal) * signal.shape[1], *arguments, work=work)


@compiled
def _unpool(low, high, signal, switches, origin, out, kernel, stride, padding, dilation, rectify):
    channels, rows, columns = signal.shape[1:]
    down, across = np.empty(kernel[0] * kernel[1], np.int64), np.empty(kernel[0] * kernel[1], np.int64)
    for code in range(down.size):  # a division for each element would take most of the time
        down[code], across[code] = code // kernel[1] * dilation[0], code % kernel[1] * dilation[1]
    for plane in range(low, high):
        b, c = plane // channels, plane % channels
        source, top, left = origin[b, 0], origin[b, 1], origin[b, 2]
        pixels = out[b, c]
        for y in range(pixels.shape[0]):
            for x in range(pixels.shape[1]):
                pixels[y, x] = 0
        for oy in range(max(top, 0), min(top + rows, switches.shape[2])):
            values, codes = signal[b, c, oy - top], switches[source, c, oy]
            first_y = oy * stride[0] - padding[0] - origin[b, 3]
            first_x = -padding[1] - origin[b, 4]
            for ox in range(max(left, 0), min(left + columns, switches.shape[3])):
                code = codes[ox]
                if code >= down.size:  # not of this pooling
                    continue
                y, x = first_y + down[code], first_x + ox * stride[1] + across[code]
                if 0 <= y < pixels.shape[0] and 0 <= x < pixels.shape[1]:
                    pixels[y, x] += values[ox - left]
        if rectify:
            for y in range(pixels.shape[0]):
                for x in range(pixels.shape[1]):
                    if pixels[y, x] < 0:
                        pixels[y, x] = 0
