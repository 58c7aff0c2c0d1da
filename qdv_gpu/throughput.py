"""How fast each layer of a network is, and how near to what the device can do."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import qdv_gpu
from qdv_gpu import figures
from qdv_gpu.device import resolve_device
from qdv_gpu.errors import InputError
from qdv_gpu.files import replacing, write_json
from qdv_gpu.forward import Report, check_precision, computing
from qdv_gpu.networks import Network, load_network

ELSEWHERE = "(between layers)"
SECONDS = 1.0  # of repeats for each batch size, at least three of them
PRODUCT = {"cpu": 2048, "cuda": 8192}  # side of the matrices whose product is the peak
COPY = {"cpu": 2**28, "cuda": 2**31}  # bytes of the copy


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
        Input, output and weights, each once.
    bound : {"compute", "memory"}
        Which of the device's limits takes longer.
    share_of_peak : float
        Time at that limit over the time taken; more than 1 where a cache spares the memory.
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
    layers : list of LayerTime
    """

    batch_size: int
    precision: str
    seconds: float
    layers: list[LayerTime]

    @property
    def sum_of_layers(self) -> float:
        """Seconds of all layers together; differs from `seconds` by what measuring each costs."""
        return sum(layer.seconds for layer in self.layers)


def measured_peaks(device: torch.device, precision: str) -> tuple[float, float]:
    """Operations a second of a product, and bytes a second (read and written) of a copy.

    The product is that of two square matrices or, where that is faster, a 3 x 3 convolution of as many operations:
    on some CPUs torch has the better library for these.
    """
    side, kind = PRODUCT[device.type], torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    maps = max(1, side // 8)
    images = max(1, side**3 // (maps**2 * 9 * 32**2))
    x = torch.randn(images, maps, 32, 32, device=device, dtype=kind)
    weight = torch.randn(maps, maps, 3, 3, device=device, dtype=kind)
    source = torch.zeros(COPY[device.type] // 4, device=device)
    target = torch.empty_like(source)
    with torch.inference_mode(), computing(precision, device):
        products = 2 * side**3 / _time(lambda: a @ b, device, of=min)
        convolved = 2 * x.numel() * maps * 9 / _time(lambda: functional.conv2d(x, weight, padding=1), device, of=min)
        copy = _time(lambda: target.copy_(source), device, of=min)
    return max(products, convolved), 2 * source.nbytes / copy


def profile(
    network: str | Network,
    out: str | Path | None = None,
    *,
    batch_sizes: Sequence[int] = (1, 16, 64),
    precision: str = "fp32",
    weights: str | Path = "none",
    image_size: int | None = None,
    device: str | torch.device = "auto",
    report: Report = print,
) -> list[Profile]:
    """Time every layer of a forward pass on random images.

    Parameters
    ----------
    network : str or Network
        As for `load_network`.
    out : str or Path, optional
        Folder that gets profile.json and profile.png.
    batch_sizes : sequence of int
    precision : {"fp32", "tf32", "bf16"}
    weights, image_size, device
        As for `load_network` and `activations`.

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
    if not batch_sizes or min(batch_sizes) < 1:
        raise InputError(f"batch sizes must be at least 1, got {', '.join(map(str, batch_sizes)) or 'none'}")
    target = resolve_device(device)
    check_precision(precision, target)
    loaded = load_network(network, weights=weights, device=target) if isinstance(network, str) else network
    size = loaded.image_size if image_size is None else image_size
    if size < 1:
        raise InputError(f"image size must be at least 1 pixel, got {size}")
    if loaded.device.type == "cuda":
        torch.cuda.set_device(loaded.device)  # whose events and streams these are
    operations, bandwidth = measured_peaks(loaded.device, precision)
    report(f"measured peaks: {operations / 1e9:,.0f} GFLOP/s ({precision} product), {bandwidth / 1e9:,.1f} GB/s (copy)")
    profiles = []
    for batch in batch_sizes:
        images = torch.randn(batch, loaded.channels, size, size, device=loaded.device)
        if images.is_cuda:  # as the forward passes of an analysis
            images = images.contiguous(memory_format=torch.channels_last)
        try:
            profiles.append(_profile(loaded, images, precision, operations, bandwidth))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            report(f"batch size {batch} does not fit the device's memory: left out")
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{loaded.name} cannot take images of {size} x {size} pixels: {error}") from error
    if not profiles:
        raise InputError("no batch size fits the device's memory: choose smaller --batch-sizes")
    if out is not None:
        name = torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else "cpu"
        write_json(
            Path(out) / "profile.json",
            {
                "network": loaded.name,
                "image_size": size,
                "device": name,
                "threads": torch.get_num_threads(),
                "versions": {"qdv_gpu": qdv_gpu.__version__, "torch": torch.__version__},
                "peak_gflop_per_s": operations / 1e9,
                "peak_gb_per_s": bandwidth / 1e9,
                "profiles": [asdict(found) for found in profiles],
            },
        )
        with replacing(Path(out) / "profile.png") as temporary:
            figures.plot_profile(
                {found.batch_size: [(one.layer, one.share, one.bound) for one in found.layers] for found in profiles},
                f"{loaded.name}, {size} px, {precision}: share of the forward pass",
            ).savefig(temporary, dpi=130)
    return profiles


def _profile(network: Network, images: Tensor, precision: str, operations: float, bandwidth: float) -> Profile:
    module, device = network.module, network.device
    with torch.inference_mode(), computing(precision, device):
        counter = FlopCounterMode(display=False)
        with _watching(module, device) as watch, counter:
            module(images)
            calls = watch.calls  # shapes and operations; the times of this first pass do not count
        whole = _time(lambda: module(images), device)
        passes: list[list[float]] = []
        bare = []
        for _ in range(_repeats(whole)):  # in turns, so that what else the machine does meets both
            bare.append(_time(lambda: module(images), device, repeats=1))
            with _watching(module, device) as watch:
                module(images)
                passes.append(watch.seconds())
        whole = median(bare)
    spent = [median(times) for times in zip(*passes, strict=True)]  # the last is what no module does
    total = sum(spent)
    names = [path for path, *_ in calls]
    flops = _operations(counter, names)
    layers = []
    for number, ((path, kind, moved), seconds) in enumerate(zip(calls, spent, strict=False)):
        several = names.count(path) > 1
        work = flops.get(path, 0) / names.count(path)
        limits = {"compute": work / operations, "memory": moved / bandwidth}
        bound = max(limits, key=limits.__getitem__)
        label = f"{path}@{names[: number + 1].count(path)}" if several else path
        rate = len(images) / seconds if seconds else math.inf
        layers.append(
            LayerTime(
                label,
                kind,
                seconds,
                rate,
                work / 1e9,
                moved,
                bound,
                limits[bound] / max(seconds, 1e-12),
                seconds / total,
            )
        )
    rest = spent[-1]
    layers.append(LayerTime(ELSEWHERE, "", rest, len(images) / max(rest, 1e-12), 0.0, 0, "memory", 0.0, rest / total))
    return Profile(len(images), precision, whole, layers)


def _operations(counter: FlopCounterMode, paths: Sequence[str]) -> dict[str, int]:
    """Operations of each module; the counter puts the root's name before its path."""
    counts = counter.get_flop_counts()
    found = {}
    for path in paths:
        full = next((name for name in counts if name.partition(".")[2] == path), None)
        found[path] = sum(counts[full].values()) if full else 0
    return found


class _Watch:
    """Notes of the innermost modules that a forward pass calls, and of when each begins and ends."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.calls: list[tuple[str, str, int]] = []
        self.marks: list[Any] = [self._now()]

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self, *_: Any) -> None:
        self.marks.append(self._now())

    def end(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self.marks.append(self._now())
            tensors = [t for t in (*inputs, output, *module.parameters()) if isinstance(t, Tensor)]
            self.calls.append((path, type(module).__name__, sum(t.nbytes for t in tensors)))

        return hook

    def seconds(self) -> list[float]:
        """Of each call, and last of what lay between them."""
        self.marks.append(self._now())
        if self.cuda:
            torch.cuda.synchronize()
            steps = [a.elapsed_time(b) / 1e3 for a, b in zip(self.marks, self.marks[1:], strict=False)]
        else:
            steps = [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return [*steps[1::2], sum(steps[::2])]


@contextmanager
def _watching(module: nn.Module, device: torch.device) -> Iterator[_Watch]:
    handles = []
    watch = _Watch(device)
    try:
        for path, child in module.named_modules():
            if path and not any(child.children()):
                handles.append(child.register_forward_pre_hook(watch.begin))
                handles.append(child.register_forward_hook(watch.end(path)))
        watch.marks = [watch._now()]
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _time(
    work: Callable[[], Any], device: torch.device, of: Callable[[list[float]], float] = median, repeats: int = 0
) -> float:
    """Median (or least) seconds of some or `repeats` calls, after a first one that does not count."""
    if not repeats:
        work()
    spent: list[float] = []
    while len(spent) < (repeats or 3) or (not repeats and sum(spent) < SECONDS and len(spent) < 100):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize(device)
            spent.append(begin.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            work()
            spent.append(time.perf_counter() - started)
    return of(spent)


def _repeats(seconds: float) -> int:
    return max(3, min(100, int(SECONDS / max(seconds, 1e-6))))
