"""The command `qdv-gpu`, also as `python -m qdv_gpu`; it stops in order while it is still being imported."""

import os
import signal
import sys
from typing import Any


def _stop(number: int, _: Any) -> None:
    """End at once, with nothing begun."""
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


def run() -> None:
    """Run the command line and exit."""
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    from qdv_gpu.cli import main

    sys.exit(main())


if __name__ == "__main__":
    run()
