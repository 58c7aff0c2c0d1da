"""The hot loops: CUDA C++ (`*.cu`) for the GPU and numba (`cpu.py`) for the CPU."""
