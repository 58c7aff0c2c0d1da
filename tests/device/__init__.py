"""A CUDA device that is not there: the compiler's own code for it, run and inspected on a CPU."""
