"""A run folder: a view of stages in the store, all of whose files can be made again."""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from qdv_gpu.errors import InputError, unknown
from qdv_gpu.files import TEMPORARY, locked, read_json, remove_leftovers, replacing, write_json, write_text
from qdv_gpu.results.run import RUN, embedding_file

logger = logging.getLogger(__name__)
FORMATS = ("png", "pdf", "svg")  # of figures
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
    chosen = tuple(formats) if isinstance(formats, Iterable) else (formats,)
    for suffix in chosen or ("",):
        if suffix not in FORMATS:
            raise unknown("figure format", str(suffix), FORMATS)
    return chosen


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


class RunFolder:
    """The files of one run below `out`, which one process at a time writes.

    A folder may show one run after another: what an earlier one wrote and this one does not is removed at the end,
    and nothing else is touched.

    Parameters
    ----------
    out : str or Path
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        self.written: list[str] = []

    def check(self) -> None:
        """Raise InputError if `out` holds something that is no run, before anything is written."""
        if self.out.is_dir():
            if not (self.out / RUN).is_file() and any(not f.name.startswith(TEMPORARY) for f in self.out.iterdir()):
                raise InputError(f"{self.out} is not empty and holds no {RUN}: choose another --out")
        elif self.out.exists() or self.out.is_symlink():
            raise InputError(f"{self.out} is no folder: choose another --out")

    @contextmanager
    def locked(self, about: dict[str, Any]) -> Iterator[None]:
        """Keep other processes out for as long as the block lasts; `about` says at once what the folder is for.

        Raises
        ------
        InputError
            If a run is writing to it.
        """
        with locked(self.out) as free:
            if not free:
                raise InputError(f"another run is writing to {self.out}: choose another --out, or wait")
            self.check()
            remove_leftovers(self.out)
            if not (self.out / RUN).is_file():
                write_json(self.out / RUN, {**about, "files": []})
            yield

    def finish(self, about: dict[str, Any]) -> None:
        """Write run.json, with what else is to be said, and remove the files of an earlier run."""
        before = self._files_before()
        write_json(self.out / RUN, {**about, "files": sorted(self.written)})
        for name in before - set(self.written):
            file = self.out / name
            with suppress(OSError):
                file.unlink()
                for folder in file.parents:
                    if folder != self.out:
                        folder.rmdir()  # while it is empty

    def add(self) -> None:
        """Have the run.json of a finished run list what was written since too, so that a later run removes it."""
        about = read_json(self.out / RUN)
        write_json(self.out / RUN, {**about, "files": sorted({*about.get("files", ()), *self.written})})

    def embedding(self, network: str, layer: str) -> str:
        """Name of the file with a layer's maps."""
        return embedding_file(network, layer)

    def text(self, name: str, text: str) -> Path:
        """Write a text file."""
        write_text(self._path(name), text)
        return self.out / name

    def json(self, name: str, value: Any) -> Path:
        """Write a JSON file."""
        write_json(self._path(name), value)
        return self.out / name

    def bytes(self, name: str, contents: bytes) -> Path:
        """Write a file of bytes."""
        with replacing(self._path(name)) as temporary:
            temporary.write_bytes(contents)
        return self.out / name

    def arrays(self, name: str, **arrays: np.ndarray) -> Path:
        """Write an .npz file."""
        with replacing(self._path(name)) as temporary:
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
        with replacing(self._path(name)) as temporary, temporary.open("wb") as file:  # pyarrow's paths are of UTF-8
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
        self.written += [f"{name}.{suffix}" for suffix in formats]
        return write_figure(self.out / name, figure, formats)

    def _path(self, name: str) -> Path:
        self.written.append(name)
        return self.out / name

    def _files_before(self) -> set[str]:
        """Files that the last run wrote, all of them below `out`."""
        with suppress(InputError, OSError, TypeError, AttributeError):
            names = read_json(self.out / RUN).get("files", [])
            return {name for name in names if not os.path.isabs(name) and ".." not in Path(name).parts}
        return set()
