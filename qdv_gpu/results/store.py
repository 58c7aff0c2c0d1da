"""A store of stages, each in a folder of its own that is named by what the stage depends on.

    STORE/components/alexnet-conv3-0f8936b4c5d6e7f8/stage.json      the key, what is said about it, hashes of the files
                                                    arrays.npz      numbers
    STORE/runs/<hash>                                               the path of a run folder that refers to stages
    STORE/tmp/                                                      what is being written
    STORE/locks/<digest>                                            held while somebody computes that stage

A stage is written to a temporary folder, flushed, and renamed; it is never changed. What is read is checked against its
hashes and its key: a stage that is damaged, or not what its name says, is computed again.
"""

import csv
import json
import logging
import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from qdv_gpu.errors import InputError, as_path
from qdv_gpu.files import abandoned, explained, flush, locked, read_json, remove_leftovers, umask
from qdv_gpu.sealed import SEAL, hash_of, read_sealed, seal_of, write_sealed

FORMAT = 1  # of a stage's folder
MANIFEST, ARRAYS = "stage.json", "arrays.npz"
VARIABLE = "QDV_GPU_STORE"  # names the store where no argument does
_LABEL = 60  # characters of a folder's name that are for people

# What reading a damaged file raises.
DAMAGES = (
    OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, NotImplementedError,
    RecursionError, SyntaxError, csv.Error, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Key:
    """What a stage depends on.

    Attributes
    ----------
    stage : str
        What kind of result it is: "components", "map", ...
    version : int
        Of the code that makes it: raised when the same key would give other results.
    parameters : dict
        JSON-able.
    parents : tuple of str
        Digests of the keys of the stages that it is made from.
    label : str
        For people: the same whenever the rest is the same.
    """

    stage: str
    version: int
    parameters: Mapping[str, Any]
    parents: tuple[str, ...] = ()
    label: str = field(default="", compare=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256, hexadecimal."""
        return sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()

    @property
    def content(self) -> dict[str, Any]:
        """What the digest is of, as JSON keeps it."""
        whole = {"stage": self.stage, "version": self.version, "parents": self.parents, "parameters": self.parameters}
        content: dict[str, Any] = json.loads(json.dumps(whole))
        return content

    @property
    def folder(self) -> str:
        """Its folder below the store."""
        label = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in self.label)[:_LABEL]
        return f"{self.stage}/{f'{label}-' if label else ''}{self.digest[:16]}"


@dataclass(frozen=True)
class Record:
    """A stage that was read: what was said `about` it (JSON), its `arrays`, and the `folder` of further files."""

    about: dict[str, Any]
    arrays: dict[str, np.ndarray]
    folder: Path


@dataclass(frozen=True)
class Entry:
    """A stage as `Store.entries` lists it: kind, digest (None if it cannot be read), folder and size in bytes."""

    stage: str
    digest: str | None
    folder: Path
    size: int


class Store:
    """Stages below a folder.

    Parameters
    ----------
    path : str or Path
        Made when the first stage is written.

    Examples
    --------
    >>> store = Store(tmp_path / "store")
    >>> key = Key("squares", 1, {"n": 3})
    >>> store.read(key) is None
    True
    >>> store.write(key, arrays={"x": np.arange(3) ** 2}, about={"unit": "m2"})
    >>> store.read(key).arrays["x"].tolist()
    [0, 1, 4]
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def beside(cls, out: Path, path: str | Path | None = None) -> "Store":
        """The store at `path`, or that of $QDV_GPU_STORE, or `.qdv-store` in the folder that holds `out`."""
        if path is not None and not (isinstance(path, str) and not path):
            return cls(as_path("store", path))
        named = os.path.expanduser(os.environ.get(VARIABLE, ""))  # which no shell does in a file of variables
        return cls(named or out.absolute().parent / ".qdv-store")

    def read(self, key: Key, check: Callable[[Record], object] | None = None) -> Record | None:
        """The stage of a key; None if it is absent, or was damaged and is hence removed, with a warning.

        `check` is to raise a ValueError, LookupError or TypeError for a stage that does not hold what it should.
        """
        folder = self.path / key.folder
        if not os.path.lexists(folder):
            return None
        try:
            about = _verified(folder, key)
            with np.load(folder / ARRAYS, allow_pickle=False) as file:
                record = Record(about, dict(file.items()), folder)
            if check is not None:
                check(record)
            return record
        except DAMAGES as error:
            logger.warning("%s is damaged (%s) and will be computed again", folder, " ".join(str(error).split()))
            _remove(folder)
            return None

    def find(
        self, stage: str, digest: str, check: Callable[[Record], object] | None = None, *, version: int | None = None
    ) -> tuple[Record | None, int | None]:
        """The stage of a key's digest, and the version of the code that made it; None for what is not there.

        `check` as for `read`. With `version` a stage that code of another version made is not read: a check would take
        it for damaged.
        """
        for manifest in self.path.glob(f"{stage}/*{digest[:16]}/{MANIFEST}"):
            with suppress(*DAMAGES):
                content = read_json(manifest)
                label = manifest.parent.name[: -len(digest[:16])].rstrip("-")
                key = Key(stage, content["version"], content["parameters"], tuple(content["parents"]), label)
                if key.digest == digest:
                    return self.read(key, check) if version in (None, key.version) else None, key.version
        return None, None

    def holds(self, digests: Iterable[str]) -> bool:
        """Whether the stages of these keys are all there, and whole."""
        places = {manifest.parent.name[-16:]: manifest.parent for manifest in self.path.glob(f"*/*/{MANIFEST}")}
        return all(digest[:16] in places and _is_whole(places[digest[:16]], digest) for digest in digests)

    def nearest(self, key: Key) -> dict[str, tuple[Any, Any]] | None:
        """Where a key differs from the most alike of its stage that is there: names, and the values of both.

        None if there is no such stage; "version" and "parents" are names like those of parameters.
        """
        found: list[dict[str, tuple[Any, Any]]] = []
        for manifest in sorted(self.path.glob(f"{key.stage}/*/{MANIFEST}")):
            with suppress(*DAMAGES):
                there, own = (
                    {**one["parameters"], "version": one["version"], "parents": one["parents"]}
                    for one in (read_json(manifest), key.content)
                )
                names = [name for name in {**there, **own} if there.get(name) != own.get(name)]
                found.append({name: (there.get(name), own.get(name)) for name in names})
        return min(found, key=len, default=None)

    def write(
        self,
        key: Key,
        *,
        arrays: Mapping[str, np.ndarray] | None = None,
        about: Mapping[str, Any] | None = None,
        files: Mapping[str, Path] | None = None,
    ) -> None:
        """Keep a stage; nothing happens if it is there already.

        Parameters
        ----------
        key : Key
        arrays : dict of array, optional
        about : dict, optional
            JSON-able: scalars, timings, versions.
        files : dict of str to Path, optional
            Files to link or copy, by the name that they get; they are not to be changed afterwards.

        Raises
        ------
        InputError
            If the disk is full or the store cannot be written.
        """
        final = self.path / key.folder
        with explained(final), self._temporary() as folder:
            with (folder / ARRAYS).open("wb") as file:
                np.savez(file, **(arrays or {}))  # type: ignore[arg-type]  # the stubs take its options for arrays
            for name, source in (files or {}).items():
                try:
                    os.link(source, folder / name)
                except OSError:  # on another disk
                    shutil.copyfile(source, folder / name)
            named = [ARRAYS, *(files or {})]
            for name in named:
                flush(folder / name)
            hashes = {name: hash_of(folder / name) for name in named}
            sealed = {"format": FORMAT, **key.content, "about": dict(about or {}), "files": hashes}
            write_sealed(folder / MANIFEST, sealed)
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                folder.rename(final)
            except OSError:
                if not (final / MANIFEST).is_file():  # else somebody has computed the same meanwhile
                    raise
            flush(final.parent)

    @contextmanager
    def used(self) -> Iterator[None]:
        """For as long as the block lasts, nobody removes stages (several processes may use a store)."""
        with locked(self.path, shared=True) as free:
            self._require(free)
            self._remove_stale()
            yield

    @contextmanager
    def computing(self, key: Key) -> Iterator[bool]:
        """For as long as the block lasts, nobody else computes the stage of a key. Yields whether it had to wait."""
        lock = self.path / "locks" / key.digest[:16]
        with locked(lock) as free:
            if free:
                yield False
                return
        logger.info("another process is computing %s: waiting for it", key.folder)
        with locked(lock, wait=True):
            yield True

    def check(self, run: Path) -> None:
        """Raise InputError if the store is no folder, or the run folder."""
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise InputError(f"the store must be a folder, and {self.path} is none: choose another --store")
        if os.path.realpath(self.path) == os.path.realpath(run):
            raise InputError(f"the store and --out are both {run}: choose another --store")

    def refer(self, run: Path) -> None:
        """Remember that the run folder `run` refers to stages here, which its run.json lists under "stages"."""
        path = str(run.absolute())
        file = self.path / "runs" / sha256(os.fsencode(path)).hexdigest()[:16]
        with suppress(*DAMAGES):
            if read_sealed(file) == {"run": path}:
                return
        write_sealed(file, {"run": path})

    def entries(self) -> list[Entry]:
        """All stages, sorted by folder."""
        found = []
        for manifest in sorted(self.path.glob(f"*/*/{MANIFEST}")):
            place = manifest.parent
            if place.parent == self._unfinished:
                continue
            try:
                content = read_json(manifest)
                digest: str | None = Key(**{name: content[name] for name in ("stage", "version", "parameters")},
                                         parents=tuple(content["parents"])).digest  # fmt: skip
            except DAMAGES:
                digest = None
            size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
            found.append(Entry(place.parent.name, digest, place, size))
        return found

    def unreferenced(self) -> list[Entry]:
        """Stages that no run folder refers to; run folders that are gone refer to nothing.

        Raises
        ------
        InputError
            If it cannot be told to which stages a run folder refers, as its run.json is damaged.
        """
        kept: set[str] = set()
        for file in (self.path / "runs").glob("[!.]*"):
            run = file
            try:
                run = _referring(file)
                kept.update(read_sealed(run / "run.json", stages=list)["stages"])
            except FileNotFoundError:
                logger.warning("run folder %s is gone: if it was moved, run its command again first", run)
            except (OSError, InputError, TypeError) as error:
                raise InputError(
                    f"it cannot be told which stages {run} needs ({error}): run its command again, or delete it"
                ) from None
        return [entry for entry in self.entries() if entry.digest not in kept]

    def remove(self, entries: Iterable[Entry]) -> None:
        """Delete stages.

        Raises
        ------
        InputError
            If a run is using the store.
        """
        with locked(self.path) as free:
            self._require(free)
            for entry in entries:
                _remove(entry.folder)
            shutil.rmtree(self.path / "locks", ignore_errors=True)
            self._remove_stale()

    def _require(self, free: bool) -> None:  # noqa: FBT001 - says what it is
        if not free:
            raise InputError(f"the store {self.path} is in use: try again when that is finished")

    @property
    def _unfinished(self) -> Path:
        """Holds temporary folders; it is locked while one is made, or looked at whether its process lives."""
        return self.path / "tmp"

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        """A folder for a stage, locked for as long as its process lives, and gone after the block."""
        with ExitStack() as stack:
            with locked(self._unfinished, wait=True):
                folder = Path(tempfile.mkdtemp(dir=self._unfinished))
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                stack.enter_context(locked(folder))
            folder.chmod(0o777 & ~umask())
            yield folder

    def _remove_stale(self) -> None:
        """Delete what killed processes left."""
        with locked(self._unfinished, wait=True):
            for folder in filter(Path.is_dir, self._unfinished.iterdir()):
                with abandoned(folder) as free:
                    if free:
                        shutil.rmtree(folder, ignore_errors=True)
        remove_leftovers(self.path / "runs")


def _referring(file: Path) -> Path:
    """The run folder that a file of the store names."""
    said = read_json(file)
    if isinstance(said, str):  # as older versions wrote it
        return Path(said)
    path = read_sealed(file, run=str)["run"]
    return Path(path)


def _is_whole(folder: Path, digest: str) -> bool:
    """Whether a folder holds the stage of the key of that digest."""
    with suppress(*DAMAGES):
        content = read_json(folder / MANIFEST)
        key = Key(content["stage"], content["version"], content["parameters"], tuple(content["parents"]))
        _verified(folder, key)
        return key.digest == digest
    return False


def _verified(folder: Path, key: Key) -> dict[str, Any]:
    """What is said about the stage in a folder; ValueError if it is not all there, or not of that key."""
    sealed = read_json(folder / MANIFEST)
    if not isinstance(sealed, dict):
        raise ValueError(f"{MANIFEST} holds no object")
    seal = sealed.pop(SEAL)
    if sealed["format"] != FORMAT:
        raise ValueError(f"it has format {sealed['format']}, not {FORMAT}")
    if seal != seal_of(sealed):
        raise ValueError(f"the hash of {MANIFEST} is another")
    if {name: sealed[name] for name in key.content} != key.content:
        raise ValueError("it is of another key")
    for name, expected in sealed["files"].items():
        if hash_of(folder / name) != expected:
            raise ValueError(f"the hash of {name} is another")
    about: dict[str, Any] = sealed["about"]
    return about


def _remove(folder: Path) -> None:
    """Delete a stage at once, as others see it."""
    with suppress(OSError):
        unfinished = folder.parents[1] / "tmp"
        unfinished.mkdir(exist_ok=True)
        gone = folder.rename(unfinished / f"{folder.name}-{os.getpid()}")
        gone.unlink() if gone.is_file() else shutil.rmtree(gone, ignore_errors=True)
