"""Times cover the whole pass, operations are counted right, and bad input is refused."""

import json

import pytest
import torch
from tiny_networks import Functional
from typer.testing import CliRunner

from qdv_gpu import load_network
from qdv_gpu.cli import app
from qdv_gpu.errors import InputError
from qdv_gpu.machine import on_threads
from qdv_gpu.studies import peaks
from qdv_gpu.studies import profile as throughput
from qdv_gpu.studies.peaks import measured_peaks
from qdv_gpu.studies.profile import ELSEWHERE, profile


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(throughput, "SECONDS", 0.01)
    monkeypatch.setattr(peaks, "SECONDS", 0.01)
    monkeypatch.setattr(peaks, "PRODUCT", {"cpu": 64, "cuda": 1024})
    monkeypatch.setattr(peaks, "COPY", {"cpu": 2**16, "cuda": 2**24})


def test_operations_bytes_and_shares(tmp_path):
    (found,) = profile("tiny_networks:cnn", tmp_path, batch_sizes=[5], device="cpu")
    names = [layer.layer for layer in found.layers]
    assert names == ["conv1", "relu@1", "pool@1", "conv2", "relu@2", "pool@2", "dropout", "fc", ELSEWHERE]
    conv2 = found.layers[3]
    assert conv2.gflop == pytest.approx(2 * 5 * 8 * 6 * 9 * 16 / 1e9)  # 4 x 4 outputs
    assert conv2.bytes == 4 * (5 * 6 * 16 + 5 * 8 * 16 + 8 * 6 * 9 + 8)
    assert found.layers[1].gflop == 0
    assert found.layers[1].bytes == 4 * 2 * 5 * 6 * 64  # in place: read and written
    assert found.layers[6].bytes == 0  # dropout passes its input on
    assert found.layers[1].bound == "memory"
    assert sum(layer.share for layer in found.layers) == pytest.approx(1)
    assert conv2.images_per_second == pytest.approx(5 / conv2.seconds)
    saved = json.loads((tmp_path / "profile.json").read_text())
    assert saved["profiles"][0]["layers"][3]["layer"] == "conv2"
    assert (tmp_path / "profile.png").stat().st_size > 5000


def test_every_operation_is_counted_where_it_is_done():
    (found,) = profile("tiny_networks:attentive", batch_sizes=[3], device="cpu")
    operations = {layer.layer: layer.gflop * 1e9 for layer in found.layers}
    tokens = 3 * 16
    assert operations == pytest.approx(
        {
            "stem": 2 * 3 * 64 * 4,
            "conv@1": 2 * 3 * 64 * 4 * 36,
            "conv@2": 2 * tokens * 4 * 36,
            "attention": 2 * tokens * 4 * (12 + 16 + 16 + 4),  # queries, keys and values; scores; sums; out
            "fc": 2 * 3 * 4 * 10,
            ELSEWHERE: 2 * tokens * 4 * 4,
        }
    )
    attention = next(layer for layer in found.layers if layer.layer == "attention")
    assert attention.bytes == 4 * (2 * tokens * 4 + 4 * 12 + 12 + 4 * 4 + 4)  # its three inputs are one


def test_half_precision_networks():
    net = load_network("tiny_networks:cnn", weights="none", device="cpu")
    net.module.to(torch.bfloat16)
    (found,) = profile(net, batch_sizes=[2])
    assert found.layers[0].bytes == 2 * (2 * 64 + 2 * 6 * 64 + 6 * 9 + 6)


def test_layers_sum_to_the_whole(monkeypatch):
    monkeypatch.setattr(throughput, "SECONDS", 1.0)
    net = load_network("alexnet", weights="none", device="cpu")
    with on_threads(1):  # or the whole waits for a core that another test has
        (found,) = profile(net, batch_sizes=[8], image_size=96)
    assert 0.5 < found.sum_of_layers / found.seconds < 2  # within 10 % on a quiet machine: benchmarks


def test_hooks_are_removed_also_after_an_exception():
    net = load_network("tiny_networks:written_with_functions", weights="none", device="cpu")
    with pytest.raises(InputError, match="cannot take images of 3 x 3"):
        profile(net, batch_sizes=[2], image_size=3)
    assert isinstance(net.module, Functional)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.module.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": [4, 0]}, "at least 1, got 4, 0"),
        ({"batch_sizes": []}, "got none"),
        ({"precision": "fp64"}, "unknown precision"),
        ({"precision": "tf32"}, "requires a CUDA device"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        profile("tiny_networks:cnn", device="cpu", **options)


def test_mixed_precision_and_settings_are_restored():
    before = torch.backends.cudnn.conv.fp32_precision
    (found,) = profile("tiny_networks:cnn", batch_sizes=[2], precision="bf16", device="cpu")
    assert found.precision == "bf16"
    assert torch.backends.cudnn.conv.fp32_precision == before
    assert all(value > 0 for value in measured_peaks(torch.device("cpu"), "bf16"))


def test_a_repeat_is_a_bare_and_a_watched_pass(monkeypatch):
    passes, prepared = [], []
    net = load_network("tiny_networks:cnn", weights="none", device="cpu")
    net.module.register_forward_hook(lambda *_: passes.append(len(prepared)))
    monkeypatch.setattr(throughput, "ahead", lambda work, device: prepared.append(work) or (lambda: None))
    monkeypatch.setattr(throughput, "measured_peaks", lambda *_: (1e9, 1e9))
    (found,) = profile(net, batch_sizes=[2])
    assert len(prepared) == 1  # it runs the network on a GPU
    assert passes.count(1) == 1 + 2 * len(found.all_seconds)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_layers_sum_to_the_whole_on_a_gpu(monkeypatch, precision):
    monkeypatch.setattr(throughput, "SECONDS", 0.3)
    net = load_network("alexnet", weights="none", device="cuda")
    for found in profile(net, batch_sizes=[1, 64], precision=precision):
        assert 0.8 < found.sum_of_layers / found.seconds < 1.25  # within 10 %: benchmarks
        limited = [layer for layer in found.layers if layer.bound == "compute"]
        assert not [layer for layer in limited if layer.share_of_peak >= 1.5], found


def test_command_prints_a_table():
    result = CliRunner().invoke(app, ["profile", "tiny_networks:cnn", "--batch-sizes", "2,3", "--device", "cpu"])
    assert result.exit_code == 0
    assert "conv2" in result.output
    assert "batch of 3" in result.output
    wrong = CliRunner().invoke(app, ["profile", "tiny_networks:cnn", "--batch-sizes", "two"])
    assert "must be integers" in str(wrong.exception)


def test_a_network_that_takes_one_image_with_channels_last_but_not_two():
    class Joining(Functional):
        def forward(self, x):
            x = self.stem(x)
            return x.view(-1, *x.shape[2:]).mean((1, 2))  # maps of all images one behind the other

    [found] = profile(Joining().eval(), batch_sizes=[4], device="cpu")
    assert "stem" in [layer.layer for layer in found.layers]
