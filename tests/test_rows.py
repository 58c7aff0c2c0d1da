"""Loops over rows: every row once, on as many threads as torch uses, and errors come out."""

import gc
import itertools
import threading
import time

import numba
import pytest
from numba.extending import overload

from qdv_gpu.kernels import rows
from qdv_gpu.machine import on_threads


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 100])
def test_every_row_is_done_once(count, threads, monkeypatch):
    monkeypatch.setattr(rows, "WORTH", 1)
    done, calls = [0] * count, itertools.count()
    all_there = threading.Barrier(min(threads, max(count, 1)))

    def loop(low, high, list_):
        if next(calls) < all_there.parties:
            all_there.wait(60)
        for row in range(low, high):
            list_[row] += 1

    with on_threads(threads):
        rows.spread(loop, count, done, work=1)
    assert done == [1] * count


def test_little_work_is_not_spread():
    seen = []
    with on_threads(4):
        rows.spread(lambda low, high: seen.append((low, high)), 1000, work=rows.WORTH / 1001)
    assert seen == [(0, 1000)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_ends_the_others(error):
    started = []

    def loop(low, _high):
        started.append(low)
        if low == 0:
            raise error
        time.sleep(0.02)

    with on_threads(2), pytest.raises(error):
        rows.spread(loop, 16, work=10 * rows.WORTH)
    assert len(started) < 16


@pytest.mark.parametrize("works", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_garbage_waits_while_numba_compiles(before, works):
    def seen():
        raise NotImplementedError

    while_compiling = []

    @overload(seen)
    def _seen():
        while_compiling.append(gc.isenabled())
        return (lambda: 1) if works else None

    called = numba.njit(lambda: seen())
    loop = numba.njit(lambda: called() + called())
    was = gc.isenabled()
    try:
        (gc.enable if before else gc.disable)()
        if works:
            assert loop() == 2
        else:
            with pytest.raises(numba.TypingError):
                loop()
        assert gc.isenabled() == before
    finally:
        (gc.enable if was else gc.disable)()
    assert while_compiling
    assert not any(while_compiling)
