"""Compile `kernels/*.cu` with g++, to run them on the CPU."""

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qdv_gpu import kernels

HERE = Path(__file__).parent
HAS_COMPILER = shutil.which("g++") is not None


@functools.cache
def load(name: str, /, **defines: int) -> "Module":
    """The stand-in for `qdv_gpu.kernels.load`: the same source, compiled by g++ against cuda_shim.h."""
    source = kernels.FOLDER / f"{name}.cu"
    names = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)", source.read_text())
    text = '#include "cuda_shim.h"\n' + f'#include "{source}"\n' + "".join(f"SHIM_EXPORT({n})\n" for n in names)
    folder = Path(tempfile.mkdtemp(prefix="cuda_shim_"))
    main, library = folder / "main.cpp", folder / f"{hashlib.sha1(text.encode()).hexdigest()[:8]}.so"
    main.write_text(text)
    macros = [f"-D{macro}={value}" for macro, value in defines.items()]
    command = [
        "g++",
        "-O1",
        "-g",
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-w",
        f"-I{HERE}",
        *macros,
        str(main),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    module = Module(ctypes.CDLL(str(library)))
    shutil.rmtree(folder)
    return module


class Module:
    """Kernels that run on CPU tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def launch(self, kernel: str, *args: Any, grid: tuple[int, ...], block: int, seed: int = 0) -> None:
        """Run a kernel as `qdv_gpu.kernels.launch` does; arguments are CPU tensors, contiguous, or numpy scalars."""
        boxes = []
        for arg in args:
            if isinstance(arg, torch.Tensor):
                assert arg.is_contiguous()
                assert not arg.is_cuda
                boxes.append(ctypes.c_void_p(arg.data_ptr()))
            else:
                boxes.append((ctypes.c_char * arg.nbytes).from_buffer_copy(np.asarray(arg).tobytes()))
        pointers = (ctypes.c_void_p * len(boxes))(*(ctypes.addressof(box) for box in boxes))
        sizes = (ctypes.c_uint * 6)(*grid, *[1] * (3 - len(grid)), block, 1, 1)
        if getattr(self._library, f"run_{kernel}")(pointers, sizes, ctypes.c_uint(seed)):
            raise RuntimeError(f"{kernel}: threads of a block wait for others that never come")
