"""Where the points of a sweep are computed: in this process, in processes of their own, under Slurm, or by Dask.

A task is a tuple of points that share a training. Whatever the way, `run_points` computes it, what comes of it is in
the points' folders, and nothing else is handed back. A process that ends without a word costs its own task and no
other; it is started once more, and the task too that ran out of memory.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from qdv_gpu.errors import InputError, MissingPackageError, as_path, check_among, check_count, reason
from qdv_gpu.files import read_toml
from qdv_gpu.machine import SHARED, threads
from qdv_gpu.results.store import Store
from qdv_gpu.sealed import read_sealed, write_sealed
from qdv_gpu.studies.point import ERROR, LOG, Point, compute, keep_error, read_points, run_points, state_of

logger = logging.getLogger(__name__)
Task = tuple[Point, ...]
POLL = 0.1  # seconds between looks at processes
SLURM_POLL, SLURM_POLL_MOST = 2.0, 30.0  # and at Slurm's queue, at first and after minutes: it is everybody's
ATTEMPTS = 2  # of a point in one call


class StopSweepError(Exception):
    """A point failed, and no further one is to be started."""


@dataclass
class Progress:
    """Tells of each point once that it is done or has failed.

    Attributes
    ----------
    out : Path
    store : Store
    total : int
        Of points.
    fail_fast : bool
        Raise StopSweepError at the first that fails.
    """

    out: Path
    store: Store
    total: int
    fail_fast: bool
    told: set[str] = field(default_factory=set)

    def tell(self, task: Task) -> None:
        """Log what has become of the points of a task."""
        for point in task:
            state = state_of(self.out, point, None)
            if point.name in self.told or state.kind not in ("done", "failed"):
                continue
            self.told.add(point.name)
            count = f"[{len(self.told)}/{self.total}] {point.label}, run {point.run}"
            if state.kind == "done":
                accuracy = state.about["accuracy"]
                said = "" if accuracy is None else f", accuracy {accuracy:.1%}"
                logger.info("%s: done in %.0f s%s", count, state.seconds, said)
            else:
                log = point.folder(self.out) / LOG
                logger.warning("%s: failed: %s (%s)", count, state.about["message"], log)
                if self.fail_fast:
                    raise StopSweepError


def tasks_of(points: Sequence[Point]) -> list[Task]:
    """Points that share a training together, in the order of the first of each."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.training_digest if point.training else _same_components(point), []).append(point)
    return [tuple(group) for group in groups.values()]


def _same_components(point: Point) -> str:
    """Networks that are analysed as they are share their components."""
    return f"{point.network} {point.data} {point.weights} {point.device} {point.skip_bad}"


def in_process(out: Path, tasks: Sequence[Task], progress: Progress) -> None:
    """One task after the other, in this process."""
    for task in tasks:
        rest = task
        while rest:
            code = 0
            try:
                run_points(out, rest, store=progress.store.path)
            except SystemExit as error:  # of a network, and no reason to end the others
                code = error.code if isinstance(error.code, int) else int(error.code is not None)
            rest = unfinished(out, rest, code, first=False)
        progress.tell(task)


def in_processes(out: Path, tasks: Sequence[Task], progress: Progress, slots: Sequence[Mapping[str, str]]) -> None:
    """A fresh process for each task, as many at a time as there are slots, each with its own environment."""
    waiting = deque((task, True) for task in tasks)
    free, running = deque(slots), dict[subprocess.Popen[bytes], tuple[Task, bool, Mapping[str, str]]]()
    try:
        while waiting or running:
            while waiting and free:
                task, first = waiting.popleft()
                slot = free.popleft()
                running[start(out, task, slot)] = task, first, slot
            for process in [one for one in running if one.poll() is not None]:
                task, first, slot = running.pop(process)
                free.append(slot)
                rest = unfinished(out, task, process.returncode, first=first)
                if rest:
                    waiting.append((rest, False))
                progress.tell(tuple(point for point in task if point not in rest))
            time.sleep(POLL)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def start(out: Path, task: Task, slot: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A process that computes a task, and ends when this one does."""
    folder = task[0].folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "qdv_gpu.studies.point", str(out), *(point.name for point in task)]
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env={**os.environ, **slot})


def unfinished(out: Path, task: Task, code: int, *, first: bool) -> Task:
    """Which points of a task whose process has ended are to be tried again; others that are missing have failed.

    Parameters
    ----------
    code : int
        The process's exit code; below 0 the signal that ended it.
    first : bool
        Whether the task was tried for the first time.
    """
    again, states = [], [state_of(out, point, None) for point in task]
    begun = any(state.kind != "waiting" for state in states)
    for point, state in zip(task, states, strict=True):
        folder, more = point.folder(out), state.about.get("attempt", 0) < ATTEMPTS
        if state.kind == "failed" and state.about.get("memory") and more:
            (folder / ERROR).unlink()
            again.append(point)
        elif (state.kind == "lost" and more) or (state.kind == "waiting" and (begun or first)):
            again.append(point)
        elif state.kind in ("lost", "waiting"):
            said = f"its process {_ending(code)}, twice"
            keep_error(folder, "Killed", said, seconds=state.seconds if state.kind == "lost" else 0.0, signal=-code)
    return tuple(again)


def _ending(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with code {code}"
    with suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"


def slots_of(workers: int | None, gpus: Sequence[str] | None) -> list[dict[str, str]]:
    """The environment of each process at a time: its GPU, and its share of the CPU's threads and of memory.

    GPUs are numbers among those of CUDA_VISIBLE_DEVICES where that is set; all are used by turns.

    Raises
    ------
    InputError
        If a GPU is not among them.

    >>> [slot["CUDA_VISIBLE_DEVICES"] for slot in slots_of(3, ["0", "1"])]
    ['0', '1', '0']
    """
    if gpus is not None and not all(gpus):
        raise InputError(f"--gpus must be numbers separated by commas, got {','.join(gpus)!r}")
    inherited = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    chosen = inherited if gpus is None else list(gpus)
    if gpus is not None and inherited:
        try:
            chosen = [inherited[int(one)] for one in gpus]
        except (ValueError, IndexError):
            raise InputError(f"--gpus must be numbers below {len(inherited)}, got {','.join(gpus)}") from None
    count = workers or len(chosen)
    share = str(max(1, threads() // count))
    own = [chosen[number % len(chosen)] if chosen else "" for number in range(count)]  # else all have the first
    return [
        {"OMP_NUM_THREADS": share, SHARED: f"{count},{own.count(gpu)}"} | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
        for gpu in own
    ]


def on_slurm(out: Path, tasks: Sequence[Task], progress: Progress, options: Mapping[str, Any]) -> None:
    """An array job of all tasks; those of an earlier call that are still in the queue are waited for.

    What has become of a task is read from its points' folders, and whether it is over from the queue alone: Slurm's
    accounting may not be there. Interrupted, the jobs go on. Those that a call was killed in sending, before it could
    write down which they are, are known by their name, cancelled, and sent anew.
    """
    known = out / "slurm" / "jobs.json"
    before: dict[str, str] = {}
    if known.is_file():
        try:
            before = read_sealed(known)
        except InputError as error:
            logger.warning("%s: no job of an earlier call is waited for", error)
    queue = queued()
    if queue is None:
        raise InputError("Slurm's queue gives no answer (squeue --me): what is sent already cannot be told")
    unknown = [job for job, name in queue.items() if name == job_name(out, options) and job not in before.values()]
    if unknown:
        logger.warning("%d jobs that an earlier call was stopped in sending are cancelled", len(unknown))
        subprocess.run(["scancel", *unknown], capture_output=True, check=False)
    jobs = {task: before[task[0].name] for task in tasks if before.get(task[0].name) in queue}
    fresh = [task for task in tasks if task not in jobs]
    if fresh:
        executor = slurm_executor(out, options)
        names = [[point.name for point in task] for task in fresh]
        try:
            submitted = executor.map_array(Computing(), [str(out)] * len(fresh), names)
        except Exception as error:  # as a program of Slurm's says it
            raise InputError(f"Slurm takes no job: {reason(error)}") from error
        jobs |= {task: job.job_id for task, job in zip(fresh, submitted, strict=True)}
        write_sealed(known, before | {point.name: job for task, job in jobs.items() for point in task})
        logger.info("%d tasks are in Slurm's queue as job %s", len(fresh), submitted[0].job_id.partition("_")[0])
    pause = SLURM_POLL
    while jobs:
        time.sleep(pause)
        pause = min(1.1 * pause, SLURM_POLL_MOST)
        found = queued()
        for task, job in list(jobs.items()):
            if found is not None and job not in found:
                del jobs[task]
            progress.tell(task)


class Computing:
    """Computes a task under Slurm; out of time or preempted, it is put into the queue again, up to three times."""

    def __call__(self, out: str, names: Sequence[str]) -> list[str]:
        return compute(out, names)

    def checkpoint(self, out: str, names: Sequence[str]) -> Any:
        """What submitit is to queue instead."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, out, names)


def job_name(out: Path, options: Mapping[str, Any]) -> str:
    """Of the jobs of the sweep in a folder, and of no other."""
    return f"{options.get('job_name', 'qdv-gpu')}-{sha256(os.fsencode(out)).hexdigest()[:8]}"


def queued() -> dict[str, str] | None:
    """This user's jobs in Slurm's queue, each task of an array by itself, and their names; None without an answer."""
    command = ["squeue", "--me", "-h", "-r", "-o", "%i %j"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except FileNotFoundError:
        raise InputError("--slurm needs Slurm's commands (sbatch, squeue), which are not here") from None
    if found.returncode:
        return None
    pairs = (line.partition(" ") for line in found.stdout.splitlines())
    return {job: name for job, _, name in pairs}


def slurm_executor(out: Path, options: Mapping[str, Any]) -> Any:
    """Of submitit, with options such as `time` (minutes), `gres`, `partition`, `array_parallelism`.

    Raises
    ------
    InputError
        If Slurm is not here.
    """
    from submitit import SlurmExecutor

    try:
        executor = SlurmExecutor(out / "slurm")
    except RuntimeError:
        raise InputError("--slurm needs Slurm's commands (sbatch, squeue, srun), which are not here") from None
    executor.update_parameters(**{**options, "job_name": job_name(out, options)})
    return executor


def slurm_script(out: Path, tasks: int, options: Mapping[str, Any]) -> str:
    """What sbatch gets, as text; nothing is written, and Slurm need not be there."""
    from submitit.slurm.slurm import _make_sbatch_string

    text: str = _make_sbatch_string(
        f"{sys.executable} -m submitit.core._submit {out / 'slurm'}", out / "slurm", map_count=tasks,
        **{**options, "job_name": job_name(out, options)},
    )  # fmt: skip
    return text


def read_slurm(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Slurm's options, of a TOML file or a dict.

    Raises
    ------
    InputError
        If the file cannot be read, or holds an option that there is not, or a value that it does not take.
    MissingPackageError
    """
    try:
        from submitit import SlurmExecutor
    except ImportError:
        raise MissingPackageError('--slurm needs submitit: pip install "qdv_gpu[cluster]"') from None
    options = dict(source) if isinstance(source, Mapping) else read_toml("--slurm", as_path("slurm", source))[0]
    allowed = SlurmExecutor._valid_parameters()
    for name in options:
        check_among("option of Slurm", name, allowed)
    if "array_parallelism" in options:
        check_count("array_parallelism", options["array_parallelism"])
    try:
        slurm_script(Path(), 1, options)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"Slurm's options are not as submitit takes them: {reason(error)}") from None
    return options


def on_dask(out: Path, tasks: Sequence[Task], progress: Progress, address: str) -> None:
    """A process for each task on the workers of a Dask scheduler that is running, which see the same files.

    Dask itself starts a task again whose worker is gone; what is finished is in the store and not computed twice.
    """
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise MissingPackageError('--dask needs distributed: pip install "qdv_gpu[cluster]"') from None
    try:
        client = Client(address, timeout=10, set_as_default=False)
    except Exception as error:  # it asserts something of addresses, too
        raise InputError(f"no Dask scheduler answers at {address} ({reason(error)})") from None
    with client:
        running: dict[Any, tuple[Task, bool]] = {}

        def submit(task: Task, *, first: bool) -> Any:
            names = [point.name for point in task]
            key = f"qdv-gpu-{task[0].digest}-{time.time_ns()}"
            future = client.submit(run_elsewhere, str(out), names, key=key, pure=False)
            running[future] = task, first
            return future

        done = as_completed([submit(task, first=True) for task in tasks], loop=client.loop)
        try:
            for future in done:
                task, first = running.pop(future)
                code = future.result() if future.status == "finished" else -signal.SIGKILL
                rest = unfinished(out, task, code, first=first)
                if rest:
                    done.add(submit(rest, first=False))
                progress.tell(tuple(point for point in task if point not in rest))
        finally:
            client.cancel(list(running))


def run_elsewhere(out: str, names: Sequence[str]) -> int:
    """On a Dask worker: a process for a task; its exit code."""
    task = tuple(point for point in read_points(Path(out)) if point.name in names)
    with start(Path(out), task, {}) as process:
        return process.wait()
