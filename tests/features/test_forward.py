"""Activations of many layers from one forward pass."""

import numpy as np
import pytest
import torch

from qdv_gpu import activations, load_images, load_network
from qdv_gpu.data.images import prepare
from qdv_gpu.errors import InputError
from qdv_gpu.features.forward import ForwardPass, hold


@pytest.fixture
def network():
    return load_network("tiny_networks:cnn", device="cpu")


@pytest.fixture
def images():
    return load_images("digits").take(torch.arange(70))


def hooks(network):
    return sum(len(module._forward_hooks) for module in network.module.modules())


def test_layers_against_a_plain_forward_pass(network, images):
    """conv1 is overwritten by the in-place ReLU behind it; relu and pool are called twice."""
    got = activations(network, images, layers=["conv1", "relu", "pool", "conv2"], batch_size=32)
    m = network.module
    with torch.no_grad():
        x = prepare(images.pixels, size=8, channels=1, mean=network.mean, std=network.std)
        conv1 = m.conv1(x)
        pool1 = torch.nn.functional.max_pool2d(conv1.relu(), 2)
        conv2 = m.conv2(pool1)
        pool2 = torch.nn.functional.max_pool2d(conv2.relu(), 2)
    expected = {
        "conv1": conv1,
        "relu@1": conv1.relu(),
        "relu@2": conv2.relu(),
        "pool@1": pool1,
        "pool@2": pool2,
        "conv2": conv2,
    }
    assert list(got) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value.flatten(1), rtol=1e-5, atol=1e-6)
        assert got[name].dtype == torch.float32


def test_the_pass_ends_behind_the_last_layer(network, images):
    calls = []
    network.module.fc.register_forward_hook(lambda *_: calls.append(1))
    activations(network, images, layers=["conv2"], batch_size=10)
    assert len(calls) == 1  # only the first batch, which finds out how often each layer is called


def test_nothing_stays_behind(network, images):
    activations(network, images, layers=["conv1"])
    assert hooks(network) == 0
    broken = load_network("tiny_networks:pair")
    with pytest.raises(InputError, match="layer pair of pair gives a tuple, not a tensor"):
        activations(broken, images, layers=["conv", "pair"])
    assert hooks(broken) == 0


def test_arrays_in_arrays_out(network, images):
    from_images = activations(network, images, layers=["pool"])["pool@2"]
    from_numpy = activations(network, images.pixels.numpy(), layers=["pool"])["pool@2"]
    assert isinstance(from_numpy, np.ndarray)
    np.testing.assert_array_equal(from_numpy, from_images.numpy())
    assert isinstance(activations(network, images.pixels)["pool@1"], torch.Tensor)
    with pytest.raises(InputError, match=r"must be uint8 of shape .* got torch.float32"):
        activations(network, images.pixels.float())


def test_tiles_are_the_rows_of_the_held_layer(network, images):
    pass_ = ForwardPass(network, images, network.select(["conv1", "pool"]), batch_size=16)
    held = hold(pass_)
    for name in ("conv1", "pool@2"):
        assert torch.equal(torch.cat(list(pass_.tiles(name))), held[name])
        assert [len(tile) for tile in pass_.tiles(name)] == [16, 16, 16, 16, 6]


def test_out_of_memory_halves_the_batch(network, images):
    expected = activations(network, images, layers=["conv2"], batch_size=64)["conv2"]

    def exhausted(_module, inputs):
        if len(inputs[0]) > 20:
            raise torch.OutOfMemoryError

    handle = network.module.register_forward_pre_hook(exhausted)
    said: list[str] = []
    got = activations(network, images, layers=["conv2"], batch_size=64, report=said.append)["conv2"]
    handle.remove()
    torch.testing.assert_close(got, expected)
    assert said == [f"CUDA is out of memory: the batch is halved to {n} images" for n in (32, 16)]

    def hopeless(_module, _inputs):
        raise torch.OutOfMemoryError

    network.module.register_forward_pre_hook(hopeless)
    with pytest.raises(InputError, match="out of memory even for one image"):
        activations(network, images, report=said.append)


def test_activations_may_be_changed_and_used_in_autograd(network, images):
    X = activations(network, images, layers=["conv2"])["conv2"]
    X.sub_(X.mean())
    X.requires_grad_().square().sum().backward()
    assert X.grad is not None


def test_a_pass_of_tiles_ends_with_its_layer(network, images):
    calls = []
    handle = network.module.fc.register_forward_hook(lambda *_: calls.append(1))
    tiles = ForwardPass(network, images, network.select(["conv1"]), batch_size=16).tiles("conv1")
    assert len(list(tiles)) == 5
    assert len(list(tiles)) == 5
    handle.remove()
    assert len(calls) == 1  # the first batch shows how often the layer is called


@pytest.mark.parametrize("setting", ["medium", "high", "highest"])
def test_precision_settings_are_restored(network, images, setting):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        activations(network, images, layers=["conv1"])
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)


def test_bad_input(network, images):
    with pytest.raises(InputError, match="batch size must be at least 1, got -1"):
        activations(network, images, batch_size=-1)
    with pytest.raises(InputError, match="at least one layer"):
        activations(network, images, layers=[])
    with pytest.raises(InputError, match=r"unknown layer of cnn .nothing."):
        load_network("tiny_networks:cnn").select(["nothing"])
    moody = load_network("tiny_networks:moody")
    with pytest.raises(InputError, match="layer crop of moody changes its size from batch to batch: 36, then 18"):
        activations(moody, images, layers=["crop"], batch_size=34)
    for fickle in (lambda x: len(x) > 34, lambda x: len(x) <= 34):  # once or twice
        net = load_network("tiny_networks:cnn")
        net.module.stem = torch.nn.Identity()
        net.module.register_forward_pre_hook(
            lambda module, x, fickle=fickle: [module.stem(x[0]) for _ in range(1 + fickle(x[0]))][-1]
        )
        with pytest.raises(InputError, match=r"layer stem of cnn is (called more often|not used in its forward pass)"):
            activations(net, images, layers=["stem", "fc"], batch_size=40)
    network.module.register_module("unused", torch.nn.Identity())
    with pytest.raises(InputError, match="layer unused of cnn is not used"):
        activations(network, images, layers=["unused"])


@pytest.mark.gpu
def test_stays_on_the_device(images):
    cpu = load_network("tiny_networks:cnn", device="cpu")
    gpu = load_network("tiny_networks:cnn", device="cuda")
    ours = activations(gpu, images.to("cuda"))
    assert all(X.is_cuda for X in ours.values())
    for name, X in activations(cpu, images).items():
        torch.testing.assert_close(ours[name].cpu(), X, rtol=1e-4, atol=1e-4)
