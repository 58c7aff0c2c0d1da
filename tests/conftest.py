"""What all tests share."""

import logging
from contextlib import nullcontext

import pytest
import torch


@pytest.fixture
def lines(caplog):
    """A function that gives what the library has told so far."""
    caplog.set_level(logging.INFO, logger="qdv_gpu")
    return lambda: list(caplog.messages)


def _place(kind):
    """A block with a CUDA device, simulated or real."""
    if kind == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        return nullcontext()
    pytest.importorskip("cupy")  # whose compiler makes the code that the simulated device runs
    from device import simulated

    return simulated.devices()


@pytest.fixture(params=["simulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def cuda(request):
    """torch.device("cuda"), simulated or real."""
    with _place(request.param):
        yield torch.device("cuda", 0)


@pytest.fixture
def gpu():
    """Two simulated devices, and what is asked of them (`device.runtime.Runtime`)."""
    with _place("simulated") as runtime:
        yield runtime


@pytest.fixture
def trained(monkeypatch):
    """Counts trainings."""
    import qdv_gpu.studies.finetune as training

    counts = []
    train = training._trained

    def count(run, *rest):
        counts.append(run.network.name)
        return train(run, *rest)

    monkeypatch.setattr(training, "_trained", count)
    return counts
