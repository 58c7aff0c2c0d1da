"""The grammar of a network's name."""

import random

import pytest
import torch

from qdv_gpu import Variant, describe_layers, load_network
from qdv_gpu.errors import InputError
from qdv_gpu.networks.load import load_networks
from qdv_gpu.networks.spec import CARRY, Spec


@pytest.mark.parametrize(
    ("text", "name", "arguments", "checkpoint", "label"),
    [
        ("resnet18", "resnet18", {}, "", ""),
        ("resnet18=best.pt", "resnet18", {}, "best.pt", ""),
        ("resnet18=runs/lr=0.1/best.pt", "resnet18", {}, "runs/lr=0.1/best.pt", ""),
        ("mine=resnet18=runs/a=b.pt", "resnet18", {}, "runs/a=b.pt", "mine"),
        ("mine=resnet18", "resnet18", {}, "", "mine"),
        ("a b=timm:resnet18.a1_in1k=none", "timm:resnet18.a1_in1k", {}, "none", "a b"),
        ("tiny_networks:cnn=x.pt", "tiny_networks:cnn", {}, "x.pt", ""),
        ("m=pkg.sub:make(depth=3, kind='a=b)')=w.pt", "pkg.sub:make", {"depth": 3, "kind": "a=b)"}, "w.pt", "m"),
        ("resnet18(num_classes=10)", "resnet18", {"num_classes": 10}, "", ""),
        ("resnet18(replace_stride_with_dilation=[False, True, False])", "resnet18",
         {"replace_stride_with_dilation": [False, True, False]}, "", ""),
        ("alexnt=best.pt", "alexnt", {}, "best.pt", ""),
        ("alexnet=alexnet=none", "alexnet", {}, "none", "alexnet"),
        ("resnet18=resnet18(num_classes=10)=runs/a=b.pt", "resnet18", {"num_classes": 10}, "runs/a=b.pt", "resnet18"),
        ("alexnet=alexnet", "alexnet", {}, "alexnet", ""),
        ("alexnet=epoch=3-step=9.ckpt", "alexnet", {}, "epoch=3-step=9.ckpt", ""),
    ],
)  # fmt: skip
def test_parts_of_a_name(text, name, arguments, checkpoint, label):
    spec = Spec.parse(text)
    assert (spec.name, spec.arguments, spec.checkpoint, spec.label) == (name, arguments, checkpoint, label)
    assert Spec.parse(spec.built).arguments == arguments


@pytest.mark.parametrize(
    "text",
    ["resnet18(10)", "resnet18(num_classes=x)", "resnet18(num_classes=1", "resnet18(**{})", "resnet18()(a=1)",
     "resnet18(num_classes=__import__('os'))", "resnet18(a=1, a=2)", "resnet18(num_classes=1) + 1"],
)  # fmt: skip
def test_arguments_are_literals_by_name(text):
    with pytest.raises(InputError, match="key=value with Python literals"):
        Spec.parse(text)


@pytest.mark.parametrize("text", ["", "=x.pt", "(a=1)"])
def test_a_name_is_required(text):
    with pytest.raises(InputError, match="a network's name is required"):
        Spec.parse(text)


def test_arguments_reach_torchvision_timm_and_factories():
    assert load_network("resnet18(num_classes=7)=none").module.fc.out_features == 7
    assert load_network("timm:resnet18(num_classes=7)=none").module.fc.out_features == 7
    assert load_network("tiny_networks:wide(maps=3)").module[0].out_channels == 3
    assert load_network("vit_b_32(image_size=64)=none").image_size == 64
    assert load_network("timm:vit_tiny_patch16_224(img_size=96)=none").image_size == 96


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet18(nun_classes=7)=none", "network resnet18 cannot be built: TypeError.*nun_classes"),
        ("zfnet(a=1)=none", "zfnet takes no arguments"),
        ("tiny_networks:wide(width=3)", "tiny_networks:wide cannot be built: TypeError"),
        ("tiny_networks:raising", "tiny_networks:raising cannot be built: RuntimeError: no luck"),
        ("timm:resnet18.nope", "cannot be built: RuntimeError: Invalid pretrained tag"),
        ("timm:resnt18=none", "unknown network of timm 'resnt18': did you mean resnet18"),
        ("timm:resnet18(nun_classes=7)=none", "cannot be built: TypeError"),
    ],
)
def test_what_cannot_be_built(text, message):
    with pytest.raises(InputError, match=message) as caught:
        load_network(text)
    assert "\n" not in str(caught.value)


def test_timm_says_how_its_images_are_prepared():
    vit = load_network("timm:vit_tiny_patch16_224=none")
    assert (vit.mean, vit.std, vit.image_size, vit.resize, vit.interpolation) == (
        (0.5,) * 3, (0.5,) * 3, 224, 248, "bicubic",
    )  # fmt: skip
    assert vit.class_token
    import timm

    given = load_network(timm.create_model("vit_tiny_patch16_224"), device="cpu")
    assert (given.mean, given.resize, list(given.layers)) == (vit.mean, vit.resize, list(vit.layers))


def test_labels_name_networks(tmp_path):
    torch.save(load_network("tiny_networks:cnn").module.state_dict(), tmp_path / "best.pt")
    specs = [f"tiny_networks:cnn={tmp_path / 'best.pt'}", f"mine=tiny_networks:cnn={tmp_path / 'best.pt'}"]
    assert [network.name for network in load_networks(specs)] == ["cnn", "mine"]
    assert [n.name for n in load_networks({"a": specs[0], "b": torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3))})] == [
        "a", "b",
    ]  # fmt: skip
    with pytest.raises(InputError, match="two networks are called 'mine'"):
        load_networks([specs[1], specs[1]])


def test_mean_and_std_of_ones_own():
    assert load_network("resnet18=none", mean=[0.1], std=[1, 2, 3]).mean == (0.1,) * 3
    with pytest.raises(InputError, match="std of resnet18 must be 1 or 3 positive numbers"):
        load_network("resnet18=none", std=[1, 0, 1])
    with pytest.raises(InputError, match="mean of resnet18 must be 1 or 3 numbers"):
        load_network("resnet18=none", mean=[0.1, 0.2])
    with pytest.raises(InputError, match=r"numbers in 0\.\.1, as pixels are \(those of 0\.\.255 divided by 255\), got"):
        load_network("resnet18=none", mean=[123.7, 116.3, 103.5])


def test_where_the_class_token_comes_late():
    """Blocks whose tokens are parts of the image alone have none, whatever the network does behind them."""
    rows = {row.layer: row for row in describe_layers(load_network("timm:convit_tiny=none"))}
    assert (rows["blocks.9"].tokens, rows["blocks.11"].tokens) == ("mean", "cls")
    late = load_network("timm:xcit_nano_12_p16_224=none")
    assert late.class_token
    assert {row.tokens for row in describe_layers(late)} == {"mean"}
    with pytest.raises(InputError, match="has no class token, or not in every layer"):
        describe_layers(late, tokens="cls")


@pytest.mark.parametrize(
    ("name", "areas"),
    [
        ("twins_svt_small", [3136, 784, 196, 49]),
        ("coat_lite_tiny", [3137, 785, 197, 50]),
        ("levit_128s", [196, 49, 16]),
    ],
)
def test_hierarchies_of_tokens(name, areas):
    rows = describe_layers(load_network(f"timm:{name}=none"))
    assert [row.shape[0] for row in rows] == areas


def test_images_of_one_channel_and_behind_a_rearrangement():
    gray = load_network("timm:resnet18(in_chans=1)=none")
    assert (gray.channels, len(gray.mean), len(gray.std)) == (1, 1, 1)
    assert load_network("timm:tresnet_m=none").channels == 3


def test_squashed_images():
    squash = load_network("timm:dm_nfnet_f0=none")
    assert squash.squash
    assert not load_network("timm:resnet18=none").squash


def test_a_state_dict_instead_of_a_file():
    state = load_network("tiny_networks:cnn").module.state_dict()
    state["conv1.weight"] = state["conv1.weight"] + 1
    loaded = load_network("tiny_networks:cnn", weights=state)
    assert torch.equal(loaded.module.conv1.weight, state["conv1.weight"])
    assert load_network("resnet18", weights=None).source == "none"
    efficient = load_network("efficientnet_b0=none").module.state_dict()
    assert load_network("efficientnet_b0", weights=efficient).interpolation == "bicubic"  # as with a file
    for wrong in ({1: torch.ones(1)}, 3):
        with pytest.raises(InputError, match="weights must be a name, a file or a state dict"):
            load_network("resnet18", weights=wrong)
    for options in ({"num_classes": 0}, {"num_classes": "a"}, {"seed": "a"}, {"image_size": "x"}):
        with pytest.raises(InputError, match="must be an integer"):
            load_network("resnet18=none", **options)


@pytest.mark.parametrize(
    ("text", "edits", "carry", "built"),
    [
        ("alexnet[features.0.kernel_size=7,features.0.stride=2]", {"features.0.kernel_size": 7, "features.0.stride": 2},
         "fresh", "alexnet[features.0.kernel_size=7, features.0.stride=2]"),
        ("a=resnet18(num_classes=10)[ width = 0.5, zf, carry='crop' ]=b[1].pt", {"width": 0.5, "zf": True}, "crop",
         "resnet18(num_classes=10)[width=0.5, zf, carry=crop]"),
        ("alexnet[a.b='x, y]', c.d=[1, (2, 3)], zf=True]=none",
         {"a.b": "x, y]", "c.d": [1, (2, 3)], "zf": True}, "fresh",
         "alexnet[a.b='x, y]', c.d=[1, (2, 3)], zf]"),
        ("alexnet[a.mode=same-1.b, a.on=False, a.to=None, a.word='None']",
         {"a.mode": "same-1.b", "a.on": False, "a.to": None, "a.word": "None"}, "fresh",
         "alexnet[a.mode=same-1.b, a.on=False, a.to=None, a.word='None']"),
    ],
)  # fmt: skip
def test_edits(text, edits, carry, built):
    spec = Spec.parse(text)
    assert (spec.edits, list(spec.edits), spec.carry, spec.built) == (edits, list(edits), carry, built)
    assert Spec.parse(str(spec)) == spec
    assert "carry" not in spec.structure


def test_edits_are_read_as_they_were_written():
    """Whatever the values are, in whatever order: a name, a variant of it, and the name again."""
    draw = random.Random(0)
    values = [
        1,
        -2.5,
        1e-9,
        True,
        None,
        "relu",
        "a b",
        "it's",
        'say "]',
        "x,y=z",
        "[",
        (1, 2),
        [3, [4.0]],
        "",
        "same",
        "1",
        "é",
    ]
    for _ in range(300):
        paths = draw.sample(["a", "b.0", "layer1.2.conv", "c_d.e"], draw.randint(1, 4))
        edits = {path: {argument: draw.choice(values) for argument in draw.sample(["p", "kernel_size", "depth"], 2)}
                 for path in paths}  # fmt: skip
        edits |= draw.choice([{}, {"width": 0.5}, {"zf": True, "norm": "batch"}])
        base = draw.choice(["alexnet", "resnet18(num_classes=10)", "m=alexnet=x[1].pt", "timm:resnet18.a1_in1k"])
        variant = Variant(base, edits, draw.choice(CARRY))
        assert Spec.parse(str(variant)) == variant.spec, str(variant)
        assert Spec.parse(variant.spec.built).built == variant.spec.built


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alexnet[]", r"edits of a network are \[PATH.ARGUMENT=VALUE, ...\], got alexnet\[\]"),
        ("alexnet[zf", "edits of a network are"),
        ("alexnet[zf]x", "edits of a network are"),
        ("alexnet[zf, zf]", "edit zf is given twice"),
        ("alexnet[a.b=1, a.b=2]", "edit a.b is given twice"),
        ("alexnet[carry=crop, carry=fresh]", "edit carry is given twice"),
        ("alexnet[a.b]", "unknown edit 'a.b'"),
        ("alexnet[depth=3]", "unknown edit 'depth': did you mean "),
        ("alexnet[a.b=1+]", r"the value of a.b must be a Python literal or a word, got '1\+'"),
        ("alexnet[.b=1]", "an edit of a module is PATH.ARGUMENT=VALUE, got .b"),
        ("alexnet[zf=3]", "the edit zf takes no value, got 3"),
    ],
)
def test_mistakes_in_edits(text, message):
    with pytest.raises(InputError, match=message):
        Spec.parse(text)
