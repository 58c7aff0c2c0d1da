"""How fast a device is, and how long work takes on it."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch.nn import functional

from qdv_gpu.features.forward import computing
from qdv_gpu.machine import free_memory

SECONDS = 1.0  # of repeats for each batch size, at least three of them
PRODUCT = {"cpu": 2048, "cuda": 8192}  # side of the matrices whose product is the peak
COPY = {"cpu": 2**28, "cuda": 2**31}  # bytes of the copy


def measured_peaks(device: torch.device, precision: str, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Operations a second of a product, and bytes a second (read and written) of a copy.

    The product is that of two square matrices or, where that is faster, a 3 x 3 convolution of as many operations: on
    some CPUs torch has the better library for these. Its numbers are of `dtype`, or bfloat16 if that is the precision.
    """
    copy = copy_bandwidth(device)
    kind = torch.bfloat16 if precision == "bf16" else dtype
    side = PRODUCT[device.type] // (8 if device.type == "cpu" and kind == torch.float16 else 1)  # which takes minutes
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    maps = max(1, side // 8)
    images = max(1, side**3 // (maps**2 * 9 * 32**2))
    x = torch.randn(images, maps, 32, 32, device=device, dtype=kind)
    weight = torch.randn(maps, maps, 3, 3, device=device, dtype=kind)
    x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))  # as networks run
    with torch.inference_mode(), computing(precision, device):
        products = 2 * side**3 / timed(lambda: a @ b, device, of=min)
        convolved = 2 * x.numel() * maps * 9 / timed(lambda: functional.conv2d(x, weight, padding=1), device, of=min)
    return max(products, convolved), copy


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a copy."""
    source = torch.zeros(min(COPY[device.type], free_memory(device) // 4) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source), device, of=min)


def timed(work: Callable[[], Any], device: torch.device, of: Callable[[list[float]], float] = median) -> float:
    """Median (or least) seconds of some calls, at least three, after a first one that does not count."""
    work()
    busy = ahead(work, device)
    spent: list[float] = []
    while len(spent) < 3 or (sum(spent) < SECONDS and len(spent) < 100):
        spent.append(once(work, device, busy))
    return of(spent)


def once(work: Callable[[], Any], device: torch.device, busy: Callable[[], None]) -> float:
    """Seconds of one call; `busy` is what `ahead` gave for it."""
    if device.type == "cpu":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    busy()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def ahead(work: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """What gives a GPU enough to do while `work` is launched that events time the work and not the launches.

    It runs the work twice, to learn how long its launches take.
    """
    if device.type == "cpu":
        return lambda: None
    work()
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    launching = time.perf_counter() - started
    cycles = int(8e9 * launching)  # at about 2e9 a second four times as long, since hooks and events are launched too
    return lambda: torch.cuda._sleep(cycles)
