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


class Reversed:
    """Stands in for a CuPy array that is read backwards."""

    def __init__(self, numbers):
        self.numbers = numbers
        self.__cuda_array_interface__ = {"shape": numbers.shape, "strides": numbers.strides}

    def copy(self):
        return self.numbers.copy()

    def __dlpack__(self, **options):
        return self.numbers.__dlpack__(**options)


def test_a_cupy_array_that_is_read_backwards():
    """torch has no view with negative strides."""
    assert arrays.to_tensor(Reversed(np.arange(3.0)[::-1])).tolist() == [2, 1, 0]
