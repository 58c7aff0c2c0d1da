"""Activations of many layers from one forward pass."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import tiny_networks
import torch

from qdv_gpu import activations, load_images, load_network
from qdv_gpu.data.images import prepare
from qdv_gpu.errors import InputError
from qdv_gpu.features.forward import ForwardPass, hold
from qdv_gpu.features.pca import reduce


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
    assert len(calls) == 2  # of two images, to find the layout, and the first batch: how often each layer is called


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
    normalised = activations(network, prepare(images.pixels, size=8, channels=1, mean=network.mean, std=network.std))
    torch.testing.assert_close(
        normalised["pool@1"], torch.from_numpy(activations(network, images.pixels.numpy())["pool@1"])
    )


def test_tiles_are_the_rows_of_the_held_layer(network, images):
    pass_ = ForwardPass(network, images, network.select(["conv1", "pool"]), batch_size=16)
    held = hold(pass_)
    for name in ("conv1", "pool@2"):
        assert torch.equal(torch.cat(list(pass_.tiles(name))), held[name])
        assert [len(tile) for tile in pass_.tiles(name)] == [64, 6]


def test_one_call_of_a_layer(network, images):
    every = activations(network, images, layers=["pool"])
    one = activations(network, images, layers=["pool@2", "conv1"])
    assert list(one) == ["pool@2", "conv1"]
    assert torch.equal(one["pool@2"], every["pool@2"])
    with pytest.raises(InputError, match="unknown call of a layer of cnn 'pool@3': did you mean pool@2"):
        activations(network, images, layers=["pool@3"])


def test_modules_are_not_changed(images):
    module = tiny_networks.normalised().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    ours = activations(module, images, layers=["conv2"])["conv2"]
    assert all(child.training for child in module.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    network = load_network(module)
    network.module.train()
    assert torch.equal(activations(network, images, layers=["conv2"])["conv2"], ours)  # not the batch's statistics
    assert network.module.training


def test_a_networks_own_mistake_is_no_matter_of_size(images):
    class Wrong(tiny_networks.Tiny):
        def forward(self, x):
            if x.abs().max() > 0:
                raise RuntimeError("a mistake of the network's")
            return super().forward(x)

    with pytest.raises(InputError, match=r"on a batch of \d+: RuntimeError: a mistake of the network's \("):
        activations(Wrong(), images, layers=["conv1"])
    with pytest.raises(InputError, match="Tiny cannot take images of 2 x 2 pixels"):
        activations(tiny_networks.Tiny(), images, image_size=2)


def test_state_kept_during_the_pass_is_each_tiles_own(images):
    class Keeping(tiny_networks.Tiny):
        def forward(self, x):
            self.kept = self.conv1(x)
            for _ in range(20):
                torch.mm(torch.ones(50, 50), torch.ones(50, 50))
            return self.fc(self.pool(self.conv2(self.pool(self.kept.relu()))).flatten(1))

    module = Keeping()
    many = images.take(torch.arange(70).repeat(20))
    together = activations(module, many, layers=["conv2"])["conv2"].view(20, 70, -1)
    assert not hasattr(module, "kept")
    torch.testing.assert_close(together, together[:1].expand(20, -1, -1), rtol=1e-5, atol=1e-6)


class Between(tiny_networks.Tiny):
    """Gives its layer `between` what `change` makes of the images."""

    def __init__(self, change):
        super().__init__()
        self.between, self.change = torch.nn.Identity(), change

    def forward(self, x):
        self.batches = getattr(self, "batches", 0) + 1
        self.between(self.change(self, x))
        return super().forward(x)


DEPENDENT = {
    "random": lambda _, x: torch.nn.functional.dropout(x + 1),
    "statistics": lambda _, x: torch.nn.functional.batch_norm(x, None, None, training=True),
    "state": lambda network, x: (x + 1) * network.batches,
    "order": lambda _, x: x.flip(0),
    "layout": lambda network, x: torch.as_strided(network.conv1(x), (len(x), 6, 8, 8), (384, 64, 8, 1)),
}


@pytest.mark.parametrize("change", DEPENDENT)
def test_numbers_of_more_than_the_image_are_said_once(images, caplog, change):
    activations(Between(DEPENDENT[change]), images, layers=["conv1", "between"])
    (record,) = caplog.records
    assert record.getMessage().startswith("layer between of Between gives an image other numbers when it is run again")


def test_a_network_that_refuses_channels_last(images):
    """Its convolutions get images with channels last, two of them, until its view of their maps fails."""
    layouts = []

    class Viewing(tiny_networks.Viewing):
        def forward(self, x):
            layouts.append(self.conv1(x).is_contiguous())
            return super().forward(x)

    found = activations(Viewing(), images, layers=["conv2", "fc"])
    assert layouts == [True, False, True, True, True]  # to find layers; two images; the tiles; one alone
    assert found["conv2"].isfinite().all()


def test_float64_stays_in_the_default_layout(images):
    """Convolutions of it that are grouped took three times as long with channels last."""
    layouts = []
    network = tiny_networks.cnn().double()
    network.conv1.register_forward_pre_hook(lambda _, inputs: layouts.append(inputs[0].stride(1)))
    activations(network, images, layers=["conv1"])
    assert set(layouts) == {64}


def test_a_network_that_writes_to_its_images(images, caplog):
    class Writing(tiny_networks.Viewing):
        def forward(self, x):
            return super().forward(x.mul_(2).sub_(1))

    pixels = images.pixels.float()
    kept, network = pixels.clone(), Writing().eval()
    found = activations(network, pixels, layers=["fc"])["fc"]
    with torch.inference_mode():
        expected = network(pixels.clone())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(pixels, kept)
    assert not caplog.records


def test_rounding_that_depends_on_the_batch_is_not_said(images, caplog):
    activations(Between(lambda _, x: x * (1 + 5e-6 * len(x))), images, layers=["between"])
    activations(Between(lambda _, x: x * (1 + 1e-3 * len(x))), images, layers=["between"], precision="bf16")
    assert not caplog.records


def test_a_network_that_computes_gradients(images):
    class Differentiating(tiny_networks.Tiny):
        def forward(self, x):
            with torch.inference_mode(mode=False), torch.enable_grad():
                return super().forward(x.clone())

    got = activations(Differentiating(), images, layers=["conv2"])["conv2"]
    assert not got.requires_grad
    assert reduce([got], 3).shape == (70, 3)


NO_ROWS = {
    "strided complex64": lambda _, x: torch.fft.fft2(x),
    "sparse_coo float32": lambda _, x: x.to_sparse(),
    "nested": lambda _, x: torch.nested.nested_tensor(list(x)),
    "meta": lambda _, x: x.to("meta"),
    "shape [64, 1, 2]": lambda _, x: x.flatten(1).T[:64, :, None].expand(-1, -1, 2),  # as many tokens as images
}


@pytest.mark.parametrize("kind", NO_ROWS)
def test_what_is_no_row_of_numbers_for_each_image(images, kind):
    with pytest.raises(InputError, match=f"layer between of Between must give a .* {re.escape(kind)}"):
        activations(Between(NO_ROWS[kind]), images.take(torch.arange(64)), layers=["between"])
    assert activations(Between(NO_ROWS[kind]), images, layers=["conv1"])  # another layer may


BITS = """
import hashlib
import numpy as np, torch
from qdv_gpu import TSNE, activations, load_images, load_network
from qdv_gpu.features.pca import reduce
images = load_images("digits")
for turn in range(2):
    for name, size in (("squeezenet1_1", 40), ("resnet18", 33)):
        network = load_network(name, weights="none", device="cpu")
        chosen = images.take(torch.arange(100))
        for batch in (1, 64, 100):
            for layer, X in activations(network, chosen, image_size=size, batch_size=batch).items():
                print(turn, hashlib.sha256(X.numpy().tobytes()).hexdigest()[:16], layer)
                print(hashlib.sha256(reduce(X.split(17 + batch), 20).numpy().tobytes()).hexdigest()[:16])
    TSNE(perplexity=5, iterations=10).fit_transform(np.arange(200.0).reshape(50, 4))
print(torch.get_num_threads())
"""


def test_bits_do_not_depend_on_the_threads_or_the_batch():
    outputs = {}
    for threads in ("1", "2", "3", None):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = threads
        done = subprocess.run([sys.executable, "-c", BITS], env=environment, capture_output=True, text=True, check=True)
        *lines, after = done.stdout.splitlines()
        if threads == "1":
            assert after == "1"  # nothing has raised it
        outputs[threads] = lines
    assert outputs["1"] == outputs["2"] == outputs["3"] == outputs[None]
    first = {line.partition(" ")[2] for line in outputs["1"] if line[1] == " "}
    assert len(first) == len({line.rpartition(" ")[2] for line in outputs["1"] if line[1] == " "})  # one for each layer


def test_activations_may_be_changed_and_used_in_autograd(network, images):
    X = activations(network, images, layers=["conv2"])["conv2"]
    X.sub_(X.mean())
    X.requires_grad_().square().sum().backward()
    assert X.grad is not None


def test_a_pass_of_tiles_ends_with_its_layer(network, images):
    calls = []
    handle = network.module.fc.register_forward_hook(lambda *_: calls.append(1))
    tiles = ForwardPass(network, images, network.select(["conv1"]), batch_size=16).tiles("conv1")
    assert len(list(tiles)) == 2
    assert len(list(tiles)) == 2
    handle.remove()
    assert len(calls) == 2  # as above


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
    with pytest.raises(InputError, match="batch size must be an integer of at least 1, got -1"):
        activations(network, images, batch_size=-1)
    with pytest.raises(InputError, match="at least one layer"):
        activations(network, images, layers=[])
    with pytest.raises(InputError, match=r"unknown layer of cnn .nothing."):
        load_network("tiny_networks:cnn").select(["nothing"])
    moody = load_network("tiny_networks:moody")
    with pytest.raises(InputError, match="layer crop of moody changes its size from batch to batch: 36, then 18"):
        activations(moody, images[:66], layers=["crop"])
    for fickle in (lambda x: len(x) > 10, lambda x: len(x) <= 10):  # once or twice
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


def test_stays_on_the_device(images, cuda):
    cpu = load_network("tiny_networks:cnn", device="cpu")
    gpu = load_network("tiny_networks:cnn", device=cuda)
    ours = activations(gpu, images.to(cuda))
    assert all(X.is_cuda for X in ours.values())
    for name, X in activations(cpu, images).items():
        torch.testing.assert_close(ours[name].cpu(), X, rtol=1e-4, atol=1e-4)
