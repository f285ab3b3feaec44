"""A background part that breaks is an alarm with its name, and goes on."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from code_worker.errors import StoreUnavailableError
from code_worker.worker import background
from code_worker.worker.background import Repeater, failing_parts
from tests.worker.harness import wait_until


class Part:
    """Work that fails as often as it is told to."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.turns = 0

    def __call__(self) -> None:
        self.turns += 1
        if self.errors:
            raise self.errors.pop(0)


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[int, dict[str, Any]]]:
    return [(record.levelno, record.msg) for record in caplog.records if isinstance(record.msg, dict)]


def run(part: Part, turns: int) -> Repeater:
    repeater = Repeater("sweep", 0.001, part)
    repeater.start()
    wait_until(lambda: part.turns >= turns, 120, "turns")
    return repeater


def test_a_bug_is_an_alarm_at_once_and_the_part_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    part = Part(*(LookupError("of a job") for _ in range(5)))
    run(part, 7).stop()
    levels = [(level, event["event"]) for level, event in said(caplog)]
    assert levels == [
        *[(logging.CRITICAL, "background_part_broken")] * 3,
        (logging.INFO, "background_part_works_again"),
    ]
    first = said(caplog)[0][1]
    assert (first["part"], first["error"], first["failures"]) == ("sweep", "of a job", 1)
    assert "LookupError" in first["exception"]


def test_an_error_of_our_own_is_an_alarm_once_it_has_lasted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    away = StoreUnavailableError("away")
    run(Part(away, away), 4).stop()
    assert [level for level, _ in said(caplog)] == [logging.WARNING, logging.WARNING, logging.INFO]
    caplog.clear()
    monkeypatch.setattr(background, "_ALARM_AFTER_S", 0.0)
    run(Part(away), 2).stop()
    assert [level for level, _ in said(caplog)] == [logging.CRITICAL, logging.INFO]


def test_parts_that_fail_are_named_until_they_work_or_stop() -> None:
    part = Part(*(LookupError("the name of an image") for _ in range(10_000)))
    repeater = run(part, 3)
    facts = failing_parts()["sweep"]
    assert facts["error"] == "LookupError", "the text may name an image"
    assert facts["failures"] >= 2
    part.errors.clear()
    wait_until(lambda: "sweep" not in failing_parts(), 120, "a turn that works")
    repeater.stop()
