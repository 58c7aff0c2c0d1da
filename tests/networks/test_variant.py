"""Variants: what is edited, what becomes of the weights, and what is said of it."""

import copy

import pytest
import tiny_networks
import torch
from torch import nn

from qdv_gpu import Variant, activations, describe_variant, finetune, load_network
from qdv_gpu.errors import InputError
from qdv_gpu.networks.carry import carried, resampled, resizing
from qdv_gpu.networks.identity import structure_digest, weights_digest
from qdv_gpu.networks.load import load_networks
from qdv_gpu.networks.rebuild import rebuild
from qdv_gpu.networks.weights import read_weights

ZEILER = "alexnet[features.0.kernel_size=7, features.0.stride=2]"


def load(spec, **options):
    return load_network(spec, **{"weights": "none", "device": "cpu", **options})


def states(network):
    return {one.name: one.state for one in describe_variant(network).tensors}


def test_alexnet_with_another_first_layer():
    network = load(ZEILER)
    changes = describe_variant(network)
    assert network.module.features[0].kernel_size == (7, 7)
    assert [one.name for one in changes.tensors if one.state != "kept"] == ["features.0.weight"]
    assert (len(changes.tensors), changes.dropped) == (16, ())
    assert changes.share == pytest.approx(1 - 64 * 3 * 49 / sum(p.numel() for p in network.module.parameters()))
    rows = {row.layer: (row.before, row.after) for row in changes.layers}
    assert [(g.size, g.stride, g.field) for g in rows["maxpool5"]] == [((6, 6), 32, 195), ((13, 13), 16, 99)]
    assert changes.warnings[0].startswith("avgpool pools 13 x 13 to 6 x 6, where it was 6 x 6")
    own, base = network.module.state_dict(), load("alexnet").module.state_dict()
    assert all(torch.equal(own[name], base[name]) == (name != "features.0.weight") for name in own)


def test_operations_with_the_papers_head():
    changes = describe_variant(load(ZEILER, num_classes=10))
    assert [round(one, 2) for one in changes.gmac] == [0.66, 2.60]
    assert "the head classifier is new: it must be trained" in changes.warnings
    lines = changes.lines()
    assert lines[0] == f"{ZEILER} beside alexnet, at 224 px"
    assert "  features.0.weight   fresh  64x3x11x11 -> 64x3x7x7" in lines
    assert "0.66 -> 2.60 GMAC" in lines


@pytest.mark.parametrize("name", ["alexnet[zf]", "caffe_alexnet[zf]"])
def test_zeiler_and_fergus_by_name(name):
    network = load(name)
    first, second = [m for m in network.module.modules() if isinstance(m, nn.Conv2d)][:2]
    assert (first.kernel_size, first.stride, second.kernel_size, second.stride) == ((7, 7), (2, 2), (5, 5), (2, 2))
    for size in (64, 224):
        with torch.inference_mode():
            maps = network.module.features(torch.zeros(1, 3, size, size))
        assert maps.shape[2:] == ((1, 1) if size == 64 else (6, 6))
    assert list(load(name, num_classes=10).layers)[-1] == "maxpool5"


EDITS = [
    "width=0.5",
    "width=1.25",
    "norm=group",
    "norm=none",
    "activation=gelu",
    "pooling=avg",
    "width=0.3, norm=batch",
]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "timm:mobilenetv3_small_050"])
def test_whole_networks_run_and_are_initialised(name, edit):
    nothing = {"pooling=avg": "timm:mobilenetv3_small_050", "norm=none": "squeezenet1_1"}
    if name == nothing.get(edit):
        with pytest.raises(InputError, match="changes nothing"):
            load(f"{name}[{edit}]")
        return
    network, again = load(f"{name}[{edit}]", seed=3), load(f"{name}[{edit}]", seed=3)
    assert weights_digest(network.module) == weights_digest(again.module)
    with torch.inference_mode():
        assert network.module(torch.zeros(1, 3, 64, 64)).isfinite().all()
    assert all(torch.isfinite(t).all() for t in network.module.state_dict().values())
    assert set(states(network).values()) <= {"kept", "fresh"}


def test_widths():
    shapes = {name: tuple(t.shape) for name, t in load("resnet18[width=0.5]").module.state_dict().items()}
    assert shapes["conv1.weight"] == (32, 3, 7, 7)
    assert shapes["layer4.1.conv2.weight"] == (256, 256, 3, 3)
    assert shapes["fc.weight"] == (1000, 256)
    assert load("alexnet[width=0.5]").module.classifier[1].in_features == 128 * 36
    mobile = load("mobilenet_v2[width=0.5]").module
    depthwise = [m for m in mobile.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(depthwise) == 17
    assert all(m.groups == m.in_channels == m.out_channels for m in depthwise)
    grouped = load("resnext50_32x4d[width=0.3]").module.layer1[0].conv2
    assert (grouped.groups, grouped.in_channels) == (32, 32)
    assert load("resnet18[width=1]").module.state_dict().keys() == load("resnet18").module.state_dict().keys()
    refused = r"width cannot be changed of {0}, which has sizes .*: {0} with width=0\.5 cannot take images of 224 x 224"
    for name in ("vit_b_32", "swin_t"):
        with pytest.raises(InputError, match=refused.format(name)) as caught:
            load(f"{name}[width=0.5]")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"^alexnet cannot take images of 8 x 8 pixels"):
        load_network("alexnet[width=0.5]", weights="none", image_size=8, device="cpu")


def test_depths():
    deeper = load("resnet18[layer1.depth=4]")
    assert len(deeper.module.layer1) == 4
    assert {name for name, state in states(deeper).items() if state == "fresh"} == {
        name for name in deeper.module.state_dict() if name.startswith(("layer1.2.", "layer1.3."))
    }
    blocks = [block.conv1.weight for block in deeper.module.layer1]
    assert not any(torch.equal(blocks[i], blocks[j]) for i in range(4) for j in range(i))
    shallower = load("resnet18[layer4.depth=1]")
    assert len(shallower.module.layer4) == 1
    assert len(describe_variant(shallower).dropped) == 12
    base, twice = load("alexnet"), load("alexnet[features.3.depth=3]")
    assert torch.equal(twice.module.features[3][0].weight, base.module.features[3].weight)
    assert states(twice)["features.3.0.weight"] == "kept"
    assert [type(m).__name__ for m in twice.module.features[3]] == ["Conv2d", "ReLU", "Conv2d", "ReLU", "Conv2d"]
    assert twice.layers == base.layers
    with pytest.raises(InputError, match=r"features.19.0 \(Conv2d\) has in_channels=320"):
        load("mobilenet_v2[features.depth=20]")


def test_norms_and_activations():
    network = load("caffe_alexnet[norm=batch]")
    assert [m.num_features for m in network.module.modules() if isinstance(m, nn.BatchNorm2d)] == [96, 256]
    normed = load("alexnet[norm=batch]").module
    assert [m.num_features for m in normed.modules() if isinstance(m, nn.BatchNorm2d)] == [64, 192, 384, 256, 256]
    assert not any(isinstance(m, nn.ReLU) for m in load("resnet18[activation=silu]").module.modules())
    gates = [m for m in load("mobilenet_v3_small[activation=relu]").module.modules() if isinstance(m, nn.Hardsigmoid)]
    assert gates
    assert list(load("vgg11[pooling=avg]").layers) == [f"avgpool{i}" for i in range(1, 6)]
    with pytest.raises(InputError, match="has no activation module, or calls functions"):
        load("tiny_networks:written_with_functions[activation=gelu]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alexnet[feature.0.stride=2]", "unknown module of alexnet 'feature.0': did you mean features.0, features.1"),
        ("alexnet[features.0.strid=2]", r"unknown argument of features.0 \(Conv2d\) 'strid': did you mean stride, "),
        ("alexnet[features.0.kernel_size=x]", r"features.0.kernel_size must be a number like \(11, 11\), got 'x'"),
        ("alexnet[features.1.inplace=no]", "features.1.inplace must be True or False, got 'no'"),
        ("alexnet[features.0.kernel_size=-1]", "features.0.kernel_size must be an integer of at least 1, got -1"),
        ("alexnet[features.0.stride=0]", "features.0.stride must be an integer of at least 1, got 0"),
        ("alexnet[features.0.out_channels=32]",
         r"does not fit together: features.3 \(Conv2d\) has in_channels=64; add features.3.in_channels=32"),
        ("resnet18[layer1.0.stride=2]",
         r"layer1.0 \(BasicBlock\) cannot be built again: it does not keep inplanes, planes; change its parts, as "
         "layer1.0.conv1, layer1.0.bn1, layer1.0.relu"),
        ("alexnet[widht=2]", "unknown edit 'widht': did you mean width"),
        ("alexnet[width=x]", "width must be a positive number, got 'x'"),
        ("alexnet[norm=bath]", "unknown value of norm 'bath': did you mean batch, "),
        ("alexnet[activation=rel]", "unknown value of activation 'rel': did you mean relu, "),
        ("alexnet[pooling=sum]", "unknown value of pooling 'sum'"),
        ("alexnet[zf, carry=corp]", "unknown value of carry 'corp': did you mean crop, "),
        ("alexnet[features.depth=0]", "features.depth must be an integer of at least 1, got 0"),
        ("resnet18[zf]", "does not fit|cannot take"),
    ],
)  # fmt: skip
def test_mistakes_in_one_line(text, message):
    with pytest.raises(InputError, match=message) as caught:
        load(text)
    assert "\n" not in str(caught.value)


def test_kernels_are_cropped_and_padded_in_the_centre():
    old, fresh = torch.randn(6, 3, 11, 11), torch.randn(8, 2, 7, 7)
    new = carried(old, fresh, resample=False, spatial=True)
    assert torch.equal(new[:6], old[:, :2, 2:9, 2:9])
    assert torch.equal(new[6:], fresh[6:])
    larger = carried(old[..., :3, :3], torch.randn(4, 3, 5, 5), resample=False, spatial=True)
    assert torch.equal(larger[..., 1:4, 1:4], old[:4, :, :3, :3])
    assert larger.count_nonzero() == larger[..., 1:4, 1:4].count_nonzero()
    matrix = carried(torch.ones(3, 5), torch.zeros(4, 4), resample=True, spatial=False)
    assert matrix.sum() == 12


@pytest.mark.parametrize("size", [12, 15, 22])
def test_a_resampled_kernel_answers_a_resized_patch_as_before(size):
    patch, kernel = torch.randn(5, 11, 11).double(), torch.randn(11, 11).double()
    B = resizing(11, size)
    new = resampled(resampled(kernel, 0, size), 1, size)
    torch.testing.assert_close((B @ patch @ B.T * new).sum((1, 2)), (patch * kernel).sum((1, 2)))


def test_a_smaller_resampled_kernel_is_the_nearest():
    """By the normal equations of min |B^T w' - w|, with the matrix of both dimensions written out."""
    kernel = torch.randn(9, 9).double()
    B = torch.kron(resizing(9, 4), resizing(9, 4))
    expected = torch.linalg.solve(B @ B.T, B @ kernel.reshape(-1)).reshape(4, 4)
    torch.testing.assert_close(resampled(resampled(kernel, 0, 4), 1, 4), expected)


@pytest.mark.parametrize("carry", ["crop", "resample"])
def test_weights_are_carried(carry):
    base = load("alexnet").module.features[0].weight
    wider = "features.0.kernel_size=7, features.0.out_channels=80, features.3.in_channels=80"
    network = load(f"alexnet[{wider}, carry={carry}]")
    first = network.module.features[0]
    expected = base[:, :, 2:9, 2:9] if carry == "crop" else resampled(resampled(base, 2, 7), 3, 7)
    torch.testing.assert_close(first.weight[:64], expected, rtol=0, atol=0)
    assert 0 < first.weight[64:].abs().max() < 1
    assert [states(network)[f"features.{i}.weight"] for i in (0, 3, 6)] == ["resized", "resized", "kept"]


def test_a_module_is_not_changed():
    module = tiny_networks.cnn().train().double()
    before, digest = structure_digest(module), weights_digest(module)
    variant = Variant(module, {"conv1": {"kernel_size": 5, "padding": 2}, "activation": "gelu"}, carry="crop")
    network = load_network(variant)
    assert (structure_digest(module), weights_digest(module), module.training) == (before, digest, True)
    assert network.module.conv1.weight.dtype == torch.float64
    assert network.module.conv2.weight.data_ptr() == module.conv2.weight.data_ptr()
    assert network.spec == "Tiny[conv1.kernel_size=5, conv1.padding=2, activation=gelu, carry=crop]"
    assert states(network)["conv1.weight"] == "resized"
    whole = load_network(Variant(load_network(module), {"conv1": {"kernel_size": 5, "padding": 2}}))
    again = load_network(Variant(whole, {"activation": "gelu"}))
    assert again.spec == "Tiny[conv1.kernel_size=5, conv1.padding=2, activation=gelu]"
    assert structure_digest(again.module) == structure_digest(network.module)
    assert describe_variant(again).base == "Tiny[conv1.kernel_size=5, conv1.padding=2]"
    assert activations(variant, torch.zeros(4, 1, 8, 8), layers=["conv2"])["conv2"].shape == (4, 128)
    for wrong, message in [
        (lambda: Variant(3, {"zf": True}), "the base of a variant is a name, an nn.Module or a Network, got int"),
        (lambda: Variant("alexnet", {}), "a variant needs at least one edit"),
        (lambda: Variant("alexnet[zf]", {"zf": True}), "edit zf is given twice"),
        (lambda: Variant("alexnet", {"features.0": {"stride": torch.ones(1)}}), "must be a Python literal"),
        (lambda: describe_variant(load_network(module)), "Tiny is no variant"),
    ]:
        with pytest.raises(InputError, match=message):
            wrong()


def test_rebuilding_keeps_what_is_not_said():
    old = nn.Conv2d(4, 8, 3, bias=False, padding_mode="reflect", dilation=2).half().eval()
    old.requires_grad_(requires_grad=False)
    new = rebuild(old, {"stride": 2})
    assert (new.bias, new.padding_mode, new.dilation, new.stride) == (None, "reflect", (2, 2), (2, 2))
    assert (new.weight.dtype, new.training) == (torch.float16, False)
    hooked = nn.Conv2d(1, 1, 1)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="it does not keep what was changed in it"):
        rebuild(hooked, {"stride": 2})
    edited = copy.deepcopy(old)
    edited.mood = "odd"
    with pytest.raises(InputError, match="it does not keep what was changed in it"):
        rebuild(edited, {})


class Lazy(nn.Module):
    def __init__(self, size=3):
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.empty(size))


def test_memory_is_never_a_weight():
    with pytest.raises(InputError, match="its constructor does not initialise weight"):
        rebuild(Lazy(), {"size": 4})


def test_a_fine_tuned_variant_loads_again(tmp_path, lines):
    spec = "tiny_networks:cnn[conv1.kernel_size=5, conv1.padding=2, carry=resample]"
    options = {"epochs": 1, "batch_size": 50, "samples": 100, "device": "cpu"}
    finetune(spec, "digits", tmp_path / "run", **options)
    said = lines()
    start = said.index(f"{spec} beside tiny_networks:cnn, at 8 px")
    assert start < next(i for i, line in enumerate(said) if line.startswith("epoch 1"))
    assert "5 of 6 tensors kept (1 resized), 83.8% of the parameters" in said
    trained = read_weights(tmp_path / "run" / "weights.safetensors")[0]
    for text in (spec, "tiny_networks:cnn[conv1.kernel_size=5, conv1.padding=2]"):
        network = load_network(f"{text}={tmp_path / 'run'}", device="cpu")
        assert all(torch.equal(trained[name], tensor) for name, tensor in network.module.state_dict().items())
        assert set(states(network).values()) == {"trained"}
    with pytest.raises(InputError, match=r"holds tiny_networks:cnn\[.*, not tiny_networks:cnn\[conv1.stride=2\]"):
        load(f"tiny_networks:cnn[conv1.stride=2]={tmp_path / 'run'}")
    finetune("tiny_networks:cnn", "digits", tmp_path / "base", **options)
    base = read_weights(tmp_path / "base" / "weights.safetensors")[0]
    network = load(f"{spec}={tmp_path / 'base'}")
    assert torch.equal(network.module.conv2.weight, base["conv2.weight"])
    assert states(network)["conv1.weight"] == "resized"


def test_files_without_a_name_are_of_the_variant_or_of_its_base(tmp_path):
    text = "tiny_networks:cnn[conv1.kernel_size=5, conv1.padding=2]"
    own = {name: tensor + 1 for name, tensor in load(text).module.state_dict().items()}
    base = {name: tensor + 1 for name, tensor in load("tiny_networks:cnn").module.state_dict().items()}
    for state, kept in ((own, "trained"), (base, "kept")):
        network = load(text, weights=state)
        assert torch.equal(network.module.conv2.weight, state["conv2.weight"])
        assert states(network)["conv2.weight"] == kept
    with pytest.raises(InputError, match="do not fit tiny_networks:cnn"):
        load(text, weights={"conv1.weight": torch.ones(1)})


class OnCpu(nn.Module):
    image_size = 8

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4, 2)
        self.scale = [torch.ones(1)]

    def forward(self, x):
        return self.fc((self.conv(x) * self.scale[0]).mean((2, 3)))


def test_what_cannot_run_without_numbers_is_said():
    changes = describe_variant(load_network(Variant(OnCpu(), {"conv": {"kernel_size": 5}}), device="cpu"))
    assert changes.gmac == (None, None)
    assert "sizes and operations of OnCpu are not known without numbers" in changes.notes[0]
    assert "unknown -> unknown GMAC" in changes.lines()


def test_variants_are_networks_of_their_own():
    loaded = load_networks({"a": Variant("tiny_networks:cnn", {"width": 0.5}), "b": "tiny_networks:cnn[width=2]"})
    assert [network.name for network in loaded] == ["a", "b"]
    assert [network.module.conv1.out_channels for network in loaded] == [3, 12]
    labelled = load_networks([Variant("mine=tiny_networks:cnn", {"width": 0.5})])
    assert labelled[0].name == "mine"
