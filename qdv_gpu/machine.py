"""The machine: its devices, their memory, and how exactly they multiply."""

import ctypes
import logging
import os
import re
import resource
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from qdv_gpu.errors import InputError, short

S = TypeVar("S")
T = TypeVar("T")
logger = logging.getLogger(__name__)
SHARED = "QDV_GPU_SHARED"  # how many workers share the host's memory, and that of a GPU: "4,2"
_THREADS = torch.get_num_threads()  # before anything changes it


def command_line() -> str | None:
    """What was typed, where this process is the command `qdv-gpu`."""
    own = Path(sys.argv[0])
    if own.name == "qdv-gpu" or (own.name == "__main__.py" and own.parent.name == "qdv_gpu"):
        return shlex.join(["qdv-gpu", *sys.argv[1:]])
    return None


def end_with(parent: int) -> None:
    """Have Linux kill this process as soon as the process `parent`, which started it, is gone; Ctrl-C is the parent's.

    It is gone too when the thread that started this process has ended.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it was too late
        os._exit(1)


_inside = 0  # blocks of `staying` that are running, in whatever threads
_home = ""
_moving = threading.Lock()


@contextmanager
def staying() -> Iterator[None]:
    """Put this process back into its current folder, on which relative paths depend, after a block that may leave it.

    Where several threads are in such blocks, it is the folder that it was in before the first of them.
    """
    global _inside, _home
    with _moving:
        if not _inside:
            _home = ""
            with suppress(OSError):  # it may be gone
                _home = os.getcwd()
        _inside += 1
    try:
        yield
    finally:
        with _moving, suppress(OSError):
            _inside -= 1
            os.chdir(_home)  # a folder without a name is none


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Turn "auto", "cpu", "cuda" or "cuda:1" into a usable device.

    For a CUDA device cuBLAS is told to give the same bits on every run, which it reads only when it is first used.

    Raises
    ------
    InputError
        If the name is not a device, or CUDA is asked for and absent.
    """
    resolved = None
    if isinstance(device, str | torch.device):
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        with suppress(RuntimeError):
            resolved = torch.device(device)
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, got {short(device)}")
    if resolved.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(f"device {device} was asked for, but torch finds no CUDA device: use cpu or auto")
    index = torch.cuda.current_device() if resolved.index is None else resolved.index
    if index >= torch.cuda.device_count():
        raise InputError(f"device {device} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return torch.device("cuda", index)


def threads() -> int:
    """How many threads the CPU's work is spread over: what torch started with, which OMP_NUM_THREADS sets."""
    return _THREADS


@contextmanager
def on_threads(count: int | None) -> Iterator[None]:
    """Let each of torch's operators on the CPU use so many threads, on which the order of its sums depends.

    None leaves their number as it is.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_parallel(function: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """Results of a function for each item, in order, on `threads()` threads with torch's operators on one each.

    So a result depends on its item alone, and not on how many threads there are. Inference, gradient and autocast modes
    belong to a thread: the function enters them.

    >>> in_parallel(lambda n: n * n, range(4))
    [0, 1, 4, 9]
    """
    with on_threads(1), ThreadPoolExecutor(threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(function, items))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw torch's random numbers in a block from a seed; its generators, also of GPUs in use, are put back after it.

    >>> before = torch.get_rng_state()
    >>> with seeded(0):
    ...     first = torch.rand(2)
    >>> torch.equal(first, torch.rand(2, generator=torch.Generator().manual_seed(0)))
    True
    >>> torch.equal(torch.get_rng_state(), before)
    True
    """
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
        torch.manual_seed(seed)
        yield


@contextmanager
def deterministic() -> Iterator[None]:
    """Have torch's operators give the same bits on every run, where they can, and fill new memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode=before[0], warn_only=before[1])


class Halving:
    """Calls a function on a batch, of one tensor or several, in as many tiles as memory needs; remembers how many."""

    def __init__(self) -> None:
        self.tiles = 1

    def __call__(self, function: Callable[..., T], *batch: torch.Tensor) -> list[T]:
        """Results of the tiles, in order.

        Raises
        ------
        InputError
            If not even one row fits.
        """
        while True:
            try:
                return [function(*tile) for tile in zip(*(b.chunk(self.tiles) for b in batch), strict=True)]
            except torch.OutOfMemoryError:
                pass  # and let go of what the exception holds before trying again
            self.halve(len(batch[0]))

    def halve(self, size: int) -> None:
        """Cut batches of `size` rows into twice as many tiles from now on."""
        if self.tiles >= size:
            raise InputError("CUDA is out of memory even for one image: lower --image-size")
        self.tiles *= 2
        torch.cuda.empty_cache()
        logger.warning("CUDA is out of memory: the batch is halved to %d images", -(-size // self.tiles))


@contextmanager
def product_precision(kind: str) -> Iterator[None]:
    """Do CUDA's float32 products and convolutions in "ieee" or "tf32"; torch's default is TF32 for convolutions.

    torch has old switches and new ones, and raises when an old one is read that disagrees with the new, which
    `torch.backends.cudnn.flags` does as well as networks. So both are set, unless they disagreed before, and all are
    put back. To one thing torch has no way back, either: that cuDNN's precision was never set, and would follow
    `torch.backends.fp32_precision`.
    """
    cudnn, matmul, tf32 = torch.backends.cudnn, torch.backends.cuda.matmul, kind == "tf32"
    before = _own_precisions()
    old_matmul, old_cudnn = _unless_mixed(torch.get_float32_matmul_precision), _unless_mixed(lambda: cudnn.allow_tf32)
    try:
        if old_matmul is not None and (old_matmul != "highest") != tf32:
            if tf32:
                matmul.allow_tf32 = True
            else:
                torch.set_float32_matmul_precision("highest")  # oneDNN's too, which the old switch is compared with
        if old_cudnn is not None and old_cudnn != tf32:
            cudnn.allow_tf32 = tf32
        cudnn.fp32_precision = kind
        for operator in _operators()[:3]:
            if operator.fp32_precision != kind:
                operator.fp32_precision = kind
        yield
    finally:
        if old_matmul is not None:
            torch.set_float32_matmul_precision(old_matmul)
        if old_cudnn is not None and old_cudnn != tf32:
            cudnn.allow_tf32 = old_cudnn
        _set_precisions(before)


def _operators() -> tuple[Any, ...]:
    """What has a precision of its own: three of CUDA's, and one of the CPU's."""
    backends: Any = torch.backends
    return backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul


def _own_precisions() -> tuple[str, ...]:
    """Precisions of everything, of all of CUDA's, and of the operators, each without what it takes from the others."""
    backends: Any = torch.backends
    whole, backends.fp32_precision = backends.fp32_precision, "none"
    cuda, backends.cudnn.fp32_precision = backends.cudnn.fp32_precision, "none"
    found = whole, cuda, *(operator.fp32_precision for operator in _operators())
    _set_precisions(found)
    return found


def _set_precisions(own: tuple[str, ...]) -> None:
    """Set them to what `_own_precisions` gave, without touching those that have it."""
    backends: Any = torch.backends
    backends.fp32_precision = backends.cudnn.fp32_precision = "none"
    for operator, value in zip(_operators(), own[2:], strict=True):
        if operator.fp32_precision != value:
            operator.fp32_precision = value
    backends.fp32_precision, backends.cudnn.fp32_precision = own[:2]


def _unless_mixed(read: Callable[[], T]) -> T | None:
    """What an old switch says, or None if torch raises because the new ones say something else."""
    try:
        return read()
    except RuntimeError:
        return None


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Do CUDA's float32 convolutions and products in float32, and each in the same order every time."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        with product_precision("ieee"):
            yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`, or for the CPU on the host and in the process's control group.

    A worker of a sweep gets its share of what those of the same device have together, as `SHARED` says.

    Raises
    ------
    InputError
        If that is not two numbers.
    """
    shared = os.environ.get(SHARED) or "1,1"
    if not re.fullmatch("[1-9][0-9]{0,5},[1-9][0-9]{0,5}", shared):
        raise InputError(f"{SHARED} must be two numbers of workers from 1, as 4,2, or not be set, got {short(shared)}")
    host, gpu = map(int, shared.split(","))
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] // gpu + reserved
    try:
        available = _counters(Path("/proc/meminfo"))["MemAvailable:"] * 1024
    except OSError:  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 // host
    return min([available, *_free_in_groups()]) // host


def return_freed_memory() -> None:
    """Have the C library give large blocks back as soon as they are freed, for the rest of the process (glibc).

    Otherwise each thread keeps blocks of up to 32 MB for later, which is faster, and which no budget can count.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            library.mallopt(option, 1 << 20)
        library.malloc_trim(0)


def _free_in_groups(process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Bytes that each control group of the process leaves, from its own up to all of its machine."""
    for line in process.read_text().splitlines() if process.is_file() else ():
        _, controllers, own = line.split(":", 2)
        if controllers == "":  # version 2
            folder, names = root / own[1:], ("memory.max", "memory.current", "inactive_file")
        elif controllers == "memory":
            folder = root / "memory" / own[1:]
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        for group in [folder, *folder.parents]:
            with suppress(OSError, ValueError, KeyError):  # no limit, or no such group
                limit, used = (int((group / name).read_text()) for name in names[:2])
                yield max(0, limit - used + _counters(group / "memory.stat")[names[2]])


def _counters(file: Path) -> dict[str, int]:
    return {line.split()[0]: int(line.split()[1]) for line in file.read_text().splitlines()}


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
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    measured["peak_bytes"] = float(torch.cuda.max_memory_allocated(device) if cuda else resident)
