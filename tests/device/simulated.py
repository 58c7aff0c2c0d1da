"""CUDA devices that are not there: the device code of the package runs from end to end on a CPU.

    with simulated.devices() as gpu:
        analyze("alexnet", data, out, device="cuda")
    gpu.counts.syncs

A tensor of the device (`SimTensor`) says "cuda:0" and holds memory of the CPU. A dispatch mode sees each operator of
torch and runs it on that memory, a function mode does what torch does before an operator is reached (`.to`, `.cuda`,
`torch.tensor`), torch.cuda is patched with `runtime`'s streams and graphs, and `libraries` stands in for CuPy, faiss
and cuML. The kernels of the package run as PTX.

What a GPU would answer with an error is one here: tensors of two devices, `.numpy()`, a generator of the CPU, work or a
sync while a graph is captured, streams that do not wait for each other. New memory holds NaN. A product in TF32 rounds
its factors. A generator of a device gives other numbers than the CPU's of the same seed. Copies to the host that nobody
has waited for have not happened. `counts` says what was asked of the devices, by line.

What this does not show: time, cuDNN's and cuBLAS's own roundings, the real faiss-gpu and cuML. To C++ the tensors are
on the device "meta", so that it asks no driver for anything.
"""

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from . import libraries
from . import runtime as rt
from .memory import Fault
from .runtime import Event, Graph, Runtime, Stream, on_stream, site

CPU = torch.device("cpu")
aten = torch.ops.aten
T = torch.Tensor

# Operators by what they do on a GPU.
SYNCS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
    "bincount", "histc", "is_nonzero", "repeat_interleave", "_linalg_eigh", "_linalg_svd", "_linalg_solve_ex",
}  # fmt: skip
VIEWS = {
    "view", "slice", "select", "transpose", "t", "permute", "expand", "unsqueeze", "squeeze", "detach", "alias",
    "as_strided", "split", "split_with_sizes", "unbind", "_unsafe_view", "_reshape_alias", "diagonal", "lift_fresh",
    "view_as", "unflatten", "chunk", "unfold",
}  # fmt: skip
EMPTY = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "resize_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = {"copy_", "_to_copy"}
STAGED = 1 << 16  # bytes that the driver takes from pageable memory at once
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "convolution", "convolution_backward"}
# Sums by atomic additions, or in an order that cuDNN chooses.
UNORDERED = {
    "scatter_add", "scatter_add_", "index_add", "index_add_", "scatter_reduce", "max_pool2d_with_indices_backward",
    "upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "_adaptive_avg_pool2d_backward", "histc",
    "embedding_dense_backward",
}  # fmt: skip


class SimTensor(torch.Tensor):
    """A tensor of a simulated device; `inner` holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    inner: torch.Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, inner: torch.Tensor, place: torch.device) -> "SimTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device("meta", place.index),
        )  # fmt: skip
        made.inner, made.place = inner, place
        return made

    def __init__(self, inner: torch.Tensor, place: torch.device) -> None:
        pass

    device = property(lambda self: self.place)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def get_device(self) -> int:
        return self.place.index

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(
            f"can't convert {self.place} device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )

    __array__ = numpy

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> "SimTensor":
        new = self.detach().clone().requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            new._is_param = True
        memo[id(self)] = new
        return new

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"{self.inner!r} on {self.place}"


def is_sim(value: Any) -> bool:
    return isinstance(value, SimTensor)


class Generator(torch.Generator):
    """Stands in for torch.Generator: one of a device gives numbers of its own."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        return super().__new__(cls)

    def __init__(self, device: Any = "cpu") -> None:
        self.place = _resolved(device)
        self.manual_seed(super().initial_seed())

    device = property(lambda self: self.place)

    def manual_seed(self, seed: int) -> "Generator":
        super().manual_seed(seed ^ 0x5EED if self.place.type == "cuda" else seed)
        return self


def _resolved(device: Any) -> torch.device:
    """With an index, if it is a CUDA device."""
    found = torch.device(device)
    if found.type == "meta":
        found = torch.device("cuda", found.index)
    if found.type != "cuda":
        return found
    index = rt.runtime.current if found.index is None else found.index
    if index >= len(rt.runtime.memory):
        raise RuntimeError(f"CUDA error: invalid device ordinal {index}")
    return torch.device("cuda", index)


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """An operator, on CPU tensors alone or with tensors of simulated devices."""
    name = func._schema.name.split("::")[1]
    if func.namespace == "qdv_gpu":  # our own: the operator's body launches the kernels
        with _dispatch:
            return _bodies()[name](*args, **kwargs)
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, T)]
    sims = [x for x in leaves if is_sim(x)]
    asked = kwargs.get("device")
    target = None if asked is None else _resolved(asked)
    if not sims and (target is None or target.type != "cuda"):
        return func(*args, **kwargs)
    if func._can_decompose():  # made of other operators; in inference mode it arrives whole
        with _dispatch:
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
    place = _place_of(name, args, sims, leaves, target)
    down = sims and ((name == "_to_copy" and place.type == "cpu") or (name == "copy_" and not is_sim(args[0])))
    up = (name == "_to_copy" and not sims) or (name == "copy_" and is_sim(args[0]) and not is_sim(args[1]))
    masked = name in INDEXING and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if name in COPIES and len({x.place for x in sims} | {place}) > 1 and not up and not down:  # between two devices
        ends = [rt.runtime.streams[one.index] for one in {sims[-1].place, place}]
        ends[0].wait_stream(ends[-1])
        ends[-1].wait_stream(ends[0])
    if name not in VIEWS:
        _count(name, args, kwargs, place, masked=masked, up=up, down=down)
    if down and name == "_to_copy" and kwargs.get("non_blocking"):
        return _copy_later(func, args, kwargs)

    if name in PRODUCTS and not sims[0].is_floating_point() and not sims[0].is_complex():
        raise RuntimeError(f'"{name}_cuda" not implemented for {sims[0].dtype}')
    if name in PRODUCTS and sims[0].dtype == torch.float32 and _in_tf32(name):
        rt.runtime.counts.tf32[f"{site()} {name}"] += 1
        rounded = {id(x): _rounded(x) for x in sims if x.ndim > 1}
        args, kwargs = tree_map(lambda x: rounded.get(id(x), x), (args, kwargs))
    inner_args, inner_kwargs = tree_map(lambda x: x.inner if is_sim(x) else x, (args, dict(kwargs)))
    if inner_kwargs.get("device") is not None:
        inner_kwargs["device"] = CPU
    inner_kwargs.pop("non_blocking", None)
    inner_kwargs.pop("pin_memory", None)
    if name == "copy_":
        inner_args = inner_args[:2]
    out = func(*inner_args, **inner_kwargs)
    if name == "_to_copy" and any(out is x for x in inner_args):
        out = out.clone()
    if name in EMPTY:
        _poison(out)

    touched = [x for x in sims if x.inner.untyped_storage().nbytes()]
    if name not in VIEWS:
        _touch(func, args, touched, out, place if place.type == "cuda" else touched[0].place)
    if name == "_local_scalar_dense" or name in ("equal", "is_nonzero"):
        return out
    if down:
        return out if name == "_to_copy" else args[0]
    if place.type == "cpu":  # `zeros_like` and its like
        return out
    known = {id(x.inner): x for x in sims}
    # A view of a normal tensor is a normal tensor, in inference mode as well.
    normal = name in VIEWS and sims and not sims[0].is_inference()
    with torch.inference_mode(mode=torch.is_inference_mode_enabled() and not normal):
        return tree_map(lambda x: _wrapped(x, place, known) if isinstance(x, T) else x, out)


def _place_of(
    name: str, args: Any, sims: list[SimTensor], leaves: list[T], target: torch.device | None
) -> torch.device:
    """Where the result belongs; raises what torch does if the tensors lie on several devices."""
    if name in COPIES:
        return target or args[0].device
    if name in INDEXING:
        if not is_sim(args[0]):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if name != "index" and not is_sim(args[2]) and args[2].dim() > 0:
            raise RuntimeError(f"{name}: the values must be on {args[0].place}")
        if any(is_sim(x) and x.place != args[0].place for x in args[1] if x is not None):
            raise RuntimeError(f"{name}: an index is on another device than {args[0].place} ({site()})")
        return args[0].place
    if not sims:
        return target
    scalars = name not in ("cat", "stack")  # that a GPU takes from the host
    places = {x.place for x in sims} | {CPU for x in leaves if not is_sim(x) and (x.dim() > 0 or not scalars)}
    if len(places) > 1:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(sorted(map(str, places)))}! ({name} at {site()})"
        )
    return target or sims[0].place


def _count(
    name: str, args: Any, kwargs: Any, place: torch.device, *, masked: bool, up: Any, down: Any
) -> None:  # fmt: skip
    counts, where = rt.runtime.counts, site()
    if rt.runtime.capturing:
        raise Fault(f"torch's {name} while a graph is captured ({where})")
    counts.launches[where] += 1
    spared = name == "repeat_interleave" and kwargs.get("output_size") is not None
    stream = rt.runtime.streams[place.index if place.type == "cuda" else rt.runtime.current]
    later = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
    if (name in SYNCS and not spared) or masked:
        rt.runtime.sync([stream], f"{name}{' (mask)' * masked}")
    if down:
        source = args[1] if name == "copy_" else args[0]
        counts.to_host[where] += source.nbytes
        counts.largest_copy = max(counts.largest_copy, source.nbytes)
        if not later:
            rt.runtime.sync([rt.runtime.streams[source.place.index]], "copy to the host")
    uploads = [args[1] if name == "copy_" else args[0]] if up else []
    if name in INDEXING:
        uploads = [x for x in args[1] if x is not None and not is_sim(x) and x.dim()]
    for source in uploads:
        counts.from_host[where] += source.nbytes
        if not later:
            rt.runtime.sync([stream], "copy to the device")
        elif not _is_pinned(source) and source.nbytes > STAGED:
            counts.pageable[where] += source.nbytes
    ordered = name == "convolution_backward" and torch.backends.cudnn.deterministic
    if name in UNORDERED or (name == "convolution_backward" and not ordered):
        counts.unordered[f"{where} {name}"] += 1


def _touch(func: Any, args: Any, sims: list[SimTensor], out: Any, place: torch.device) -> None:
    """Tell the runtime whose memory the operator reads and writes."""
    written = {x.untyped_storage().data_ptr() for x in tree_leaves(out) if isinstance(x, T)}
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write and is_sim(value):
            written.add(value.inner.untyped_storage().data_ptr())
    storages = {x.inner.untyped_storage().data_ptr(): x.inner.untyped_storage() for x in sims}
    storages |= {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tree_leaves(out) if isinstance(x, T)}
    rt.runtime.ran(place.index, [s for s in storages.values() if s.nbytes()], written)


def _wrapped(x: T, place: torch.device, known: dict[int, SimTensor]) -> SimTensor:
    if id(x) in known:
        return known[id(x)]
    storage = x.untyped_storage()
    if not any(storage is s.inner.untyped_storage() for s in known.values()):
        rt.runtime.allocate(place.index, storage)
    return SimTensor(x, place)


def _poison(out: Any) -> None:
    for x in tree_leaves(out):
        number = x.is_floating_point() or x.is_complex()
        x.fill_(torch.nan if number else x.dtype == torch.bool or torch.iinfo(x.dtype).max)


def _in_tf32(name: str) -> bool:
    part: Any = torch.backends.cudnn.conv if "convolution" in name else torch.backends.cuda.matmul
    return part.fp32_precision == "tf32"


def _rounded(x: SimTensor) -> SimTensor:
    """To the 10 bits of TF32's fraction."""
    bits = (x.inner.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF
    return SimTensor(bits.view(torch.float32).view(x.shape), x.place)


def _copy_later(func: Any, args: Any, kwargs: Any) -> T:
    """A copy to the host that holds nonsense until its stream has been waited for."""
    source = args[0]
    options = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking", "pin_memory")}
    out = func(source.inner, device=CPU, **options)
    out = out.clone() if out.data_ptr() == source.inner.data_ptr() else out
    truth = out.clone()
    _poison(out)
    _touch(func, (source,), [source], (), source.place)
    rt.runtime.streams[source.place.index].later.append(lambda: out.copy_(truth))
    return out


_pinned: set[int] = set()


def _is_pinned(x: T) -> bool:
    return x.untyped_storage().data_ptr() in _pinned


def _pin(x: T) -> T:
    import weakref

    made = x.clone()
    storage = made.untyped_storage()
    _pinned.add(storage.data_ptr())
    weakref.finalize(storage, _pinned.discard, storage.data_ptr())
    return made


def _bodies() -> dict[str, Any]:
    from qdv_gpu.deconv import unpool

    return {"max_pool": unpool._max_pool._init_fn, "unpool": unpool._unpool._init_fn}


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


_dispatch = _Dispatch()


class _Front(TorchFunctionMode):
    """What torch does before an operator is reached."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        x = args[0] if args else None
        if func in (T.cuda, T.cpu, T.to):
            return _moved(func, x, args[1:], kwargs)
        if func is T.pin_memory:
            if is_sim(x):
                raise RuntimeError(f"cannot pin a tensor of {x.place}: only dense CPU tensors can be pinned")
            return _pin(x)
        if func is T.is_pinned:
            return not is_sim(x) and _is_pinned(x)
        if func in (torch.tensor, torch.as_tensor, torch.asarray, T.new_tensor):
            return _made(func, args, kwargs)
        if is_sim(x) and getattr(func, "__name__", "") == "__set__" and func.__self__ is T.data:
            x.inner, x.place = args[1].inner, args[1].place
            return None
        kind = next((a.device.type for a in args if isinstance(a, T)), None)
        if (generator := kwargs.get("generator")) is not None:
            wanted = kind or torch.device(kwargs.get("device") or "cpu").type
            if generator.device.type != wanted:
                raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{generator.device}'")
        if kind == "cuda" and func in AUTOCAST and torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            args, kwargs = tree_map(
                lambda a: a.to(dtype) if is_sim(a) and a.dtype == torch.float32 else a, (args, kwargs)
            )
        return func(*args, **kwargs)


AUTOCAST = {
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose2d, torch.nn.functional.linear, torch.matmul,
    torch.mm, torch.bmm, torch.nn.functional.scaled_dot_product_attention, T.matmul, T.__matmul__, T.mm,
}  # fmt: skip


def _moved(func: Any, x: T, rest: Any, kwargs: dict[str, Any]) -> T:
    """Tensor.to, .cuda and .cpu."""
    dtype, device = kwargs.get("dtype"), kwargs.get("device")
    flags = []
    for extra in [*rest, *([kwargs["other"]] if "other" in kwargs else [])]:
        if isinstance(extra, torch.dtype):
            dtype = extra
        elif isinstance(extra, T):
            dtype, device = extra.dtype, extra.device
        elif isinstance(extra, bool):
            flags.append(extra)
        elif extra is not None:
            device = extra
    if isinstance(device, int):
        device = torch.device("cuda", device)
    to = _resolved("cuda" if device is None else device) if func is T.cuda else CPU if func is T.cpu else None
    to = to or (x.device if device is None else _resolved(device))
    later = kwargs.get("non_blocking", bool(flags and flags[0]))
    copy, dtype, layout = kwargs.get("copy", len(flags) > 1 and flags[1]), dtype or x.dtype, kwargs.get("memory_format")
    options = {} if layout is None else {"memory_format": layout}
    settled = layout in (None, torch.preserve_format) or x.is_contiguous(memory_format=layout)
    if to == x.device and dtype == x.dtype and not copy and settled:
        return x
    return aten._to_copy(x, dtype=dtype, device=to, non_blocking=bool(later), **options)


def _made(func: Any, args: Any, kwargs: dict[str, Any]) -> T:
    """torch.tensor and its like: made on the host, then moved."""
    device = kwargs.pop("device", None)
    data = args[1] if func is T.new_tensor else args[0]
    if func is T.new_tensor:
        device = args[0].device if device is None else device
        kwargs.setdefault("dtype", args[0].dtype)
    if isinstance(data, T):
        if func is not torch.tensor and func is not T.new_tensor:  # not copied
            moved = data if kwargs.get("dtype") is None else data.to(kwargs["dtype"])
            return moved if device is None else moved.to(device)
        copy = data.detach().clone()
        copy = copy if kwargs.get("dtype") is None else copy.to(kwargs["dtype"])
        return copy.to(data.device if device is None else device)
    make = torch.tensor if func is T.new_tensor else func
    plain = tree_map(lambda a: a.item() if is_sim(a) else a, data) if isinstance(data, list | tuple) else data
    made = make(plain, **kwargs)
    return made if device is None else made.to(_resolved(device))


class _Device(contextlib.ContextDecorator):
    """Stands in for torch.cuda.device."""

    def __init__(self, device: Any) -> None:
        self.index = _resolved(device if not isinstance(device, int) else torch.device("cuda", device)).index

    def __enter__(self) -> None:
        self.before, rt.runtime.current = rt.runtime.current, self.index

    def __exit__(self, *_: Any) -> None:
        rt.runtime.current = self.before


def _index(device: Any = None) -> int:
    return rt.runtime.current if device is None else device if isinstance(device, int) else _resolved(device).index


def _patches(runtime: Runtime) -> dict[str, Any]:
    """What torch.cuda has instead."""
    memory = runtime.memory
    seeds = dict.fromkeys(range(len(memory)), 0)

    def select(device: Any) -> None:
        runtime.current = _index(device)

    def synchronize(device: Any = None) -> None:
        runtime.sync([one for one in runtime.every if one.device.index == _index(device)], "synchronize")

    def empty_cache() -> None:
        for one in memory:
            one.reserved = one.allocated

    def reset(device: Any = None) -> None:
        one = memory[_index(device)]
        one.peak, one.peak_reserved = one.allocated, one.reserved

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_initialized": True,
        "_lazy_init": lambda: None,
        "device_count": lambda: len(memory),
        "current_device": lambda: runtime.current,
        "set_device": select,
        "device": _Device,
        "current_stream": lambda device=None: runtime.streams[_index(device)],
        "default_stream": lambda device=None: runtime.defaults[_index(device)],
        "is_current_stream_capturing": lambda: runtime.capturing is not None,
        "stream": on_stream,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "synchronize": synchronize,
        "mem_get_info": lambda device=None: (
            memory[_index(device)].size - memory[_index(device)].reserved,
            memory[_index(device)].size,
        ),
        "memory_allocated": lambda device=None: memory[_index(device)].allocated,
        "memory_reserved": lambda device=None: memory[_index(device)].reserved,
        "max_memory_allocated": lambda device=None: memory[_index(device)].peak,
        "max_memory_reserved": lambda device=None: memory[_index(device)].peak_reserved,
        "reset_peak_memory_stats": reset,
        "empty_cache": empty_cache,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: seeds.update(dict.fromkeys(seeds, seed)),
        "get_rng_state": lambda device: torch.tensor(seeds[_index(device)]),
        "set_rng_state": lambda state, device: seeds.update({_index(device): int(state)}),
        "get_device_name": lambda device=None: "simulated GPU",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(
            name="simulated GPU", total_memory=memory[_index(device)].size, multi_processor_count=132, major=9, minor=0
        ),
        "is_bf16_supported": lambda *_, **__: True,
        "_sleep": lambda cycles: None,
    }


@contextmanager
def devices(count: int = 2, *, memory: int = 8 << 30) -> Iterator[Runtime]:
    """A block in which torch has so many CUDA devices, each with so many bytes."""
    from qdv_gpu import kernels, neighbors

    runtime = Runtime(count, memory)
    before, rt.runtime = rt.runtime, runtime
    patches = _patches(runtime)
    kept, begin = {name: getattr(torch.cuda, name) for name in patches}, threading.Thread.run
    current_stream = torch.accelerator.current_stream

    def in_modes(thread: threading.Thread) -> None:  # a mode belongs to a thread
        with _dispatch, _Front():
            begin(thread)

    generator = torch.Generator
    caches = [kernels._loaded, kernels._function, neighbors._faiss_resources]
    try:
        for name, value in patches.items():
            setattr(torch.cuda, name, value)
        torch.accelerator.current_stream = lambda device=None: runtime.stream
        torch.Generator, threading.Thread.run = Generator, in_modes
        for cache in caches:
            cache.cache_clear()
        with libraries.installed(), _dispatch, _Front():
            yield runtime
    finally:
        for cache in caches:
            cache.cache_clear()
        torch.Generator, threading.Thread.run = generator, begin
        torch.accelerator.current_stream = current_stream
        for name, value in kept.items():
            setattr(torch.cuda, name, value)
        rt.runtime = before
