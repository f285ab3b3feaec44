"""The fetch pool: urgent first, arrival order within a priority, no thread lost to an error."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from code_worker.moderation.pool import PriorityPool


def test_urgent_work_overtakes_what_waits() -> None:
    order: list[str] = []
    release = threading.Event()
    with PriorityPool(1) as pool:
        pool.submit((-9,), partial(release.wait, 10))
        for name, priority in [("backfill-1", 1), ("live-1", 8), ("backfill-2", 1), ("live-2", 8), ("normal", 4)]:
            pool.submit((-priority,), partial(order.append, name))
        release.set()
    assert order == ["live-1", "live-2", "normal", "backfill-1", "backfill-2"]


def test_a_thread_survives_work_that_raises() -> None:
    done: list[int] = []
    with PriorityPool(1) as pool:
        pool.submit((0,), partial(int, "no number"))
        pool.submit((0,), partial(done.append, 1))
    assert done == [1]


def test_a_closed_pool_has_done_what_was_queued_and_takes_no_more() -> None:
    done: list[int] = []
    pool = PriorityPool(2)
    for number in range(50):
        pool.submit((0,), partial(done.append, number))
    pool.close()
    assert sorted(done) == list(range(50))
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit((0,), partial(done.append, 1))
