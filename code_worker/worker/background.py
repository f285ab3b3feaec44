"""Threads that do one small thing again and again until they are told to stop."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from code_worker.errors import CodeWorkerError
from code_worker.logs import get_logger
from code_worker.machine import jittered

__all__ = ["Repeater", "failing_parts"]

log = get_logger(__name__)
_ALARM_AFTER_S: Final = 60.0
_failing: dict[str, dict[str, Any]] = {}
os.register_at_fork(after_in_child=_failing.clear)


def failing_parts() -> Mapping[str, Mapping[str, Any]]:
    """Background parts of this process whose last turn failed: name, and how often in a row, for how long, with what.

    Errors are named by their class: their texts may name an image, and an erasure does not reach the rows in which
    this is noted.
    """
    return {name: dict(facts) for name, facts in list(_failing.items())}


class Repeater:
    """Calls `work` every `interval_s` (± a tenth, so that workers do not march in step).

    A turn that fails is followed by the next one. Our own errors, such as a database that is away, are warnings for a
    minute and an alarm (a critical event) from then on; any other error is a bug and an alarm at once. What goes on
    failing is said at the first, second, fourth, eighth … turn.
    """

    def __init__(self, name: str, interval_s: float, work: Callable[[], object]) -> None:
        self._name = name
        self._interval_s = interval_s
        self._work = work
        self._failures = 0
        self._failed_at = 0.0
        self._alarmed = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Starts the thread; the first call comes at once."""
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Asks the thread to end and waits for it."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        _failing.pop(self._name, None)

    def _run(self) -> None:
        while True:
            try:
                self._work()
            except Exception as error:  # noqa: BLE001 - the thread must outlive a bug: without it leases lapse and nothing is swept
                self._failed(error)
            else:
                self._succeeded()
            if self._stop.wait(jittered(self._interval_s, 0.1)):
                return

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        if self._failures == 1:
            self._failed_at = time.monotonic()
        lasted_s = round(time.monotonic() - self._failed_at, 1)
        facts = {"failures": self._failures, "seconds": lasted_s, "error": type(error).__name__}
        _failing[self._name] = facts
        bug = not isinstance(error, CodeWorkerError)
        alarm = bug or lasted_s >= _ALARM_AFTER_S
        if (alarm and not self._alarmed) or self._failures & (self._failures - 1) == 0:
            self._say(error, facts, alarm=alarm, bug=bug)
        self._alarmed = self._alarmed or alarm

    def _say(self, error: Exception, facts: Mapping[str, object], *, alarm: bool, bug: bool) -> None:
        said = {**facts, "part": self._name, "error": str(error), **({"exc_info": error} if bug else {})}
        if alarm:
            log.critical("background_part_broken", **said)
        else:
            log.warning("background_part_failed", **said)

    def _succeeded(self) -> None:
        if self._failures:
            lasted_s = round(time.monotonic() - self._failed_at, 1)
            log.info("background_part_works_again", part=self._name, failures=self._failures, seconds=lasted_s)
            _failing.pop(self._name, None)
            self._failures, self._alarmed = 0, False
