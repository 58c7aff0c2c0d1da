"""Runs that are killed, and runs at once: the same bytes as one run left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_analysis import TINY, outcome, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("analysis") / "run")


CODE = "from tiny_analysis import SPECS, TINY, analyze; analyze(SPECS, 'digits', {!r}, settings=TINY, device='cpu')"


def start(out, threads=None, code=CODE):
    """A process of its own, on that many threads."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}:{here.parent.parent}"}
    environment.pop("OMP_NUM_THREADS", None)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code.format(str(out))],
        cwd=here,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_runs_end_as_if_they_had_not_been(finished, tmp_path, kills):
    """SIGKILL at random moments, under one thread or as many as there are, and on under another number."""
    moments = random.Random(kills)
    started = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    whole = time.monotonic() - started
    for number in range(kills):
        out = tmp_path / f"run-{number}" / "run"
        process = start(out, 1 if number % 2 else None)
        time.sleep(moments.uniform(0.3, 1.05) * whole)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        resumed = start(out, None if number % 2 else 1)
        _, complaint = resumed.communicate()
        assert resumed.returncode == 0, complaint
        assert outcome(out) == outcome(finished.out), number
        assert not list(out.rglob(".*"))
        assert not list((out.parent / ".qdv-store" / "tmp").iterdir())


def test_two_processes_at_once(finished, tmp_path):
    """On one folder one is refused, whatever its settings; on one store both are right."""
    other = CODE.replace("settings=TINY", "settings=TINY, perplexity=9")
    runs = [
        start(tmp_path / "one"),
        start(tmp_path / "one"),
        start(tmp_path / "two"),
        start(tmp_path / "one", code=other),
    ]
    complaints = [process.communicate()[1] for process in runs]
    codes = [process.returncode for process in runs]
    assert codes[2] == 0, complaints[2]
    refused = [complaint for code, complaint in zip(codes, complaints, strict=True) if code]
    assert all("another run is writing to" in complaint.splitlines()[-1] for complaint in refused)
    assert outcome(tmp_path / "two") == outcome(finished.out)
    settings = json.loads((tmp_path / "one" / "run.json").read_text())["settings"]
    expected = replace(TINY, perplexity=settings["perplexity"])
    run(tmp_path / "three", expected, store=tmp_path / "fresh")
    assert outcome(tmp_path / "one") == outcome(tmp_path / "three")
