"""Reconstructions agree with Captum, with autograd under patched rules and with a network transposed by hand."""

import itertools
import math
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from deconv_reference import NETWORKS, Rectify, by_autograd, close, network, normal
from torch import nn
from torch.nn import functional

from qdv_gpu import Deconvnet, load_images, load_network
from qdv_gpu.data.convert import as_images
from qdv_gpu.deconv import deconvnet, record, rules, windows
from qdv_gpu.errors import InputError
from qdv_gpu.features.forward import network_input
from qdv_gpu.machine import product_precision
from qdv_gpu.report.curves import plot_sanity


@pytest.mark.parametrize("mode", ["deconvnet", "deconvnet-map", "guided", "gradient"])
@pytest.mark.parametrize("spec", NETWORKS)
def test_agrees_with_autograd_on_every_layer(spec, mode, monkeypatch):
    net, image = network(spec), normal(3, 96, 96)
    layers = list(net.layers.items())
    for layer, path in layers if mode == "deconvnet" else layers[1:4:2]:
        found = Deconvnet(net).reconstruct(image, layer, maps=[0, 3, 5, 11, 3], mode=mode)
        truth = by_autograd(monkeypatch, net, image, path, mode=mode, maps=[0, 3, 5, 11, 3])
        assert found.shape == (5, 3, 96, 96)
        assert truth.norm() > 0
        assert close(found, truth), layer


@pytest.mark.parametrize("spec", ["alexnet", "vgg11"])
def test_agrees_with_captum(spec):
    attr = pytest.importorskip("captum.attr")
    net, image = network(spec), normal(3, 96, 96)
    for module in net.module.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    for layer, path in net.layers.items():
        with torch.no_grad():
            activation = nn.Sequential(*list(net.module.features)[: int(path.split(".")[1]) + 1])(image[None])[0]
        maps = [1, 2, 30, len(activation) - 1]
        found = Deconvnet(net).reconstruct(image, layer, maps=maps)
        captum = attr.NeuronDeconvolution(net.module, net.module.get_submodule(path))
        for number, picture in zip(maps, found, strict=True):
            value, place = activation[number].flatten().max(0)
            unit = (number, int(place) // activation.shape[2], int(place) % activation.shape[2])
            truth = value * captum.attribute(image[None], unit)[0].detach()
            assert close(picture, truth)


def scatter(y, x, kernel, stride, padding):
    """Unpooling in float64 by adding one window after the other."""
    result = torch.zeros_like(x)
    padded = functional.pad(x, [padding] * 4, value=-torch.inf)
    for c, i, j in itertools.product(*map(range, y.shape[1:])):
        window = padded[0, c, i * stride : i * stride + kernel, j * stride : j * stride + kernel]
        winner = int(window.flatten().argmax())
        result[0, c, i * stride - padding + winner // kernel, j * stride - padding + winner % kernel] += y[0, c, i, j]
    return result


def test_agrees_with_a_network_transposed_by_hand():
    net = load_network("tiny_networks:written_with_functions", weights="none", device="cpu")
    m, image = net.module.double(), normal(3, 33, 33).double()
    with torch.no_grad():
        x0 = m.norm(m.stem(image[None])).relu()  # [1, 8, 17, 17]
        x1 = functional.max_pool2d(x0, 3, 2, 1)  # [1, 8, 9, 9]
        h = m.a(x1).relu()
        x2 = (m.b(h) + x1).relu()
        x3 = torch.cat([x2, m.c(x2).relu()], 1)
        x4 = m.d(functional.avg_pool2d(x3, 2, 1))  # [1, 10, 3, 3]
        for number in range(10):
            seed = torch.zeros_like(x4)
            seed[0, number].view(-1)[x4[0, number].argmax()] = x4[0, number].max()
            r = functional.conv_transpose2d(seed, m.d.weight, stride=2, output_padding=1)
            smear = torch.ones(12, 1, 2, 2, dtype=torch.float64) / 4
            r = functional.conv_transpose2d(r, smear, groups=12)
            r = r[:, :8] + functional.conv_transpose2d(r[:, 8:].relu(), m.c.weight, padding=2, dilation=2)
            r = r.relu()
            r = r + functional.conv_transpose2d(
                functional.conv_transpose2d(r, m.b.weight, padding=1, groups=2).relu(), m.a.weight, padding=1
            )
            r = scatter(r, x0, 3, 2, 1).relu()
            r = r * (m.norm.weight / (m.norm.running_var + m.norm.eps).sqrt())[:, None, None]
            r = functional.conv_transpose2d(r, m.stem.weight, stride=2, padding=2)
            (found,) = Deconvnet(net).reconstruct(image, "d", maps=[number])
            assert (found - r[0]).norm() <= 1e-12 * r.norm()


@pytest.mark.parametrize("spec", ["alexnet", "resnet18", "tiny_networks:written_with_functions"])
def test_windows_change_nothing_but_the_time(spec, monkeypatch):
    net, image = network(spec, classes=10), normal(3, 96, 96)
    layers = net.layers if ":" not in spec else ["a", "c", "d"]
    windowed = [Deconvnet(net).reconstruct(image, layer) for layer in layers]
    monkeypatch.setattr(windows.Window, "smaller", lambda window, size: False)
    for layer, found in zip(layers, windowed, strict=True):
        assert close(found, Deconvnet(net).reconstruct(image, layer)), layer


def test_unknown_linear_nodes_take_autograds_formula():
    class Shuffled(nn.Module):
        image_size = 16
        named_layers = {"conv": "conv"}  # noqa: RUF012

        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, padding=1)
            self.conv = nn.Conv2d(4, 5, 3)
            self.fc = nn.Linear(5, 2)

        def forward(self, x):
            x = self.first(x).relu()
            left, right = x.unflatten(1, (4, 2)).transpose(1, 2).flatten(1, 2).chunk(2, dim=1)
            x = functional.interpolate(left - 0.5 * right, scale_factor=2)
            return self.fc(self.conv(x).mean((2, 3)))

    torch.manual_seed(0)
    net = load_network(Shuffled(), device="cpu")
    images = normal(2, 3, 16, 16)
    for mode in ("deconvnet", "gradient"):
        for image in images:
            x = image[None].clone().requires_grad_()
            hidden = Rectify.apply(net.module.first(x), 0) if mode == "deconvnet" else net.module.first(x).relu()
            left, right = hidden.unflatten(1, (4, 2)).transpose(1, 2).flatten(1, 2).chunk(2, dim=1)
            output = net.module.conv(functional.interpolate(left - 0.5 * right, scale_factor=2))
            value = output[0, 3].max()
            factor = value.detach() if mode == "deconvnet" else 1
            (truth,) = torch.autograd.grad(value * factor, x)
            assert close(Deconvnet(net).reconstruct(image, "conv", maps=[3], mode=mode), truth)


def test_each_call_of_a_reused_relu():
    net = load_network("tiny_networks:cnn", weights="none", device="cpu")
    image = torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first, second = (Deconvnet(net).reconstruct(image, f"relu@{call}") for call in (1, 2))
    assert (len(first), len(second)) == (6, 8)
    assert torch.equal(second, Deconvnet(net).reconstruct(image, "relu@2"))
    with pytest.raises(InputError, match=r"used 2 times: choose one of relu@1, relu@2"):
        Deconvnet(net).reconstruct(image, "relu")
    with pytest.raises(InputError, match="used 2 times, got relu@3"):
        Deconvnet(net).reconstruct(image, "relu@3")
    with pytest.raises(InputError, match="used once, got conv1@1"):
        Deconvnet(net).reconstruct(image, "conv1@1")


def test_one_forward_pass_serves_all_maps(monkeypatch):
    net = network("alexnet")
    calls = []
    net.module.features[0].register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr("qdv_gpu.deconv.deconvnet.CPU_MAPS", 20)
    Deconvnet(net).reconstruct(normal(3, 96, 96), "conv3")
    assert len(calls) == 1


def test_convolutions_are_float32_in_a_fixed_order(monkeypatch):
    """torch lets cuDNN convolve in TF32, and in an order of its own, unless told otherwise."""
    cudnn, seen = torch.backends.cudnn, set()

    def settings():
        return cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision, cudnn.deterministic

    def spying(name):
        function = getattr(deconvnet, name)
        return lambda *args, **options: (seen.add((name, *settings())), function(*args, **options))[1]

    for name in ("record_forward", "back_to_image"):
        monkeypatch.setattr(deconvnet, name, spying(name))
    net = Deconvnet(network("tiny_networks:cnn"))
    calls = (
        lambda: net.reconstruct(normal(1, 8, 8), "conv2"),
        lambda: net.sanity_check(normal(1, 8, 8), "conv2"),
        lambda: net.top_activations(load_images("digits", samples=20), "conv2", k=2),
    )
    with product_precision("tf32"):
        before = settings()
        for call in calls:
            seen.clear()
            call()
            assert seen == {(name, "ieee", "ieee", True) for name in ("record_forward", "back_to_image")}
            assert settings() == before


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_network_is_changed(fails, monkeypatch):
    net = network("resnet18")
    before = {name: tensor.clone() for name, tensor in net.module.state_dict().items()}
    if fails:
        monkeypatch.setitem(rules.RULES, rules.POOL, Mock(side_effect=ZeroDivisionError))
        with pytest.raises(ZeroDivisionError):
            Deconvnet(net).reconstruct(normal(3, 64, 64), "layer1")
        with pytest.raises(InputError, match="image size must be an integer of at least 1, got 0"):
            Deconvnet(net).reconstruct(normal(3, 0, 0), "layer1")
    else:
        Deconvnet(net).reconstruct(normal(3, 64, 64), "layer2", maps=[0])
        Deconvnet(net).sanity_check(normal(3, 64, 64), "layer1", maps=[0, 1])
    after = net.module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(p.requires_grad and p.grad is None for p in net.module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.module.modules())
    assert not net.module.training


@pytest.mark.parametrize(
    ("spec", "layer", "name", "module"),
    [
        ("mobilenet_v2", "features.2", "Hardtanh", r"features\.\d+\.conv\.\d+\.\d+"),
        ("mobilenet_v3_small", "features.2", "Hard", r"features\.[\w.]+"),
        ("efficientnet_b0", "features.2", "Silu|Sigmoid", r"features\.[\w.]+"),
        ("convnext_tiny", "features.3", "Permute|LayerNorm|Gelu", r"features\.[\w.]+"),
    ],
)
def test_activations_without_a_rule_name_their_module(spec, layer, name, module):
    net = network(spec)
    with pytest.raises(InputError, match=rf"no rule for .*({name}).*which module {module} of {spec} uses"):
        Deconvnet(net).reconstruct(normal(3, 64, 64), layer)
    assert Deconvnet(net).reconstruct(normal(3, 64, 64), layer, maps=[0], mode="gradient").abs().max() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, x: d.reconstruct(x, "classifier"), "has no maps"),
        (lambda d, x: d.reconstruct(x, "conv9"), "unknown layer"),
        (lambda d, x: d.reconstruct(x, "conv3", maps=[0, 384]), "0 to 383, got 384"),
        (lambda d, x: d.reconstruct(x, "conv3", maps=[-1]), "0 to 383, got -1"),
        (lambda d, x: d.reconstruct(x, "conv3", maps=[]), "got none"),
        (lambda d, x: d.reconstruct(x[:2], "conv3"), "takes 3-channel images, got 2"),
        (lambda d, x: d.reconstruct(x[None], "conv3"), "must have shape"),
        (lambda d, x: d.reconstruct(x.long(), "conv3"), "uint8 or floating point"),
        (lambda d, x: d.reconstruct(x, "conv3", mode="guided-map"), "unknown mode"),
        (lambda d, x: d.reconstruct(x * torch.nan, "conv3"), "NaN"),
        (lambda d, x: d.reconstruct(x[:, :9, :9], "conv3"), "does not fit|cannot take"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(Deconvnet(network("alexnet")), normal(3, 96, 96))


def test_layers_off_the_image_are_refused():
    net = load_network("tiny_networks:written_with_functions", weights="none", device="cpu")
    with pytest.raises(InputError, match="does not depend on the image"):
        Deconvnet(net).reconstruct(normal(3, 33, 33), "side")


def test_networks_in_training_mode_are_left_in_it():
    net = load_network("tiny_networks:written_with_functions", weights="none", device="cpu")
    expected = Deconvnet(net).reconstruct(normal(3, 33, 33), "a")
    net.module.train()
    before = {name: tensor.clone() for name, tensor in net.module.state_dict().items()}
    for given in (net, net.module):
        assert torch.equal(Deconvnet(given).reconstruct(normal(3, 33, 33), "a"), expected)
    assert all(module.training for module in net.module.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.module.state_dict().items())


def test_maps_as_people_name_them():
    net = Deconvnet(network("tiny_networks:cnn"))
    every = net.reconstruct(normal(1, 8, 8), "conv2")
    names = {3: [3], np.int64(4): [4], torch.tensor([1, 4]): [1, 4], range(2, 4): [2, 3]}
    for maps, expected in [*names.items(), (slice(0, 8, 3), [0, 3, 6])]:
        found = net.reconstruct(normal(1, 8, 8), "conv2", maps=maps)
        torch.testing.assert_close(found, every[expected], rtol=1e-5, atol=1e-6)
    for wrong in (8, -1, 1.0, True, "3", [1.5], [], [0, 9]):
        with pytest.raises(InputError, match="maps must be some of 0 to 7, got"):
            net.reconstruct(normal(1, 8, 8), "conv2", maps=wrong)


def test_a_fault_of_ours_is_no_matter_of_size(monkeypatch):
    net = network("tiny_networks:cnn")
    there = {"torch": torch}  # code that is in a file of ours
    exec(compile("fault = lambda *_, **__: torch.zeros(3) @ torch.zeros(2)", record.__file__, "exec"), there)
    monkeypatch.setattr(record, "_pooled", there["fault"])
    with pytest.raises(RuntimeError, match="size"):
        Deconvnet(net).reconstruct(normal(1, 8, 8), "conv2")


def test_top_activations_are_those_of_every_image():
    net = load_network("tiny_networks:cnn", weights="none", device="cpu")
    digits = load_images("digits", samples=100)
    top = Deconvnet(net).top_activations(digits, "conv2", k=3, maps=[1, 6])
    x = (digits.pixels.float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        hidden = net.module.pool(net.module.conv1(x).relu())
        activations = net.module.conv2(hidden)  # [100, 8, 4, 4]
    values, images = activations.flatten(2).amax(2).topk(3, dim=0)
    assert torch.allclose(top.values, values.T, atol=1e-6)
    assert torch.equal(top.images, images.T)
    assert top.patches.shape == (2, 3, 1, 8, 8)
    for m, n in itertools.product(range(2), range(3)):
        image, (y, x0) = top.images[top.maps[m], n], top.places[top.maps[m], n]
        assert activations[image, top.maps[m], y, x0] == activations[image, top.maps[m]].max()
        truth = Deconvnet(net).reconstruct(digits.pixels[image], "conv2", maps=[int(top.maps[m])])[0]
        box = top.fields[m, n]  # conv2 sees 2 * (4 + 1) - 1 + 2 = 8 pixels, cut at the edges
        assert box.tolist() == [max(0, 2 * y - 3), max(0, 2 * x0 - 3), min(8, 2 * y + 5), min(8, 2 * x0 + 5)]
        shifted = torch.zeros(1, 14, 14)
        shifted[:, 3:11, 3:11] = truth
        assert torch.allclose(top.reconstructions[m, n], shifted[:, 2 * y : 2 * y + 8, 2 * x0 : 2 * x0 + 8], atol=1e-6)
        pixels = functional.pad(digits.pixels[image], [3] * 4)
        assert torch.equal(top.patches[m, n], pixels[:, 2 * y : 2 * y + 8, 2 * x0 : 2 * x0 + 8])
    with pytest.raises(InputError, match="k must be an integer within 1"):
        Deconvnet(net).top_activations(digits, "conv2", k=101)


@pytest.mark.parametrize("spec", ["resnet18", "googlenet", "densenet121", "squeezenet1_1"])
def test_receptive_fields_hold_all_that_a_unit_sees(spec):
    net = network(spec)
    layer = list(net.layers)[1]
    images = torch.randint(0, 256, (3, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    net = replace(net, image_size=96)
    top = Deconvnet(net).top_activations(as_images(images), layer, k=1)
    alive = (top.values[:, 0] > 0).nonzero()[:3, 0].tolist()
    for number in alive:
        x = network_input(net, images[top.images[number, 0]][None]).requires_grad_()
        seen = []
        handle = net.module.get_submodule(net.layers[layer]).register_forward_hook(
            lambda _m, _i, o, s=seen: s.append(o)
        )
        net.module(x)
        handle.remove()
        y, x0 = top.places[number, 0]
        seen[0][0, number, y, x0].backward()
        used = x.grad[0].abs().amax(0) > 0
        t, left, b, r = top.fields[number, 0].tolist()
        assert used[t:b, left:r].sum() == used.sum() > 0
        assert (b - t) * (r - left) < 96 * 96 or math.prod(used.shape) == used.sum()


def test_sanity_check_goes_down_from_the_layer():
    net = network("alexnet")
    check = Deconvnet(net).sanity_check(normal(3, 96, 96), "conv3", maps=[0, 1, 2])
    assert check.modules == ["features.6", "features.3", "features.0"]
    assert check.similarity.shape == (3, 3)
    assert all(-1 <= mean < 0.95 for mean in check.mean)
    again = Deconvnet(net).sanity_check(normal(3, 96, 96), "conv3", maps=[0, 1, 2])
    assert torch.equal(check.similarity, again.similarity)
    _, ax = plot_sanity(check.modules, check.similarity.numpy(), "AlexNet conv3")
    assert len(ax.get_xticks()) == 4
    branch = Deconvnet(network("googlenet")).sanity_check(normal(3, 96, 96), "inception3a.branch3", maps=[0])
    assert not any(path.startswith(("inception3a.branch1", "inception3a.branch2")) for path in branch.modules)
    plain = load_network("tiny_networks:cnn", weights="none", device="cpu")
    plain.module.first = nn.Identity().eval()
    plain.module.forward = lambda x: plain.module.fc(plain.module.first(x * 1)[:, :, :4].flatten(1))
    with pytest.raises(InputError, match="no weights below it"):
        Deconvnet(plain).sanity_check(normal(1, 8, 8), "first")
