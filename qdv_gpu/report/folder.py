"""A run folder: a view of stages in the store, all of whose files can be made again."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from qdv_gpu.errors import InputError, check_among, listed
from qdv_gpu.files import LEFTOVER, locked, remove_leftovers, replacing
from qdv_gpu.results.run import RUN, is_finished
from qdv_gpu.sealed import hash_of, read_sealed, write_sealed

logger = logging.getLogger(__name__)
FORMATS = ("png", "pdf", "svg")  # of figures
# What a folder of a command holds, how an error names that, and what tells folders apart whose run.json does not.
OWN = {
    "analyze": {RUN},
    "sweep": {RUN},
    "finetune": {RUN, "checkpoint.safetensors", "weights.safetensors"},
    "compare": {"comparison.json"},
}
NAMED = {"analyze": RUN, "sweep": RUN, "finetune": "checkpoint.safetensors", "compare": "comparison.json"}
MARKS = {"sweep": {"sweep.json"}, "finetune": {"finetune.json", "checkpoint.safetensors", "weights.safetensors"}}
DPI = 200  # of a figure in pixels, and of what a drawing holds as pixels


def read_formats(formats: str | Sequence[str]) -> tuple[str, ...]:
    """Formats of figures, of one text, separated by commas, or of several.

    Raises
    ------
    InputError
        If there is none, or one is unknown.

    >>> read_formats("png,svg")
    ('png', 'svg')
    """
    if isinstance(formats, str):
        formats = [part.strip() for part in formats.split(",")]
    chosen = listed("formats", formats, what=", ".join(FORMATS))
    for suffix in chosen or ("",):
        check_among("figure format", suffix, FORMATS)
    return tuple(chosen)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the path's suffix: without a date, and with fonts that can be edited in PDF."""
    dates: dict[str, dict[str, Any]] = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    with rc_context({"svg.hashsalt": "qdv_gpu", "pdf.fonttype": 42}):
        figure.savefig(path, dpi=DPI, metadata=dates.get(path.suffix))


def write_figure(path: Path, figure: Figure, formats: Sequence[str]) -> list[Path]:
    """Write a figure in each format, as `path` with the format's suffix added."""
    written = [path.with_name(f"{path.name}.{suffix}") for suffix in formats]
    for one in written:
        with replacing(one) as temporary:
            save_figure(figure, temporary)
    return written


@contextmanager
def only_writer(out: Path, check: Callable[[], object] = lambda: None, *, below: bool = True) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if need be, and remove what killed ones were writing there.

    Also what they were writing `below` it, unless told otherwise.

    Raises
    ------
    InputError
        If a living process is writing to it; as `check`, which is called before anything is removed.
    """
    absent = [folder for folder in (out, *out.parents) if not os.path.exists(folder)]  # pathlib's raises for long names
    with locked(out) as free:
        if not free:
            raise InputError(f"another run is writing to {out}: choose another --out, or wait")
        try:
            check()
            remove_leftovers(out, below=below)
            yield
        except BaseException:
            for folder in absent:  # unless something was written to it
                with suppress(OSError):
                    folder.rmdir()
            raise


class RunFolder:
    """The files of one run below `out`, which one process at a time writes.

    Its run.json lists them before they are written, and in the end with the hashes of those that are read again. A
    folder may show one run after another of one command: what an earlier one wrote and this one does not is removed at
    the end, and nothing else is touched.

    Parameters
    ----------
    out : str or Path
    kind : {"analyze", "compare", "finetune", "sweep"}
        The command. Folders of "compare" have no run.json: their files have always the same names.

    Attributes
    ----------
    written : dict of str to str or None
        Names of the files that are written, and hashes of those that are read again.
    """

    def __init__(self, out: str | Path, kind: str = "analyze") -> None:
        self.out, self.kind = Path(out), kind
        self.written: dict[str, str | None] = {}
        self._about: dict[str, Any] | None = None  # what run.json says, while the folder is locked

    def check(self) -> None:
        """Raise InputError if `out` holds something that is no run of the command, before anything is written."""
        if self.out.is_dir():
            names = {file.name for file in self.out.iterdir() if not LEFTOVER.fullmatch(file.name)}
            if names and not names & OWN[self.kind]:
                raise InputError(f"{self.out} is not empty and holds no {NAMED[self.kind]}: choose another --out")
            if names and self.kind != "compare" and (other := self._kind(names)) != self.kind:
                raise InputError(f"{self.out} is of qdv-gpu {other}: choose another --out")
        elif self.out.exists() or self.out.is_symlink():
            raise InputError(f"{self.out} is no folder: choose another --out")

    def _kind(self, names: Set[str]) -> str:
        """Of a run that is there, whose run.json may be damaged, or of a version that did not say so."""
        with suppress(InputError, OSError):
            return str(read_sealed(self.out / RUN, kind=str)["kind"])
        return next((kind for kind in ("sweep", "finetune") if names & MARKS[kind]), "analyze")

    @contextmanager
    def locked(self, about: dict[str, Any] | None) -> Iterator[None]:
        """Keep other processes out for as long as the block lasts; `about` says at once what the folder is for.

        Raises
        ------
        InputError
            If a run is writing to it, or it holds something else.
        """
        with only_writer(self.out, self.check):
            before = self._before()
            if about is None or is_finished(before):
                self._about = before
            else:
                self._write({**about, "finished": False, "files": before["files"]})
            try:
                yield
            finally:
                self._about = None

    def finish(self, about: dict[str, Any]) -> None:
        """Remove the files of an earlier run, and write run.json, with what else is to be said."""
        before = {} if self._about is None else self._about["files"]
        for name in before.keys() - self.written.keys():
            file = self.out / name
            with suppress(OSError):
                file.unlink()
                for folder in file.parents:
                    if folder != self.out:
                        folder.rmdir()  # while it is empty
        self._write({**about, "files": dict(sorted(self.written.items()))})

    def add(self) -> None:
        """Have the run.json of a finished run list what was written since too, so that a later run removes it."""
        assert self._about is not None
        self._write({**self._about, "files": dict(sorted({**self._about["files"], **self.written}.items()))})

    def claim(self, *names: str) -> None:
        """Have run.json list files before they are written, so that they are known as ours whatever happens."""
        self.written |= {name: None for name in names}
        if self._about is not None and self.kind != "compare" and not self._about["files"].keys() >= set(names):
            self._write({**self._about, "files": {**self._about["files"], **dict.fromkeys(names)}})

    def _write(self, about: dict[str, Any]) -> None:
        self._about = {"kind": self.kind, **about}
        write_sealed(self.out / RUN, self._about)

    def _before(self) -> dict[str, Any]:
        """What run.json says, with files that are all below `out`; of an unfinished run if it says nothing."""
        try:
            about = read_sealed(self.out / RUN)
            files = about.get("files", {})
            files = files if isinstance(files, Mapping) else dict.fromkeys(files)
            ours = {n: files[n] for n in files if not os.path.isabs(n) and ".." not in Path(n).parts}
            return {**about, "finished": is_finished(about), "files": ours}
        except FileNotFoundError:
            pass
        except (InputError, OSError, TypeError) as error:
            logger.warning("%s; it is written again", error)
        return {"finished": False, "files": {}}

    def text(self, name: str, text: str) -> Path:
        """Write a text file."""
        with self._replacing(name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return self.out / name

    def json(self, name: str, value: Mapping[str, Any]) -> Path:
        """Write a record."""
        self.claim(name)
        write_sealed(self.out / name, value)
        self.written[name] = hash_of(self.out / name)
        return self.out / name

    def bytes(self, name: str, contents: bytes) -> Path:
        """Write a file of bytes."""
        with self._replacing(name) as temporary:
            temporary.write_bytes(contents)
        return self.out / name

    def arrays(self, name: str, **arrays: np.ndarray) -> Path:
        """Write an .npz file."""
        with self._replacing(name) as temporary:
            np.savez(temporary, **arrays)  # type: ignore[arg-type]  # the stubs take its options for arrays
        return self.out / name

    def parquet(self, name: str, columns: Mapping[str, Sequence[Any]]) -> Path | None:
        """Write columns as Parquet; where pyarrow is not installed, say so and do not."""
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            logger.warning("%s is not written: pip install pyarrow", name)
            return None
        with self._replacing(name) as temporary, temporary.open("wb") as file:  # pyarrow's paths are of UTF-8
            pyarrow.parquet.write_table(pyarrow.table(dict(columns)), file)
        return self.out / name

    def figure(self, name: str, figure: Figure, formats: Sequence[str] = ("png",)) -> list[Path]:
        """Write a picture in each format, the same bytes for the same picture.

        Parameters
        ----------
        name : str
            Without the suffix, which is the format's name.
        figure : Figure
        formats : sequence of {"png", "pdf", "svg"}

        Raises
        ------
        InputError
            If a format is unknown; nothing is written then.

        Examples
        --------
        >>> [path.name for path in RunFolder(tmp_path).figure("empty", Figure((1, 1)), ["pdf", "svg"])]
        ['empty.pdf', 'empty.svg']
        """
        formats = read_formats(formats)
        self.claim(*(f"{name}.{suffix}" for suffix in formats))
        return write_figure(self.out / name, figure, formats)

    @contextmanager
    def _replacing(self, name: str) -> Iterator[Path]:
        """As `replacing`, of a file that is claimed, and whose hash is kept."""
        self.claim(name)
        with replacing(self.out / name) as temporary:
            yield temporary
            digest = hash_of(temporary)
        self.written[name] = digest
