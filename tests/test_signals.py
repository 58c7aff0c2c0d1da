"""Ctrl-C and SIGTERM end a command in one line, while it is imported as well as while it works."""

import os
import signal
import subprocess
import sys
import time

import pytest

SMALL = ["--data", "digits", "--samples", "60", "--pca", "5", "--perplexity", "5", "--seeds", "2", "--device", "cpu"]


def command(*arguments):
    """The command in a process of its own, which says when Python has started."""
    code = f"import sys; sys.argv = {['qdv-gpu', *arguments]!r}; from qdv_gpu.__main__ import run; "
    code += "print('started', file=sys.stderr, flush=True); run()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
    )  # fmt: skip
    assert process.stderr.readline() == "started\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("after", [0.1, 0.6, 1.2])
def test_while_it_is_imported(tmp_path, number, code, after):
    process = command("analyze", "tiny_networks:cnn", *SMALL, "--iterations", "50000000", "--out", str(tmp_path / "o"))
    time.sleep(after)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert said.splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_while_it_works(tmp_path, number, code):
    """It says how many layers are kept, and the same command goes on from them."""
    arguments = ["analyze", "tiny_networks:cnn", *SMALL, "--out", str(tmp_path / "o"), "--iterations"]
    process = command(*arguments, "50000000")
    for line in process.stderr:
        if "holds" in line:
            break
    time.sleep(1)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    kept, interrupted = said.splitlines()[-2:]
    assert "0 of 3 layers are finished and kept in" in kept
    assert interrupted == "interrupted: the same command goes on from what is finished"
    again = command(*arguments, "20")
    _, said = again.communicate(timeout=120)
    assert again.returncode == 0, said


def test_signals_are_heeded_from_the_start():
    """What is imported before takes no time: within it Ctrl-C is Python's, with a traceback."""
    code = "import sys; sys.path[:0] = {!r}; before = set(sys.modules); import qdv_gpu.__main__; "
    code += "print(*sorted(name for name in set(sys.modules) - before if not name.startswith('_')))"
    done = subprocess.run(
        [sys.executable, "-ISc", code.format(sys.path)], stdout=subprocess.PIPE, check=True, text=True
    )
    assert {"qdv_gpu.__main__", "signal"} <= set(done.stdout.split())
    assert not {"typing", "re", "pathlib", "logging", "importlib.util"} & set(done.stdout.split()), done.stdout
