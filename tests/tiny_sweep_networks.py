"""Networks that fail in ways of their own once they are trained."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from tiny_networks import cnn


def _failing(name, action):
    """A network that does something when it is in training mode."""
    network = cnn()
    network.kind = name  # so that it is no other network
    network.conv1.register_forward_hook(lambda module, *_: action() if module.training else None)
    return network


def _count():
    file = Path(os.environ["TINY_COUNT"])
    with file.open("a") as stream:
        stream.write("x")
    return len(file.read_text())


def explodes():
    def explode():
        raise RuntimeError("it explodes")

    return _failing("explodes", explode)


def hungry():
    """Out of memory the first time."""

    def eat():
        if _count() == 1:
            raise MemoryError("no memory")

    return _failing("hungry", eat)


def breaks_the_gpu():
    def fail():
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    return _failing("breaks_the_gpu", fail)


def suicidal():
    def die():
        _count()
        os.kill(os.getpid(), signal.SIGKILL)

    return _failing("suicidal", die)


def slow():
    """Longer than any job may take, the first time."""
    return _failing("slow", lambda: time.sleep(600) if _count() == 1 else None)


def leaves():
    return _failing("leaves", lambda: sys.exit(7))
