"""Runs one command or piece of Python after the other, each in a fresh process that has imported everything already.

>>> with Warm() as warm:
...     done = warm.run("doctor", "--device", "tpu", cwd="/tmp")
>>> done.code, done.err
(2, "qdv-gpu: device must be auto, cpu, cuda or cuda:N, got 'tpu'\n")
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parents[1]
SMALL = ("--data", "digits", "--samples", "60", "--pca", "5", "--perplexity", "5", "--iterations", "20", "--seeds", "1",
         "--device", "cpu", "--layers", "pool")  # fmt: skip


@dataclass(frozen=True)
class Done:
    """What came of a case: its exit code (below 0 the signal that ended it), and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def refused(self):
        """Whether it ended with 2 and one line."""
        return self.code == 2 and self.err.startswith("qdv-gpu: ") and self.err.count("\n") == 1


class Warm:
    """A process that forks itself for each case; with one thread, which a fork cannot lose."""

    def __enter__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        assert self.server.stdout.readline() == "warm\n"
        return self

    def __exit__(self, *_):
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()

    def run(self, *arguments, cwd, code="", before="", stdout=None, timeout=120):
        """Run `qdv-gpu ARGUMENTS`, or else the Python text `code`, whose InputErrors end it as they end a command.

        Parameters
        ----------
        cwd : str or Path
        before : str
            Python that is run first.
        stdout : str or Path, optional
            A file or device that standard output goes to.
        """
        with tempfile.TemporaryDirectory() as folder:
            files = [str(stdout or f"{folder}/out"), f"{folder}/err"]
            asked = {"argv": [*map(str, arguments)], "code": code, "cwd": str(cwd), "before": before, "files": files,
                     "timeout": timeout}  # fmt: skip
            print(json.dumps(asked), file=self.server.stdin, flush=True)
            ended = json.loads(self.server.stdout.readline())
            out, err = ("" if stdout and i == 0 else Path(file).read_bytes() for i, file in enumerate(files))
        return Done(ended, *(text if isinstance(text, str) else text.decode(errors="replace") for text in (out, err)))


FAIL = """
import os, errno
def fail(name, number, code, below=""):
    real, count = getattr(os, name), [0]
    def failing(*given, **more):
        path = given[0] if given else ""
        path = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) and path > 2 else str(path)
        if below in path:
            count[0] += 1
            if count[0] >= number:
                raise OSError(code, os.strerror(code), path)
        return real(*given, **more)
    setattr(os, name, failing)
"""


def serve():
    """Answer requests, one a line, until there are none."""
    import tiny_networks  # noqa: F401
    from matplotlib import pyplot  # noqa: F401

    import qdv_gpu
    from qdv_gpu import __main__, cli, doctor  # noqa: F401

    for name in qdv_gpu.__all__:
        getattr(qdv_gpu, name)
    print("warm", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        process = os.fork()
        if not process:
            answer(asked)
        print(ended(process, asked["timeout"]), flush=True)


def answer(asked):
    """In a process of its own: run a case, and end."""
    code = 70
    try:
        os.setsid()
        for number, file in enumerate(asked["files"], start=1):
            handle = os.open(file, os.O_WRONLY | os.O_CREAT)
            os.dup2(handle, number)
            os.close(handle)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(asked["cwd"])
        sys.argv = ["qdv-gpu", *asked["argv"]]
        exec(asked["before"], {"__name__": "before"})
        code = of_text(asked["code"]) if asked["code"] else of_command()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def of_command():
    from qdv_gpu.__main__ import run

    try:
        run()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)


def of_text(code):
    from qdv_gpu.errors import InputError

    try:
        exec(code, {"__name__": "case"})
    except InputError as error:
        print(f"qdv-gpu: {error}", file=sys.stderr)
        return 2
    return 0


def ended(process, timeout):
    """The exit code of a process, which is killed with its own after so many seconds."""
    handle = os.pidfd_open(process)
    if not select.select([handle], [], [], timeout)[0]:
        os.killpg(process, signal.SIGKILL)
    os.close(handle)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    serve()
