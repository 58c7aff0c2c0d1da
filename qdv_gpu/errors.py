"""What the user got wrong, as opposed to what the program got wrong.

The command line prints these as one line and exits with code 2; any other exception is a bug and keeps its
traceback.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """An argument, file or setting breaks a rule. The message states the rule, the value and what is allowed."""


class MissingPackageError(InputError, ImportError):
    """An optional package is needed and not installed. The message holds the pip command."""


def unknown(kind: str, value: str, allowed: Iterable[str]) -> InputError:
    """Error for a name that is not among `allowed`, with the closest of them first."""
    names = sorted(set(allowed))
    close = difflib.get_close_matches(value, names, n=3, cutoff=0.5)
    if close:
        return InputError(f"unknown {kind} {value!r}: did you mean {', '.join(close)}?")
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return InputError(f"unknown {kind} {value!r}: allowed are {shown}")
