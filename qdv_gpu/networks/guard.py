"""Code of the user's: what it raises is said in one line, with the line of its own file that it came to."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import dropwhile
from pathlib import Path

import torch

from qdv_gpu.errors import OURS, InputError, is_own, reason
from qdv_gpu.machine import staying

ZOO = str(Path(__file__).with_name("zoo.py"))  # networks as anybody's


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Run code of a network's, which may change the current folder for itself alone.

    Parameters
    ----------
    what : str
        That is said to have failed: "network x cannot be built".

    Raises
    ------
    InputError
        In place of anything that the code raises, a SystemExit among it, but for a KeyboardInterrupt, which is taken
        for the user's, a lack of memory, and what our own hooks raise.
    """
    try:
        with staying():
            yield
    except (InputError, KeyboardInterrupt, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except BaseException as error:
        if "allocate memory" in reason(error) or _is_ours(error):
            raise
        raise InputError(f"{what}: {reason(error)}") from error


def _is_ours(error: BaseException) -> bool:
    """Whether an error is of our code that the guarded code called, and not of the code itself.

    An operation of the code's that we only pass on, in `__torch_function__`, is the code's.
    """
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    files = [code.co_filename for code in codes if code.co_name != "__torch_function__"]
    inside = [*dropwhile(lambda file: file != ZOO and file.startswith(f"{OURS}/"), files)]  # what the block called
    for file in reversed(inside):
        if file == ZOO or is_own(file):
            return False
        if file.startswith(f"{OURS}/"):
            return True
    return not inside
