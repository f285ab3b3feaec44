"""Sources as a worker uses them: left alone by all while their credentials fail, by this worker while they do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from code_worker.errors import ImageRejectedError, SourceCredentialsError, SourcePausedError, TransientError
from code_worker.images.source import source_name
from code_worker.logs import get_logger
from code_worker.types import RejectReason

if TYPE_CHECKING:
    from code_worker.images.source import Fetched
    from code_worker.moderation.judge import Fetcher

__all__ = ["GuardedSources"]

log = get_logger(__name__)
FAILURES: Final = 8
"""In a row, before a source is left alone: as many as are fetched at the same time."""
FIRST_REST_S: Final = 2.0
LONGEST_REST_S: Final = 15.0
"""Between two tries of a source that fails; its jobs are done soon after it works again."""

_OF_THE_SOURCE: Final = frozenset({RejectReason.FETCH_FAILED, RejectReason.FETCH_TIMEOUT})
"""A body that is damaged or ends too early may be so of one object alone."""


@dataclass(slots=True)
class _Breaker:
    """How one source did of late."""

    failures: int = 0
    rest_s: float = 0.0
    closed_until: float = 0.0


class GuardedSources:
    """Fetches, unless the source is known to fail; safe to share between threads.

    Jobs of a source that fails go back without a fault of theirs, and its timeouts hold up nobody else's: after some
    failures in a row one image at a time is tried, at growing distances, until one arrives.

    Attributes:
        paused: sources whose credentials do not work, by name, and for how many seconds more; set from the ledger.
    """

    def __init__(self, sources: Fetcher, clock: Callable[[], float] = time.monotonic) -> None:
        self.paused: Mapping[str, float] = {}
        self._sources = sources
        self._clock = clock
        self._lock = threading.Lock()
        self._breakers: dict[str, _Breaker] = {}

    def fetch(self, uri: str) -> Fetched:
        """As `Sources.fetch`.

        Raises:
            SourcePausedError: nothing was tried.
        """
        name = source_name(uri)
        if (left_s := self.paused.get(name)) is not None:
            raise SourcePausedError(name, left_s, "its credentials do not work")
        self._admit(name)
        try:
            fetched = self._sources.fetch(uri)
        except SourceCredentialsError:
            raise
        except TransientError as error:
            if error.reason in _OF_THE_SOURCE:
                self._failed(name, error)
            raise
        except ImageRejectedError:
            self._worked(name)
            raise
        self._worked(name)
        return fetched

    def _admit(self, name: str) -> None:
        with self._lock:
            if (breaker := self._breakers.get(name)) is None or not breaker.rest_s:
                return
            left_s = breaker.closed_until - self._clock()
            if left_s > 0:
                raise SourcePausedError(name, left_s, "it fails")
            # This one is the try; the others wait for what becomes of it.
            breaker.closed_until = self._clock() + breaker.rest_s

    def _worked(self, name: str) -> None:
        with self._lock:
            breaker = self._breakers.pop(name, None)
        if breaker is not None and breaker.rest_s:
            log.info("source_works_again", source=name)

    def _failed(self, name: str, error: TransientError) -> None:
        with self._lock:
            breaker = self._breakers.setdefault(name, _Breaker())
            breaker.failures += 1
            if breaker.failures < FAILURES:
                return
            first = not breaker.rest_s
            breaker.rest_s = min(LONGEST_REST_S, 2 * breaker.rest_s or FIRST_REST_S)
            breaker.closed_until = self._clock() + breaker.rest_s
        if first:
            log.error("source_failing", source=name, reason=error.reason.value, detail=error.detail)
