"""Checkpoints as other programs write them; nothing in a file but tensors becomes an object."""

import argparse
import logging
import os
from pathlib import Path

import pytest
import torch

from qdv_gpu import load_network
from qdv_gpu.errors import InputError

SPEC = "tiny_networks:normalised"


@pytest.fixture
def state():
    module = load_network(SPEC).module
    with torch.no_grad():
        module.conv1.weight.add_(1)
    return module.state_dict()


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


CHECKPOINTS = {
    "lightning.ckpt": lambda s: {
        "epoch": 3,
        "state_dict": {**prefixed(s, "model."), "criterion.weight": torch.ones(3)},
        "hyper_parameters": argparse.Namespace(lr=0.1, path=Path("x")),
    },
    "lightning_other.ckpt": lambda s: {"state_dict": prefixed(s, "net.backbone.")},
    "compiled.pt": lambda s: prefixed(s, "_orig_mod."),
    "distributed.pth": lambda s: {"model": prefixed(s, "module.")},
    "both.pth": lambda s: {"model_state_dict": prefixed(s, "module._orig_mod."), "optimizer": {"lr": 0.1}},
    "timm.pth.tar": lambda s: {"arch": "x", "args": argparse.Namespace(a=1), "state_dict": s},
    "net.bin": lambda s: {"net": s, "acc": 93.1, "epoch": 4},
    "ema.pt": lambda s: {"state_dict_ema": prefixed(s, "module.")},
    "without_counters.pt": lambda s: {name: t for name, t in s.items() if "num_batches" not in name},
    "parameters.pt": lambda s: {name: torch.nn.Parameter(t.clone(), t.is_floating_point()) if t.is_floating_point()
                                else t for name, t in s.items()},
    "half.pt": lambda s: {name: t.half() if t.is_floating_point() else t for name, t in s.items()},
}  # fmt: skip


@pytest.mark.parametrize("file", CHECKPOINTS)
def test_checkpoints_of_other_programs(file, state, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    torch.save(CHECKPOINTS[file](state), tmp_path / file)
    loaded = load_network(f"{SPEC}={tmp_path / file}").module.state_dict()
    for name, tensor in state.items():
        assert torch.allclose(loaded[name].float(), tensor.float(), atol=2e-3), name
    taken_off = {"lightning.ckpt": "model.", "lightning_other.ckpt": "net.backbone.", "both.pth": "module._orig_mod."}
    if file in taken_off:
        assert f"{taken_off[file]!r} is taken off" in caplog.text
    if file == "lightning.ckpt":
        assert "1 others are left out" in caplog.text


def test_several_networks_in_one_file_are_said(state, tmp_path, caplog):
    other = {name: torch.zeros_like(t) for name, t in state.items()}
    torch.save({**prefixed(state, "student."), **prefixed(other, "teacher.")}, tmp_path / "w.pt")
    loaded = load_network(f"{SPEC}={tmp_path / 'w.pt'}").module
    assert torch.equal(loaded.conv1.weight, state["conv1.weight"])
    assert "'student.' is taken, not 'teacher.'" in caplog.text


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


BAD = {
    "integers.pt": (lambda _: {1: torch.ones(2)}, "a dict of names and tensors is required"),
    "tuples.pt": (lambda _: {("a", 1): torch.ones(2)}, "a dict of names and tensors is required"),
    "complex.pt": (lambda s: {**s, "fc.bias": torch.ones(10, dtype=torch.complex64)}, "the complex tensor fc.bias"),
    "sparse.pt": (lambda s: {**s, "fc.weight": s["fc.weight"].to_sparse()}, "the sparse tensor fc.weight"),
    "meta.pt": (lambda s: {**s, "fc.bias": torch.ones(10, device="meta")}, r"the empty \(meta\) tensor fc.bias"),
    "quantised.pt": (lambda s: {**s, "fc.bias": torch.quantize_per_tensor(s["fc.bias"], 0.1, 0, torch.qint8)},
                     "the quantised tensor fc.bias"),
    "empty.pt": (lambda _: {}, "a dict of names and tensors is required"),
    "tensor.pt": (lambda _: torch.ones(3), "a dict of names and tensors is required"),
    "other.pt": (lambda _: {"x.weight": torch.ones(2)}, "do not fit"),
    "executable.ckpt": (lambda s: {"state_dict": s, "x": Payload()}, "nothing else is loaded from a pickle"),
}  # fmt: skip


@pytest.mark.parametrize("file", BAD)
def test_bad_checkpoints(file, state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, message = BAD[file]
    torch.save(content(state), file)
    with pytest.raises(InputError, match=message) as caught:
        load_network(f"{SPEC}={file}")
    assert "\n" not in str(caught.value)
    assert not Path("executed").exists()
