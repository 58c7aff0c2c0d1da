"""Operations on the way back: what has a rule, what takes autograd's formula, and what is refused."""

from dataclasses import replace

import pytest
import torch
from deconv_reference import Rectify, by_autograd, close, network, normal
from torch import nn
from torch.nn import functional

from qdv_gpu import Deconvnet, load_network
from qdv_gpu.data.convert import as_images
from qdv_gpu.deconv.rules import _conv_transpose
from qdv_gpu.deconv.unpool import Pool, max_pool, unpool
from qdv_gpu.errors import InputError


class Folding(nn.Module):
    """Folds the channels into the batch, and applies a linear layer to pixels."""

    image_size = 16
    named_layers = {"conv": "conv"}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.pixels = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.conv = nn.Conv2d(6, 5, 3)
        self.fc = nn.Linear(5, 2)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x):
        x = functional.relu(self.first(x))
        x = x.reshape(-1, 1, 16, 16)
        x = functional.conv2d(x, torch.full((1, 1, 3, 3), 1 / 9, dtype=x.dtype), padding=1).reshape(-1, 4, 16, 16)
        x = x.permute(1, 0, 2, 3).roll(1, 0).permute(1, 0, 2, 3)
        x = functional.relu(self.pixels(x.permute(0, 2, 3, 1)), inplace=True)
        x = self.norm(x.permute(0, 3, 1, 2).flatten(2)).unflatten(2, (16, 16))
        return self.fc(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("mode", ["deconvnet", "guided", "gradient"])
def test_what_is_folded_into_the_batch_comes_back(mode, monkeypatch):
    torch.manual_seed(0)
    net = load_network(Folding(), device="cpu")
    for image in normal(2, 3, 16, 16):
        found = Deconvnet(net).reconstruct(image, "conv", maps=[0, 1, 2, 3, 4, 4], mode=mode)
        assert close(found, by_autograd(monkeypatch, net, image, "conv", mode=mode, maps=[0, 1, 2, 3, 4, 4]))
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    top = Deconvnet(net).top_activations(as_images(images), "conv", k=2)
    own = Deconvnet(net).reconstruct(images[top.images[3, 1]], "conv", maps=[3])[0]
    assert close(top.reconstructions[3, 1], own)


def test_trained_convnext_gradient(monkeypatch):
    net = network("convnext_tiny")
    for name, parameter in net.module.named_parameters():
        if name.endswith("layer_scale"):
            nn.init.ones_(parameter)
    found = Deconvnet(net).reconstruct(normal(3, 64, 64), "features.1", maps=[0, 5], mode="gradient")
    assert not found.requires_grad
    assert close(found, by_autograd(monkeypatch, net, normal(3, 64, 64), "features.1", mode="gradient", maps=[0, 5]))


@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (3, 3), (5, 2), (7, 7), (11, 11)])
@pytest.mark.parametrize("stride", [2, 3, 4])
def test_strided_convolutions_of_an_image(kernel, stride):
    data = torch.randn(3, 5, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(5, 3, *kernel, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for padding in {(0, 0), (kernel[0] // 2, 0), (kernel[0] // 2, kernel[1] // 2)}:
        for rest in ((0, 0), (stride - 1, 0), (1, stride - 1)):
            pool = Pool(kernel, (stride, stride), padding, (1, 1))
            expected = functional.conv_transpose2d(data, weight, None, stride, padding, rest)
            torch.testing.assert_close(_conv_transpose(data, weight, pool, 1, rest), expected)


def test_a_convolution_with_valid_padding():
    torch.manual_seed(0)
    named, plain = (nn.Conv2d(3, 4, 3, stride=2, padding=padding) for padding in ("valid", 0))
    plain.load_state_dict(named.state_dict())
    found, expected = (
        Deconvnet(nn.Sequential(conv, nn.ReLU())).reconstruct(normal(3, 12, 12), "1", mode="deconvnet-map")
        for conv in (named, plain)
    )
    assert torch.equal(found, expected)


def test_a_network_without_parameters():
    net = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    image = torch.arange(48.0).reshape(3, 4, 4)
    expected = torch.zeros(3, 3, 4, 4)
    expected[range(3), range(3), 3, 3] = image[:, 3, 3]
    assert torch.equal(Deconvnet(net).reconstruct(image, "1"), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: functional.instance_norm(x),
        lambda x: 1 / (x + 9),
        lambda x: x * x,
        lambda x: functional.conv2d(x, x.mean((0, 2, 3))[None, :, None, None]),
    ],
    ids=["instance norm", "quotient", "product", "weights from the image"],
)
def test_what_is_not_linear_is_refused(make):
    net = load_network("tiny_networks:cnn", weights="none", device="cpu")
    forward = net.module.forward
    net.module.forward = lambda x: forward(x + 0 * make(net.module.conv1(x)).mean(1, keepdim=True))
    with pytest.raises(InputError, match="no rule for"):
        Deconvnet(net).reconstruct(normal(1, 8, 8), "conv2")


@pytest.mark.parametrize("mode", ["deconvnet", "guided", "gradient"])
def test_a_sum_in_place_behind_a_relu(mode):
    net = load_network("tiny_networks:cnn", weights="none", device="cpu")
    m = net.module

    def forward(x):
        y = m.conv1(x).relu()
        y += x
        return m.conv2(y).mean() + m.fc.weight.sum()

    m.forward = forward
    image = normal(1, 8, 8)
    with torch.inference_mode():
        (found,) = Deconvnet(net).reconstruct(image, "conv2", maps=[2], mode=mode)
    x = image[None].clone().requires_grad_()
    hidden = m.conv1(x).relu() if mode == "gradient" else Rectify.apply(m.conv1(x), mode == "guided")
    output = m.conv2(hidden + x)[0, 2]
    value = output.sum() if mode == "guided" else output.max() * (output.max().detach() if mode == "deconvnet" else 1)
    assert close(found, torch.autograd.grad(value, x)[0][0])


def test_double_precision_and_colour_order():
    net = load_network("caffe_alexnet", weights="none", num_classes=10, device="cpu")
    net.module.double()
    net = replace(net, image_size=67)
    pixels = torch.randint(0, 256, (2, 3, 67, 67), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    top = Deconvnet(net).top_activations(as_images(pixels), "maxpool1", k=1, maps=[0])
    t, left, b, r = top.fields[0, 0].tolist()
    assert torch.equal(top.patches[0, 0], pixels[top.images[0, 0], :, t:b, left:r])
    assert Deconvnet(net).reconstruct(pixels[0].numpy(), "maxpool1", maps=[0]).dtype == torch.float64


def test_switches_lost_by_max_unpool_are_kept():
    x = normal(1, 16, 27, 27)
    pooled, indices = functional.max_pool2d(x, 3, 2, return_indices=True)
    _, switches = max_pool(x, 3, 2)
    lost = functional.max_unpool2d(pooled, indices, 3, 2, output_size=(27, 27)).sum() / pooled.sum()
    assert lost < 0.95
    assert unpool(pooled, switches, (27, 27), 3, 2).sum() == pytest.approx(float(pooled.sum()), rel=1e-5)


class Changing(nn.Module):
    """A layer that returns its input, which is changed in place behind it; or one with a division that rounds."""

    image_size = 12

    def __init__(self, *, rounding=False):
        super().__init__()
        self.conv1, self.id, self.conv2 = nn.Conv2d(1, 4, 3), nn.Identity(), nn.Conv2d(4, 2, 3)
        self.rounding = rounding

    def forward(self, x):
        y = self.conv1(x)
        z = self.id(y)
        y.mul_(-3)
        return self.conv2(z.div(2, rounding_mode="floor") if self.rounding else z)


@pytest.mark.parametrize("mode", ["deconvnet", "guided", "gradient"])
def test_what_is_changed_in_place_behind_a_layer(mode):
    torch.manual_seed(0)
    net, image = load_network(Changing(), device="cpu"), normal(1, 12, 12)
    expected = Deconvnet(net).reconstruct(image, "conv1", mode=mode)
    assert torch.equal(Deconvnet(net).reconstruct(image, "id", mode=mode), expected)


def test_a_division_that_rounds_is_refused():
    with pytest.raises(InputError, match="no rule for Div with rounding"):
        Deconvnet(Changing(rounding=True)).reconstruct(normal(1, 12, 12), "conv2")
