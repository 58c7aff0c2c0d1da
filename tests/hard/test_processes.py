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


LITTLE = """
import torch, qdv_gpu
from torch.utils.data import DataLoader, Dataset

class Large(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        return torch.full((3, 256, 256), i, dtype=torch.uint8), torch.tensor(i % 2)

images = qdv_gpu.as_images(DataLoader(Large(), num_workers=2, batch_size=32))
assert images[40].unique().tolist() == [40]
assert images.labels.tolist() == [0, 1] * 32
"""


def mounted(command, *arguments, size="1m", at="/dev/shm", cwd=None):
    """A command where a folder is a file system of a size; skips the test where that may not be mounted."""
    mount = f"mount -t tmpfs -o size={size} none {at}"
    own = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c"]
    if subprocess.run([*own, mount], check=False, capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    return subprocess.run(
        [*own, f'{mount}; exec "$@"', "sh", *map(str, (command, *arguments))], cwd=cwd, env=ENVIRONMENT, text=True,
        capture_output=True, check=False, timeout=200,
    )  # fmt: skip


def test_readers_of_images_need_no_shared_memory():
    done = mounted(sys.executable, "-c", LITTLE)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["run", "store", "temporary"])
def test_a_full_file_system(tmp_path, name):
    (tmp_path / "full").mkdir()
    out, store = ("full/out" if name == "run" else "out"), ("full" if name == "store" else ".qdv-store")
    more = ["--store", store, "--out", out]
    change = [f"TMPDIR={tmp_path / 'full'}"] if name == "temporary" else ["X=1"]
    done = mounted("env", *change, sys.executable, "-m", "qdv_gpu", *ANALYZE[:-2], *more, size="20k",
                   at=tmp_path / "full", cwd=tmp_path)  # fmt: skip
    assert "Traceback" not in done.stderr
    assert done.returncode == (0 if name == "temporary" else 2), done.stderr
    if name != "temporary":
        assert done.stderr.splitlines()[-1].startswith("qdv-gpu: disk full while writing ")


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
import qdv_gpu.studies.compute as at
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
import qdv_gpu.studies.compute as at
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
    "no threads of numba": ({"NUMBA_NUM_THREADS": "-1"}, 2),
    "odd threads": ({"NUMBA_NUM_THREADS": "many", "OMP_NUM_THREADS": "many"}, 0),
    "a library that is not imported": ({"TORCH_LOGS": "nonsense"}, 2),
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
