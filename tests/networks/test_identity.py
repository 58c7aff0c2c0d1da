"""Digests see what changes a network's results, and nothing else."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional

from qdv_gpu.errors import InputError
from qdv_gpu.networks.identity import structure_digest, weights_digest


class Pooled(nn.Module):
    """A forward pass with a number in an attribute and one in the code."""

    def __init__(self, size=2, activation=functional.relu):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.size, self.activation = size, activation

    def forward(self, x):
        return self.activation(functional.max_pool2d(self.conv(x), self.size, 2))


class Reworded(Pooled):
    """The same."""

    def forward(self, x):
        """With a docstring and a comment."""
        # a comment
        return self.activation(functional.max_pool2d(self.conv(x), self.size, 2))


class Edited(Pooled):
    """Another number in the code."""

    def forward(self, x):
        return self.activation(functional.max_pool2d(self.conv(x), self.size, 3))


def test_what_changes_results_changes_the_structure():
    plain = structure_digest(Pooled())
    assert structure_digest(Pooled()) == plain
    assert structure_digest(Pooled(size=3)) != plain
    assert structure_digest(Pooled(activation=functional.gelu)) != plain
    assert structure_digest(Pooled(activation=functools.partial(functional.leaky_relu, negative_slope=0.1))) != plain
    assert structure_digest(Edited()) != structure_digest(Reworded())
    for one, other in [
        (nn.MaxPool2d(2), nn.MaxPool2d(3)),
        (nn.Sequential(nn.ReLU()), nn.Sequential(nn.GELU())),
        (nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, stride=2)),
    ]:
        assert structure_digest(one) != structure_digest(other)


def test_what_changes_no_result_does_not():
    module = Pooled()
    before = structure_digest(module)
    module.eval().requires_grad_(requires_grad=False)
    with torch.no_grad():
        module.conv.weight.zero_()
    assert structure_digest(module) == before
    module.size = torch.zeros(3)  # no plain value
    assert "0x" not in str(structure_digest(module))


def test_weights_and_buffers_are_seen():
    module = nn.BatchNorm2d(4)
    module.register_buffer("extra", torch.zeros(2, dtype=torch.bfloat16), persistent=False)
    before = weights_digest(module)
    assert weights_digest(module) == before
    module.extra[0] = 1
    assert weights_digest(module) != before
    with pytest.raises(InputError, match="tensor weight of the network has no values"):
        weights_digest(nn.BatchNorm2d(4, device="meta"))
