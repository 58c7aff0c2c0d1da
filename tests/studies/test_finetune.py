"""Fine-tuning: learning, resuming, settings."""

import json
import shutil

import pytest
import tiny_networks
import torch

from qdv_gpu import load_images, load_network
from qdv_gpu.errors import InputError
from qdv_gpu.features.forward import shown
from qdv_gpu.networks.weights import read_weights
from qdv_gpu.progress import watched
from qdv_gpu.studies.finetune import finetune

OPTIONS = {"epochs": 3, "batch_size": 50, "lr": 1e-2, "samples": 300, "device": "cpu"}
SPEC = "tiny_networks:cnn"


def weights_of(out):
    return read_weights(out / "weights.safetensors")[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, finetune(SPEC, "digits", out, **OPTIONS)


def test_it_learns_and_says_so(finished):
    out, result = finished
    assert len(result["history"]) == 3
    assert result["history"][-1]["loss"] < 0.9 * result["history"][0]["loss"]
    assert result["test_accuracy"] > 0.4
    assert json.loads((out / "finetune.json").read_text())["test_accuracy"] == result["test_accuracy"]
    assert {path.name for path in out.iterdir()} == {
        "checkpoint.safetensors",
        "run.json",
        "weights.safetensors",
        "finetune.json",
        "training.png",
    }


@pytest.mark.parametrize("images", [50, 450, 850])
def test_killed_and_resumed_gives_the_same_weights(finished, tmp_path, images):
    class KilledError(Exception):
        pass

    seen = 0

    def kill(_stage, _done, _total):
        nonlocal seen
        seen += 1
        if seen * 50 == images:
            raise KilledError

    with pytest.raises(KilledError), watched(kill):
        finetune(SPEC, "digits", tmp_path / "run", **OPTIONS)
    finetune(SPEC, "digits", tmp_path / "run", **OPTIONS)
    expected = weights_of(finished[0])
    for name, tensor in weights_of(tmp_path / "run").items():
        assert torch.equal(tensor, expected[name]), name


def test_more_epochs_go_on(finished, tmp_path, lines):
    shutil.copytree(finished[0], tmp_path / "run")
    result = finetune(SPEC, "digits", tmp_path / "run", **{**OPTIONS, "epochs": 4})
    assert "after epoch 3" in lines()[0]
    assert result["history"][:3] == finished[1]["history"]


def test_more_epochs_go_on_where_numbers_are_float64(tmp_path, lines):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for epochs in (1, 2):
            finetune(SPEC, "digits", tmp_path / "run", **{**OPTIONS, "epochs": epochs, "samples": 100})
    finally:
        torch.set_default_dtype(before)
    assert not any("is damaged" in line for line in lines())
    assert any("after epoch 1" in line for line in lines())


def test_out_of_memory_keeps_the_gradient(tmp_path, monkeypatch, lines):
    """Without dropout, tiles of a batch give its gradient."""
    import qdv_gpu.studies.finetune as module

    plain = module.logits_of
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda _self, x: x)
    finetune(SPEC, "digits", tmp_path / "whole", **{**OPTIONS, "epochs": 1})

    def small(network, pixels):
        if torch.is_grad_enabled() and len(pixels) > 20:
            raise torch.OutOfMemoryError
        return plain(network, pixels)

    monkeypatch.setattr(module, "logits_of", small)
    finetune(SPEC, "digits", tmp_path / "tiles", store=tmp_path / "other", **{**OPTIONS, "epochs": 1})
    assert "CUDA is out of memory: each batch now runs in 4 tiles" in lines()
    whole, pieces = weights_of(tmp_path / "whole"), weights_of(tmp_path / "tiles")
    for name, tensor in whole.items():
        torch.testing.assert_close(pieces[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("spec", [SPEC, "tiny_networks:normalised"])
def test_single_images(tmp_path, spec, lines):
    options = {**OPTIONS, "epochs": 1, "samples": 31, "lr": 1e-3}
    result = finetune(spec, "digits", tmp_path / "one", **{**options, "batch_size": 1})
    assert 0 < result["history"][0]["loss"] < 10
    result = finetune(spec, "digits", tmp_path / "left", **{**options, "batch_size": 30})
    assert any("left over" in line for line in lines()) == (spec != SPEC)
    assert 0 < result["history"][0]["loss"] < 10


def test_single_images_of_which_a_batch_norm_sees_one_number(tmp_path):
    options = {**OPTIONS, "batch_size": 1, "samples": 20}
    with pytest.raises(InputError, match="cannot train on one image: a larger batch size"):
        finetune("tiny_networks:normalised_head", "digits", tmp_path / "out", **options)


def test_bad_settings_write_nothing(finished, tmp_path):
    for wrong, message in [
        ({"epochs": 0}, "epochs must be an integer of at least 1"),
        ({"lr": -1.0}, "lr must be a number"),
        ({"samples": 3}, "samples must be at least one per class"),
        ({"samples": 5000}, "fewer than the 500 asked for"),
    ]:
        with pytest.raises(InputError, match=message):
            finetune(SPEC, "digits", tmp_path / "new", **{**OPTIONS, **wrong})
        assert not (tmp_path / "new").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / ".a-b").touch()
    with pytest.raises(InputError, match="is not empty and holds no checkpoint"):
        finetune(SPEC, "digits", tmp_path / "notes", **OPTIONS)
    assert (tmp_path / "notes" / ".a-b").exists()
    with pytest.raises(InputError, match=r"holds a run with lr=0\.01, not 0\.1: choose another --out"):
        finetune(SPEC, "digits", finished[0], **{**OPTIONS, "lr": 0.1})
    with pytest.raises(InputError, match=r"holds a run with mean=.*, not \[0\.3\]: choose another --out"):
        finetune(SPEC, "digits", finished[0], **{**OPTIONS, "mean": 0.3}, store=tmp_path / "store")
    with pytest.raises(InputError, match="the loss is not a number"):
        finetune("tiny_networks:poisoned", "digits", tmp_path / "new", **OPTIONS)
    with pytest.raises(InputError, match="or infinite, after epoch 1: lower --lr"):
        finetune("tiny_networks:overflowing", "digits", tmp_path / "other", **{**OPTIONS, "samples": 50, "epochs": 1})


def test_random_generators_are_put_back(tmp_path):
    before = torch.get_rng_state()
    load_network("resnet18[width=0.1]", weights="none", num_classes=7)
    finetune("tiny_networks:cnn", "digits", tmp_path / "run", **{**OPTIONS, "epochs": 1, "samples": 50})
    assert torch.equal(torch.get_rng_state(), before)


def test_what_was_trained_is_not_trained_again(finished, tmp_path, lines):
    seen: list[tuple[str, int, int]] = []
    with watched(lambda *at: seen.append(at)):
        result = finetune(SPEC, "digits", tmp_path / "run", store=finished[0].parent / ".qdv-store", **OPTIONS)
    assert not seen
    assert "was trained before" in lines()[-1]
    assert result["history"] == finished[1]["history"]
    for name, tensor in weights_of(tmp_path / "run").items():
        assert torch.equal(tensor, weights_of(finished[0])[name])


def test_modules_and_data_of_ones_own(tmp_path):
    module = tiny_networks.cnn().eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    pixels, labels = torch.randint(0, 255, (60, 1, 8, 8), dtype=torch.uint8), torch.arange(60) % 10
    data = {"train": (pixels, labels), "test": (pixels[:20], labels[:20])}
    result = finetune(module, data, tmp_path / "run", epochs=1, batch_size=20, lr=1e-2, device="cpu")
    assert result["test_images"] == 20
    five = {split: (pixels, labels % 5) for split, (pixels, labels) in data.items()}
    finetune(load_network(module), five, tmp_path / "five", epochs=1, batch_size=20, lr=1e-2, device="cpu")
    assert weights_of(tmp_path / "five")["fc.weight"].shape == (5, 32)
    assert not module.training
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights_of(tmp_path / "run").items())


class Watched(tiny_networks.Tiny):
    """Has the layouts of the maps of its second convolution in training: whether channels are last."""

    layouts: list[bool] = []  # noqa: RUF012

    def forward(self, x):
        x = self.pool(self.relu(self.conv1(x)))
        x = self.conv2(x)
        if self.training:
            self.layouts.append(x.stride(1) == 1)
        return self.fc(self.pool(self.relu(x)).flatten(1))


class Standardised(Watched):
    """Views its weights."""

    def forward(self, x):
        weight = self.conv2.weight
        return super().forward(x) + 0 * weight.view(len(weight), -1).mean()


class TwoHeads(Watched):
    """Views its maps, in training alone."""

    def forward(self, x):
        maps = self.conv2(self.conv1(x))
        return super().forward(x) + (0 * maps.view(len(x), -1).mean() if self.training else 0)


class ViewedGradient(torch.autograd.Function):
    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(_, gradient):
        return gradient.view(len(gradient), -1).view(gradient.shape)


class ViewingBack(Watched):
    """Views its gradients."""

    def __init__(self):
        super().__init__()
        self.conv2.register_forward_hook(lambda _module, _inputs, output: ViewedGradient.apply(output))


@pytest.mark.parametrize(
    ("kind", "last"), [(Watched, True), (Standardised, False), (TwoHeads, False), (ViewingBack, False)]
)
def test_convolutions_train_with_channels_last_where_the_network_takes_that(tmp_path, monkeypatch, kind, last):
    monkeypatch.setattr(Watched, "layouts", [])
    finetune(kind(), "digits", tmp_path / "run", **{**OPTIONS, "epochs": 1, "samples": 100})
    assert Watched.layouts[-2:] == [last, last]


def test_parameters_with_gaps_between_their_numbers(tmp_path, monkeypatch):
    def sliced():
        network = tiny_networks.Tiny()
        network.load_state_dict(whole.state_dict())
        network.fc.bias = torch.nn.Parameter(torch.stack([network.fc.bias.data] * 2, dim=1)[:, 0])
        return network

    whole = tiny_networks.cnn()
    finetune(SPEC, "digits", tmp_path / "whole", **{**OPTIONS, "epochs": 1})
    monkeypatch.setattr(tiny_networks, "cnn", sliced)
    finetune(SPEC, "digits", tmp_path / "sliced", store=tmp_path / "other", **{**OPTIONS, "epochs": 1})
    expected = weights_of(tmp_path / "whole")
    for name, tensor in weights_of(tmp_path / "sliced").items():
        torch.testing.assert_close(tensor, expected[name])


def test_how_images_were_shown_is_remembered(tmp_path):
    """Size, mean, std and crop of the training are those of an analysis of its weights."""
    options = {**OPTIONS, "epochs": 1, "samples": 40, "image_size": 8, "mean": 0.3, "std": 0.2, "crop": True}
    finetune(SPEC, "digits", tmp_path / "out", **options)
    network = load_network(f"{SPEC}={tmp_path / 'out'}", device="cpu")
    assert (network.image_size, network.mean, network.std) == (8, (0.3,), (0.2,))
    seen = shown(load_images("digits", samples=20), network)
    assert str(seen.geometry) == f"8 of {network.resize} bilinear"


def test_one_network_of_two_names_is_trained_once_and_loads_by_both(tmp_path):
    options = {"data": "digits", "epochs": 1, "batch_size": 64, "samples": 100, "store": tmp_path / "store"}
    names = ["tiny_networks:cnn", "tiny_networks:cnn[conv1.stride=1]"]  # whose stride is 1 anyway
    for number, name in enumerate(names):
        finetune(name, out=tmp_path / str(number), **options)
        load_network(f"{name}={tmp_path / str(number)}")
    assert len(list((tmp_path / "store" / "weights").iterdir())) == 1


class Remembering(tiny_networks.Tiny):
    """Adds its last batch's mean, and what that was computed from."""

    def forward(self, x):
        logits = super().forward(x)
        self.mean = 0.9 * getattr(self, "mean", 0) + 0.1 * logits.mean(0)
        return logits - self.mean


def test_a_gradient_that_fails_is_the_networks(tmp_path):
    with pytest.raises(InputError, match="Remembering cannot be trained: its gradient fails: RuntimeError: Trying to"):
        finetune(Remembering(), "digits", tmp_path, **OPTIONS)


def test_fewer_epochs_in_a_folder_of_more_are_refused(tmp_path):
    options = {"data": "digits", "batch_size": 64, "samples": 100}
    finetune("tiny_networks:cnn", out=tmp_path / "run", epochs=2, **options)
    with pytest.raises(InputError, match="holds a run of 2 epochs, not 1: choose another --out"):
        finetune("tiny_networks:cnn", out=tmp_path / "run", epochs=1, **options)
