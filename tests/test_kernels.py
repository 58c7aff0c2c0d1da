"""Every .cu file compiles for every architecture, and the kernels of t-SNE agree with float64 autograd.

The same tests run the source on the CPU (cpu), what the compiler makes of it for a GPU (ptx), and a GPU (cuda).
"""

import cuda_shim
import numpy as np
import pytest
import torch
import tsne_reference as reference
from device import compile
from device.launches import devices, needs_compiler, needs_nvrtc, run

from qdv_gpu import kernels

SOURCES = sorted(kernels.FOLDER.glob("*.cu"))
VARIANTS = [{"GAUSSIAN": gaussian, "DENSE": dense} for gaussian in (0, 1) for dense in (0, 1)]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(f"{k}{x}" for k, x in v.items()))


@needs_nvrtc
@pytest.mark.parametrize("architecture", compile.ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_source_compiles(source, architecture):
    assert compile.cubin(source.read_text(), kernels.options(), f"sm_{architecture}").startswith(b"\x7fELF")


class Batch:
    """Embeddings of the given sizes one after the other, each with a random symmetric P, and the kernels' buffers."""

    def __init__(self, embeddings, *, dense, device, seed=0, arch="compute_90"):
        self.Z = [torch.as_tensor(z, dtype=torch.float32) for z in embeddings]
        generator = torch.Generator().manual_seed(seed)
        self.P = []
        for z in self.Z:
            p = torch.rand(len(z), len(z), generator=generator)
            if not dense:
                kept = torch.rand(p.shape, generator=generator) < 0.2
                kept[:2, :2] = True  # two points alone have each other
                p *= kept
            p = (p + p.T).fill_diagonal_(0).double()
            self.P.append((p / p.sum().clamp(min=1e-30)).float())
        values = [p.flatten() if dense else p[p > 0] for p in self.P]
        counts = torch.cat([torch.full((len(p),), len(p)) if dense else (p > 0).sum(1) for p in self.P])
        indices = torch.cat([(p > 0).nonzero()[:, 1] for p in self.P]).int() if not dense else torch.empty(0).int()
        self.sizes = [len(z) for z in self.Z]
        start = torch.tensor([0, *np.cumsum(self.sizes)])
        self.device, self.arch = device, arch
        device = "cuda" if device == "cuda" else "cpu"
        self.start = start.to(device)
        self.rows = [
            t.to(device)
            for t in (
                start[:-1].clone(),
                torch.cat([torch.zeros(1), counts.cumsum(0)]).long(),
                indices,
                torch.cat(values),
            )
        ]
        self.z = torch.cat(self.Z).contiguous().to(device)
        self.attraction, self.repulsion = torch.full_like(self.z, torch.nan), torch.full_like(self.z, torch.nan)
        self.weight = torch.full_like(self.z[:, 0], torch.nan).contiguous()

    def launch(self, variant, kernel, *args, points, block, seed):
        grid = (-(-max(self.sizes) // points), len(self.sizes))
        sizes = {"grid": grid, "block": block}
        run(self.device, "tsne", kernel, *args, **sizes, fast_math=True, seed=seed, arch=self.arch, **variant)

    def forces(self, variant, *, seed=0):
        self.launch(variant, "repel", self.z, self.start, self.repulsion, self.weight, points=16, block=128, seed=seed)
        self.launch(variant, "attract", self.z, self.start, *self.rows, self.attraction, points=4, block=128, seed=seed)

    def update(self, variant, velocity, gains, *, exaggeration, rate, momentum, seed=0):
        scalars = np.array([exaggeration, rate, momentum], dtype=np.float32)
        buffers = (self.z, velocity, gains, self.attraction, self.repulsion, self.weight, self.start)
        self.launch(variant, "update", *buffers, *scalars, points=256, block=256, seed=seed)

    def gradients(self):
        """4 (attraction - repulsion / Z) of each embedding, float64 on the CPU."""
        parts = zip(
            *(t.double().cpu().split(self.sizes) for t in (self.attraction, self.repulsion, self.weight)), strict=True
        )
        return [4 * (a - r / w.sum()) if w.sum() > 0 else 4 * a for a, r, w in parts]


CASES = {
    "2": [reference.cloud(2)],
    "31": [reference.cloud(31)],
    "33": [reference.cloud(33)],
    "1000": [reference.cloud(1000, 2.0)],
    "duplicates": [reference.cloud(40).repeat_interleave(3, 0)],
    "far": [reference.far_apart(130)],
    "lone": [torch.cat([reference.cloud(50), torch.full((1, 2), 1e4)])],
    "batch": [
        reference.cloud(33),
        reference.cloud(2, seed=1),
        reference.cloud(1),
        reference.cloud(300, seed=2),
        reference.far_apart(64),
        reference.cloud(128, seed=3),
    ],
}


@devices
@variants
@pytest.mark.parametrize("case", CASES)
def test_gradient_agrees_with_autograd(case, variant, device):
    batch = Batch(CASES[case], dense=variant["DENSE"], device=device)
    batch.forces(variant)
    for gradient, P, z in zip(batch.gradients(), batch.P, batch.Z, strict=True):
        if len(z) == 1:
            assert gradient.abs().max() == 0
            continue
        truth = reference.gradient(P, z, gaussian=variant["GAUSSIAN"])
        # Two points always have p = q, so that both forces cancel: the error is then against either of them.
        scale = truth.norm() if len(z) > 2 else (z[0] - z[1]).norm()
        assert (gradient - truth).norm() <= 1e-5 * scale


@needs_nvrtc
@pytest.mark.parametrize("architecture", compile.ARCHITECTURES)
def test_every_architecture_computes_the_same(architecture):
    batch = Batch(CASES["batch"][:3], dense=0, device="ptx", arch=f"compute_{architecture}")
    batch.forces(VARIANTS[0])
    for gradient, P, z in zip(batch.gradients(), batch.P, batch.Z, strict=True):
        truth = reference.gradient(P, z, gaussian=0) if len(z) > 2 else gradient
        assert (gradient - truth).norm() <= 1e-5 * truth.norm()
    batch.update(
        VARIANTS[0], torch.zeros_like(batch.z), torch.ones_like(batch.z), exaggeration=1, rate=50, momentum=0.5
    )
    assert (batch.z - torch.cat(batch.Z))[:33].abs().max() > 0


@devices
def test_one_point_stays(device):
    batch = Batch([[[3.0, -2.0]]], dense=1, device=device)
    batch.forces(VARIANTS[1])
    batch.update(
        VARIANTS[1], torch.zeros_like(batch.z), torch.ones_like(batch.z), exaggeration=1, rate=50, momentum=0.5
    )
    assert batch.z.tolist() == [[3.0, -2.0]]


@devices
def test_update_follows_its_formula(device):
    batch = Batch([reference.cloud(300), reference.cloud(33, seed=1), reference.cloud(1)], dense=0, device=device)
    batch.forces(VARIANTS[0])
    velocity, gains = reference.cloud(334, 0.1, seed=2), 0.01 + 2 * reference.cloud(334, seed=3).abs()
    v, g = velocity.clone().to(batch.z.device), gains.clone().to(batch.z.device)
    batch.update(VARIANTS[0], v, g, exaggeration=12, rate=200, momentum=0.8)
    parts = zip(
        *(t.double().cpu().split(batch.sizes) for t in (batch.attraction, batch.repulsion, batch.weight)), strict=True
    )
    slope = torch.cat([4 * (12 * a - r / w.sum().clamp(min=1e-30)) for a, r, w in parts])
    gains = torch.where(slope * velocity < 0, gains + 0.2, gains * 0.8).clamp(min=0.01)
    velocity = 0.8 * velocity - 200 * gains * slope
    torch.testing.assert_close(g.cpu(), gains, rtol=1e-5, atol=0, check_dtype=False)
    torch.testing.assert_close(v.cpu(), velocity, rtol=1e-5, atol=1e-5, check_dtype=False)
    torch.testing.assert_close(batch.z.cpu(), torch.cat(batch.Z) + velocity, rtol=1e-5, atol=1e-5, check_dtype=False)


@devices
def test_bits_repeat_alone_in_a_batch_and_in_any_thread_order(device):
    alone = Batch([reference.cloud(130)], dense=1, device=device)
    alone.forces(VARIANTS[1])
    for seed in range(1, {"cpu": 3, "ptx": 2, "cuda": 20}[device]):
        batch = Batch([reference.cloud(130), reference.cloud(200, seed=1)], dense=1, device=device)
        batch.forces(VARIANTS[1], seed=seed)
        assert torch.equal(batch.repulsion[:130], alone.repulsion)
        assert torch.equal(batch.weight[:130], alone.weight)
        assert torch.equal(batch.attraction[:130], alone.attraction)


@needs_compiler
def test_shim_reports_a_missing_lane(tmp_path, monkeypatch):
    (tmp_path / "bad.cu").write_text(
        'extern "C" __global__ void bad(float* x) {\n'
        "    if (threadIdx.x == 3) return;\n"
        "    x[threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x], 1);\n}\n"
    )
    monkeypatch.setattr(kernels, "FOLDER", tmp_path)
    with pytest.raises(RuntimeError, match="never come"):
        cuda_shim.load("bad").launch("bad", torch.ones(32), grid=(1,), block=32)


@needs_compiler
def test_shim_shows_a_missing_barrier(tmp_path, monkeypatch):
    (tmp_path / "race.cu").write_text(
        'extern "C" __global__ void race(int* x) {\n'
        "    __shared__ int s[64];\n"
        "    s[threadIdx.x] = threadIdx.x;\n"
        "    if (x[64]) __syncthreads();\n"
        "    x[threadIdx.x] = s[63 - threadIdx.x];\n}\n"
    )
    monkeypatch.setattr(kernels, "FOLDER", tmp_path)
    expected = torch.arange(63, -1, -1, dtype=torch.int32)
    for barrier in (0, 1):
        x = torch.full((65,), barrier, dtype=torch.int32)
        cuda_shim.load("race").launch("race", x, grid=(1,), block=64)
        assert torch.equal(x[:64], expected) == bool(barrier)


def test_the_binary_that_is_loaded_is_of_these_options_alone(monkeypatch):
    """CuPy's own modules are compiled with -ftz=true, which the bits of unpooling do not stand."""
    compiler = pytest.importorskip("cupy").cuda.compiler
    seen = []

    class Program:
        def __init__(self, source, *args, **options):
            seen.append(source)

        def compile(self, options, log):
            seen.append(options)
            return b"", {}

    monkeypatch.setattr(compiler, "_NVRTCProgram", Program)
    monkeypatch.setattr(compiler, "_get_arch_for_options_for_nvrtc", lambda arch: (f"-arch=sm_{arch}", "cubin"))
    flags = kernels.options(KH=2)
    source = (kernels.FOLDER / "unpool.cu").read_text()
    compiler.compile_using_nvrtc(source, flags, arch="90")
    assert seen[0] == source
    assert set(flags) <= set(seen[1])
    assert not [option for option in seen[1] if "ftz" in option or "fast" in option]
