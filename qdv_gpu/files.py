"""Files: written whole or not at all, locked, safely named; and sizes and times as people write them."""

import contextlib
import errno
import fcntl
import functools
import json
import logging
import math
import os
import re
import stat
import tempfile
import time
import tomllib
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from qdv_gpu.errors import InputError, short

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
TEMPORARY = ".qdv-gpu-tmp-"  # how the names of unfinished files begin
LEFTOVER = re.compile(re.escape(TEMPORARY) + r"[a-z0-9_]{8}(\.\w+)?")  # and what they are, whole
STALE = 24 * 3600  # seconds after which an unfinished file is nobody's, where there are no locks to tell
UNLOCKABLE = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EINVAL}

logger = logging.getLogger(__name__)


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
    temporary = handle = None
    with explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = _begun(path)
            yield temporary
            flush(temporary)
            temporary.chmod(0o666 & ~umask())
            temporary.replace(path)
        finally:
            if temporary is not None and handle is not None:
                temporary.unlink(missing_ok=True)
                os.close(handle)


def _begun(path: Path) -> tuple[int, Path]:
    """An unfinished file beside `path`, locked for as long as its handle is open: nobody takes it for a leftover."""
    while True:
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, suffix=path.suffix, dir=path.parent)
        _flock(handle, fcntl.LOCK_EX)
        if os.path.lexists(name):  # else it was taken for one before it was locked
            return handle, Path(name)
        os.close(handle)


@contextlib.contextmanager
def locked(folder: Path, *, shared: bool = False, wait: bool = False) -> Iterator[bool]:
    """Hold a lock on a folder, which is made if need be; it dies with the process. Yields whether it was to be had."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        free = _flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        if free is None:
            _say_unlockable()
        yield free is not False
    finally:
        os.close(handle)


@contextlib.contextmanager
def abandoned(path: Path) -> Iterator[bool]:
    """Whether nobody who lives holds the lock of an unfinished file or folder; none can take it in the block.

    Where the file system has no locks, what nobody has changed for a day is abandoned.
    """
    try:
        handle = os.open(path, (os.O_RDONLY if path.is_dir() else os.O_RDWR) | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        free = _flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield time.time() - os.fstat(handle).st_mtime > STALE if free is None else free
    finally:
        os.close(handle)


def _flock(handle: int, operation: int) -> bool | None:
    """Whether a lock was to be had; None where the file system has none."""
    try:
        fcntl.flock(handle, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in UNLOCKABLE:
            return None
        raise
    return True


@functools.cache
def _say_unlockable() -> None:
    logger.warning("the file system here has no locks: see to it that no two runs write to one folder at a time")


def safe_name(text: str) -> str:
    """A file name for a text, the text itself if it is letters, digits and "@+-_." and not hidden.

    What else there is becomes "_", and then eight digits of the text's hash keep different texts apart.

    >>> safe_name("layer4.1"), safe_name("../up")
    ('layer4.1', '_._up-8c722b8a')
    """
    safe = re.sub(r"^\.|[^A-Za-z0-9@+_.-]", "_", text)[:100]
    return safe if safe == text != "" else f"{safe}-{sha256(text.encode(errors='surrogateescape')).hexdigest()[:8]}"


def text_of(name: str) -> str:
    r"""A name as text that every encoding has: bytes that are no UTF-8 become "\xNN".

    >>> text_of(b"caf\xe9".decode(errors="surrogateescape"))
    'caf\\xe9'
    """
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def flush(path: Path) -> None:
    """Have the disk keep a file, or what a folder lists."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def umask() -> int:
    """The process's mask of permissions that new files do not get."""
    with contextlib.suppress(OSError, StopIteration):  # to ask the system is to change it, for all threads
        said = Path("/proc/self/status").read_text(errors="replace").splitlines()
        return int(next(line for line in said if line.startswith("Umask:")).split()[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def contents_of(path: str | Path) -> bytes:
    """The bytes of a regular file; OSError for any other, such as a pipe, which would be waited for."""
    check_regular(path)
    return Path(path).read_bytes()


def read_toml(name: str, path: Path) -> tuple[dict[str, Any], str]:
    """What a file in TOML holds, and its text; InputError, which calls it `name`, if it cannot be read as that."""
    try:
        text = contents_of(path).decode("utf-8-sig").replace("\r\n", "\n")
        return tomllib.loads(text), text
    except OSError as error:
        raise InputError(f"{name} {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{name} {path} is no text in UTF-8") from None
    except (ValueError, RecursionError) as error:  # also of an integer of thousands of digits
        raise InputError(f"{name} {path}: {error}") from None


def check_regular(path: str | Path) -> None:
    """OSError for what is neither a regular file nor a folder."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


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
        return json.loads(contents_of(path).decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error})") from None


def remove_leftovers(folder: str | Path, *, below: bool = True) -> None:
    """Delete the unfinished files that killed processes left in a folder, and unless told otherwise below it."""
    for top, folders, names in os.walk(folder):
        for name in filter(LEFTOVER.fullmatch, names):
            path = Path(top, name)
            with contextlib.suppress(OSError), abandoned(path) as free:
                if free and stat.S_ISREG(path.lstat().st_mode):
                    path.unlink()
        if not below:
            folders.clear()


def parse_bytes(text: str) -> int:
    """Bytes of "4GB", "512 MiB", "2e9".

    Raises
    ------
    InputError
        If it is not a positive number with or without a unit.
    """
    match = re.fullmatch(r"\s*([\d.]+(?:e\+?\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    try:
        number = float(match[1]) * UNITS[match[2].upper()] if match else 0
    except (ValueError, KeyError):
        number = 0
    if not 1 <= number < math.inf:
        raise InputError(f"memory must be a size like 4GB or 512MiB, got {short(text)}")
    return int(number)


def readable(size: float) -> str:
    """A number of bytes as people write it.

    >>> readable(1_284_505_600)
    '1.28 GB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def readable_time(seconds: float) -> str:
    """A duration as people say it.

    >>> readable_time(42), readable_time(754), readable_time(9000)
    ('42 s', '13 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
