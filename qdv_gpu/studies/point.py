"""One point of a sweep: what is computed, where, and how far it has come.

As a program, `python -m qdv_gpu.studies.point SWEEP NAME...`, it computes points in a process of their own, which ends
when the process that started it does.
"""

import faulthandler
import json
import logging
import math
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from qdv_gpu.errors import InputError
from qdv_gpu.files import locked, safe_name
from qdv_gpu.networks.spec import Spec
from qdv_gpu.results.run import RUN, is_whole
from qdv_gpu.results.stages import VERSIONS
from qdv_gpu.results.store import DAMAGES, Store
from qdv_gpu.sealed import read_sealed, write_sealed
from qdv_gpu.studies.settings import Settings, Training

SWEEP, RESULT, ERROR, STARTED, LOG = "sweep.json", "result.json", "error.json", "started.json", "log.txt"
_NUMBER = int | float
_HOLDS: dict[str, dict[str, Any]] = {  # what a file says at least, and of which type
    RESULT: {"accuracy": _NUMBER | None, "gmac": _NUMBER | None, "seconds": dict, "stages": list, "versions": dict},
    ERROR: {"message": str, "seconds": _NUMBER},
    STARTED: {"time": _NUMBER, "attempt": int},
    RUN: {"stages": list},  # of one that came to its end
}
LABEL = 60  # characters of a folder's name that are for people
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """One setting of everything, and the number of a run.

    Attributes
    ----------
    label : str
        What tells it from the others, its run aside.
    varied : dict
        The same as settings and values.
    network, data, weights, device : str
        As for `finetune` and `analyze`.
    skip_bad : bool
    run : int
        From 1; each starts from a seed of its own.
    training : Training or None
        None where the network is analysed as it is.
    settings : Settings
        Of the analysis.
    """

    label: str
    varied: Mapping[str, Any] = field(compare=False)
    network: str
    data: str
    weights: str
    device: str
    skip_bad: bool
    run: int
    training: Training | None
    settings: Settings

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> "Point":
        """From what `said` made of one."""
        training = None if said["training"] is None else Training(**said["training"])
        return cls(**{**said, "training": training, "settings": Settings(**said["settings"])})

    def said(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return asdict(self)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all but what it is called, hexadecimal."""
        return _digest(self.said())

    @cached_property
    def candidate(self) -> str:
        """Digest of what its runs share."""
        training = self.training and replace(self.training, seed=0)
        return _digest(replace(self, training=training, run=0).said())

    @cached_property
    def training_digest(self) -> str:
        """Digest of what its training shares with one of more epochs, which goes on from it."""
        if self.training is None:
            return self.digest
        return _digest(
            {**replace(self, training=replace(self.training, epochs=1)).said(), "label": "", "settings": None}
        )

    @cached_property
    def name(self) -> str:
        """Of its folder."""
        return f"{safe_name(self.label)[:LABEL]}-run{self.run}-{self.digest[:8]}"

    def trained(self, weights: Path) -> str:
        """The network's name, with weights of a training instead of those that it starts from."""
        return f"{Spec.parse(self.network).built}={weights}"

    def folder(self, out: Path) -> Path:
        """Where it keeps its analysis and log."""
        return out / "points" / self.name

    def training_folder(self, out: Path) -> Path:
        """Where its training is kept, as other points share it."""
        return out / "training" / f"{safe_name(self.network)[:LABEL]}-{self.training_digest[:8]}"


def _digest(said: Mapping[str, Any]) -> str:
    content = {name: value for name, value in said.items() if name not in ("label", "varied")}
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class State:
    """How far a point has come.

    Attributes
    ----------
    kind : {"done", "running", "failed", "lost", "waiting"}
        Lost is one that was started, and whose process ended without a word.
    seconds : float
        It took, or since it was started; NaN if it was not.
    about : dict
        result.json of one that is done, error.json of one that failed, else started.json; a message that says why
        where there is a result that does not count.
    """

    kind: str
    seconds: float
    about: Mapping[str, Any]


def state_of(out: Path, point: Point, store: Store | None) -> State:
    """The state of a point of the sweep in `out`, from what is there and from nothing else.

    Where a store is given, a point is done only if all of its stages are whole in it.
    """
    folder = point.folder(out)
    started = _read(folder / STARTED)
    since = time.time() - started["time"] if started else math.nan
    if folder.is_dir():
        with locked(folder, shared=True) as free:
            if not free:
                return State("running", since, started)
    result, error = _result(folder), _read(folder / ERROR)
    if result and (store is None or _is_done(folder, result, store)):
        return State("done", sum(result["seconds"].values()), result)
    if error and not result:
        return State("failed", error["seconds"], error)
    if started and not result:
        return State("lost", since, started)
    return State("waiting", math.nan, {"message": _why_not(result)} if result else {})


def _why_not(result: Mapping[str, Any]) -> str:
    """Why a result that is there does not count."""
    if result["versions"] != VERSIONS:
        return "what computed it was another version of qdv_gpu"
    return "its analysis is damaged, or stages of it have gone from the store"


def _is_done(folder: Path, result: Mapping[str, Any], store: Store) -> bool:
    """Whether all stages of a result are whole in the store, made by this version of their code, and so its tables."""
    if not result or result["versions"] != VERSIONS:
        return False
    return is_whole(folder / "analysis") and store.holds(result["stages"])


def damaged_files(folder: Path) -> list[Path]:
    """Files of a point that are there and do not say what this version writes, or not what was written."""
    found = [folder / name for name in (RESULT, ERROR, STARTED)]
    found = [file for file in found if file.is_file() and not _read(file)]
    if found or not _result(folder) or is_whole(folder / "analysis"):  # of a damaged run.json the analysis speaks
        return found
    return [folder / "analysis"]


def _result(folder: Path) -> dict[str, Any]:
    """A point's result.json; nothing without an analysis that is finished."""
    return _read(folder / RESULT) if _read(folder / "analysis" / RUN) else {}


def _read(file: Path) -> dict[str, Any]:
    """What a file says; nothing if it is not there, not whole, or does not say what this version writes."""
    with suppress(OSError, InputError):
        found = read_sealed(file)
        if isinstance(found, dict) and all(
            n in found and isinstance(found[n], t) for n, t in _HOLDS[file.name].items()
        ):
            times = found["seconds"].values() if isinstance(found.get("seconds"), dict) else ()
            return found if all(isinstance(one, _NUMBER) for one in times) else {}
    return {}


def run_points(out: Path, points: Sequence[Point], *, store: Path) -> list[str]:
    """Train and analyse points that share a training, in order of their epochs; the names of those that failed.

    Points that are done are left alone. What goes wrong with one is in its error.json, and the others go on.

    Raises
    ------
    InputError
        If a GPU has failed: it answers this process with errors from then on, and the other points were blamed for it.
    """
    failed = []
    ordered = sorted(points, key=lambda point: point.training.epochs if point.training else 0)
    for number, point in enumerate(ordered):
        later = [one.settings for one in ordered[number + 1 :] if _but_perplexity(one) == _but_perplexity(point)]
        try:
            _run_point(out, point, store=store, also=later)
        except Exception as error:
            logger.warning("%s failed: %s (%s)", point.name, _one_line(error), point.folder(out) / LOG)
            failed.append(point.name)
            if type(error).__name__ == "AcceleratorError":
                raise InputError(
                    f"the GPU failed ({_one_line(error)}): run the same command again, which goes on in a new process"
                ) from error
    return failed


def _but_perplexity(point: Point) -> str:
    return replace(point, settings=replace(point.settings, perplexity=1.0)).digest


def _run_point(out: Path, point: Point, *, store: Path, also: Sequence[Settings]) -> None:
    folder = point.folder(out)
    with locked(folder, wait=True), _logged(folder / LOG):
        if _is_done(folder, _result(folder), Store(store)):
            return
        for name in (ERROR, RESULT):
            (folder / name).unlink(missing_ok=True)
        begun, attempt = time.time(), _read(folder / STARTED).get("attempt", 0) + 1
        devices = os.environ.get("CUDA_VISIBLE_DEVICES")
        about = {"time": begun, "host": platform.node(), "pid": os.getpid(), "attempt": attempt, "devices": devices}
        write_sealed(folder / STARTED, about)
        try:
            result = _computed(out, point, store, also)
            _tidy(out, point)
            write_sealed(folder / RESULT, result)
        except Exception as error:
            lines = traceback.format_exc().splitlines()
            with (folder / LOG).open("a", encoding="utf-8") as log:
                print(*lines, sep="\n", file=log)
            ended = {"signal": None} if type(error).__name__ == "UncompletedJobError" else {}  # Slurm took it away
            keep_error(folder, type(error).__name__, _one_line(error), seconds=time.time() - begun, traceback=lines,
                       memory=_is_memory(error), attempt=attempt, **ended)  # fmt: skip
            raise


def _tidy(out: Path, point: Point) -> None:
    """Delete the checkpoint of a training, which is three times its weights, unless a point of more epochs needs it."""
    from qdv_gpu.studies.finetune import CHECKPOINT

    if point.training is not None:
        same = [one.training for one in read_points(out) if one.training_digest == point.training_digest]
        if not any(one is not None and one.epochs > point.training.epochs for one in same):
            (point.training_folder(out) / CHECKPOINT).unlink(missing_ok=True)


def keep_error(folder: Path, kind: str, message: str, *, seconds: float, **more: Any) -> None:
    """Write what a point failed of to its error.json."""
    write_sealed(folder / ERROR, {"type": kind, "message": message, "seconds": round(seconds, 3), **more})


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) and text else f"{type(error).__name__}: {text}".rstrip(": ")


def _is_memory(error: Exception) -> bool:
    """Whether memory ran out, of the machine or of its GPU, which another time it may not."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in str(error)


def _computed(out: Path, point: Point, store: Path, also: Sequence[Settings]) -> dict[str, Any]:
    """Compute a point; what its result.json says."""
    from qdv_gpu.networks.load import file_digest
    from qdv_gpu.studies.analyze import analyze
    from qdv_gpu.studies.finetune import finetune

    seconds, stages, accuracy, source = dict[str, float](), list[str](), None, point.network
    checkpoint = file_digest(point.network, point.weights)
    options: dict[str, Any] = {
        "weights": point.weights,
        "device": point.device,
        "store": store,
        "skip_bad": point.skip_bad,
    }
    if point.training is not None:
        begun, folder = time.perf_counter(), point.training_folder(out)
        trained = finetune(point.network, point.data, folder, settings=point.training, **options)
        accuracy, source = trained["test_accuracy"], point.trained(folder)
        stages += read_sealed(folder / RUN)["stages"]
        seconds["training"] = round(time.perf_counter() - begun, 3)
    begun, folder = time.perf_counter(), point.folder(out) / "analysis"
    analyze({point.label: source}, point.data, folder, settings=point.settings, also=also, report=False, **options)
    stages += read_sealed(folder / RUN)["stages"]
    seconds["analysis"] = round(time.perf_counter() - begun, 3)
    return {"accuracy": accuracy, "gmac": _gmac(source, point), "seconds": seconds, "stages": stages,
            "checkpoint": checkpoint, "versions": VERSIONS}  # fmt: skip


def _gmac(source: str, point: Point) -> float | None:
    """Multiplications and additions of one image, in 10^9 pairs; None if they are not known without numbers."""
    from qdv_gpu.networks.blank import on_meta
    from qdv_gpu.networks.fields import pass_of
    from qdv_gpu.networks.load import load_network

    network = load_network(source, weights=point.weights, image_size=point.settings.image_size, device="cpu")
    with suppress(InputError):
        return pass_of(network.at_size(point.settings.image_size), on_meta(network.module), ()).operations / 1e9
    return None


@contextmanager
def _logged(file: Path) -> Iterator[None]:
    """What the library says goes to a file, and of it only warnings to where it went before."""
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    library = logging.getLogger("qdv_gpu")
    others = [(one, one.level) for one in library.handlers]
    for one, _ in others:
        one.setLevel(logging.WARNING)
    library.addHandler(handler)
    try:
        yield
    finally:
        library.removeHandler(handler)
        handler.close()
        for one, level in others:
            one.setLevel(level)


@dataclass(frozen=True)
class Kept:
    """What sweep.json says: the file as a dict, points as they were asked for and of all rungs, store and folder."""

    table: dict[str, Any]
    asked: list[Point]
    points: list[Point]
    store: Path
    cwd: str

    @classmethod
    def read(cls, out: Path) -> "Kept":
        """Of the sweep in `out`; InputError if it is not whole, FileNotFoundError if there is none."""
        try:
            said = read_sealed(out / SWEEP)
            asked, points = ([Point.of(one) for one in said[name]] for name in ("asked", "points"))
            texts = [said["cwd"], said["store"]]
            texts += [text for one in (*asked, *points) for text in (one.label, one.network, one.data, one.weights)]
            if isinstance(said["table"], dict) and all(isinstance(text, str) for text in texts):
                return cls(said["table"], asked, points, Path(said["store"]), said["cwd"])
        except FileNotFoundError:
            raise
        except DAMAGES:
            pass
        raise InputError(
            f"{out / SWEEP} is damaged, or of another version: delete it, or choose another --out; what the store has "
            "is not computed again"
        )


def read_points(out: Path) -> list[Point]:
    """All points of the sweep in `out`."""
    return Kept.read(out).points


def _end_with_parent() -> None:
    """End this process when the one that started it, and holds the other end of standard input, is gone."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def compute(out: str, names: Sequence[str]) -> list[str]:
    """In a process of its own: compute the points of a sweep that are named; the names of those that failed."""
    sweep = Kept.read(Path(out))
    os.chdir(sweep.cwd)  # where names of files and factories mean what they meant
    logging.getLogger("qdv_gpu").setLevel(logging.INFO)
    points = [point for point in sweep.points if point.name in names]
    return run_points(Path(out), points, store=sweep.store)


def main() -> int:
    """Compute the points that the command line names: 0 if all are done, 1 if one failed."""
    out, *names = sys.argv[1:]
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one, which ends it
    _end_with_parent()
    return int(bool(compute(out, names)))


if __name__ == "__main__":
    sys.exit(main())
