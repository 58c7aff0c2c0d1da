"""Networks by name, their layers, and weight files good and bad."""

import os
import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import tiny_networks
import torch

from qdv_gpu.errors import InputError
from qdv_gpu.networks.load import load_network
from qdv_gpu.networks.tokens import describe_layers
from qdv_gpu.networks.weights import read_tensors, read_weights, write_weights


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("alexnet", [(64, 27, 27), (192, 13, 13), (384, 13, 13), (256, 13, 13), (256, 6, 6)]),
        ("caffe_alexnet", [(96, 27, 27), (256, 13, 13), (384, 13, 13), (384, 13, 13), (256, 6, 6)]),
        ("zfnet", [(96, 55, 55), (256, 13, 13), (384, 13, 13), (384, 13, 13), (256, 6, 6)]),
    ],
)
def test_the_five_layers_of_the_paper(name, shapes):
    network = load_network(name, weights="none", num_classes=10)
    described = describe_layers(network)
    assert [row.layer for row in described] == ["maxpool1", "maxpool2", "conv3", "conv4", "maxpool5"]
    assert [row.shape for row in described] == shapes
    assert not network.module.training


def test_vgg19_layers_and_size():
    network = load_network("vgg19", weights="none", num_classes=10)
    assert [(row.layer, row.shape) for row in describe_layers(network, 64)] == [
        ("maxpool1", (64, 32, 32)),
        ("maxpool2", (128, 16, 16)),
        ("maxpool3", (256, 8, 8)),
        ("maxpool4", (512, 4, 4)),
        ("maxpool5", (512, 2, 2)),
    ]
    assert network.module.classifier[6].out_features == 10


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("resnet18", ["relu", "layer1", "layer2", "layer3", "layer4"]),
        ("resnet50", ["relu", "layer1", "layer2", "layer3", "layer4"]),
        ("googlenet", ["conv1", "conv3", "inception3b", "inception4e", "inception5b"]),
        ("mobilenet_v2", ["features.1", "features.3", "features.6", "features.13", "features.18"]),
        ("squeezenet1_1", ["features.1", "features.4", "features.7", "features.12"]),
        ("convnext_tiny", ["features.1", "features.3", "features.5", "features.7"]),
        ("tiny_networks:cnn", ["conv2", "pool"]),
        ("inception_v3", ["Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c"]),
        ("efficientnet_v2_s", ["features.1", "features.2", "features.3", "features.5", "features.7"]),
        ("efficientnet_b0", ["features.1", "features.2", "features.3", "features.5", "features.8"]),
        ("swin_t", ["features.1", "features.3", "features.5", "features.7"]),
        ("timm:resnet18", ["act1", "layer1", "layer2", "layer3", "layer4"]),
        ("timm:swin_tiny_patch4_window7_224", [f"layers.{i}" for i in range(4)]),
        ("timm:convnext_atto", [f"stages.{i}" for i in range(4)]),
        ("timm:pvt_v2_b0", [f"stages.{i}" for i in range(4)]),
        ("timm:vit_tiny_patch16_224", [f"blocks.{i}" for i in range(1, 12, 2)]),
    ],
)
def test_default_layers_are_the_stages(name, stages):
    assert list(load_network(name, weights="none").layers) == stages


def test_a_plain_transformer_is_analysed_at_six_of_its_blocks():
    network = load_network("vit_b_32", weights="none")
    assert list(network.layers) == [f"encoder.layers.encoder_layer_{i}" for i in range(1, 12, 2)]
    assert {(row.features, row.tokens) for row in describe_layers(network)} == {(768, "cls")}


def test_paper_head_and_other_heads():
    alexnet = load_network("alexnet", weights="none", num_classes=10).module
    assert (alexnet.classifier.in_features, alexnet.classifier.out_features) == (9216, 10)
    assert load_network("squeezenet1_1", weights="none", num_classes=7).module.classifier[1].out_channels == 7
    assert load_network("densenet121", weights="none", num_classes=7).module.classifier.out_features == 7


def test_random_weights_follow_the_seed():
    weights = [load_network("resnet18", weights="none", seed=seed).module.conv1.weight for seed in (3, 3, 4)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_unknown_names_come_with_close_matches():
    with pytest.raises(InputError, match=r"unknown network 'alexnt': did you mean alexnet"):
        load_network("alexnt")
    network = load_network("tiny_networks:cnn")
    with pytest.raises(InputError, match=r"unknown layer of cnn 'convo1': did you mean .*conv1"):
        network.select(["convo1"])
    assert network.select(["conv2", "pool"]) == {"conv2": "conv2", "pool": "pool"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module:net", "cannot be imported"),
        ("tiny_networks:nothing", "has no 'nothing'"),
        ("tiny_networks:cmn", "has no 'cmn': did you mean cnn"),
        ("tiny_networks.py:cnn", "write tiny_networks:cnn, without .py"),
        ("tiny_networks:not_a_module", "must return an nn.Module, got int"),
    ],
)
def test_bad_factories(spec, message):
    with pytest.raises(InputError, match=message):
        load_network(spec)


def test_a_file_is_no_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best.pt").touch()
    with pytest.raises(InputError, match=r"best\.pt is a file: .* as in resnet18=best\.pt"):
        load_network("best.pt")
    (tmp_path / "resnet18").touch()
    assert load_network("resnet18", weights="none").name == "resnet18"


def test_weight_files_round_trip(tmp_path):
    module = load_network("tiny_networks:cnn", num_classes=4).module
    with torch.no_grad():
        module.conv1.weight.add_(1)
    torch.save(module.state_dict(), tmp_path / "a.pt")
    torch.save({"state_dict": {f"module.{n}": t for n, t in module.state_dict().items()}}, tmp_path / "b.pth")
    write_weights(tmp_path / "c.safetensors", module.state_dict(), {"network": "tiny_networks:cnn", "image_size": 10})
    for file in ("a.pt", "b.pth", "c.safetensors"):
        loaded = load_network(f"tiny_networks:cnn={tmp_path / file}")
        assert loaded.module.fc.out_features == 4
        assert torch.equal(loaded.module.conv1.weight, module.conv1.weight)
    assert loaded.image_size == 10


def test_alexnet_checkpoint_with_the_paper_head(tmp_path):
    module = load_network("alexnet", weights="none", num_classes=10).module
    write_weights(tmp_path / "w.safetensors", module.state_dict(), {"network": "alexnet"})
    assert load_network(f"alexnet={tmp_path / 'w.safetensors'}").module.classifier.out_features == 10
    with pytest.raises(InputError, match="holds alexnet, not vgg11"):
        load_network(f"vgg11={tmp_path / 'w.safetensors'}")


class _Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_bad_weight_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = load_network("tiny_networks:cnn").module
    write_weights("good.safetensors", module.state_dict(), {})
    Path("short.safetensors").write_bytes(Path("good.safetensors").read_bytes()[:2000])
    torch.save(module.state_dict(), "good.pt")
    Path("short.pt").write_bytes(Path("good.pt").read_bytes()[:2000])
    Path("empty.pt").touch()
    Path("bomb.pt").write_bytes(pickle.dumps({"conv1.weight": _Bomb()}, protocol=2))
    torch.save({"conv1.weight": _Bomb()}, "bomb2.pt")
    np.save("bomb.npy", np.array({"conv1": _Bomb()}, dtype=object), allow_pickle=True)
    torch.save([1, 2], "list.pt")
    Path("w.bin").touch()
    Path("w.onnx").touch()
    cases = {
        "short.safetensors": "truncated",
        "short.pt": "truncated or not",
        "empty.pt": "truncated or not",
        "bomb.pt": "not a plain state dict",
        "bomb2.pt": "not a plain state dict",
        "bomb.npy": "not in the layout",
        "list.pt": "not a state dict",
        "w.bin": "truncated or not",
        "w.onnx": "must end in",
        "absent.pt": "does not exist",
    }
    for file, message in cases.items():
        with pytest.raises(InputError, match=message):
            load_network(f"tiny_networks:cnn={file}")
    assert not Path("executed").exists()
    with pytest.raises(InputError, match=r"do not fit tiny_networks:other: the file has another shape of conv2.weight"):
        load_network("tiny_networks:other=good.pt")
    with pytest.raises(InputError, match=r"holds no weights.safetensors"):
        load_network(f"tiny_networks:cnn={tmp_path}")


def test_caffe_weights_keep_their_meaning(tmp_path):
    random = np.random.default_rng(0)
    shapes = {"conv1": (11, 11, 3, 96), "conv2": (5, 5, 48, 256), "conv3": (3, 3, 256, 384)}
    shapes |= {"conv4": (3, 3, 192, 384), "conv5": (3, 3, 192, 256), "fc6": (9216, 5), "fc7": (5, 4), "fc8": (4, 3)}
    layers = {n: [random.normal(size=s).astype(np.float32), random.normal(size=s[-1])] for n, s in shapes.items()}
    np.save(tmp_path / "caffe.npy", np.array(layers, dtype=object), allow_pickle=True)
    tensors, _ = read_weights(tmp_path / "caffe.npy")
    kernel = layers["conv2"][0]
    assert tensors["features.4.weight"][7, 3, 1, 2] == kernel[1, 2, 3, 7]
    maps = random.normal(size=(6, 6, 256)).astype(np.float32)  # as Caffe's converted layout flattens them
    expected = maps.reshape(-1) @ layers["fc6"][0]
    ours = tensors["classifier.0.weight"].numpy() @ maps.transpose(2, 0, 1).reshape(-1)
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3)


def test_weights_that_cannot_be_downloaded(monkeypatch, tmp_path):
    def refuse(*_args, **_kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        InputError, match=r"no route.*put alexnet-owt-7be5be79.pth into .*hub/checkpoints.*--weights none"
    ):
        load_network("alexnet")
    with pytest.raises(InputError, match=r"zfnet has no ImageNet weights.*--weights none"):
        load_network("zfnet")


def test_cached_weights_are_checked_and_never_executed(monkeypatch, tmp_path):
    """A file in torch's cache, under the name that torchvision looks for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    cached = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    state = load_network("squeezenet1_1", weights="none").module.state_dict()
    torch.save({**state, "bomb": _Bomb()}, cached)
    with pytest.raises(InputError, match=r"squeezenet1_1-b8a52dc0\.pth is damaged"):
        load_network("squeezenet1_1")
    monkeypatch.setattr("qdv_gpu.networks.build._download", lambda *_: None)  # as if the hash were right
    with pytest.raises(InputError, match="cannot be built: it holds other things than tensors"):
        load_network("squeezenet1_1")
    assert not Path("executed").exists()
    torch.save(state, cached)
    loaded = load_network("squeezenet1_1")
    assert torch.equal(loaded.module.state_dict()["features.0.weight"], state["features.0.weight"])
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_module_of_ones_own():
    import tiny_networks

    network = load_network(tiny_networks.cnn())
    assert (network.name, network.image_size, network.channels) == ("Tiny", 8, 1)
    assert list(network.layers) == ["conv2", "pool"]


@pytest.mark.filterwarnings("ignore")  # torch is to drop them
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.jit.script(tiny_networks.cnn()), "RecursiveScriptModule, whose layers cannot be watched"),
        (lambda: torch.jit.trace(tiny_networks.cnn(), torch.rand(1, 1, 8, 8)), "whose layers cannot be watched"),
        (lambda: torch.ao.quantization.quantize_dynamic(tiny_networks.cnn(), {torch.nn.Linear}), "quantised network"),
    ],
)
def test_modules_that_are_not_of_python_and_tensors(make, message):
    with pytest.raises(InputError, match=message):
        load_network(make(), device="cpu")


def test_one_layer_gets_no_head():
    with pytest.raises(InputError, match="the network is a Linear alone"):
        load_network(torch.nn.Linear(8, 2), num_classes=10)


def test_tied_weights_are_written_once_for_each_name(tmp_path):
    network = tiny_networks.cnn()
    network.again = network.conv2
    write_weights(tmp_path / "tied.safetensors", network.state_dict(), {})
    tensors, _ = read_tensors(tmp_path / "tied.safetensors")
    assert torch.equal(tensors["again.weight"], network.conv2.weight)
    assert torch.equal(tensors["conv2.weight"], network.conv2.weight)


def test_torchvision_checkpoints_with_side_heads(tmp_path):
    """As torchvision trains GoogLeNet: two heads more than are used afterwards."""
    import torchvision

    theirs = torchvision.models.googlenet(num_classes=5, aux_logits=True, init_weights=False)
    torch.save(theirs.state_dict(), tmp_path / "g.pt")
    ours = load_network(f"googlenet={tmp_path / 'g.pt'}")
    assert torch.equal(ours.module.fc.weight, theirs.fc.weight)


def test_images_of_a_size_that_the_network_cannot_take():
    with pytest.raises(InputError, match="cannot take images of 64 x 64 pixels"):
        describe_layers(load_network("vit_b_32", weights="none"), 64)
    with pytest.raises(InputError, match="image size must be at least 1 pixel, got 0"):
        describe_layers(load_network("tiny_networks:cnn"), 0)
