"""Follows the champion: loads a new release beside the old one and swaps between batches."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from code_worker.errors import CodeWorkerError
from code_worker.logs import get_logger
from code_worker.moderation.runtime import Runtime

__all__ = ["Runtimes"]

log = get_logger(__name__)
_RETRY_S = 30.0
_JITTER_S = 2.0


@dataclass(slots=True, eq=False)
class _Held:
    runtime: Runtime
    users: int = 0
    retired: bool = False


class Runtimes:
    """The runtime in use; a batch keeps the one it began with."""

    def __init__(self, champion: Callable[[], str | None], load: Callable[[str], Runtime]) -> None:
        self._champion = champion
        self._load = load
        self._lock = threading.Lock()
        self._current: _Held | None = None
        self._failed: tuple[str, float] | None = None
        self._waiting_said = False

    @contextmanager
    def use(self) -> Iterator[Runtime | None]:
        """The current runtime for the length of a batch; None while there is no champion."""
        with self._lock:
            held = self._current
            if held is not None:
                held.users += 1
        try:
            yield held.runtime if held else None
        finally:
            if held is not None:
                with self._lock:
                    held.users -= 1
                    close = held.retired and not held.users
                if close:
                    held.runtime.embedder.close()

    @property
    def release(self) -> str | None:
        """Id of the release in use."""
        return self._current.runtime.release if self._current else None

    @property
    def failure(self) -> BaseException | None:
        """What ended the device of the release in use, if anything did."""
        return self._current.runtime.embedder.failure if self._current else None

    def follow(self) -> None:
        """Looks where the alias points; on a move loads that release and swaps.

        A release that does not load leaves the old one in place: answers stay those of a known release.
        """
        wanted = self._champion()
        if wanted is None:
            if not self._waiting_said:
                log.warning("waiting_for_release", hint="code-worker releases import DIR --promote")
                self._waiting_said = True
            return
        if wanted == self.release or self._recently_failed(wanted):
            return
        if self._current is not None:
            # A fleet that loads at the same moment would stall together.
            time.sleep(random.uniform(0, _JITTER_S))  # noqa: S311 - jitter, not a secret
        began = time.monotonic()
        try:
            runtime = self._load(wanted)
        except Exception as error:  # noqa: BLE001 - whatever a device or a plugin raises: the release in use goes on, loading rests
            self._failed = (wanted, time.monotonic())
            details = {} if isinstance(error, CodeWorkerError) else {"exc_info": error}
            log.error(  # noqa: TRY400 - our own errors say it all, others come with their traceback
                "release_load_failed", release=wanted, kept=self.release, error=str(error), **details
            )
            return
        self._swap(runtime)
        log.info("release_in_use", release=wanted, seconds=round(time.monotonic() - began, 2))

    def _recently_failed(self, release: str) -> bool:
        return (
            self._failed is not None and self._failed[0] == release and time.monotonic() - self._failed[1] < _RETRY_S
        )

    def _swap(self, runtime: Runtime) -> None:
        with self._lock:
            old, self._current = self._current, _Held(runtime)
            close = False
            if old is not None:
                old.retired = True
                close = not old.users
        if old is not None and close:
            old.runtime.embedder.close()

    def close(self) -> None:
        """Retires the runtime in use."""
        with self._lock:
            old, self._current = self._current, None
        if old is not None:
            old.runtime.embedder.close()
