"""Threads, memory, and batches that get smaller."""

import pytest
import torch

from qdv_gpu.errors import InputError
from qdv_gpu.machine import Halving, in_parallel, threads


def test_items_are_worked_on_in_order_each_by_one_thread():
    before = torch.get_num_threads()
    assert in_parallel(lambda n: (n, torch.get_num_threads()), range(5)) == [(n, 1) for n in range(5)]
    with pytest.raises(ZeroDivisionError):
        in_parallel(lambda n: 1 / n, range(3))
    assert torch.get_num_threads() == before == threads()


def test_out_of_memory_halves_the_batch(lines):
    def exhausted(rows):
        if len(rows) > 20:
            raise torch.OutOfMemoryError
        return rows

    halving, rows = Halving(), torch.arange(64)
    assert torch.equal(torch.cat(halving(exhausted, rows)), rows)
    assert lines() == [f"CUDA is out of memory: the batch is halved to {n} images" for n in (32, 16)]
    assert len(halving(exhausted, rows)) == 4  # and stays so

    def hopeless(_rows):
        raise torch.OutOfMemoryError

    with pytest.raises(InputError, match="out of memory even for one image"):
        Halving()(hopeless, rows)
