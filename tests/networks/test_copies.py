"""Copies share weights and nothing else."""

from typing import NamedTuple

import pytest
import torch
from torch import fx, nn

from qdv_gpu import activations
from qdv_gpu.errors import InputError
from qdv_gpu.networks.copies import shared_copy


class Pair(NamedTuple):
    """Two modules."""

    first: nn.Module
    second: nn.Module


class Odd(nn.Module):
    """Modules and state where a plain walk over submodules does not find them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.tied = nn.Linear(4, 4)
        self.also = nn.Linear(4, 4)
        self.also.weight = self.tied.weight
        self.pair, self.hidden = Pair(self.conv, self.tied), [nn.BatchNorm1d(4)]
        self.weights, self.seen, self.run = [self.tied.weight], [], self.step
        self.loop: list = []
        self.loop.append(self.loop)

    def step(self, x):
        self.seen.append(len(x))
        return self.conv(x)

    def forward(self, x):
        return self.run(x)


def test_what_a_module_holds_is_the_copys_own_and_weights_are_shared():
    module = Odd().train()
    other = shared_copy(module).eval()
    assert other.conv.weight.data_ptr() == module.conv.weight.data_ptr()
    assert other.conv.weight is not module.conv.weight
    assert other.tied.weight is other.also.weight is other.weights[0]
    assert other.pair.first is other.conv
    assert other.hidden[0] is not module.hidden[0]
    assert other.loop[0] is other.loop
    other(torch.zeros(2, 1, 8, 8))
    assert (other.seen, module.seen) == ([2], [])
    assert module.training
    assert module.conv.training


@pytest.mark.parametrize("make", [fx.symbolic_trace, lambda module: module.compile(backend="eager") or module])
def test_traced_and_compiled_modules(make):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 3)).eval()
    images = torch.rand(5, 1, 8, 8)
    expected = activations(plain, images, layers=["2"])["2"]
    assert torch.equal(activations(make(plain), images, layers=["2"])["2"], expected)


def test_lazy_modules_are_refused_until_they_have_shapes():
    with pytest.raises(InputError, match="run one batch through it first"):
        shared_copy(nn.LazyLinear(3))


class Closing(nn.Module):
    """Whose forward pass is a lambda that reaches a module by its name there, and not by `self`."""

    def __init__(self):
        super().__init__()
        hidden = nn.BatchNorm2d(3)
        self.hidden, self.identity = hidden, nn.Identity()
        self.run = lambda x: self.identity(hidden(x))

    def forward(self, x):
        return self.run(x)


def test_modules_that_a_function_closes_over_are_not_run():
    module, images = Closing().train(), torch.rand(6, 3, 4, 4)
    found = activations(module, images, layers=["identity"])["identity"]
    torch.testing.assert_close(found, images.flatten(1), rtol=1e-4, atol=1e-5)  # not by the batch's statistics
    assert int(module.hidden.num_batches_tracked) == 0
