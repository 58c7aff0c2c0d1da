"""Writing results so that a killed or full-disk run never leaves half a file."""

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qdv_gpu.errors import InputError

TEMPORARY = ".qdv-gpu-tmp-"  # how the names of unfinished files begin


@contextlib.contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Say of an error of the file system, in one line, that `path` could not be written.

    Raises
    ------
    InputError
        In place of any OSError; the results that are complete stay where they are.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC or "No space left" in str(error):
            raise InputError(
                f"disk full while writing {path}: free some space and run the same command again"
            ) from None
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; flush it and rename it over `path` if the block succeeds.

    Raises
    ------
    InputError
        If the disk is full or the folder cannot be written; the temporary file is removed first.
    """
    path = Path(path)
    temporary = None
    with explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=TEMPORARY, suffix=path.suffix, dir=path.parent)
            os.close(handle)
            temporary = Path(name)
            yield temporary
            flush(temporary)
            temporary.chmod(0o666 & ~umask())
            temporary.replace(path)
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have the disk keep a file, or what a folder lists."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def umask() -> int:
    """The process's mask of permissions that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file that this package wrote.

    Raises
    ------
    InputError
        If the file is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error})") from None


def remove_leftovers(folder: str | Path) -> None:
    """Delete the temporary files that killed runs left below `folder`, which nothing else may be writing to."""
    for path in Path(folder).rglob(f"{TEMPORARY}*"):
        if path.is_file():
            path.unlink(missing_ok=True)
