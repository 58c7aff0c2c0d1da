"""`python -m qdv_gpu` is `qdv-gpu`."""

from qdv_gpu.cli import main

main()
