"""Suspects run alone, batches together, and nobody starves."""

from __future__ import annotations

import threading
from collections.abc import Callable

from code_worker.worker.judging.node import ExclusiveLock


def _thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_batches_run_together_and_a_suspect_alone() -> None:
    gate = ExclusiveLock()
    together = threading.Barrier(3)
    inside: list[str] = []
    seen_by_suspect: list[list[str]] = []
    leave = threading.Event()

    def batch() -> None:
        with gate.together():
            inside.append("batch")
            together.wait(120)
            leave.wait(120)
            inside.remove("batch")

    def suspect() -> None:
        with gate.alone():
            seen_by_suspect.append(list(inside))

    batches = [_thread(batch), _thread(batch)]
    together.wait(120)
    waiting = _thread(suspect)
    assert not seen_by_suspect
    leave.set()
    for thread in [*batches, waiting]:
        thread.join(120)
    assert seen_by_suspect == [[]]


def test_a_waiting_suspect_lets_no_new_batch_in() -> None:
    gate = ExclusiveLock()
    order: list[str] = []
    first_in, leave = threading.Event(), threading.Event()

    def first() -> None:
        with gate.together():
            first_in.set()
            leave.wait(120)

    def suspect() -> None:
        with gate.alone():
            order.append("suspect")

    def second() -> None:
        with gate.together():
            order.append("batch")

    threads = [_thread(first)]
    first_in.wait(120)
    threads.append(_thread(suspect))
    while not gate._waiting:
        threading.Event().wait(0.005)
    threads.append(_thread(second))
    leave.set()
    for thread in threads:
        thread.join(120)
    assert order == ["suspect", "batch"]


def test_an_error_inside_leaves_the_gate_open() -> None:
    gate = ExclusiveLock()
    for enter in (gate.together, gate.alone):
        try:
            with enter():
                raise KeyError("inside")
        except KeyError:
            pass
    with gate.alone():
        pass
    with gate.together():
        pass
