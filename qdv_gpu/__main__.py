"""The command `qdv-gpu`, also as `python -m qdv_gpu`; it stops in order while it is still being imported."""

import os
import signal
import sys
import warnings


def _stop(number: int, _: object) -> None:
    """End at once, with nothing begun."""
    try:
        os.write(2, b"interrupted\n")
    finally:
        os._exit(128 + number)


def _open_streams() -> None:
    """Put something in the place of standard streams that are closed, or the next files would be opened there."""
    for number, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):  # to write to the second is an error
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 - stays open
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115 - stays open


def _settle() -> None:
    """Leave out of the environment what is for other programs: no command shows a window, or fails of a warning."""
    os.environ["MPLBACKEND"] = "agg"
    os.environ.pop("PYTHONWARNINGS", None)
    warnings.filters[:] = [one for one in warnings.filters if one[0] != "error"]  # type: ignore[index]  # it is a list


def run() -> None:
    """Run the command line and exit."""
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    _open_streams()
    _settle()
    from qdv_gpu.cli import main

    sys.exit(main())


if __name__ == "__main__":
    run()
