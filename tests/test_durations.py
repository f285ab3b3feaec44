"""The report on durations: what is slow is listed and fails, unless it says why or the machine was slow."""

from __future__ import annotations

import pytest

from tests.durations import LIMIT_S, Durations

BEGAN = 1000.0


def report(name: str, seconds: float, **properties: object) -> pytest.TestReport:
    return pytest.TestReport(
        name,
        (name, 0, name),
        {},
        "passed",
        None,
        "call",
        user_properties=list(properties.items()),
        duration=seconds,
        start=BEGAN,
        stop=BEGAN + seconds,
    )


def test_only_what_is_over_the_limit_and_gives_no_reason_is_named() -> None:
    durations = Durations(shared=True)
    durations.pytest_runtest_logreport(report("quick", LIMIT_S - 1))
    durations.pytest_runtest_logreport(report("long", LIMIT_S + 1))
    durations.pytest_runtest_logreport(report("excused", LIMIT_S + 1, slow=True))
    assert durations.over() == ["long"]


def test_a_single_process_has_no_limit() -> None:
    durations = Durations(shared=False)
    durations.pytest_runtest_logreport(report("long", LIMIT_S + 1))
    assert durations.over() == []


def test_what_others_share_does_not_count() -> None:
    durations = Durations(shared=True)
    set_up = report("first", LIMIT_S + 1)
    set_up.when = "setup"
    durations.pytest_runtest_logreport(set_up)
    durations.pytest_runtest_logreport(report("first", LIMIT_S - 1))
    assert durations.over() == []


def test_what_other_work_takes_away_does_not_count() -> None:
    durations = Durations(shared=True)
    durations.slowdowns += [(BEGAN + 1, 2.0), (BEGAN + 2, 4.0), (BEGAN + 100, 1.0)]
    durations.pytest_runtest_logreport(report("beside others", 3 * LIMIT_S - 1))
    assert durations.over() == []
    durations.pytest_runtest_logreport(report("slow all the same", 3 * LIMIT_S + 1))
    assert durations.over() == ["slow all the same"]


def test_a_machine_that_stands_still_does_not_count() -> None:
    durations = Durations(shared=True)
    durations.stalls.append((BEGAN + 30, 25.0))
    durations.pytest_runtest_logreport(report("paused", LIMIT_S + 24))
    assert durations.over() == []
