"""The code that NVRTC makes for a GPU, without one: PTX, which `ptx.py` runs, and the binary."""

import functools

try:
    from cuda import pathfinder
    from cupy.cuda import nvrtc
except ImportError:
    nvrtc = None

HAS_COMPILER = nvrtc is not None
ARCHITECTURES = (75, 80, 90, 100, 120)


@functools.cache
def ptx(source: str, options: tuple[str, ...], arch: str = "compute_90") -> str:
    """The PTX of CUDA C++ for a virtual architecture; raises RuntimeError with the compiler's log."""
    return _compiled(source, options, arch, nvrtc.getPTX).decode()


@functools.cache
def cubin(source: str, options: tuple[str, ...], arch: str = "sm_90") -> bytes:
    """The binary (an ELF file) for a real architecture; raises RuntimeError with the compiler's log."""
    return _compiled(source, options, arch, nvrtc.getCUBIN) + b"\0"  # CuPy takes the last byte for a string's end


def _compiled(source, options, arch, result):
    include = pathfinder.find_nvidia_header_directory("cudart")
    program = nvrtc.createProgram(source, "kernel.cu", (), ())
    try:
        nvrtc.compileProgram(program, (f"-arch={arch}", f"-I{include}", *options))
        return result(program)
    except nvrtc.NVRTCError:
        raise RuntimeError(nvrtc.getProgramLog(program)) from None
    finally:
        nvrtc.destroyProgram(program)
