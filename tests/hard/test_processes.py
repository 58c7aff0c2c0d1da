"""Processes of their own: signals at any moment, children whose parent is killed, and odd environments."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hard.cases import SMALL, TESTS

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
ANALYZE = ("analyze", "tiny_networks:cnn", *SMALL, "--out", "out")


def start(*arguments, cwd, **changes):
    return subprocess.Popen(
        [sys.executable, "-m", "qdv_gpu", *arguments], cwd=cwd, env={**ENVIRONMENT, **changes}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def children(process):
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def is_alive(process):
    """Whether a process runs; one that nobody has asked after is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(true, seconds=60):
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.05)


SLOW = """
import time, torch, qdv_gpu
from torch.utils.data import DataLoader, Dataset

class Slow(Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, i):
        if i > 40:
            print(i, flush=True)
            time.sleep(600)
        return torch.zeros(1, 8, 8, dtype=torch.uint8), 0

qdv_gpu.as_images(DataLoader(Slow(), num_workers=2))
"""


def test_readers_of_images_end_with_a_killed_parent(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SLOW], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    workers = children(process)
    assert len(workers) == 2
    process.kill()
    process.wait()
    process.stdout.close()
    wait_until(lambda: not any(map(is_alive, workers)))


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_of_a_sweep_end_with_it(tmp_path, ending):
    (tmp_path / "s.toml").write_text(
        "[run]\ndata = 'digits'\nweights = 'none'\nanalyze.samples = 60\nperplexity = 5\niterations = 50000000\n"
        "layers = 'pool'\n[grid]\nnetwork = ['tiny_networks:cnn', 'tiny_networks:other']\n"
    )
    process = start("sweep", "s.toml", "--workers", "2", "--out", "out", cwd=tmp_path)
    wait_until(lambda: len(children(process)) == 2)
    workers = children(process)
    process.send_signal(ending)
    _, said = process.communicate()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(ending, -ending), said
    assert "Traceback" not in said
    wait_until(lambda: not any(map(is_alive, workers)))


@pytest.mark.parametrize(
    "swallowing",
    ["", "class Bad:\n    def __del__(self): raise_signal(number)\n"],
    ids=["turned into another exception", "in a destructor"],
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_is_swallowed_stops_a_command(warm, tmp_path, number, code, swallowing):
    before = f"from signal import raise_signal\nnumber = {int(number)}\n{swallowing}"
    before += """
import qdv_gpu.studies.analyze as at
real = at.reduce
def reduce(*given, **more):
    if "Bad" in globals():
        Bad()
    else:
        try:
            raise_signal(number)
        except KeyboardInterrupt:
            raise ImportError("of a library")
    return real(*given, **more)
at.reduce = reduce
"""
    done = warm.run(*ANALYZE, cwd=tmp_path, before=before)
    assert done.code == code, done.err
    assert done.err.splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in done.err
    assert warm.run(*ANALYZE, cwd=tmp_path).code == 0


def test_a_second_signal_stops_at_once(warm, tmp_path):
    before = """
import signal, time
import qdv_gpu.studies.analyze as at
def reduce(*_, **__):
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(600)
at.reduce = reduce
"""
    done = warm.run(*ANALYZE, cwd=tmp_path, before=before, timeout=60)
    assert done.code == 143
    assert done.err.splitlines()[-1] == "interrupted"


ENVIRONMENTS = {
    "no home": ({"HOME": "/nonexistent/home"}, 0),
    "home that is read-only": ({"HOME": "/proc", "XDG_CACHE_HOME": "/proc/x", "MPLCONFIGDIR": "/proc/x"}, 0),
    "no backend": ({"MPLBACKEND": "nonsense"}, 0),
    "strict warnings": ({"PYTHONWARNINGS": "error"}, 0),
    "no temporary folder": ({"TMPDIR": "/nonexistent"}, 0),
    "ascii": ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, 0),
    "no compiler": ({"NUMBA_DISABLE_JIT": "1"}, 2),
    "no cache of numba": ({"NUMBA_CACHE_DIR": "/proc/x"}, 0),
    "optimised": ({"PYTHONOPTIMIZE": "1"}, 0),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("no backend", "no compiler") else pytest.mark.slow)
             for name in ENVIRONMENTS]
)  # fmt: skip
def test_an_environment(tmp_path, name):
    changes, code = ENVIRONMENTS[name]
    process = start(*ANALYZE, cwd=tmp_path, **changes)
    _, said = process.communicate()
    assert process.returncode == code, said
    assert "Traceback" not in said
