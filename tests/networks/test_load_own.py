"""Modules of a researcher's own, which say nothing of themselves."""

import pytest
import torch
from torch import nn

from qdv_gpu import activations, analyze, load_network
from qdv_gpu.errors import InputError


def small():
    """For images of 32 pixels, without saying so."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 8 * 8, 5),
    )  # fmt: skip


def test_the_size_is_found():
    network = load_network(small())
    assert (network.image_size, network.source) == (32, "given")
    assert list(network.layers) == ["4", "5"]
    with pytest.raises(InputError, match=r"cannot take images of 224 x 224 pixels.*set its attribute image_size"):
        load_network(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(7, 2)))


def test_analysis_in_a_notebook(tmp_path):
    pixels, labels = torch.randint(0, 255, (60, 3, 32, 32), dtype=torch.uint8), torch.arange(60) % 5
    result = analyze(small(), (pixels, labels), tmp_path / "run", perplexity=5, iterations=20, seeds=1, k=3)
    assert [layer.layer for layer in result.layers] == ["4", "5"]
    assert set(result.predictions) == {"Sequential"}


class Plain(nn.Module):
    """Without weights, and without a layer that stands out."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.ReLU(), nn.ReLU()

    def forward(self, x):
        return {"logits": self.second(self.first(x)).mean((2, 3))}


def test_networks_without_weights_or_stages(tmp_path):
    network = load_network(Plain())
    with pytest.raises(InputError, match=r"no layer of Plain stands out: name some, e\.g\. first, second"):
        activations(network, torch.zeros(4, 3, 8, 8))
    assert activations(network, torch.zeros(4, 3, 8, 8), layers=["first"])["first"].shape == (4, 192)
    pixels, labels = torch.randint(0, 255, (60, 3, 8, 8), dtype=torch.uint8), torch.arange(60) % 3
    options = {"perplexity": 5, "iterations": 20, "seeds": 1, "k": 3, "image_size": 8}
    result = analyze(Plain(), (pixels, labels), tmp_path / "run", layers="first", **options)
    assert not result.predictions


def test_the_size_of_the_images_is_tried_first(tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 81, 3))
    pixels, labels = torch.randint(0, 255, (60, 3, 20, 20), dtype=torch.uint8), torch.arange(60) % 3
    options = {"perplexity": 5, "iterations": 20, "seeds": 1, "k": 3, "image_size": 20}
    assert analyze(module, (pixels, labels), tmp_path / "run", layers="2", **options).layers[0].features == 4 * 81
    with pytest.raises(InputError, match="the store and --out are both"):
        analyze(module, (pixels, labels), tmp_path / "one", store=tmp_path / "one", layers="2", **options)
    assert not (tmp_path / "one").exists()


def test_parametrised_weights_are_no_layers():
    module = small()
    expected = load_network(module).layers
    nn.utils.parametrizations.weight_norm(module[0])
    assert load_network(module).layers == expected


@pytest.mark.parametrize("named", [{"": "2"}, {"a": 3}, "2"])
def test_named_layers_of_another_kind(named):
    module = small()
    module.named_layers = named
    with pytest.raises(InputError, match="must be a dict of names to module paths"):
        load_network(module)
