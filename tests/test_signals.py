"""Ctrl-C and SIGTERM end a command in one line, while it is imported as well as while it works."""

import os
import signal
import subprocess
import sys
import time

import pytest

SMALL = ["--data", "digits", "--samples", "60", "--pca", "5", "--perplexity", "5", "--seeds", "2", "--device", "cpu"]


def command(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "qdv_gpu", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
    )  # fmt: skip


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("after", [0.3, 0.8, 1.5])
def test_while_it_is_imported(tmp_path, number, code, after):
    """Before Python itself has started there is nobody to ask: a signal then ends it as it ends any program."""
    process = command("analyze", "tiny_networks:cnn", *SMALL, "--iterations", "10000000", "--out", str(tmp_path / "o"))
    time.sleep(after)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (code, -number), said
    assert "Traceback" not in said or "site" in said.splitlines()[1]
    assert len(said.splitlines()) <= 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_while_it_works(tmp_path, number, code):
    """It says how many layers are kept, and the same command goes on from them."""
    arguments = ["analyze", "tiny_networks:cnn", *SMALL, "--out", str(tmp_path / "o"), "--iterations"]
    process = command(*arguments, "2000000")
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
