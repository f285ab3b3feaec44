"""The fetch pool: urgent first, arrival order within a priority, errors to their owner."""

from __future__ import annotations

import threading

import pytest

from code_worker.moderation.pool import PriorityPool


def test_urgent_work_overtakes_what_waits() -> None:
    order: list[str] = []
    release = threading.Event()
    with PriorityPool(1) as pool:
        pool.submit((-9,), release.wait, 10)
        for name, priority in [("backfill-1", 1), ("live-1", 8), ("backfill-2", 1), ("live-2", 8), ("normal", 4)]:
            pool.submit((-priority,), order.append, name)
        release.set()
    assert order == ["live-1", "live-2", "normal", "backfill-1", "backfill-2"]


def test_errors_reach_the_future_and_the_thread_goes_on() -> None:
    with PriorityPool(1) as pool:
        failed = pool.submit((0,), int, "no number")
        worked = pool.submit((0,), int, "12")
        with pytest.raises(ValueError, match="no number"):
            failed.result(10)
        assert worked.result(10) == 12


def test_a_closed_pool_takes_no_work() -> None:
    pool = PriorityPool(2)
    done = [pool.submit((0,), int, "1") for _ in range(50)]
    pool.close()
    assert [future.result(0) for future in done] == [1] * 50
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit((0,), int, "1")
