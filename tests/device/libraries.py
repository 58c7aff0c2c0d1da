"""CuPy, faiss and cuML on simulated devices: our launches run as PTX, searches and embeddings by torch on the CPU.

Each takes what its original takes, on the stream that it uses, and refuses what it refuses.
"""

import importlib.machinery
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from qdv_gpu.machine import product_precision

from . import compile, ptx
from . import runtime as rt
from .memory import Fault
from .runtime import site

MAX_GRID = (2**31 - 1, 65535, 65535)


class Module:
    """Stands in for cupy.cuda.function.Module, of PTX instead of a binary."""

    def load(self, code: bytes) -> None:
        self.kernels, self.device = ptx.kernels_of(code.decode()), cupy.cuda.place()[0]

    def get_function(self, name: str) -> "Function":
        return Function(self.kernels[name], self.device)


class Function:
    """Runs a kernel on the tensors that its pointers lie in."""

    def __init__(self, kernel: ptx.Kernel, device: int) -> None:
        self.kernel, self.device, self.warm = kernel, device, False

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        runtime, kernel = rt.runtime, self.kernel
        device, stream = cupy.cuda.place()
        if device != self.device:
            raise Fault(f"{kernel.name} was loaded on cuda:{self.device} and is launched on cuda:{device} ({site()})")
        if stream != runtime.streams[device].cuda_stream:
            raise Fault(f"{kernel.name} is launched on another stream than torch's current one ({site()})")
        if any(not 1 <= size <= most for size, most in zip(grid, MAX_GRID, strict=False)):
            raise Fault(f"{kernel.name}: invalid grid {grid}")
        if not 1 <= block[0] <= kernel.max_threads:
            raise Fault(f"{kernel.name}: {block[0]} threads, but it is bound to {kernel.max_threads}")
        if len(arguments) != len(kernel.params):
            raise Fault(f"{kernel.name} takes {len(kernel.params)} arguments, got {len(arguments)}")
        raw, pointers = [], []
        for (name, dtype), value in zip(kernel.params, arguments, strict=True):
            data = np.int64(value).tobytes() if isinstance(value, int) else value.tobytes()
            if len(data) != np.dtype(dtype).itemsize:
                raise Fault(f"{kernel.name}: {name} has {np.dtype(dtype).itemsize} bytes, got {len(data)}")
            if isinstance(value, int):
                pointers.append(value)
            raw.append(data)

        def launch() -> None:
            runtime.counts.kernels[kernel.name] += 1
            found = [runtime.storage_at(pointer, device, kernel.name) for pointer in pointers]
            storages = [storage for storage in found if storage is not None]
            runtime.ran(device, storages, {storage.data_ptr() for storage in storages})
            if runtime.counts.kernels[kernel.name] > runtime.run.get(kernel.name, sys.maxsize):
                return
            memory = ptx.Memory(races=self.kernel.name not in runtime.searched)
            runtime.searched.add(self.kernel.name)
            for storage in storages:
                memory.add(storage.data_ptr(), storage.nbytes())
            kernel.run(memory, raw, grid, block[0])

        if runtime.capturing:
            if not self.warm:
                raise Fault(f"{kernel.name} is loaded while a graph is captured ({site()})")
            if runtime.capturing.stream is not runtime.streams[device]:
                raise Fault(f"{kernel.name} is launched on a stream that is not captured ({site()})")
            runtime.capturing.launches.append(launch)
        else:
            self.warm = True
            launch()


class Array:
    """Stands in for cupy.ndarray: a view of a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    ndim = property(lambda self: self.tensor.ndim)
    shape = property(lambda self: tuple(self.tensor.shape))
    dtype = property(lambda self: np.dtype(str(self.tensor.dtype).removeprefix("torch.")))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (self.tensor.data_ptr(), False), "version": 3}


class _Place:
    """CuPy's current device and stream; both are contexts."""

    def __init__(self) -> None:
        self.devices, self.pointers = [], []

    def __call__(self) -> tuple[int, int]:
        return (self.devices or [rt.runtime.current])[-1], (self.pointers or [0xC0FFEE])[-1]

    @contextmanager
    def on_device(self, index: int) -> Iterator[None]:
        self.devices.append(index)
        try:
            yield
        finally:
            self.devices.pop()

    @contextmanager
    def on_stream(self, pointer: int, device_id: int = -1) -> Iterator[None]:
        self.pointers.append(pointer)
        try:
            yield
        finally:
            self.pointers.pop()


def _cupy() -> Any:
    place = _Place()
    module: Any = types.ModuleType("cupy")
    module.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    module.ndarray, module.from_dlpack = Array, lambda tensor: Array(tensor)
    module.cuda = types.SimpleNamespace(
        Device=place.on_device,
        ExternalStream=place.on_stream,
        place=place,
        function=types.SimpleNamespace(Module=Module),
        compiler=types.SimpleNamespace(
            compile_using_nvrtc=lambda source, flags: (compile.ptx(source, flags).encode(), {})
        ),
    )
    return module


class Resources:
    """Stands in for faiss.StandardGpuResources."""

    def __init__(self) -> None:
        self.pinned, self.temporary = 256 << 20, 1536 << 20
        rt.runtime.faiss_resources.append(self)

    def setTempMemory(self, size: int) -> None:
        self.temporary = size

    def setPinnedMemory(self, size: int) -> None:
        self.pinned = size


def knn_gpu(
    resources: Resources, queries: torch.Tensor, points: torch.Tensor, k: int, *, device: int, use_cuvs: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared L2 distances by expansion, clamped at 0, and indices, on torch's stream."""
    if queries.device.index != device or rt.runtime.current != device:
        raise Fault(f"faiss searches on cuda:{device} points that are on {queries.device}")
    if k > 2048:
        raise SystemExit("faiss aborts the process for more than 2048 neighbours")
    with product_precision("ieee"):  # whatever torch is told
        D = (queries.square().sum(1)[:, None] + points.square().sum(1) - 2 * queries @ points.T).clamp_(min=0)
    found = D.topk(k, dim=1, largest=False)
    return found.values, found.indices


class CumlTSNE:
    """Stands in for cuml.manifold.TSNE: a map that says what was given, after the checks that cuML does not make."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def fit_transform(self, X: Array) -> Array:
        given = [X.tensor, *(array.tensor for array in self.settings["precomputed_knn"] or ())]
        for tensor in given:
            rt.runtime.host_reads(tensor.untyped_storage(), "cuML, which runs on a stream of its own,")
        pool = rt.runtime.memory[X.tensor.device.index]
        if pool.reserved > pool.allocated:
            raise Fault("cuML allocates beside torch, which keeps memory for later")
        if X.tensor.T.is_contiguous() is False or X.tensor.dtype != torch.float32:
            raise Fault("cuML copies points that are not float32 by columns")
        generator = torch.Generator().manual_seed(self.settings["random_state"])
        made = torch.randn(2, len(X.tensor), generator=generator)
        with rt.on_stream(rt.Stream(X.tensor.device)):
            if self.settings["precomputed_knn"] is not None:
                indices, distances = given[1:]
                if not torch.equal(indices[:, 0].cpu(), torch.arange(len(indices))):
                    raise Fault("cuML requires each point as its own first neighbour")
                distances.square_()  # in place, as cuML does
            return Array(made.to(X.tensor.device, non_blocking=True).T)


cupy: Any = None


@contextmanager
def installed() -> Iterator[None]:
    """A block in which these are what the package imports."""
    global cupy
    import faiss

    compile.ptx("", ())  # loads NVRTC, while the real CuPy can be imported
    before, cupy = cupy, _cupy()
    cuml: Any = types.ModuleType("cuml")
    cuml.__spec__ = importlib.machinery.ModuleSpec("cuml", None)
    manifold: Any = types.ModuleType("cuml.manifold")
    manifold.TSNE = CumlTSNE
    wrapper = types.ModuleType("faiss.contrib.torch_utils")
    stand_ins = {"cupy": cupy, "cuml": cuml, "cuml.manifold": manifold, "faiss.contrib.torch_utils": wrapper}
    kept = {name: sys.modules.get(name) for name in stand_ins}
    from_dlpack, made = (
        torch.from_dlpack,
        {"knn_gpu": knn_gpu, "StandardGpuResources": Resources, "get_num_gpus": _gpus},
    )
    old = {name: getattr(faiss, name, None) for name in made}
    try:
        sys.modules.update(stand_ins)
        torch.from_dlpack = lambda x, **_: x.tensor if isinstance(x, Array) else from_dlpack(x)
        for name, value in made.items():
            setattr(faiss, name, value)
        yield
    finally:
        for name, module in kept.items():
            sys.modules[name] = module
            if module is None:
                del sys.modules[name]
        torch.from_dlpack = from_dlpack
        for name, value in old.items():
            setattr(faiss, name, value)
            if value is None:
                delattr(faiss, name)
        cupy = before


def _gpus() -> int:
    return len(rt.runtime.memory)
