"""What a GPU would answer with an error or a wrong result is one on the simulated device."""

import numpy as np
import pytest
import torch

from qdv_gpu import kernels

pytest.importorskip("cupy")
from device.memory import Fault
from device.runtime import Event, Graph, Stream


def test_tensors_say_where_they_are(gpu):
    x = torch.arange(6.0, device="cuda").view(2, 3)
    assert (x.is_cuda, x.device, x.is_cpu) == (True, torch.device("cuda", 0), False)
    assert (x.T @ x).device == x.device
    assert x.sum(0).cpu().tolist() == [3, 5, 7]
    with torch.cuda.device(1):
        assert torch.zeros(2, device="cuda").device.index == 1
    assert x.to("cuda:1").device.index == 1
    assert torch.zeros_like(x, device="cpu").tolist() == [[0, 0, 0], [0, 0, 0]]
    with torch.inference_mode():
        assert torch.nn.functional.linear(x, x).cpu().tolist() == [[5, 14], [14, 50]]


@pytest.mark.parametrize(
    ("what", "error"),
    [
        (lambda x: x + torch.ones(3), "at least two devices, cpu and cuda:0"),
        (lambda x: x + x.to("cuda:1"), "at least two devices, cuda:0 and cuda:1"),
        (lambda x: torch.ones(3)[torch.arange(3, device="cuda")], "indices should be either on cpu"),
        (lambda x: x.index_put_((torch.arange(3, device="cuda"),), torch.ones(3)), "the values must be on cuda:0"),
        (lambda x: torch.stack([x[0], torch.tensor(1.0)]), "at least two devices, cpu and cuda:0"),
        (lambda x: x[None].long() @ x[:, None].long(), "not implemented for torch.int64"),
        (lambda x: x.pin_memory(), "cannot pin"),
        (lambda x: x.to("cuda:2"), "invalid device ordinal"),
        (lambda x: torch.randn(3, generator=torch.Generator(), device="cuda"), "device type for generator"),
        (lambda x: torch.randn(3, generator=torch.Generator("cuda")), "device type for generator"),
    ],
)
def test_what_torch_refuses(gpu, what, error):
    with pytest.raises(RuntimeError, match=error):
        what(torch.zeros(3, device="cuda"))


def test_modules_move_between_devices(gpu):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to("cuda:0").to("cuda:1")
    assert {tensor.device.index for tensor in module.state_dict().values()} == {1}
    module(torch.randn(4, 3, device="cuda:1")).sum().backward()
    assert module[0].weight.grad.device.index == 1


def test_no_view_of_device_memory_by_numpy(gpu):
    for view in (lambda x: x.numpy(), np.asarray, lambda x: np.add(x, 1)):
        with pytest.raises(TypeError, match=r"Use Tensor.cpu\(\)"):
            view(torch.zeros(3, device="cuda"))


def test_new_memory_holds_nonsense_and_random_numbers_are_its_own(gpu):
    assert torch.empty(3, device="cuda").isnan().all()
    ours, theirs = torch.Generator("cuda").manual_seed(0), torch.Generator().manual_seed(0)
    assert not torch.equal(torch.randn(3, generator=ours, device="cuda").cpu(), torch.randn(3, generator=theirs))


def test_memory_runs_out(gpu):
    gpu.memory[0].size = 10_000
    x = torch.zeros(2000, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        x + 1
    del x
    assert torch.cuda.memory_allocated() == 0
    assert torch.cuda.memory_reserved() == torch.cuda.max_memory_allocated() == 8192
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == 0


def test_streams_that_do_not_wait(gpu):
    side = Stream()
    x = torch.zeros(3, device="cuda")
    with torch.cuda.stream(side), pytest.raises(Fault, match="may still be writing"):
        x + 1
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x + 1
    with pytest.raises(Fault, match="may still read"):
        x.zero_()
    torch.cuda.current_stream().wait_stream(side)
    x.zero_()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.add_(1)
    torch.cuda.synchronize()
    x.zero_()
    z, waited = torch.ones(3, device="cuda"), Event()
    waited.record()
    waited.wait(side)
    with torch.cuda.stream(side):
        assert (y + z).cpu().tolist() == [2, 2, 2]


def test_cuml_runs_on_a_stream_of_its_own(gpu):
    import cupy
    from cuml.manifold import TSNE

    X = torch.zeros(2, 9, device="cuda").T
    model = TSNE(precomputed_knn=None, random_state=0)
    with pytest.raises(Fault, match="cuML"):
        model.fit_transform(cupy.from_dlpack(X))
    torch.cuda.synchronize()
    found = torch.from_dlpack(model.fit_transform(cupy.from_dlpack(X)))
    with pytest.raises(Fault, match="may still be writing"):
        found + 1
    torch.cuda.synchronize()
    assert (found + 1).shape == (9, 2)


def test_copies_that_nobody_waited_for(gpu):
    x = torch.arange(3.0, device="cuda")
    there = x.to("cpu", non_blocking=True)
    assert there.isnan().all()
    torch.cuda.synchronize()
    assert there.tolist() == [0, 1, 2]


def test_times_of_events_that_nobody_waited_for(gpu):
    begin, end = Event(enable_timing=True), Event(enable_timing=True)
    begin.record()
    torch.zeros(3, device="cuda")
    end.record()
    with pytest.raises(RuntimeError, match="not ready"):
        begin.elapsed_time(end)
    end.synchronize()
    assert begin.elapsed_time(end) >= 0


@pytest.fixture
def scale(tmp_path, monkeypatch):
    """Launches a kernel that doubles numbers."""
    (tmp_path / "scale.cu").write_text(
        'extern "C" __global__ void scale(float* x, int n) {\n'
        "    int i = blockIdx.x * 32 + threadIdx.x;\n    if (i < n) x[i] *= 2;\n}\n"
    )
    monkeypatch.setattr(kernels, "FOLDER", tmp_path)
    return lambda x, n=3, **sizes: kernels.launch(
        kernels.load("scale"), "scale", x, np.int32(n), **{"grid": (1,), "block": 32} | sizes
    )


def test_launches(gpu, scale):
    x = torch.ones(3, device="cuda")
    scale(x)
    assert x.tolist() == [2, 2, 2]
    assert gpu.counts.kernels["scale"] == 1
    there = torch.ones(3, device="cuda:1")  # which is not the current device
    with torch.cuda.device(1):
        elsewhere = kernels.load("scale")
    kernels.launch(elsewhere, "scale", there, np.int32(3), grid=(1,), block=32)
    assert there.tolist() == [2, 2, 2]
    module = kernels.load("scale")
    with pytest.raises(Fault, match="loaded on cuda:1"):
        kernels.launch(elsewhere, "scale", x, np.int32(3), grid=(1,), block=32)
    for arguments, sizes, error in (
        ((x, np.int32(200)), {"grid": (9,), "block": 32}, "outside"),
        ((x, np.int64(3)), {"grid": (1,), "block": 32}, "has 4 bytes, got 8"),
        ((x, np.int32(3)), {"grid": (1, 70_000), "block": 32}, "invalid grid"),
        ((x, np.int32(3)), {"grid": (1,), "block": 2048}, "bound to 1024"),
        ((x,), {"grid": (1,), "block": 32}, "takes 2 arguments"),
    ):
        with pytest.raises(Fault, match=error):
            kernels.launch(module, "scale", *arguments, **sizes)


def test_captures(gpu, scale):
    x, side = torch.ones(3, device="cuda"), Stream()
    side.wait_stream(torch.cuda.current_stream())
    with pytest.raises(RuntimeError, match="non-default stream"):
        Graph().capture_begin()

    def capture(work):
        graph = Graph()
        with torch.cuda.stream(side):
            graph.capture_begin()
            try:
                work()
            finally:
                graph.capture_end()
        return graph

    with pytest.raises(Fault, match="is loaded while a graph is captured"):
        capture(lambda: scale(x))
    scale(x)
    torch.cuda.synchronize()
    graph = capture(lambda: scale(x))
    assert x.tolist() == [2, 2, 2]
    graph.replay()
    assert x.tolist() == [4, 4, 4]
    for work in (lambda: x.add_(1), lambda: torch.empty(3, device="cuda"), x.clone, torch.cuda.synchronize, x.tolist):
        with pytest.raises(Fault, match="while a graph is captured"):
            capture(work)
    gone = [torch.ones(3, device="cuda")]
    graph = capture(lambda: scale(gone[0]))
    gone.clear()
    with pytest.raises(Fault, match="freed"):
        graph.replay()


def test_what_is_counted(gpu):
    x = torch.rand(4, 4, device="cuda")
    gpu.counts.clear()
    x @ x
    assert not gpu.counts.tf32
    torch.nn.functional.conv2d(x[None, None], x[None, None])  # which torch does in TF32 unless told otherwise
    assert sum(gpu.counts.tf32.values()) == 1
    assert not gpu.counts.syncs
    float(x[0, 0])
    x[x > 0]
    assert sum(gpu.counts.syncs.values()) == 2
    x.cpu()
    assert sum(gpu.counts.to_host.values()) == gpu.counts.largest_copy == 64
    images = torch.zeros(100_000)
    images.to("cuda", non_blocking=True)
    images.pin_memory().to("cuda", non_blocking=True)
    assert sum(gpu.counts.pageable.values()) == 400_000
    x.index_add(0, torch.zeros(4, dtype=torch.int64, device="cuda"), x)
    assert sum(gpu.counts.unordered.values()) == 1
