"""Sweeps on a real Slurm and a real Dask, as small as they come."""

import json
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import tiny_slurm
from tiny_sweep import TOML, changed, command, environment, rows

from qdv_gpu.errors import InputError
from qdv_gpu.studies.outlook import foreseen
from qdv_gpu.studies.status import status
from qdv_gpu.studies.sweep import sweep

SMALL = TOML.replace("runs = 3", "runs = 1")  # four points


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return rows(sweep(changed(grid={"runs": 1}), tmp_path_factory.mktemp("sweep") / "one").out)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if hindrance := tiny_slurm.hindrance():
        pytest.skip(f"no Slurm here: {hindrance}")
    with tiny_slurm.slurm(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


@pytest.fixture
def slurm(cluster, monkeypatch):
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster[name])
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    return cluster


def until(condition, seconds=120):
    """Wait for something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.2)
    raise TimeoutError


def jobs():
    said = subprocess.run(["squeue", "-h", "-r", "-o", "%i %T"], capture_output=True, text=True, check=True)
    return dict(line.split() for line in said.stdout.splitlines())


def starts(out):
    return {file.parent.name: json.loads(file.read_text()) for file in out.glob("points/*/started.json")}


OPTIONS = """
time = 5
gres = "gpu:1"
array_parallelism = 2
cpus_per_task = 1
mem = "400MB"
"""


def written(folder, text, options=OPTIONS):
    """A sweep file, and one of Slurm's options."""
    (folder / "sweep.toml").write_text(text)
    (folder / "slurm.toml").write_text(options)
    return folder / "sweep.toml", folder / "slurm.toml"


def test_an_array_job_whose_tasks_have_a_gpu_each(slurm, expected, tmp_path):
    file, options = written(tmp_path, SMALL)
    process = command("sweep", file, "--out", tmp_path / "one", "--slurm", options)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert rows(tmp_path / "one") == expected
    found = starts(tmp_path / "one")
    assert {one["devices"] for one in found.values()} == {"0", "1"}
    assert len({one["pid"] for one in found.values()}) == 4


def test_cancelled_and_out_of_time_it_is_finished_by_running_again(slurm, tmp_path, monkeypatch):
    """A job that is cancelled is lost, and one over its time is put into the queue again."""
    monkeypatch.setenv("TINY_COUNT", str(tmp_path / "count"))
    text = SMALL.replace("tiny_networks:cnn", "tiny_sweep_networks:slow").replace(", 1e-2]", "]")
    file, options = written(tmp_path, text, 'time = 1\ngres = "gpu:1"\nsignal_delay_s = 20\n')
    out = tmp_path / "one"
    process = command("sweep", file, "--out", out, "--slurm", options)
    [cancelled] = until(lambda: [job for job, state in jobs().items() if job.endswith("_1") and state == "RUNNING"])
    subprocess.run(["scancel", cancelled], check=True)
    said = process.communicate()[0]
    assert process.returncode == 1, said
    assert status(out).counts["done"] == 1, said
    assert (tmp_path / "count").read_text().count("x") > 1  # the job over its time began again
    assert "tiny_networks:other (lr=0.001), run 1: " in said
    process = command("sweep", file, "--out", out, "--slurm", options)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert [row["state"] for row in rows(out)] == ["done"] * 2


def test_jobs_that_are_queued_are_waited_for_and_not_sent_again(slurm, expected, tmp_path):
    (file, options), out = written(tmp_path, SMALL), tmp_path / "one"
    process = command("sweep", file, "--out", out, "--slurm", options)
    until(lambda: len(jobs()) == 4 and (out / "slurm" / "jobs.json").exists())
    process.kill()
    process.communicate()
    before = set(jobs())
    process = command("sweep", file, "--out", out, "--slurm", options)
    sent = set()
    while process.poll() is None:
        sent |= set(jobs())
        time.sleep(0.3)
    assert process.returncode == 0, process.communicate()[0]
    assert sent <= before
    assert rows(out) == expected


KILLED = """
import os, sys
from qdv_gpu.studies import executors
executors.write_sealed = lambda *_: os._exit(9)
from qdv_gpu.studies.sweep import sweep
sweep(sys.argv[1], sys.argv[2], slurm=sys.argv[3])
"""


def test_jobs_of_a_call_that_was_killed_in_sending_them_do_not_run_beside_those_of_the_next(slurm, expected, tmp_path):
    (file, options), out = written(tmp_path, SMALL), tmp_path / "one"
    killed = subprocess.run([sys.executable, "-c", KILLED, file, out, options], env=environment(), check=False)
    assert killed.returncode == 9
    before = set(jobs())
    assert len(before) == 4
    process = command("sweep", file, "--out", out, "--slurm", options)
    until(lambda: (out / "slurm" / "jobs.json").exists())
    later = {job for job, state in jobs().items() if state in ("PENDING", "RUNNING")}
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert "jobs that an earlier call was stopped in sending are cancelled" in said
    assert not later & before
    assert rows(out) == expected


def test_the_job_script_is_shown(tmp_path):
    lines = foreseen(changed(), tmp_path / "one", max_points=100, slurm={"time": 7, "gres": "gpu:1"})[1]
    assert "#SBATCH --gres=gpu:1" in lines[-1]
    assert "#SBATCH --array=0-11" in lines[-1]
    assert "#SBATCH --time=7" in lines[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"setup": "module load"}, "Slurm's options are not as submitit takes them: TypeError: can only concat"),
        ({"additional_parameters": "x"}, "Slurm's options are not as submitit takes them: ValueError"),
        ({"array_parallelism": "many"}, "array_parallelism must be"),
        ({"array_parallelism": 0}, "array_parallelism must be"),
    ],
)
def test_wrong_options_are_said_first(tmp_path, options, message):
    for begin in (sweep, partial(foreseen, max_points=100)):
        with pytest.raises(InputError, match=message):
            begin(changed(), tmp_path / "one", slurm=options)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def dask(tmp_path):
    """A scheduler with two workers of one thread: its address, and their processes."""
    folder = tmp_path / "dask"
    folder.mkdir()
    file = folder / "scheduler.json"

    def start(program, *options):
        command = [sys.executable, "-m", f"distributed.cli.dask_{program}", "--scheduler-file", file, *options]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, env=environment(), cwd=folder, **quiet)

    processes = [start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")]
    until(file.is_file)
    processes += [start("worker", "--nthreads", "1", "--no-nanny", "--no-dashboard") for _ in range(2)]
    yield json.loads(file.read_text())["address"], processes
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


def test_dask_with_a_worker_that_is_killed(dask, expected, tmp_path):
    address, processes = dask
    file, out = tmp_path / "sweep.toml", tmp_path / "one"
    file.write_text(SMALL)
    process = command("sweep", file, "--out", out, "--dask", address)
    until(lambda: starts(out))
    processes[1].send_signal(signal.SIGKILL)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert rows(out) == expected


def test_no_scheduler(tmp_path):
    with pytest.raises(InputError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:1"):
        sweep(changed(), tmp_path / "one", dask="tcp://127.0.0.1:1")
