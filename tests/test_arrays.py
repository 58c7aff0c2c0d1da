"""Arrays come back as they were given, and on the same device."""

import numpy as np
import torch

from qdv_gpu import arrays


def test_a_cupy_result_stays_on_its_device(gpu):
    import cupy  # the stand-in of the simulated devices

    for result, original in (("cuda:1", "cuda:0"), ("cuda:0", "cuda:1"), ("cpu", "cuda:1")):
        made = arrays.like(torch.zeros(3, device=result), cupy.from_dlpack(torch.zeros(3, device=original)))
        assert made.tensor.device == torch.device(original if result == "cpu" else result)


def test_results_are_of_the_kind_given():
    tensor = torch.ones(3, requires_grad=True)
    assert arrays.like(tensor, torch.zeros(1)) is tensor
    for original in (np.zeros(1), [1, 2]):
        assert isinstance(arrays.like(tensor, original), np.ndarray)
