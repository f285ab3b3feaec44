"""Threads that do one small thing again and again until they are told to stop."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

from code_worker.errors import CodeWorkerError
from code_worker.logs import get_logger

__all__ = ["Repeater"]

log = get_logger(__name__)


class Repeater:
    """Calls `work` every `interval_s` (± a tenth, so that workers do not march in step)."""

    def __init__(self, name: str, interval_s: float, work: Callable[[], object]) -> None:
        self._name = name
        self._interval_s = interval_s
        self._work = work
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

    def _run(self) -> None:
        while True:
            try:
                self._work()
            except CodeWorkerError as error:
                log.warning("background_work_failed", work=self._name, error=str(error))
            except Exception:  # the thread must outlive a bug: without it leases lapse and nothing is swept
                log.exception("background_work_broke", work=self._name)
            if self._stop.wait(self._interval_s * random.uniform(0.9, 1.1)):  # noqa: S311 - jitter, not a secret
                return
