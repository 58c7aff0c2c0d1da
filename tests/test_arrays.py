"""Arrays come back as they were given, and on the same device."""

import sys
import types

import numpy as np
import pytest
import torch

from qdv_gpu import arrays


class Placed:
    """A tensor of which only the place matters."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.is_cuda = self.device.type == "cuda"

    def detach(self):
        return self

    def to(self, device):
        return Placed(device)


@pytest.mark.parametrize(("result", "expected"), [("cuda:1", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cuda:2")])
def test_a_cupy_result_stays_on_its_device(monkeypatch, result, expected):
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(from_dlpack=lambda tensor: tensor.device))
    monkeypatch.setattr(arrays, "to_tensor", lambda array: Placed("cuda:2"))
    original = types.SimpleNamespace(__cuda_array_interface__={})
    assert arrays.like(Placed(result), original) == torch.device(expected)


def test_results_are_of_the_kind_given():
    tensor = torch.ones(3, requires_grad=True)
    assert arrays.like(tensor, torch.zeros(1)) is tensor
    for original in (np.zeros(1), [1, 2]):
        assert isinstance(arrays.like(tensor, original), np.ndarray)
