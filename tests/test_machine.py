"""Threads, memory, and batches that get smaller."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qdv_gpu import machine
from qdv_gpu.errors import InputError
from qdv_gpu.machine import Halving, in_parallel, product_precision, resolve_device, seeded, threads
from qdv_gpu.studies.executors import slots_of


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


def test_workers_share_memory(monkeypatch):
    """Three on two GPUs plan for a third of the host each, and two of them for half of a GPU."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "_free_in_groups", lambda: [3 * 2**20])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 2**31))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 200)
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert (machine.free_memory(cpu), machine.free_memory(gpu)) == (3 * 2**20, 2**30 + 100)
    found = []
    for slot in slots_of(3, ["0", "1"]):
        monkeypatch.setenv("QDV_GPU_SHARED", slot["QDV_GPU_SHARED"])
        found.append((machine.free_memory(cpu), machine.free_memory(gpu)))
    assert found == [(2**20, 2**29 + 100), (2**20, 2**30 + 100), (2**20, 2**29 + 100)]
    assert slots_of(2, None)[0]["QDV_GPU_SHARED"] == "2,2"  # of one GPU, if there is one


@pytest.mark.parametrize("shared", ["foo", "4", "0,1", "1,-2", "1,2,3", "1.5,1", "²,1"])
def test_workers_that_share_memory_are_two_numbers(monkeypatch, shared):
    monkeypatch.setenv("QDV_GPU_SHARED", shared)
    with pytest.raises(InputError, match="QDV_GPU_SHARED must be two numbers of workers from 1, as 4,2, or not be set"):
        machine.free_memory(torch.device("cpu"))


CUDNN = torch.backends.cudnn
MATMUL = torch.backends.cuda.matmul
SWITCHES = {  # what a program may have set before, by the old switches, the new ones, and both
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(MATMUL, "allow_tf32", True),
    "no allow_tf32": lambda: (setattr(MATMUL, "allow_tf32", False), setattr(CUDNN, "allow_tf32", False)),
    "everything ieee": lambda: setattr(torch.backends, "fp32_precision", "ieee"),
    "everything tf32": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "all of cuda": lambda: setattr(CUDNN, "fp32_precision", "tf32"),
    "convolutions": lambda: setattr(CUDNN.conv, "fp32_precision", "ieee"),
    "unset": lambda: [setattr(one, "fp32_precision", "none") for one in (MATMUL, CUDNN.conv, CUDNN.rnn)],
    "old, then new": lambda: (torch.set_float32_matmul_precision("high"), setattr(MATMUL, "fp32_precision", "ieee")),
    "new, then old": lambda: (setattr(torch.backends, "fp32_precision", "tf32"), setattr(CUDNN, "allow_tf32", False)),
}
EACH_ALONE = """
import os
from test_machine import SWITCHES, check_precisions

for name in SWITCHES:
    if os.fork() == 0:
        check_precisions(name)
        os._exit(0)
    print(name, os.wait()[1], flush=True)
"""


def check_precisions(name):
    """In a process whose switches nobody has touched."""
    SWITCHES[name]()
    for kind in ("tf32", "ieee"):
        before, following = switches(), followers()
        with contextlib.suppress(ZeroDivisionError), product_precision(kind):
            now = switches()
            assert [now[part] for part in ("matmul", "conv", "rnn")] == [kind] * 3, now
            for old in ("allow_tf32", "cudnn.allow_tf32"):
                assert now[old] == (kind == "tf32") or before[old] == now[old] == "raises", (old, before, now)
            highest = now["highest"] == ("highest" if kind == "ieee" else before["highest"].replace("highest", "high"))
            assert highest or before["highest"] == now["highest"] == "raises" or kind == "tf32", (before, now)
            1 / 0  # noqa: B018
        assert switches() == before, (before, switches())
        lost = ("conv", "rnn", "cudnn.allow_tf32") if before["cudnn.allow_tf32"] is True else ()
        for value, then in followers().items():
            rest = [part for part in then if kind == "tf32" or part not in lost]
            assert [then[part] for part in rest] == [following[value][part] for part in rest], (value, following)
        if before["cudnn.allow_tf32"] != "raises":
            with product_precision(kind):
                with CUDNN.flags(enabled=False):  # which networks use, and which reads and sets the old switch
                    pass
                assert [switches()[part] for part in ("matmul", "conv", "rnn")] == [kind] * 3
            assert switches() == before, (before, switches())


def followers():
    """What the switches would become with the one of everything."""
    before, found = torch.backends.fp32_precision, {}
    for value in ("ieee", "tf32", "none"):
        torch.backends.fp32_precision = value
        found[value] = switches()
    torch.backends.fp32_precision = before
    return found


def switches():
    """All that torch says of its precisions, without and with what they take from each other."""

    def read(old):
        try:
            return old()
        except RuntimeError:
            return "raises"

    return {
        "everything": torch.backends.fp32_precision,
        "cuda": CUDNN.fp32_precision,
        "matmul": MATMUL.fp32_precision,
        "conv": CUDNN.conv.fp32_precision,
        "rnn": CUDNN.rnn.fp32_precision,
        "cpu": torch.backends.mkldnn.matmul.fp32_precision,
        "highest": read(torch.get_float32_matmul_precision),
        "allow_tf32": read(lambda: MATMUL.allow_tf32),
        "cudnn.allow_tf32": read(lambda: CUDNN.allow_tf32),
    }


def test_precision_is_set_whole_and_put_back():
    run = subprocess.run([sys.executable, "-c", EACH_ALONE], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert run.stdout.splitlines() == [f"{name} 0" for name in SWITCHES], run.stderr


def test_cublas_is_told_before_its_first_use(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is taken back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert resolve_device("cpu").type == "cpu"
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device("cuda:0") == torch.device("cuda", 0)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_generators_of_gpus_are_put_back(cuda):
    torch.cuda.manual_seed_all(5)
    before = torch.cuda.get_rng_state(cuda)
    with seeded(7):
        assert not torch.equal(torch.cuda.get_rng_state(cuda), before)
    assert torch.equal(torch.cuda.get_rng_state(cuda), before)
