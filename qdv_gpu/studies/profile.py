"""How fast each layer of a network is, and how near to what the device can do."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import qdv_gpu
from qdv_gpu.errors import InputError, as_path, check_count, check_whole, listed
from qdv_gpu.features.forward import check_precision, computing, takes_channels_last
from qdv_gpu.files import replacing, write_json
from qdv_gpu.machine import threads
from qdv_gpu.networks.guard import guarded
from qdv_gpu.networks.hooks import hooked
from qdv_gpu.networks.layers import LayerName, check_memory, trace_calls
from qdv_gpu.networks.load import Source, load_network
from qdv_gpu.networks.network import Network
from qdv_gpu.networks.variant import home
from qdv_gpu.progress import advance
from qdv_gpu.report.curves import plot_profile
from qdv_gpu.report.folder import only_writer, save_figure
from qdv_gpu.studies.peaks import SECONDS, ahead, measured_peaks, once

logger = logging.getLogger(__name__)
ELSEWHERE = "(between layers)"
SPREAD = 0.2  # of repeats, beyond which they are doubted
BATCH_SIZES = {"cpu": (1, 16, 64), "cuda": (1, 16, 64, 256)}


@dataclass(frozen=True)
class LayerTime:
    """One layer at one batch size.

    Attributes
    ----------
    layer : str
        Module path, numbered "@n" if it is called several times; "(between layers)" is what no module does.
    kind : str
        Class of the module.
    seconds : float
        Median, for the whole batch.
    images_per_second : float
    gflop : float
        Of the batch, 10^9 operations; an addition and a multiplication are two.
    bytes : int
        Input, output and weights, each once; none where the output is the input or a view of it.
    bound : {"compute", "memory"}
        Which of the device's limits takes longer.
    share_of_peak : float
        Time at that limit over the time taken; more than 1 where a cache spares the memory, or where a library skips
        the zeros of the padding, which count as operations.
    share : float
        Of the whole forward pass.
    """

    layer: str
    kind: str
    seconds: float
    images_per_second: float
    gflop: float
    bytes: int
    bound: str
    share_of_peak: float
    share: float


@dataclass(frozen=True)
class Profile:
    """A network at one batch size.

    Attributes
    ----------
    batch_size : int
    precision : str
    seconds : float
        Median of the bare forward pass.
    all_seconds : list of float
    gflop_per_second, gb_per_second : float
        The device's measured peaks, of a product and of a copy.
    notes : list of str
        What makes the times doubtful: repeats far apart, a machine that was busy before, a peak that has changed.
    layers : list of LayerTime
    """

    batch_size: int
    precision: str
    seconds: float
    all_seconds: list[float]
    gflop_per_second: float
    gb_per_second: float
    layers: list[LayerTime]
    notes: list[str]

    @property
    def sum_of_layers(self) -> float:
        """Seconds of all layers together; differs from `seconds` by what measuring each costs."""
        return sum(layer.seconds for layer in self.layers)

    @property
    def spread(self) -> float:
        """Between the quartiles of the bare passes, over the median."""
        low, _, high = quantiles(self.all_seconds, n=4)
        return (high - low) / self.seconds

    @property
    def share_of_peak(self) -> float:
        """Operations a second of the bare forward pass over the peak."""
        return sum(layer.gflop for layer in self.layers) / self.seconds / self.gflop_per_second


def profile(
    network: Source,
    out: str | Path | None = None,
    *,
    batch_sizes: Sequence[int] | None = None,
    precision: str = "fp32",
    weights: str | Path = "none",
    image_size: int | None = None,
    device: str | torch.device = "auto",
) -> list[Profile]:
    """Time every layer of a forward pass on random images.

    Parameters
    ----------
    network : str, nn.Module or Network
        As for `load_network`; it is not changed.
    out : str or Path, optional
        Folder that gets profile.json and profile.png.
    batch_sizes : sequence of int, optional
        Default 1, 16, 64 and, on CUDA, 256.
    precision : {"fp32", "tf32", "bf16"}
    weights, image_size, device
        As for `load_network` and `activations`; a module is where it is.

    Returns
    -------
    list of Profile
        One for each batch size.

    Raises
    ------
    InputError
        For a batch size below 1, a precision that the device does not have, or an image size that the network cannot
        take.
    """
    out = None if out is None else as_path("out", out)
    loaded = load_network(network, weights=weights, device=device if home(network) else None)
    target = loaded.device
    if batch_sizes is None:
        batch_sizes = BATCH_SIZES[target.type]
    batch_sizes = listed("batch sizes", batch_sizes, what="integers")
    if not batch_sizes:
        raise InputError("batch sizes must be one or more integers, got none")
    for batch in batch_sizes:
        check_whole("batch sizes", batch)
    batch_sizes = list(dict.fromkeys(batch_sizes))
    if min(batch_sizes) < 1:
        raise InputError(f"batch sizes must be at least 1, got {', '.join(map(str, batch_sizes))}")
    check_count("batch sizes", max(batch_sizes))
    check_precision(precision, target)
    size = loaded.image_size if image_size is None else image_size
    if target.type == "cpu":  # on a GPU a batch that does not fit is left out
        check_memory(loaded, size, max(batch_sizes))
    trace_calls(loaded, size)  # or it cannot take images of that size
    # whose events and streams are used, for so long
    with torch.cuda.device(target) if target.type == "cuda" else nullcontext():
        profiles = _profiles(loaded, batch_sizes, size, precision)
    if out is not None:
        with only_writer(out, below=False):
            _write(out, profiles, loaded, size)
    return profiles


def _write(out: Path, profiles: Sequence[Profile], network: Network, size: int) -> None:
    """Write profile.json and profile.png."""
    derived = ("sum_of_layers", "share_of_peak", "spread")
    about = {
        "network": network.name,
        "image_size": size,
        "device": torch.cuda.get_device_name(network.device) if network.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {"qdv_gpu": qdv_gpu.__version__, "torch": torch.__version__},
        "profiles": [asdict(found) | {name: getattr(found, name) for name in derived} for found in profiles],
    }
    write_json(out / "profile.json", about)
    shares = {found.batch_size: [(one.layer, one.share, one.bound) for one in found.layers] for found in profiles}
    title = f"{network.name}, {size} px, {profiles[0].precision}: share of the forward pass"
    figure, _ = plot_profile(shares, title)
    with replacing(out / "profile.png") as temporary:
        save_figure(figure, temporary)


def _profiles(loaded: Network, batch_sizes: Sequence[int], size: int, precision: str) -> list[Profile]:
    """One for each batch size that fits the device's memory."""
    target = loaded.device
    load = os.getloadavg()[0]
    operations, bandwidth = measured_peaks(target, precision, loaded.dtype)
    numbers = str(loaded.dtype).removeprefix("torch.") if precision == "fp32" else precision
    speeds = f"{operations / 1e9:,.0f} GFLOP/s ({numbers} product), {bandwidth / 1e9:,.1f} GB/s (copy)"
    logger.info("measured peaks: %s", speeds)
    profiles = []
    two = torch.zeros(2, loaded.channels, size, size, dtype=loaded.dtype, device=target)
    layout = torch.channels_last if takes_channels_last(loaded, two) else torch.contiguous_format  # as an analysis
    for batch in batch_sizes:
        images = torch.randn(batch, loaded.channels, size, size, device=target).to(loaded.dtype)
        images = images.clone(memory_format=layout)  # of gray ones too, which `to` leaves as they are
        try:
            with guarded(f"{loaded.name} cannot be run on a batch of {batch}"):
                found = _profile(loaded, images, precision, operations, bandwidth)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            logger.warning("batch size %d does not fit the device's memory: left out", batch)
            continue
        advance("batch sizes", batch_sizes.index(batch) + 1, len(batch_sizes))
        if found.spread > SPREAD:
            low, high = min(found.all_seconds) * 1e3, max(found.all_seconds) * 1e3
            found.notes.append(f"repeats took {low:.2f} to {high:.2f} ms: the machine was busy, or its clock changed")
        if target.type == "cpu" and load > threads() / 2:
            found.notes.append(f"the machine was busy before it began (load {load:.1f} on {threads()} threads)")
        profiles.append(found)
    if not profiles:
        raise InputError("no batch size fits the device's memory: choose smaller --batch-sizes")
    again = measured_peaks(target, precision, loaded.dtype)[0] / operations
    if abs(again - 1) > SPREAD:
        for found in profiles:
            found.notes.append(f"the device's peak was {again:.0%} of what it was at first: its clock changed")
    return profiles


def _profile(network: Network, images: Tensor, precision: str, operations: float, bandwidth: float) -> Profile:
    module, device = network.module, network.device
    with torch.inference_mode(), computing(precision, device):
        calls = _innermost_calls(module, images)
        paths = dict.fromkeys(call.path for call in calls)
        flops = _operations(module, images, paths)
        module(images)
        busy = ahead(lambda: module(images), device)
        whole = once(lambda: module(images), device, busy)
        passes: list[list[float]] = []
        bare = []
        repeats = max(3, min(100, int(SECONDS / whole)))
        for _ in range(repeats):  # in turns, so that what else the machine does meets both
            bare.append(once(lambda: module(images), device, busy))
            busy()
            with _watching(module, paths, _event if device.type == "cuda" else time.perf_counter) as watch:
                module(images)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            passes.append(watch.spent(lambda a, b: a.elapsed_time(b) / 1e3 if device.type == "cuda" else b - a))
    spent = [median(times) for times in zip(*passes, strict=True)]
    calls.append(_Call(ELSEWHERE, "", 0))
    names = [call.path for call in calls]
    layers = []
    for number, (call, work, seconds) in enumerate(zip(calls, flops, spent, strict=True)):
        limits = {"memory": call.bytes / bandwidth, "compute": work / operations}
        bound = max(limits, key=limits.__getitem__)
        several = names.count(call.path) > 1
        layers.append(
            LayerTime(
                layer=str(LayerName(call.path, names[: number + 1].count(call.path) if several else None)),
                kind=call.kind,
                seconds=seconds,
                images_per_second=len(images) / max(seconds, 1e-9),
                gflop=work / 1e9,
                bytes=call.bytes,
                bound=bound,
                share_of_peak=limits[bound] / max(seconds, 1e-9),
                share=seconds / sum(spent),
            )
        )
    return Profile(len(images), precision, median(bare), bare, operations / 1e9, bandwidth / 1e9, layers, [])


@dataclass(frozen=True)
class _Call:
    """Of a module: its path and class, and the bytes of its input, output and weights."""

    path: str
    kind: str
    bytes: int


class _Watch:
    """Notes what a clock says when each module of a forward pass begins and ends."""

    def __init__(self, clock: Callable[[], Any]) -> None:
        self.clock = clock
        self.marks: list[Any] = []

    def mark(self, *_: Any) -> None:
        self.marks.append(self.clock())

    def spent(self, difference: Callable[[Any, Any], Any]) -> list[Any]:
        """Of each call, and last of what lies between them."""
        steps = [difference(a, b) for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return [*steps[1::2], sum(steps[::2])]


@contextmanager
def _watching(module: nn.Module, paths: Iterable[str], clock: Callable[[], Any]) -> Iterator[_Watch]:
    watch = _Watch(clock)
    with hooked(module, paths, before=watch.mark, after=watch.mark):
        watch.mark()
        yield watch
        watch.mark()


def _innermost_calls(module: nn.Module, images: Tensor) -> list[_Call]:
    """The calls of a forward pass of modules that call no other, in order."""
    calls: list[_Call] = []
    outer: set[str] = set()
    running: list[str] = []

    def begin(path: str, *_: Any) -> None:
        outer.update(running[-1:])
        running.append(path)

    def end(path: str, called: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        given = {id(value): value for value in (*inputs, *options.values()) if isinstance(value, Tensor)}.values()
        made = [value for value in (output if isinstance(output, tuple) else (output,)) if isinstance(value, Tensor)]
        places = {value.untyped_storage().data_ptr() for value in given}
        idle = all(value.untyped_storage().data_ptr() in places for value in made)
        moved = 0 if idle and not getattr(called, "inplace", False) else sum(t.nbytes for t in (*given, *made))
        size = moved + sum(weights.nbytes for weights in called.parameters())
        calls.append(_Call(running.pop(), type(called).__name__, size))

    with hooked(module, [path for path, _ in module.named_modules() if path], before=begin, after=end):
        module(images)
    return [call for call in calls if call.path not in outer]


def _operations(module: nn.Module, images: Tensor, paths: Iterable[str]) -> list[int]:
    """Operations of each call of the modules in a forward pass, and last of what is in none."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # whose operators torch does not count, nor every fused attention
    try:
        with (
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
            _watching(module, paths, counter.get_total_flops) as watch,
        ):
            module(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return watch.spent(lambda a, b: b - a)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
