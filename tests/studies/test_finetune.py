"""Fine-tuning: learning, resuming, settings."""

import json
import shutil

import pytest
import torch

from qdv_gpu.errors import InputError
from qdv_gpu.networks.weights import read_weights
from qdv_gpu.studies.finetune import finetune

OPTIONS = {"epochs": 3, "batch_size": 50, "lr": 1e-2, "limit": 300, "device": "cpu"}
SPEC = "tiny_networks:cnn"


def quiet(_line):
    pass


def weights_of(out):
    return read_weights(out / "weights.safetensors")[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, finetune(SPEC, "digits", out, report=quiet, **OPTIONS)


def test_it_learns_and_says_so(finished):
    out, result = finished
    assert len(result["history"]) == 3
    assert result["history"][-1]["loss"] < 0.9 * result["history"][0]["loss"]
    assert result["test_accuracy"] > 0.4
    assert json.loads((out / "finetune.json").read_text())["test_accuracy"] == result["test_accuracy"]
    assert {path.name for path in out.iterdir()} == {
        "checkpoint.safetensors",
        "weights.safetensors",
        "finetune.json",
        "training.png",
    }


@pytest.mark.parametrize("images", [50, 450, 850])
def test_killed_and_resumed_gives_the_same_weights(finished, tmp_path, images):
    class KilledError(Exception):
        pass

    seen = 0

    def kill(at):
        nonlocal seen
        seen += 1
        if seen * 50 == images:
            raise KilledError

    with pytest.raises(KilledError):
        finetune(SPEC, "digits", tmp_path, report=quiet, progress=kill, **OPTIONS)
    finetune(SPEC, "digits", tmp_path, report=quiet, **OPTIONS)
    expected = weights_of(finished[0])
    for name, tensor in weights_of(tmp_path).items():
        assert torch.equal(tensor, expected[name]), name


def test_more_epochs_go_on(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    said: list[str] = []
    result = finetune(SPEC, "digits", tmp_path / "run", report=said.append, **{**OPTIONS, "epochs": 4})
    assert "after epoch 3" in said[0]
    assert result["history"][:3] == finished[1]["history"]


def test_out_of_memory_keeps_the_gradient(finished, tmp_path, monkeypatch):
    """Without dropout, pieces of a batch give its gradient."""
    import qdv_gpu.studies.finetune as module

    plain = module.logits_of
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda _self, x: x)
    finetune(SPEC, "digits", tmp_path / "whole", report=quiet, **{**OPTIONS, "epochs": 1})

    def small(network, pixels):
        if torch.is_grad_enabled() and len(pixels) > 20:
            raise torch.OutOfMemoryError
        return plain(network, pixels)

    monkeypatch.setattr(module, "logits_of", small)
    said: list[str] = []
    finetune(SPEC, "digits", tmp_path / "pieces", report=said.append, **{**OPTIONS, "epochs": 1})
    assert "CUDA is out of memory: each batch now runs in 4 pieces" in said
    whole, pieces = weights_of(tmp_path / "whole"), weights_of(tmp_path / "pieces")
    for name, tensor in whole.items():
        torch.testing.assert_close(pieces[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("spec", [SPEC, "tiny_networks:normalised"])
def test_single_images(tmp_path, spec):
    options = {**OPTIONS, "epochs": 1, "limit": 31, "lr": 1e-3}
    result = finetune(spec, "digits", tmp_path / "one", report=quiet, **{**options, "batch_size": 1})
    assert 0 < result["history"][0]["loss"] < 10
    said: list[str] = []
    result = finetune(spec, "digits", tmp_path / "left", report=said.append, **{**options, "batch_size": 30})
    assert ("left over" in said[0]) == (spec != SPEC)
    assert 0 < result["history"][0]["loss"] < 10


def test_single_images_of_which_a_batch_norm_sees_one_number(tmp_path):
    options = {**OPTIONS, "batch_size": 1, "limit": 20}
    with pytest.raises(InputError, match="cannot train on one image: a larger batch size"):
        finetune("tiny_networks:normalised_head", "digits", tmp_path / "out", report=quiet, **options)


def test_bad_settings_write_nothing(finished, tmp_path):
    for wrong, message in [
        ({"epochs": 0}, "epochs and batch size must be at least 1"),
        ({"lr": -1.0}, "lr above 0"),
        ({"limit": 3}, "samples must be at least one per class"),
        ({"limit": 5000}, "fewer than the 500 asked for"),
    ]:
        with pytest.raises(InputError, match=message):
            finetune(SPEC, "digits", tmp_path / "new", report=quiet, **{**OPTIONS, **wrong})
        assert not (tmp_path / "new").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / ".a-b").touch()
    with pytest.raises(InputError, match="is not empty and holds no checkpoint"):
        finetune(SPEC, "digits", tmp_path / "notes", report=quiet, **OPTIONS)
    assert (tmp_path / "notes" / ".a-b").exists()
    with pytest.raises(InputError, match=r"holds a run with lr=0\.01, not 0\.1: choose another --out"):
        finetune(SPEC, "digits", finished[0], report=quiet, **{**OPTIONS, "lr": 0.1})
    with pytest.raises(InputError, match="the loss is not a number"):
        finetune(SPEC, "digits", tmp_path / "new", report=quiet, **{**OPTIONS, "lr": 1e20})
