"""Loops over rows: every row once, on as many threads as torch uses, and errors come out."""

import itertools
import threading
import time

import pytest

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
