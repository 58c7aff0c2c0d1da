"""Variants of networks with tied, shared, lazy and odd modules, and edits whose values no network can run with."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qdv_gpu import Variant, describe_variant, load_network
from qdv_gpu.errors import InputError
from qdv_gpu.networks.blank import on_meta
from qdv_gpu.networks.fields import pass_of


def network_of(*modules):
    network = nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    network.image_size = 16
    return network


def variant(base, edits, **options):
    return load_network(Variant(base, edits, **options), device="cpu")


def tied():
    first, second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    second.weight = first.weight
    return network_of(nn.Conv2d(3, 8, 3), nn.ReLU(), first, nn.ReLU(), second)


@pytest.mark.parametrize("path", ["2", "4"])
def test_a_tied_tensor_that_fits_is_kept_and_stays_tied(path):
    base = tied()
    network = variant(base, {f"{path}.stride": 2})
    states = {one.name: one.state for one in describe_variant(network).tensors}
    assert set(states.values()) == {"kept"}
    for name in states:
        assert torch.equal(network.module.state_dict()[name], base.state_dict()[name]), name
    assert network.module[2].weight is network.module[4].weight


def test_a_shared_module_is_kept_under_all_of_its_names():
    again = nn.Conv2d(8, 8, 3, padding=1)
    base = network_of(nn.Conv2d(3, 8, 3), nn.ReLU(), again, nn.ReLU(), again)
    changes = describe_variant(variant(base, {"0.kernel_size": 5}))
    assert {one.name for one in changes.tensors if one.state == "fresh"} == {"0.weight"}
    grown = variant(base, {"2.kernel_size": 5, "2.padding": 2}, carry="crop")
    assert {one.name: one.state for one in describe_variant(grown).tensors}["4.weight"] == "resized"
    assert grown.module[2] is grown.module[4]


class Scaled(nn.Module):
    def __init__(self, kernel_size=1) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.scale = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale[:, None, None]


def test_a_rebuilt_copy_of_a_block_holds_what_it_is_said_to_hold():
    base = network_of(nn.Conv2d(3, 8, 3), nn.Sequential(Scaled()))
    network = variant(base, {"1.depth": 2, "1.1.kernel_size": 3})
    assert {one.name: one.state for one in describe_variant(network).tensors}["1.1.scale"] == "kept"
    assert torch.equal(network.module[1][1].scale, base[1][0].scale)
    assert network.module[1][1].scale is not network.module[1][0].scale


class Stubborn(Scaled):
    def reset_parameters(self, scale: float) -> None:
        self.scale.data.fill_(scale)


REFUSED = [
    ({"0.kernel_size": 0}, "0.kernel_size must be an integer of at least 1, got 0"),
    ({"0.kernel_size": (3, 0)}, "0.kernel_size must be an integer of at least 1, got (3, 0)"),
    ({"0.kernel_size": (3, 3, 3)}, "0.kernel_size must be one integer or 2, got (3, 3, 3)"),
    ({"0.kernel_size": 2.5}, "0.kernel_size must be an integer of at least 1, got 2.5"),
    ({"0.dilation": 0}, "0.dilation must be an integer of at least 1, got 0"),
    ({"0.padding": -1}, "0.padding must be an integer of at least 0, got -1"),
    ({"activation": ["relu"]}, "unknown value of activation ['relu']"),
    (
        {"1.depth": 2},
        "1.depth: a Stubborn cannot be initialised anew: TypeError: Stubborn.reset_parameters() missing 1 required "
        "positional argument: 'scale'",
    ),
]


@pytest.mark.parametrize(("edits", "message"), REFUSED)
def test_values_that_no_network_runs_with_are_refused_in_one_line(edits, message):
    base = network_of(nn.Conv2d(3, 8, 3), nn.Sequential(Stubborn()), nn.ReLU())
    with pytest.raises(InputError) as error:
        variant(base, edits)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def lazy():
    """A factory of modules that get their weights from the first image."""
    return network_of(nn.LazyConv2d(8, 3), nn.ReLU())


def test_a_lazy_factory_can_be_varied_and_trained(monkeypatch):
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    network = load_network("test_variant_edges:lazy[activation=elu]=none", device="cpu")
    assert {one.state for one in describe_variant(network).tensors} == {"kept"}
    network.module(torch.zeros(1, 3, 16, 16)).sum().backward()


class Branches(nn.Module):
    """Finer again by a transposed convolution, and by other means behind which strides and fields are not known."""

    image_size = 32

    def __init__(self, way, **options) -> None:
        super().__init__()
        self.way = way
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, **options) if options else nn.Identity()
        self.last = nn.LazyConv2d(8, 3)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.way(self.up(self.first(x)))).mean((2, 3)))


def grids(way, **options):
    module = Branches(way, **options).eval()
    with torch.no_grad():
        module(torch.zeros(1, 3, 32, 32))
    network = load_network(module, device="cpu")
    found = pass_of(network, on_meta(network.module), ["up", "last"]).grids
    return module, [(one.stride, one.field) for one in found.values()]


def seen(module, path):
    """Rows that a unit sees, the most of five in the middle: by gradients, with all weights above 0."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.abs() + 0.1)
    maps = []
    module.get_submodule(path).register_forward_hook(lambda *given: maps.append(given[2]))
    x = torch.ones(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    module(x)
    middle, spans = maps[0].shape[2] // 2, []
    for row in range(middle - 2, middle + 3):
        (slope,) = torch.autograd.grad(maps[0][0, :, row].sum(), x, retain_graph=True)
        rows = slope.abs().sum((0, 1, 3)).nonzero().flatten()
        spans += [int(rows.max() - rows.min()) + 1] if len(rows) else []  # dilated, it leaves some rows out
    return max(spans)


@pytest.mark.parametrize(
    "options",
    [{"kernel_size": 2, "stride": 2}, {"kernel_size": 3, "stride": 2}, {"kernel_size": 4, "stride": 2},
     {"kernel_size": 5, "stride": 2}, {"kernel_size": 3, "stride": 2, "dilation": 2}, {"kernel_size": 3}],
)  # fmt: skip
def test_receptive_fields_behind_a_transposed_convolution(options):
    module, found = grids(nn.Identity(), **options)
    stride = 2 // options.get("stride", 1)
    fields = [seen(module, path) for path in ("up", "last")]
    assert found == [(stride, fields[0]), (stride, fields[1])]


@pytest.mark.parametrize(
    "way",
    [lambda x: functional.interpolate(x, scale_factor=2.0), lambda x: functional.pixel_unshuffle(x, 2),
     lambda x: x[..., ::2, ::2], lambda x: x.view(1, 8, 4, 4, 4, 4).transpose(3, 4).reshape(1, 32, 4, 16)],
)  # fmt: skip
def test_strides_behind_other_means_are_not_known(way):
    _, found = grids(way)
    assert found[1] == (0, 0)


@pytest.mark.parametrize("way", [lambda x: functional.pad(x, (1, 1, 1, 1)), lambda x: x[:, :, 1:-1, 1:]])
def test_padding_and_cutting_off_change_no_stride(way):
    _, found = grids(way)
    assert found == [(2, 3), (2, 7)]


def test_an_image_that_is_rearranged_first_has_no_known_stride():
    base = network_of(nn.PixelUnshuffle(2), nn.Conv2d(12, 8, 3), nn.ReLU())
    changes = describe_variant(variant(base, {"activation": "elu"}))
    assert {one.after.stride for one in changes.layers} == {0}


def test_a_factory_that_ends_its_program_is_an_error_in_one_line():
    with pytest.raises(InputError, match=r"exiting cannot be built: SystemExit: 3 \(.*tiny_networks.py:\d+\)$"):
        load_network("tiny_networks:exiting", device="cpu")


@pytest.mark.parametrize(
    ("name", "left"),
    [("densenet121[activation=elu]", "relu"), ("alexnet[activation=elu]", None), ("resnet18[pooling=avg]", None),
     ("inception_v3(aux_logits=False)[pooling=avg]", "max_pool2d_with_indices")],
)  # fmt: skip
def test_what_an_edit_of_all_leaves_is_said(name, left):
    warnings = describe_variant(load_network(f"{name}=none")).warnings
    assert [text.split(" leaves ")[1].split(",")[0] for text in warnings if " leaves " in text] == (
        [left] if left else []
    )
