"""What the user got wrong, as opposed to what the program got wrong.

The command line prints these as one line and exits with code 2; any other exception is a bug and keeps its
traceback.
"""

import difflib
import errno
import numbers
import os
import sysconfig
import traceback
from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Any


class InputError(ValueError):
    """An argument, file or setting breaks a rule. The message states the rule, the value and what is allowed."""


class MissingPackageError(InputError, ImportError):
    """An optional package is needed and not installed. The message holds the pip command."""


def place(error: BaseException) -> str:
    """The innermost line that an error passed in a file that is no library's, as "models.py:12"; "" if in none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_own(frame.filename):
            return f"{frame.filename}:{frame.lineno}"
    return ""


def reason(error: BaseException) -> str:
    """An error in one line: its type, what it says, and its `place`."""
    try:
        said = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    except Exception:  # its own __str__ fails
        said = type(error).__name__
    where = place(error)
    return f"{said} ({where})" if where else said


def is_own(file: str) -> bool:
    """Whether a line of code is in a file of the user's, and of no library."""
    library = file.startswith((*(f"{folder}/" for folder in LIBRARIES), "<frozen", "<eval"))
    return not library and not {"site-packages", "dist-packages"} & set(Path(file).parts)


def in_line(error: BaseException) -> str:
    """What a user can mend, in words: his input, his code, what the machine did not give; "" for a bug of ours."""
    if isinstance(error, InputError):
        return str(error)
    return (
        of_machine(error) or of_import(error) or (f"code that was run failed: {reason(error)}" if place(error) else "")
    )


def of_machine(error: BaseException) -> str:
    """What the machine did not give, in words: memory, threads, files; "" for any other error."""
    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in text:
        return f"out of memory ({text or 'none is left'}): lower --image-size or --samples"
    if any(part in text for part in LIMITS):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return ""


def of_import(error: BaseException) -> str:
    """What a library raised as we imported it, as an environment variable or another package may have it do; or ""."""
    frames = traceback.extract_tb(error.__traceback__)
    own = max((number for number, frame in enumerate(frames) if frame.filename.startswith(f"{OURS}/")), default=None)
    if own is None:
        return ""
    absent = isinstance(error, ImportError) and not (error.name or "qdv_gpu").startswith("qdv_gpu")
    if absent if own + 1 == len(frames) else frames[own + 1].name == "<module>":  # a file that is being imported
        return f"a library that is needed cannot be imported ({frames[own].line}): {reason(error)}"
    return ""


OURS = str(Path(__file__).parent)
LIBRARIES = (OURS, *{sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
# In what libraries say of what the machine did not give.
LIMITS = ("DataLoader worker", "shared memory", "start new thread", "failed to map segment", "static TLS block")
SIDE = 1 << 20  # pixels of an image's side at most
LARGEST = 1e30  # number that is computed with in float32
SEED = (1 << 32) - 1  # the largest seed of numpy's, and small enough to be counted on from


def short(value: Any) -> str:
    """The beginning of a value as Python writes it, in one line."""
    try:
        return " ".join(repr(value).split())[:60]
    except Exception:  # as of an integer of thousands of digits, or of somebody's own class
        return f"one of type {type(value).__name__}"


def is_real(value: Any) -> bool:
    """Whether a value is a real number, which True and False are to Python."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_whole(name: str, value: Any) -> int:
    """A whole number as Python's own, of any sign; InputError for anything else."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    raise InputError(f"{name} must be an integer, got {short(value)}")


def check_side(size: Any, name: str = "image size") -> int:
    """A side of an image in pixels; InputError unless it is one."""
    return check_most(name, check_count(name, size), SIDE)


def check_most(name: str, value: Any, most: float) -> Any:
    """A number; InputError if it is larger than `most`."""
    if value > most:
        raise InputError(f"{name} must be at most {most:,}, got {short(value)}")
    return value


def check_count(name: str, value: Any, *, least: int = 1, most: int = 2**63 - 1) -> int:
    """A whole number as Python's own; InputError unless it is one from `least` to `most`.

    >>> check_count("k", 5)
    5
    """
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and least <= int(value) <= most:
        return int(value)
    allowed = f"at least {least}" if most == 2**63 - 1 else f"within {least} and {most}"
    raise InputError(f"{name} must be an integer {'of ' * (most == 2**63 - 1)}{allowed}, got {short(value)}")


def check_samples(value: Any) -> int | str:
    """A number of images, which may be written as a text, or "all"; InputError for anything else.

    >>> check_samples("1000"), check_samples("all")
    (1000, 'all')
    """
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and value == "all":
        return value
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    raise InputError(f"samples must be a number or all, got {short(value)}")


def as_path(name: str, value: Any) -> Path:
    """A path; InputError unless it is text or a path, of names that the file system takes."""
    try:
        os.lstat(value if isinstance(value, str | Path) and value != "" else "\0")
    except ValueError:  # no type, or no text, of a path
        raise InputError(f"{name} must be a path, got {short(value)}") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # of which pathlib makes a traceback
            raise InputError(f"{name} must be a path of shorter names, got {short(value)}") from None
    return Path(value)


def check_among(name: str, value: Any, allowed: Iterable[str], *, alike: float = 0.5) -> str:
    """A text; InputError unless it is one of those that are allowed.

    >>> check_among("mode", "guided", ("guided", "gradient"))
    'guided'
    """
    if not isinstance(value, str) or value not in allowed:
        raise unknown(name, value, allowed, alike=alike)
    return value


def check_flag(name: str, value: Any) -> bool:
    """True or False as Python's own; InputError for anything else."""
    if type(value).__name__ in ("bool", "bool_") and value in (True, False):
        return bool(value)
    raise InputError(f"{name} must be true or false, got {short(value)}")


def check_text(name: str, value: Any) -> str:
    """A text; InputError for anything else."""
    if isinstance(value, str):
        return value
    raise InputError(f"{name} must be a text, got {short(value)}")


def check_mapping(name: str, value: Any) -> dict[str, Any]:
    """A mapping of texts as a dict; InputError for anything else."""
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return dict(value)
    raise InputError(f"{name} must be a dict of texts to values, got {short(value)}")


def listed(name: str, values: Any, kind: type | UnionType = object, what: str = "values") -> list[Any]:
    """What something holds as a list; InputError unless it is iterable, no text itself, and holds things of this type.

    >>> listed("formats", ("png", "pdf"), str, "texts")
    ['png', 'pdf']
    """
    if isinstance(values, Iterable) and not isinstance(values, str | bytes):
        with suppress(Exception):  # of somebody's own class, or an array without dimensions
            found = list(values)
            if all(isinstance(value, kind) for value in found):
                return found
    raise InputError(f"{name} must be a list of {what}, got {short(values)}")


def ordered(name: str, values: Any, what: str) -> list[Any]:
    """As `listed`, of things whose order matters; InputError also for a set or a mapping.

    >>> ordered("classes", ("cat", "dog"), "names")
    ['cat', 'dog']
    """
    if isinstance(values, Set | Mapping):
        raise InputError(f"{name} must be a list of {what}, in order, got {short(values)}")
    return listed(name, values, what=what)


def unknown(kind: str, value: Any, allowed: Iterable[str], *, alike: float = 0.5) -> InputError:
    """Error for a name that is not among `allowed`: the three nearest, of those that are `alike` at least (0 to 1)."""
    names = sorted(set(allowed))
    close = difflib.get_close_matches(value, names, n=3, cutoff=alike) if isinstance(value, str) else []
    if close:
        return InputError(f"unknown {kind} {short(value)}: did you mean {', '.join(close)}?")
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return InputError(f"unknown {kind} {short(value)}: allowed are {shown}")
