"""Sources as a worker uses them: left alone by all while they refuse, by this worker while they fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from code_worker.errors import ImageRejectedError, SourceCredentialsError, SourcePausedError, TransientError
from code_worker.images.source import source_name
from code_worker.logs import get_logger
from code_worker.types import RejectReason

if TYPE_CHECKING:
    from code_worker.moderation.runtime import Fetcher
    from code_worker.types import Fetched, Verdict

log = get_logger(__name__)
FAILURES: Final = 8
"""In a row, before a source is left alone: as many as are fetched at the same time."""
FIRST_REST_S: Final = 2.0
LONGEST_REST_S: Final = 15.0
"""Between two tries of a source that fails; its jobs are done soon after it works again."""

_OF_THE_SOURCE: Final = frozenset({RejectReason.FETCH_FAILED, RejectReason.FETCH_TIMEOUT})
"""A body that is damaged or ends too early may be so of one object alone."""
_READABLE: Final = frozenset({RejectReason.TOO_LARGE_BYTES, RejectReason.ARCHIVED, RejectReason.CONTENT_CHANGED})
"""Refusals that come after the permission to read; with facts of the bytes there is no doubt."""


@dataclass(slots=True)
class _Breaker:
    """The recent history of one source."""

    failures: int = 0
    rest_s: float = 0.0
    closed_until: float = 0.0


class GuardedSources:
    """Fetches, unless the source is known to fail; safe to share between threads.

    Jobs of a source that fails go back without a fault of theirs, and its timeouts hold up nobody else's: after some
    failures in a row one image at a time is tried, at growing distances, until one arrives.

    Attributes:
        paused: sources that refuse all that is asked, by name, and for how many seconds more; set from the ledger.
    """

    def __init__(self, sources: Fetcher, clock: Callable[[], float] = time.monotonic) -> None:
        # Replaced whole by the thread that follows the ledger: who reads it needs no lock.
        self.paused: Mapping[str, float] = {}
        self._sources = sources
        self._clock = clock
        self._lock = threading.Lock()
        # Guarded by `_lock`, never held during a fetch. A breaker is open while its `rest_s` is set.
        self._breakers: dict[str, _Breaker] = {}

    def fetch(self, uri: str) -> Fetched:
        """Fetches like `Sources.fetch`.

        Raises:
            SourcePausedError: nothing was tried.
        """
        name = source_name(uri)
        if (left_s := self.paused.get(name)) is not None:
            raise SourcePausedError(name, left_s, "it refuses all that is asked")
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
        # Also a fetch that began before the breaker opened closes it: what it brought is newer than the failures.
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
            log.error("source_failing", source=name, reason=error.reason.value, cause=error.cause)


@dataclass(frozen=True, slots=True)
class Denied:
    """A bucket that denies all that is asked of it.

    Attributes:
        source: the bucket, such as `s3://uploads`.
        jobs: those of a batch that it denied; not to be held against their images.
        began_s: seconds since the first image of the row.
    """

    source: str
    jobs: frozenset[str]
    began_s: float


@dataclass(slots=True)
class _Row:
    length: int = 0
    began: float = 0.0


class Denials:
    """Counts what each bucket denied in a row, so that a closed bucket is told from closed images; thread-safe.

    One answer that only who may read gets ends a row; that an image is not there says nothing.
    """

    def __init__(self, limit: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._lock = threading.Lock()
        # Guarded by `_lock`: batches of several threads add to the same row.
        self._rows: dict[str, _Row] = {}

    def look(self, verdicts: Sequence[Verdict], suspected: Collection[str]) -> tuple[list[Denied], set[str]]:
        """Returns what a batch says of its buckets.

        Args:
            verdicts: the batch's, denied ones not yet written.
            suspected: sources that were paused of late: of these one denial is enough.

        Returns:
            Buckets that deny everything, and sources that let something be read.
        """
        denied: dict[str, set[str]] = {}
        readable: set[str] = set()
        for verdict in verdicts:
            if verdict.reason is RejectReason.ACCESS_DENIED:
                denied.setdefault(source_name(verdict.uri), set()).add(verdict.job_id)
            elif verdict.facts is not None or verdict.reason in _READABLE:
                readable.add(source_name(verdict.uri))
        closed = []
        with self._lock:
            for source in readable:
                self._rows.pop(source, None)
            for source, jobs in denied.items():
                # One image that could be read is enough: in a batch
                # of both, the images are closed and not the bucket.
                if source not in readable and self._is_closed(source, len(jobs), source in suspected):
                    row = self._rows.pop(source)
                    closed.append(Denied(source, frozenset(jobs), self._clock() - row.began))
        return closed, readable

    def _is_closed(self, source: str, images: int, suspected: bool) -> bool:
        # Of files each has its own permissions.
        if self._limit is None or not source.startswith("s3://"):
            return False
        row = self._rows.setdefault(source, _Row(began=self._clock()))
        row.length += images
        return suspected or row.length >= self._limit
