"""Faults put into the device code on purpose, each into a copy of it, and which test sees it. Run by hand:

    python tests/device/faults.py [NAME...] [--markdown]

A fault that no test sees is a hole in what stands in for a GPU. With --markdown docs/gpu-notes.md gets the table.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
NOTES, HEADING = ROOT / "docs" / "gpu-notes.md", "## Faults put in on purpose"
LIMIT = 600  # seconds for the tests of one fault
STAGES, BUDGETS, SIMULATED, OFFSETS = (
    f"tests/device/test_{name}.py" for name in ("stages", "budgets", "simulated", "offsets")
)
UPDATES, COMPILED = (
    f"tests/test_kernels.py::test_{name}" for name in ("update_follows_its_formula", "gradient_agrees_with_autograd")
)
UNPOOL = (
    "tests/deconv/test_unpool.py::test_operators_give_the_same_bits_on_a_gpu "
    "tests/deconv/test_unpool.py::test_kernels_give_the_bits_of_the_cpu"
)
DESCENT, SECOND, PICTURES = (f"{STAGES}::test_{name}" for name in ("tsne", "a_second_device", "deconvnet"))
START = f"{STAGES}::test_tsne_after_three_iterations_from_its_own_start"
CUML = f"{STAGES}::test_cuml_gets_what_it_requires"
GRIDS, MESH = "qdv_gpu/tsne/engines/fft_cuda.py", "kernels/tsne_fft.cu"
ON_GRIDS = "tests/tsne/test_fft_cuda.py"
DISTANCES = (
    "tests/test_neighbors.py::test_distances_have_the_same_bits_on_a_gpu "
    "tests/test_neighbors.py::test_the_source_on_the_cpu"
)
RANKS = "tests/scores/test_quality.py::test_ranks_with_ties"
DIVERGENCE = "tests/tsne/test_objective.py"
STEP = "    def step() -> None:\n"
FIRST = """{start}
    const int n = (int)(start[blockIdx.y + 1] - first);
{end}"""
LANE = "    const int lane = threadIdx.x % 32;\n    const int row = "
REPEL = f"{LANE}(blockIdx.x * (THREADS / 32) + threadIdx.x / 32) * ROWS;"
ATTRACT = f"{LANE}blockIdx.x * (THREADS / 32) + threadIdx.x / 32;"
UPDATE = "    const int t = threadIdx.x;"
POINTS, INT_POINTS = (f"    const {kind} first = start[blockIdx.y];" for kind in ("long long", "int"))


class Fault(NamedTuple):
    """`old` stands once in `file`; the tests are arguments of pytest, separated by spaces."""

    file: str
    old: str
    new: str
    why: str
    tests: str


# fmt: off
FAULTS = {
    # Launches
    "CuPy's own stream": Fault(
        "kernels/__init__.py", "with cupy.cuda.Device(device), cupy.cuda.ExternalStream(stream, device):",
        "with cupy.cuda.Device(device):", "the kernel does not wait for torch's operators", SIMULATED),
    "launch on the current device": Fault(
        "kernels/__init__.py", "with cupy.cuda.Device(device), cupy.cuda.ExternalStream(stream, device):",
        "with cupy.cuda.ExternalStream(stream, device):", "a kernel gets memory of another device",
        SIMULATED),
    "descent on the current device": Fault(
        "qdv_gpu/tsne/engines/cuda.py", "with torch.cuda.device(Z.device):", "if True:",
        "streams and graphs are made on cuda:0", SECOND),
    "grid a block short": Fault(
        "qdv_gpu/tsne/engines/cuda.py", "grid=(-(-N // 16), B)", "grid=(N // 16, B)", "the last rows are not computed",
        DESCENT),
    "grid of pixels a block short": Fault(
        "qdv_gpu/deconv/unpool.py", "grid = (-(-math.prod(out) // THREADS),", "grid = (math.prod(out) // THREADS,",
        "the last pixels are not written", UNPOOL),
    "grid axes exchanged": Fault(
        "qdv_gpu/tsne/engines/cuda.py", "grid=(-(-N // 4), B)", "grid=(B, -(-N // 4))",
        "reads starts that are not there", DESCENT),
    "grid beyond 65,535": Fault(
        "qdv_gpu/deconv/unpool.py", "min(B, MAX_GRID)", "B", "CUDA refuses it", OFFSETS),
    "scalars in float64": Fault(
        "qdv_gpu/tsne/engines/cuda.py", "phase.momentum], dtype=np.float32)", "phase.momentum], dtype=np.float64)",
        "arguments are copied by the bytes that the kernel declares", START),
    "argument left out": Fault(
        "qdv_gpu/tsne/engines/cuda.py", "attraction, repulsion, weight, start, *scalars,",
        "attraction, repulsion, start, *scalars,", "each pointer stands for the next", START),
    "int64 where int32 is read": Fault(
        "qdv_gpu/tsne/affinities.py", "(keys % N).to(torch.int32)", "keys % N", "every other index is 0",
        f"{START} tests/tsne/test_affinities.py::test_cuda_agrees_with_cpu"),
    "int32 where bytes are read": Fault(
        "qdv_gpu/deconv/unpool.py", "size = 1 if self.code_dtype == torch.uint8 else 4", "size = 1",
        "switches of large windows are other ones", UNPOOL),
    "signal in another memory order": Fault(
        "qdv_gpu/deconv/unpool.py", "return (signal.contiguous(), switches", "return (signal, switches",
        "a kernel knows no strides", f"{PICTURES} {UNPOOL}"),
    "maps in another memory order": Fault(
        "qdv_gpu/deconv/unpool.py", "return (maps.contiguous(), pooled", "return (maps, pooled", "the same",
        f"{PICTURES} {UNPOOL}"),
    "start column by column": Fault(
        "qdv_gpu/tsne/engines/cuda.py", ".clone(memory_format=torch.contiguous_format)", ".clone()",
        "the kernels read points, not coordinates", DESCENT),
    "fast math for unpooling": Fault(
        "kernels/__init__.py", "launch(load(name, fast_math=False,", "launch(load(name, fast_math=True,",
        "subnormal sums become 0, and bits differ from the CPU's", UNPOOL),
    "t-SNE without fast math": Fault(
        "qdv_gpu/tsne/engines/cuda.py", 'kernels.load("tsne", fast_math=True,', 'kernels.load("tsne", fast_math=False,',
        "divisions take more instructions", f"{START} tests/device/test_static_facts.py"),
    "option misspelt": Fault(
        "kernels/__init__.py", '"-use_fast_math"', '"-use-fast-math"', "NVRTC refuses it", START),
    # Kernels
    "tail not checked": Fault(
        "kernels/tsne.cu", "if (j < n && j != row + r)", "if (j != row + r)", "adds the next embedding's points",
        COMPILED),
    "rows beyond the last stored": Fault(
        "kernels/tsne.cu", "if (lane == 0 && row + r < n) {", "if (lane == 0) {",
        "overwrites the next embedding's sums", COMPILED),
    "rows beyond the last read": Fault(
        "kernels/tsne.cu", "z[min(row + r, n - 1)]", "z[row + r]", "reads what is not allocated", COMPILED),
    "barrier left out before the sum": Fault(
        "kernels/tsne.cu", "    __syncthreads();\n    const float inverse", "    const float inverse",
        "most warps read an unfinished sum", UPDATES),
    "barrier left out within the sum": Fault(
        "kernels/tsne.cu", "        __syncthreads();\n        if (t < half)", "        if (t < half)",
        "warps add what others have not stored yet", UPDATES),
    "two threads, one cell": Fault(
        "kernels/tsne.cu", "partial[t] = total;", "partial[t / 2] = total;", "either of them wins", UPDATES),
    "shuffle without some lanes": Fault(
        "kernels/tsne.cu", "    x = warp_sum(x);", "    if (begin + lane >= end) return;\n    x = warp_sum(x);",
        "undefined: the warp may hang", COMPILED),
    "strides exchanged": Fault(
        "kernels/unpool.cu", "reach.y + PH - row * SH, across = reach.x + PW - column * SW",
        "reach.y + PH - row * SW, across = reach.x + PW - column * SH", "windows with two strides are misplaced",
        UNPOOL),
    "pixels beyond the map": Fault(
        "kernels/unpool.cu", "column >= map_w) continue", "column > map_w) continue", "reads the next row, or nobody's",
        UNPOOL),
    "windows beyond the signal": Fault(
        "kernels/unpool.cu", "min(left + w, pooled_w) - 1)};", "pooled_w - 1)};", "reads the next signal, or nobody's",
        UNPOOL),
    "channels beyond the last": Fault(
        "kernels/unpool.cu", "if (FULL || c + 1 < count) from += signal_step", "from += signal_step",
        "reads what is not allocated", UNPOOL),
    "32 bits: points of repel": Fault(
        "kernels/tsne.cu", FIRST.format(start=POINTS, end=REPEL), FIRST.format(start=INT_POINTS, end=REPEL),
        "a batch has more than 2^31 points", OFFSETS),
    "32 bits: points of attract": Fault(
        "kernels/tsne.cu", FIRST.format(start=POINTS, end=ATTRACT), FIRST.format(start=INT_POINTS, end=ATTRACT),
        "the same", OFFSETS),
    "32 bits: points of update": Fault(
        "kernels/tsne.cu", FIRST.format(start=POINTS, end=UPDATE), FIRST.format(start=INT_POINTS, end=UPDATE),
        "the same", OFFSETS),
    "32 bits: entries of P": Fault(
        "kernels/tsne.cu", "const long long begin = indptr", "const int begin = indptr",
        "50,000 points have 2.5 * 10^9 pairs", OFFSETS),
    "32 bits: maps of max_pool": Fault(
        "kernels/unpool.cu", "maps + (long long)plane * map_h", "maps + plane * map_h", "of many images", OFFSETS),
    "32 bits: pooled maps": Fault(
        "kernels/unpool.cu", "pooled + (long long)plane * h", "pooled + plane * h", "the same", OFFSETS),
    "32 bits: switches stored": Fault(
        "kernels/unpool.cu", "switches[(long long)plane * h", "switches[plane * h", "the same", OFFSETS),
    "32 bits: signals": Fault(
        "kernels/unpool.cu", "signal + ((long long)b * channels + begin) * signal_step",
        "signal + (b * channels + begin) * (int)signal_step", "the same", OFFSETS),
    "32 bits: switches read": Fault(
        "kernels/unpool.cu", "switches + ((long long)at[0] * channels + begin) * switch_step",
        "switches + (at[0] * channels + begin) * (int)switch_step", "the same", OFFSETS),
    "32 bits: unpooled maps": Fault(
        "kernels/unpool.cu", "out + ((long long)b * channels + begin) * out_step",
        "out + (b * channels + begin) * (int)out_step", "the same", OFFSETS),
    # Distances
    "fused multiply-add": Fault(
        "kernels/distances.cu", "__dadd_rn(sum, __dmul_rn(difference, difference))", "sum + difference * difference",
        "other bits than the CPU's, so that ties are none", DISTANCES),
    "ties by no lot": Fault(
        "kernels/distances.cu", " && (long long)(lot * lots[first + j]) < product", "", "ranks of ties, and a point "
        "that is before itself", RANKS),
    "tile that others still write": Fault(
        "kernels/distances.cu", "            for (int r = 0; r < ROWS; r++) tile[warp][r][j] = sums[r];\n        }\n"
        "        __syncthreads();", "            for (int r = 0; r < ROWS; r++) tile[warp][r][j] = sums[r];\n        }",
        "lanes count what is not there yet", f"{RANKS} {DISTANCES}"),
    # KL divergence
    "a point beside itself": Fault(
        "kernels/objective.cu", "if (j != row + r) total[r] += w;", "total[r] += w;", "adds 1 for each point",
        DIVERGENCE),
    "sums a block short": Fault(
        "qdv_gpu/tsne/objective.py", "(-(-len(x) // 32),)", "(max(1, len(x) // 32),)", "the last points are left out",
        DIVERGENCE),
    # t-SNE on a grid
    "grids on the current device": Fault(
        GRIDS, "with torch.cuda.device(motion.Z.device):", "if True:", "kernels are loaded on cuda:0", SECOND),
    "grid of points a block short": Fault(
        GRIDS, "groups = (-(-N // (THREADS // GROUP)), E)", "groups = (N // (THREADS // GROUP), E)",
        "the last points are no charges", ON_GRIDS),
    "charges that stay": Fault(
        MESH, "    charges[first + node] = 0;\n", "", "each iteration adds to those before", ON_GRIDS),
    "points beyond the last spread": Fault(
        MESH, "if (i >= n || lane >= ORDER) return;", "if (lane >= ORDER) return;", "the last counts several times",
        ON_GRIDS),
    "lanes that leave before a shuffle": Fault(
        MESH, "    float weights[ORDER];\n", "    if (lane >= ORDER) return;\n    float weights[ORDER];\n",
        "undefined: the warp may hang", ON_GRIDS),
    "charges in 32 bits": Fault(
        MESH, "(float)(long long)charges", "(float)(int)charges", "more than half a charge overflows", ON_GRIDS),
    "a point's own charge": Fault(
        MESH, "group_sum(wx * plain - ax * own)", "group_sum(wx * plain)", "the normaliser is too large", ON_GRIDS),
    "odd frequencies turned the other way": Fault(
        MESH, "odd.x * x.x + odd.y * x.y), im", "odd.x * x.x - odd.y * x.y), im", "the rows' ends meet", ON_GRIDS),
    "barrier left out of the normaliser": Fault(
        MESH, "        __syncthreads();\n        if (t < half)", "        if (t < half)",
        "warps add what others have not stored yet", ON_GRIDS),
    "points that leave unseen": Fault(
        MESH, "states[blockIdx.y].outside = 1;", "states[blockIdx.y].outside = 0;", "writes beside the grid", ON_GRIDS),
    "similarities too small unseen": Fault(
        MESH, "state.sparse = !(", "state.sparse = 0 && !(", "forces are rounding", ON_GRIDS),
    "turns without an end": Fault(
        MESH, " && state.done < grid.turns", "", "iterations depend on the batch", ON_GRIDS),
    "steps after the halt": Fault(
        MESH, "if (i >= n || states[blockIdx.y].halted) return;", "if (i >= n) return;", "the same", ON_GRIDS),
    "32 bits: nodes of charges": Fault(
        MESH, "charges + grid.nodes", "charges + (int)grid.nodes", "a batch has more than 2^31 nodes", OFFSETS),
    "32 bits: nodes of the potential": Fault(
        MESH, "potential + grid.nodes", "potential + (int)grid.nodes", "the same", OFFSETS),
    "kernel of another spacing": Fault(
        GRIDS, "grid.nx, grid[:3]", "grid.nx, grid[:2]", "a map that grows keeps its first kernel", ON_GRIDS),
    "frequencies in the CPU's order": Fault(
        GRIDS, "(np.argsort(fft.order_of(n)) for n in (ny, nx))", "(np.arange(n) for n in (ny, nx))",
        "cuFFT has another", ON_GRIDS),
    "first embedding's points for all": Fault(
        GRIDS, "own = slice(e * N, (e + 1) * N)", "own = slice(0, N)", "the others repel by what is left", ON_GRIDS),
    "embeddings that keep step": Fault(
        GRIDS, "            grids = [self",
        "            turns[turns > 0] = turns[turns > 0].min()\n            grids = [self",
        "an embedding's grids depend on the batch", ON_GRIDS),
    "look at the map after each iteration": Fault(
        GRIDS, "if hasty and turn % HASTE == 0", "if turn % 1 == 0", "the host waits each time", BUDGETS),
    # Graphs
    "capture of a cold kernel": Fault(
        "qdv_gpu/tsne/engines/cuda.py", "max(0, phase.iterations - 1) // GRAPH_ITERATIONS",
        "phase.iterations // GRAPH_ITERATIONS", "a module cannot be loaded while a graph is captured",
        f"{BUDGETS} -k descent"),
    "capture on the default stream": Fault(
        "qdv_gpu/tsne/engines/cuda.py", "with torch.cuda.stream(side):",
        "with torch.cuda.stream(torch.cuda.current_stream()):", "CUDA refuses it", DESCENT),
    "capture without an end": Fault(
        "qdv_gpu/tsne/engines/cuda.py", """                try:
                    for _ in range(GRAPH_ITERATIONS):
                        step()
                finally:  # or the stream would go on capturing for good
                    graph.capture_end()
""", """                for _ in range(GRAPH_ITERATIONS):
                    step()
                graph.capture_end()
""", "after Ctrl-C every call fails", f"{STAGES} -k capture"),
    "allocation in a capture": Fault(
        "qdv_gpu/tsne/engines/cuda.py", STEP,
        f"{STEP}        repulsion, weight = torch.empty_like(Z), torch.empty_like(Z[:, 0])\n",
        "replays write to memory that is given away", DESCENT),
    "operator of torch in a capture": Fault(
        "qdv_gpu/tsne/engines/cuda.py", STEP, f"{STEP}        repulsion.zero_()\n",
        "may wait or allocate, and costs a launch in each iteration", DESCENT),
    "host reads in a capture": Fault(
        "qdv_gpu/tsne/engines/cuda.py", STEP, f"{STEP}        if not float(Z[0, 0]) < 1e9:\n            return\n",
        "nothing has run that it could read", DESCENT),
    "replays that nobody waits for": Fault(
        "qdv_gpu/tsne/engines/cuda.py", "                torch.cuda.current_stream().synchronize()",
        "                #",
        "progress is not real, and Ctrl-C comes late", f"{BUDGETS} -k descent"),
    "capture that other threads break": Fault(
        "qdv_gpu/tsne/engines/cuda.py", 'capture_begin(capture_error_mode="thread_local")', "capture_begin()",
        "an allocation in another thread ends the capture", f"{STAGES} -k capture"),
    # Waits
    "no wait before cuML": Fault(
        "qdv_gpu/tsne/engines/cuml.py", "            torch.cuda.synchronize()  # cuML", "            # cuML",
        "cuML reads points that are not there yet", CUML),
    "no wait after cuML": Fault(
        "qdv_gpu/tsne/engines/cuml.py", "            torch.cuda.synchronize()\n            maps", "            maps",
        "torch reads a map that is not there yet", CUML),
    "no memory for cuML": Fault(
        "qdv_gpu/tsne/engines/cuml.py", "        torch.cuda.empty_cache()  # cuML", "        # cuML",
        "what torch keeps for later is out of cuML's reach", CUML),
    "copy that nobody waits for": Fault(
        "qdv_gpu/scores/quality.py", "near.indices.int().cpu().long()",
        'near.indices.int().to("cpu", non_blocking=True).long()', "the host reads what is not there yet",
        f"{BUDGETS} -k scores"),
    "time without a wait": Fault(
        "qdv_gpu/machine.py", '    if cuda:\n        torch.cuda.synchronize(device)\n    measured["seconds"]',
        '    measured["seconds"]', "measures the launches", f"{STAGES} -k measured"),
    "divergence read chunk by chunk": Fault(
        "qdv_gpu/tsne/objective.py", "total += p.sum()", "total += float(p.sum())", "the GPU idles after each chunk",
        f"{BUDGETS} -k divergence"),
    "loss read step by step": Fault(
        "qdv_gpu/studies/finetune.py", "loss_sum += loss * len(batch)", "loss_sum += loss.item() * len(batch)",
        "the host waits for each", f"{BUDGETS} -k training"),
    "constants made on the device": Fault(
        "qdv_gpu/arrays.py", "torch.tensor(values, dtype=dtype).to(device, non_blocking=True)",
        "torch.tensor(values, dtype=dtype, device=device)", "the host waits for each", f"{BUDGETS} -k activations"),
    "positions of images on the CPU": Fault(
        "qdv_gpu/data/images.py", "return self.pixels[positions.to(self.pixels.device, non_blocking=True)]",
        "return self.pixels[positions]", "the host waits for each batch", f"{BUDGETS} -k activations"),
    "page-locking left out": Fault(
        "qdv_gpu/data/images.py", "batch.pin_memory().to(", "batch.to(", "copies do not run beside the network",
        f"{BUDGETS} -k page_locked"),
    # Places
    "queries on the CPU": Fault(
        "qdv_gpu/neighbors.py", "missing = torch.arange(N, device=X.device)", "missing = torch.arange(N)",
        "torch refuses to mix devices", f"{BUDGETS} -k neighbours"),
    "labels on the CPU": Fault(
        "qdv_gpu/scores/statistics.py", "torch.unique(y.to(device),", "torch.unique(y,", "the same",
        "tests/scores/test_quality.py::test_cuda_equals_cpu"),
    "origins on the CPU": Fault(
        "qdv_gpu/deconv/rules.py", "(len(which), 5), dtype=torch.int32, device=which.device)",
        "(len(which), 5), dtype=torch.int32)", "the kernel gets a pointer of the host", PICTURES),
    "numpy of a device tensor": Fault(
        "qdv_gpu/studies/output.py", '{"Z": Z.cpu().numpy()}', '{"Z": Z.numpy()}', "torch refuses",
        f"{BUDGETS} -k analysis"),
    "result on cuda:0": Fault(
        "qdv_gpu/tsne/estimator.py", "Z.reshape(shape).to(home)", "Z.reshape(shape).to(home.type)",
        "the map of a tensor of cuda:1 is elsewhere", SECOND),
    "image on cuda:0": Fault(
        "qdv_gpu/deconv/deconvnet.py", "network_input(self.network, image[None].to(self.network.device))",
        'network_input(self.network, image[None].to(self.network.device.type))', "a network on cuda:1 refuses it",
        SECOND),
    "start drawn on the device": Fault(
        "qdv_gpu/tsne/estimator.py", "INIT_STD * _normal(seed, N) for seed in seeds]", """INIT_STD * torch.randn(
            (N, 2), generator=torch.Generator(points.device).manual_seed(seed), device=points.device
        ) for seed in seeds]""", "a seed means another start", START),
    "scores counted on the device": Fault(
        "qdv_gpu/scores/quality.py", "(near.indices.int().cpu().long() for near in (near_X, *near_Z))",
        "(near.indices for near in (near_X, *near_Z))", "index_add adds by atomics, and hundreds of small launches",
        f"{BUDGETS} -k scores"),
    "images come back for their hashes": Fault(
        "qdv_gpu/studies/analyze.py", "view.hashed().to(device, limit=limit)", "view.to(device, limit=limit)",
        "gigabytes go down again", f"{BUDGETS} -k analysis"),
    # Precision
    "Deconvnet in TF32": Fault(
        "qdv_gpu/deconv/deconvnet.py", "    @exact_convolutions()\n    def reconstruct(", "    def reconstruct(",
        "torch's default for convolutions: 10 bits", f"{BUDGETS} -k deconvnet"),
    "PCA as torch is told": Fault(
        "qdv_gpu/features/pca.py", '@product_precision("ieee")\ndef principal_components(', "def principal_components(",
        "TF32 that a user has set decides the components", f"{BUDGETS} -k components"),
    "activations in TF32": Fault(
        "qdv_gpu/features/forward.py", 'with product_precision("tf32" if self.precision == "tf32" else "ieee"):',
        'with product_precision("tf32"):', "fp32 was asked for", f"{BUDGETS} -k activations"),
    "convolutions in any order": Fault(
        "qdv_gpu/machine.py", "cudnn.benchmark = True, False\n        with product",
        "cudnn.benchmark = False, True\n        with product", "bits change from run to run",
        "tests/deconv/test_deconvnet.py::test_convolutions_are_float32_in_a_fixed_order"),
    # Memory
    "velocity not set to 0": Fault(
        "qdv_gpu/tsne/problem.py", "torch.zeros_like(Z), torch.ones_like(Z)",
        "torch.empty_like(Z), torch.ones_like(Z)",
        "new memory holds what was there", START),
    "out of memory": Fault(
        "qdv_gpu/machine.py", "except torch.OutOfMemoryError:\n                pass",
        "except MemoryError:\n                pass",
        "a batch that does not fit ends the run", f"{STAGES} -k halved"),
    "blocks kept after out of memory": Fault(
        "qdv_gpu/machine.py", "        torch.cuda.empty_cache()\n", "",
        "smaller tiles find no room among larger blocks", f"{STAGES} -k halved"),
    "plan by the host's memory": Fault(
        "qdv_gpu/studies/analyze.py", "taken + free_memory(target) * 4 // 5",
        'taken + free_memory(torch.device("cpu")) * 4 // 5',
        "layers are held that do not fit", f"{STAGES} -k refused"),
    "memory of the current device": Fault(
        "qdv_gpu/machine.py", "torch.cuda.mem_get_info(device)[0]", "torch.cuda.mem_get_info()[0]",
        "the same on cuda:1", f"{STAGES} -k refused"),
    "Deconvnet by the host's memory": Fault(
        "qdv_gpu/deconv/deconvnet.py", "room = free_memory(record.images.device) // 4",
        'room = free_memory(torch.device("cpu")) // 4', "more maps go back at a time than fit",
        f"{STAGES} -k fewer_maps"),
    "faiss's resources for each search": Fault(
        "qdv_gpu/neighbors.py", "_faiss_resources(X.device.index)", "_faiss_resources.__wrapped__(X.device.index)",
        "0.1 s and 256 MiB each time", f"{BUDGETS} -k analysis"),
    "faiss asked for too many": Fault(
        "qdv_gpu/neighbors.py",
        "        width = min(width, FAISS_GPU_LIMIT) if X.is_cuda and engine == \"faiss\" else width\n",
        "", "faiss aborts the process", f"{STAGES} -k faiss"),
}
# fmt: on
UNSEEN = {  # why no test here can see a fault
    "t-SNE without fast math": "the results are as good, and nothing here measures time",
    "capture that other threads break": "one thread drives a simulated device at a time",
    "blocks kept after out of memory": "the simulated pool gives room back to whoever asks, and is never in pieces",
}


def places(fault: Fault) -> int:
    """How often what a fault changes is there: once, or it changes nothing, or more than it says."""
    return (ROOT / fault.file).read_text().count(fault.old)


def seen_by(fault: Fault | None, tests: str) -> str | None:
    """The first test that fails on a copy of the tree with the fault, and how; None if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("tests", "qdv_gpu", "kernels"):
            shutil.copytree(ROOT / name, tree / name, symlinks=True)
        shutil.copy(ROOT / "pyproject.toml", tree)
        if fault is not None:
            text = (tree / fault.file).read_text()
            (tree / fault.file).write_text(text.replace(fault.old, fault.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
        environment = os.environ | {"PYTHONPATH": folder, "COLUMNS": "300"}
        try:
            done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return "the time limit"
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) \S+/(\S+::.*)$", done.stdout, re.MULTILINE)
    if done.returncode != 1 or found is None:
        raise SystemExit(f"the tests did not run:\n{done.stdout}{done.stderr}")
    return found[1]


def section(results: dict[str, str | None]) -> str:
    """The part of the notes that says what was seen."""
    seen = sum(by is not None for by in results.values())
    lines = [
        f"{HEADING}\n",
        "`python tests/device/faults.py --markdown` puts each into a copy of the code, one at a time, and runs the",
        f"tests that could see it, without a GPU. {seen} of {len(results)} are seen, each by the test named.\n",
        "| fault | what it would do on a GPU | seen by |",
        "| --- | --- | --- |",
    ]
    for name, by in results.items():
        test = "**not seen**" if by is None else f"`{by.partition(' - ')[0]}`"
        lines.append(f"| {name} | {FAULTS[name].why} | {test} |")
    reasons = [
        f"- {name}: {UNSEEN.get(name, 'nothing here looks at it')}." for name, by in results.items() if by is None
    ]
    return "\n".join([*lines, *(["", *reasons] if reasons else [])]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--markdown", action="store_true", help="write the table into docs/gpu-notes.md")
    options = parser.parse_args()
    names = options.names or list(FAULTS)
    for name in names:
        fault = FAULTS[name]
        if (count := places(fault)) != 1:
            raise SystemExit(f"{name}: what it changes in {fault.file} is there {count} times")
    for tests in dict.fromkeys(FAULTS[name].tests for name in names):
        if (fails := seen_by(None, tests)) is not None:
            raise SystemExit(f"fails without a fault: {fails}")
    results = {}
    for name in names:
        results[name] = seen_by(FAULTS[name], FAULTS[name].tests)
        print(f"{name}: {'NOT SEEN' if results[name] is None else f'seen by {results[name][:200]}'}", flush=True)
    print(f"{sum(by is not None for by in results.values())} of {len(results)} seen")
    if options.markdown:
        text = NOTES.read_text()
        before, _, after = text.partition(HEADING)
        rest = after[after.index("\n## ") + 1 :] if "\n## " in after else ""
        NOTES.write_text(f"{before.rstrip()}\n\n{section(results)}{rest and chr(10)}{rest}")


if __name__ == "__main__":
    main()
