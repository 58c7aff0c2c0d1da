"""Kill commands by SIGKILL at operations on files, and have the same commands go on: the same bytes, and no litter.

As a program, `python tests/hard/kill_points.py COMMAND=POINTS ...`, it prints a line of JSON for each kill. It
imports everything once, and forks a child for each run, so that a run costs what it computes. A point is an operation
on a file below the run's folder that opens it for writing, or makes, renames, links, flushes or removes it: the child
ends itself before the operation, and at every other flush it first cuts the file in half, as if it had been writing.
Where a command has fewer operations than points, the rest are flushes with the file cut to other lengths.
"""

import json
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent.parent
os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "NUMBA_THREADING_LAYER": "workqueue"}
sys.path[:0] = [str(HERE), str(HERE.parent)]

MADE = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
UNLIKE = ("log.txt", "started.json", ".pyc")  # what says when or how often something was done


def commands():
    """By name what is killed, which takes the folder that it may write to."""
    import tiny_sweep

    from qdv_gpu import Settings, analyze
    from qdv_gpu.studies.compare import compare
    from qdv_gpu.studies.deconv import picture
    from qdv_gpu.studies.export import export
    from qdv_gpu.studies.finetune import finetune
    from qdv_gpu.studies.report import write_report
    from qdv_gpu.studies.sweep import sweep

    net, other = "tiny_networks:cnn", "tiny_networks:other"
    settings = Settings(layers=("relu",), samples=60, pca=5, perplexity=5, iterations=20, seeds=2, k=(5, 3))
    table = tiny_sweep.changed(
        run={"finetune": {"samples": 60}, "analyze": {"samples": 60}, "iterations": 20, "perplexity": 5},
        grid={"network": [net, other], "lr": [1e-2], "runs": 1},
    )
    later = replace(settings, layers=("pool",), k=(3,))
    trained = {"epochs": 2, "batch_size": 50, "lr": 1e-2, "samples": 100, "device": "cpu"}
    return {
        "analyze": lambda top: analyze(net, "digits", top / "run", settings=settings, device="cpu"),
        "analyze again": lambda top: analyze(net, "digits", top / "run", settings=later, device="cpu"),
        "compare": lambda top: compare(net, other, "digits", top / "run", settings=settings, device="cpu"),
        "finetune": lambda top: finetune(net, "digits", top / "run", **trained),
        "deconv": lambda top: picture(
            net, top / "run", data="digits", layers=["relu@1", "pool@2"], top=2, device="cpu"
        ),
        "sweep": lambda top: sweep(table, top / "run"),
        "report": lambda top: write_report(top / "run"),
        "export": lambda top: export(top / "run", to="tensorboard"),
    }


BEFORE = dict.fromkeys(("analyze again", "report", "export"), "analyze")  # what a command is of


def imported():
    """Import what commands use, and have numbers that differ from run to run be the same."""
    import sklearn.datasets
    import torch

    torch.set_num_threads(1)
    import numba  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import safetensors.torch  # noqa: F401
    import tiny_networks  # noqa: F401

    import qdv_gpu.cli
    import qdv_gpu.kernels.cpu  # noqa: F401
    from qdv_gpu.report import folder

    commands()
    folder.DPI = 30
    sklearn.datasets.load_digits()


def steady():
    """In a child: a clock that hardly goes on, in steps without rounding, and no memory in use."""
    import itertools
    import time

    from qdv_gpu import machine

    ticks = itertools.count()
    time.perf_counter = lambda: next(ticks) * 2.0**-30
    for module in list(sys.modules.values()):
        if getattr(module, "measured", None) is machine.measured and module is not machine:
            module.measured = still
    machine.measured = still


class still:
    """As `machine.measured`, without numbers of its own."""

    def __init__(self, _device):
        pass

    def __enter__(self):
        return {"seconds": 0.0, "peak_bytes": 0.0}

    def __exit__(self, *_):
        return None


class Operations:
    """Counts operations on files below a folder, and at one of them ends this process."""

    def __init__(self, top, last=None, share=None):
        self.top, self.last, self.share, self.count, self.names = str(top), last, share, 0, []
        self.fsync = os.fsync
        os.fsync = self.flush
        sys.addaudithook(self.audit)

    def audit(self, event, arguments):
        if event == "open":
            path, mode, flags = arguments
            if not (flags & WRITING if isinstance(flags, int) else set("wax+") & set(mode or "")):
                return
        elif event in MADE:
            path = arguments[0]
        else:
            return
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(self.top):
            self.operation(f"{event} {os.path.relpath(path, self.top)}")

    def flush(self, handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        if path.startswith(self.top):
            self.operation(f"fsync {os.path.relpath(path, self.top)}", path)
        self.fsync(handle)

    def operation(self, name, written=None):
        self.count += 1
        self.names.append(name)
        if self.count == self.last:
            share = self.share or (0.5 if self.count % 2 else 1)
            if written is not None and os.path.isfile(written):
                os.truncate(written, int(os.path.getsize(written) * share))
            os.kill(os.getpid(), signal.SIGKILL)


def child(function):
    """Run a function in a fork of this process; its exit status, and what it returned or how it failed."""
    read, write = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(read)
            steady()
            said = function()
            code = 0
        except BaseException:
            said = traceback.format_exc()
        with os.fdopen(write, "w") as stream:
            json.dump(said, stream)
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as stream:
        text = stream.read()
    _, status = os.waitpid(pid, 0)
    return status, json.loads(text) if text else None


def run(action, top, last=None, share=None):
    """A command in a child; its status, and the operations on files that there were."""

    def act():
        operations = Operations(top, last, share)
        action(top)
        return operations.names

    return child(act)


def found(top):
    """What is below a folder: names of all files, and their bytes with the folder's name taken out."""
    contents = {}
    for file in sorted(top.rglob("*")):
        name = str(file.relative_to(top))
        if file.is_dir():
            continue
        data = file.read_bytes()
        if name.endswith((".json", ".html")) or "/runs/" in name:
            data = re.sub(re.escape(str(top.parent)).encode() + rb"/[^/\"]+", b"TOP", data)
            data = re.sub(rb'"seal": "\w+"', b"", data)
        if "/runs/" in name:  # of a name that is a hash of the folder's
            name = f"runs/{data.decode()}"
        contents[name] = b"" if name.endswith(UNLIKE) else data
    return contents


def difference(expected, top):
    """What is wrong with a folder, in words; "" if nothing is."""
    own = found(top)
    litter = [str(path.relative_to(top)) for path in top.rglob(".qdv-gpu-tmp-*")]
    litter += [str(path.relative_to(top)) for path in (top / ".qdv-store").glob("tmp/*")]
    if litter:
        return f"litter: {litter}"
    if own.keys() != expected.keys():
        return f"other files: {sorted(own.keys() ^ expected.keys())}"
    unlike = [name for name in own if own[name] != expected[name]]
    return f"other bytes: {unlike}" if unlike else ""


def spread(names, points):
    """So many operations, by their number from 1, evenly spread; and for more than there are shares of what is flushed.

    >>> spread(["open", "fsync"], 4)
    [(1, None), (2, None), (2, 0.333), (2, 0.667)]
    """
    count = min(points, len(names))
    chosen = sorted({round(1 + i * (len(names) - 1) / max(1, count - 1)) for i in range(count)})
    flushes = [number for number, name in enumerate(names, start=1) if name.startswith("fsync")]
    more = points - len(names)
    cut = [(flushes[i % len(flushes)], round((i + 1) / (more + 1), 3)) for i in range(more)] if flushes else []
    return [(number, None) for number in chosen] + cut


def killed(name, action, work, points):
    """Kill a command at points; yields what became of each."""
    whole, made = work / name, work / f"{name}-before"
    made.mkdir()
    if name in BEFORE:
        status, said = run(commands()[BEFORE[name]], made)
        assert status == 0, said
    shutil.copytree(made, whole)
    status, names = run(action, whole)
    assert status == 0, names
    expected = found(whole)
    for point, share in spread(names, points):
        top = work / f"{name}-{point}"
        shutil.copytree(made, top)
        status, said = run(action, top, point, share)
        about = {"command": name, "point": point, "share": share, "of": len(names), "at": names[point - 1]}
        if status != signal.SIGKILL:
            yield {**about, "wrong": f"it was not killed: {status} {said}"}
            continue
        status, said = run(action, top)
        yield {**about, "wrong": f"it does not go on: {said}" if status else difference(expected, top)}
        shutil.rmtree(top)


def main():
    imported()
    for text in sys.argv[1:]:
        name, _, points = text.partition("=")
        with tempfile.TemporaryDirectory() as work:
            for one in killed(name, commands()[name], Path(work).resolve(), int(points)):
                print(json.dumps(one), flush=True)


if __name__ == "__main__":
    main()
