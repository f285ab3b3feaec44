"""How long each test took: the slowest are listed, and a test over the limit fails the run unless it says why.

A second counts as much as this machine gave: while other work lets everything take twice as long, it is half a
second, and while the machine stands still it is none. What tests share is set up by whichever comes first, so the
limit is on the call alone, and only where files are shared among processes: a single one imports all in its first.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from typing import Final

import pytest

__all__ = ["Durations"]

LIMIT_S: Final = 15.0
_LISTED: Final = 20
_EVERY_S: Final = 2.0
_PROBE_S: Final = 0.01


class Durations:
    """A pytest plugin of the process that reports; with xdist the tests run in others.

    Attributes:
        shared: whether files are shared among processes; only then the limit holds.
        slowdowns: when, and how many times its processor time some work took then.
        stalls: when the machine went on after standing still, and for how many seconds it had.
    """

    def __init__(self, *, shared: bool) -> None:
        self._shared = shared
        self._seconds: dict[str, float] = defaultdict(float)
        self._calls: dict[str, float] = {}
        self._excused: set[str] = set()
        self.slowdowns: list[tuple[float, float]] = []
        self.stalls: list[tuple[float, float]] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._probe, name="durations", daemon=True)

    def pytest_sessionstart(self) -> None:
        self._thread.start()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Adds up what the parts took, and the call by itself."""
        factors = [slow for at, slow in self.slowdowns if report.start <= at <= report.stop]
        lost_s = sum(lost for at, lost in self.stalls if report.start <= at <= report.stop + lost)
        seconds = max(0.0, report.duration - lost_s)
        seconds /= sum(factors) / len(factors) if factors else 1.0
        self._seconds[report.nodeid] += seconds
        if report.when == "call":
            self._calls[report.nodeid] = seconds
        if dict(report.user_properties).get("slow"):
            self._excused.add(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._stopped.set()
        # CI has nobody to look whether a test or its machine was slow: there it is only said.
        if self.over() and session.exitstatus == pytest.ExitCode.OK and "CI" not in os.environ:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        slowest = sorted(self._seconds.items(), key=lambda each: -each[1])[:_LISTED]
        if sum(self._seconds.values()) > LIMIT_S:
            mean = sum(slow for _, slow in self.slowdowns) / max(1, len(self.slowdowns))
            terminalreporter.section(f"slowest tests, on a machine that work slowed down {mean:.1f} times")
            for name, seconds in slowest:
                terminalreporter.line(f"{seconds:6.1f} s  {name}")
        for name in self.over():
            terminalreporter.line(
                f"FAILED: {name} took {self._calls[name]:.0f} s, more than {LIMIT_S:.0f}: "
                "make it quicker, or mark it slow and say why",
                red=True,
            )

    def over(self) -> list[str]:
        """Tests that took more than the limit and give no reason."""
        if not self._shared:
            return []
        return [name for name, seconds in self._calls.items() if seconds > LIMIT_S and name not in self._excused]

    def _probe(self) -> None:
        """Notes every two seconds how much longer than its processor time work takes, and the machine's pauses."""
        asleep = time.perf_counter()
        while not self._stopped.wait(_EVERY_S):
            began, worked = time.perf_counter(), time.thread_time()
            if (lost_s := began - asleep - _EVERY_S) > 1:
                self.stalls.append((time.time(), lost_s))
            while time.thread_time() - worked < _PROBE_S:
                pass
            asleep = time.perf_counter()
            if (took_s := asleep - began) < 1:
                self.slowdowns.append((time.time(), took_s / _PROBE_S))
            else:
                self.stalls.append((time.time(), took_s))
