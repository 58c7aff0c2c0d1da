#!/usr/bin/env bash
# Does qdv_gpu work on this machine's GPU, and how fast? `benchmarks/gpu_check.sh --help` says what it does.
cd "$(dirname "$0")/.." && exec python3 -m benchmarks.check "$@"
