"""What a CUDA runtime keeps, for devices that are not there: memory, streams, events, graphs, counts.

Order   Every stream has a clock of how far it, and the streams it has waited for, have come (a vector clock). Memory
        remembers who wrote and read it last. Work that touches memory whose last user has not been waited for is a
        fault, though here everything runs at once and in order.
Memory  Allocated bytes are counted a device; beyond its size torch.OutOfMemoryError is raised. What is freed stays
        reserved until `empty_cache`, as with torch's pool.
Graphs  Between capture_begin and capture_end launches are kept and not run. An operator of torch, an allocation, a
        host sync, or a launch on another stream is a fault there.
"""

import itertools
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .memory import Fault

ROUND = 512  # bytes: what torch's pool rounds an allocation up to
ROOTS = ("/qdv_gpu/", "/kernels/", "/benchmarks/")  # the code whose lines are counted


@dataclass
class Counts:
    """What was asked of the devices, by the line of the package that asked."""

    launches: Counter = field(default_factory=Counter)  # operators of torch
    kernels: Counter = field(default_factory=Counter)  # our own, by name; replayed ones as well
    replays: Counter = field(default_factory=Counter)  # of graphs
    syncs: Counter = field(default_factory=Counter)  # the host waits for a stream
    to_host: Counter = field(default_factory=Counter)  # bytes
    from_host: Counter = field(default_factory=Counter)  # bytes
    pageable: Counter = field(default_factory=Counter)  # bytes of uploads that are to run beside, but are not pinned
    tf32: Counter = field(default_factory=Counter)  # float32 products in TF32
    unordered: Counter = field(default_factory=Counter)  # sums whose order changes from run to run
    largest_copy: int = 0  # bytes to the host in one go

    def clear(self) -> None:
        """Begin anew."""
        self.__init__()


class Memory:
    """Of one device."""

    def __init__(self, size: int) -> None:
        self.size, self.allocated, self.reserved = size, 0, 0
        self.peak = self.peak_reserved = 0

    def take(self, size: int) -> None:
        if self.allocated + size > self.size:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size:,} bytes; {self.allocated:,} of {self.size:,} are taken."
            )
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        self.reserved = max(self.reserved, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def give(self, size: int) -> None:
        self.allocated -= size


class Runtime:
    """Devices, and the thread of the host that drives them."""

    def __init__(self, devices: int, memory: int) -> None:
        self.counts = Counts()
        self.memory = [Memory(memory) for _ in range(devices)]
        self.every: list[Stream] = []
        self.defaults = [Stream(torch.device("cuda", index), pointer=0, runtime=self) for index in range(devices)]
        self._threads = threading.local()
        self.host: dict[int, int] = {}  # how far the host has seen each stream
        self.faiss_resources: list[object] = []
        self.capturing: Graph | None = None
        self.searched: set[str] = set()  # for races: the first launch of each kernel
        self.run: dict[str, int] = {}  # how many launches of a kernel are run and not only counted; by default all
        self.users: dict[int, _Users] = {}  # of storages, by address
        self.storages: dict[int, tuple[weakref.ref, int, int]] = {}  # by address: with device and bytes

    # Streams

    @property
    def current(self) -> int:
        """The thread's device; like its streams, the first one to begin with."""
        return getattr(self._threads, "device", 0)

    @current.setter
    def current(self, index: int) -> None:
        self._threads.device = index

    @property
    def streams(self) -> list["Stream"]:
        """The thread's current stream of each device."""
        if not hasattr(self._threads, "streams"):
            self._threads.streams = list(self.defaults)
        return self._threads.streams

    @property
    def stream(self) -> "Stream":
        return self.streams[self.current]

    def ran(self, device: int, storages: list[torch.UntypedStorage], written: set[int]) -> None:
        """Work on the current stream of a device touches these storages; `written` are addresses."""
        stream = self.streams[device]
        now = stream.step()
        for storage in storages:
            self._user(storage).touch(stream, now, writes=storage.data_ptr() in written)

    def host_reads(self, storage: torch.UntypedStorage, who: str) -> None:
        """Something outside of torch's streams reads a storage: the host must have waited for its writer."""
        self._user(storage).seen(self.host, who)

    def _user(self, storage: torch.UntypedStorage) -> "_Users":
        address = storage.data_ptr()
        if address not in self.users:
            self.users[address] = _Users()
            weakref.finalize(storage, self.users.pop, address, None)
        return self.users[address]

    def sync(self, streams: list["Stream"], what: str) -> None:
        """The host waits for streams."""
        if self.capturing:
            raise Fault(f"{what} while a graph is captured ({site()})")
        self.counts.syncs[f"{site()} {what}"] += 1
        for stream in streams:
            stream.finish()
            _merge(self.host, stream.clock)

    # Memory

    def allocate(self, device: int, storage: torch.UntypedStorage) -> None:
        size, address = -(-storage.nbytes() // ROUND) * ROUND, storage.data_ptr()
        self.memory[device].take(size)
        self.storages[address] = weakref.ref(storage), device, storage.nbytes()
        weakref.finalize(storage, self._free, address, device, size)

    def _free(self, address: int, device: int, size: int) -> None:
        self.storages.pop(address, None)
        self.memory[device].give(size)

    def storage_at(self, address: int, device: int, who: str) -> torch.UntypedStorage | None:
        """The live allocation that a pointer lies in, None if the pointer is null."""
        for base, (storage, place, size) in self.storages.items():
            if base <= address < base + size:
                if place != device:
                    raise Fault(f"{who} runs on cuda:{device} and gets memory of cuda:{place}")
                return storage()
        if address:
            raise Fault(f"{who}: a pointer into no memory of the device: freed, or of the host")
        return None


@dataclass
class _Users:
    """Who used a storage last."""

    writer: tuple[int, int] | None = None  # stream, time
    readers: dict[int, int] = field(default_factory=dict)

    def touch(self, stream: "Stream", now: int, *, writes: bool) -> None:
        self.seen(stream.clock, f"stream {stream.cuda_stream:#x}")
        if writes:
            for other, at in self.readers.items():
                if stream.clock.get(other, 0) < at:
                    raise Fault(f"{stream} overwrites what {other:#x} may still read ({site()})")
            self.writer, self.readers = (stream.identity, now), {}
        else:
            self.readers[stream.identity] = now

    def seen(self, clock: dict[int, int], who: str) -> None:
        if self.writer is not None and clock.get(self.writer[0], 0) < self.writer[1]:
            raise Fault(f"{who} reads what another stream may still be writing ({site()})")


def _merge(into: dict[int, int], clock: dict[int, int]) -> None:
    for stream, at in clock.items():
        into[stream] = max(into.get(stream, 0), at)


runtime: Runtime = None  # of the block that is running
_numbers = itertools.count(0x1000, 16)


class Stream:
    """Stands in for torch.cuda.Stream."""

    def __init__(
        self, device: object = None, priority: int = 0, *, pointer: int | None = None, runtime: Runtime | None = None
    ) -> None:
        self._runtime = runtime or globals()["runtime"]
        number = next(_numbers)
        self.cuda_stream = number if pointer is None else pointer
        self.identity = number
        index = self._runtime.current if device is None else torch.device(device).index
        self.device = torch.device("cuda", index or 0)
        self._runtime.every.append(self)
        self.clock: dict[int, int] = {}
        self.later: list[Callable[[], None]] = []  # copies to the host that nobody has waited for

    def step(self) -> int:
        """One more piece of work, which begins after all that the host has seen."""
        _merge(self.clock, self._runtime.host)
        self.clock[self.identity] = self.clock.get(self.identity, 0) + 1
        return self.clock[self.identity]

    def finish(self) -> None:
        later, self.later = self.later, []
        for copy in later:
            copy()

    def wait_stream(self, other: "Stream") -> None:
        _merge(self.clock, other.clock)

    def wait_event(self, event: "Event") -> None:
        _merge(self.clock, event.clock)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._runtime.sync([self], "stream.synchronize")

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return self._runtime.capturing is not None

    def __repr__(self) -> str:
        return f"stream {self.cuda_stream:#x}"


class Event:
    """Stands in for torch.cuda.Event."""

    def __init__(self, *, enable_timing: bool = False, blocking: bool = False) -> None:
        self.timed, self.clock, self.at = enable_timing, {}, None
        self.stream: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or runtime.stream
        self.clock, self.at = dict(self.stream.clock), time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or runtime.stream).wait_event(self)

    def synchronize(self) -> None:
        if self.stream is not None:
            runtime.sync([self.stream], "event.synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        if not (self.timed and end.timed) or self.at is None or end.at is None:
            raise RuntimeError("Both events must be created with enable_timing=True and be recorded")
        for event in (self, end):
            if any(runtime.host.get(stream, 0) < at for stream, at in event.clock.items()):
                raise RuntimeError("device not ready: an event is asked for its time before the host has waited for it")
        return (end.at - self.at) * 1e3


class Graph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.launches: list[Callable[[], None]] = []
        self.stream: Stream | None = None

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        if runtime.stream in runtime.defaults:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        if runtime.capturing:
            raise Fault("a capture begins within another")
        runtime.capturing, self.stream = self, runtime.stream

    def capture_end(self) -> None:
        if runtime.capturing is not self or runtime.stream is not self.stream:
            raise Fault("a capture ends that did not begin on this stream")
        runtime.capturing = None

    def replay(self) -> None:
        if runtime.capturing:
            raise Fault("a graph is replayed while one is captured")
        runtime.counts.replays[site()] += 1
        for launch in self.launches:
            launch()


@contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    """Stands in for torch.cuda.stream."""
    if stream is None:
        yield
        return
    index, device = stream.device.index, runtime.current
    before, runtime.streams[index], runtime.current = runtime.streams[index], stream, index
    try:
        yield
    finally:
        runtime.streams[index], runtime.current = before, device


def site() -> str:
    """File and line of the package that is running, innermost first."""
    frame = sys._getframe(1)
    while frame:
        name = frame.f_code.co_filename
        if any(root in name for root in ROOTS) and "/tests/" not in name:
            return f"{name.rsplit('/', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
