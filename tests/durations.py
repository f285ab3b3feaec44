"""How long each test took: the slowest are listed, and a test over the limit fails the run unless it says why.

A second counts as much as this machine gave: while other work slows everything down by half, it is two thirds of one.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from typing import Final

import pytest

__all__ = ["Durations"]

LIMIT_S: Final = 15.0
_LISTED: Final = 20
_PROBE_S: Final = 0.01


class Durations:
    """A pytest plugin of the process that reports; with xdist the tests run in others."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._excused: set[str] = set()
        self._slowdowns: list[tuple[float, float]] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._probe, name="durations", daemon=True)

    def pytest_sessionstart(self) -> None:
        self._thread.start()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Adds up set-up, call and tear-down."""
        factors = [slow for at, slow in self._slowdowns if report.start <= at <= report.stop]
        self._seconds[report.nodeid] += report.duration / (sum(factors) / len(factors) if factors else 1.0)
        if dict(report.user_properties).get("slow"):
            self._excused.add(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._stopped.set()
        if self._over() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        slowest = sorted(self._seconds.items(), key=lambda each: -each[1])[:_LISTED]
        if sum(self._seconds.values()) > LIMIT_S:
            mean = sum(slow for _, slow in self._slowdowns) / max(1, len(self._slowdowns))
            terminalreporter.section(f"slowest tests, on a machine that work slowed down {mean:.1f} times")
            for name, seconds in slowest:
                terminalreporter.line(f"{seconds:6.1f} s  {name}")
        for name in self._over():
            terminalreporter.line(
                f"FAILED: {name} took {self._seconds[name]:.0f} s, more than {LIMIT_S:.0f}: "
                "make it quicker, or mark it slow and say why",
                red=True,
            )

    def _over(self) -> list[str]:
        return [name for name, seconds in self._seconds.items() if seconds > LIMIT_S and name not in self._excused]

    def _probe(self) -> None:
        """Notes twice a second how much longer than its processor time some work takes."""
        while not self._stopped.wait(0.5):
            began, worked = time.perf_counter(), time.thread_time()
            while time.thread_time() - worked < _PROBE_S:
                pass
            self._slowdowns.append((time.time(), (time.perf_counter() - began) / _PROBE_S))
