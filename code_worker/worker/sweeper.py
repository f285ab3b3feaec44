"""Publishes again the jobs that nobody holds: their messages may be lost, the ledger still has them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from code_worker.errors import BrokerUnavailableError
from code_worker.logs import get_logger
from code_worker.store import jobs, verdicts, workers
from code_worker.wire import QUEUES, SUSPECTS_PER_MESSAGE, chunks

if TYPE_CHECKING:
    from code_worker.publisher import Publisher
    from code_worker.settings import Settings
    from code_worker.worker.judging.recorder import Recorder

log = get_logger(__name__)
_LIMIT = 1000
_PASSES = 20
_UNPUBLISH = 10_000
_MIN_WAIT_S = 60.0
_MAX_WAIT_S = 3600.0
_LOST_AFTER_S = 10.0
_PASS_S = 30.0
_LOOK_AT_BROKER_S = 60.0


@dataclass(frozen=True, slots=True)
class Swept:
    """Result of one pass."""

    published: int = 0
    quarantined: int = 0


class Sweeper:
    """One pass at a time in the whole deployment, by a lease in the database."""

    def __init__(self, ledger: Recorder, publisher: Publisher, settings: Settings) -> None:
        self._ledger = ledger
        self._publisher = publisher
        self._settings = settings
        self._broker: str | None = None
        self._look_at = 0.0
        self._unheard_last: dict[str, object] | None = None

    def said(self) -> dict[str, Any]:
        """Returns what `doctor` asks of it.

        The broker's identity, and when it last published what no worker had seen.
        """
        return {"broker": self._broker, "unheard": self._unheard_last}

    def sweep(self) -> Swept:
        """Quarantines what killed too many workers and publishes what waits unclaimed."""
        # One sweeper of the deployment sweeps, under a lease in the database. A pass that outlives it does no harm:
        # rows are locked while they are read, and a claim is taken once.
        mine = self._take_turn(_PASS_S)
        self._see_broker(make=mine)
        if not mine:
            return Swept()
        try:
            return self._sweep()
        finally:
            # Held on for the interval alone: were it longer, a worker that dies would take the sweeping with it.
            self._take_turn(self._settings.worker.sweep_interval_s * 0.8)

    def _see_broker(self, *, make: bool) -> None:
        """Producers are to publish where this process takes from: `doctor` compares what both see there."""
        if time.monotonic() < self._look_at:
            return
        try:
            self._broker = self._publisher.identity(make=make)
        except BrokerUnavailableError as error:
            log.warning("broker_unavailable", error=str(error))
            self._broker = None
        # Sooner where nothing was found; but a broker that hangs must not hold each pass up.
        self._look_at = time.monotonic() + (_LOOK_AT_BROKER_S if self._broker else _LOOK_AT_BROKER_S / 4)

    def _take_turn(self, seconds: float) -> bool:
        owner = self._ledger.owner
        return self._ledger.store.run(lambda session: workers.take_lease(session, "sweeper", owner, seconds))

    def _sweep(self) -> Swept:
        store = self._ledger.store
        # First, and without the broker: jobs that killed too many workers must not be published once more.
        quarantined = self._ledger.quarantine(_LIMIT)
        published = 0
        try:
            self._look_for_losses()
            waits = self._waits()
            # Bounded, so that a pass ends within its lease; the next sweep goes on with a larger backlog.
            for _ in range(_PASSES):
                due = store.run(lambda session: jobs.due(session, limit=_LIMIT, min_wait_s=waits))
                published += self._publish(due, waits)
                if len(due) < _LIMIT:
                    break
            published += self._publish_unheard(waits)
        except BrokerUnavailableError as error:
            log.warning("broker_unavailable", error=str(error))
        if published or quarantined:
            log.info("swept", published=published, quarantined=quarantined)
        return Swept(published, quarantined)

    def _publish_unheard(self, waits: dict[str, float]) -> int:
        """Publishes what an empty queue no longer holds; what no worker holds either was lost, and is said."""
        due = self._unheard()
        if not due:
            return 0
        # A worker that loads its model, or died, has messages that it took and claimed no job of.
        held = self._publisher.held(job.id for job in due)
        if lost := sum(job.id not in held for job in due):
            self._unheard_last = {"jobs": lost, "at": datetime.now(UTC).isoformat(timespec="seconds")}
            log.warning("messages_lost", jobs_published_again=lost)
        return self._publish(due, waits)

    def _waits(self) -> dict[str, float]:
        """Seconds after which a job that was published and not claimed is published again, by queue.

        Three times what jobs waited lately. Where messages lie and nobody takes any, publishing again would only add
        to them.
        """
        store = self._ledger.store
        seen = store.run(lambda session: {queue: jobs.queue_wait_s(session, queue) for queue in QUEUES}, write=False)
        return {
            queue: _MAX_WAIT_S
            if wait is None and self._publisher.depth(queue)
            else min(_MAX_WAIT_S, max(_MIN_WAIT_S, 3 * (wait or 0.0)))
            for queue, wait in seen.items()
        }

    def _look_for_losses(self) -> None:
        """A broker without our mark came back empty: everything it was told of is due again."""
        if self._publisher.marked():
            return
        store, lost = self._ledger.store, 0
        while (count := store.run(lambda session: jobs.unpublish(session, limit=_UNPUBLISH))) == _UNPUBLISH:
            lost += count
            self._take_turn(_PASS_S)
        lost += count
        # Last, so that a sweeper that dies before this is followed by one that does it again.
        self._publisher.mark()
        self._look_at = 0.0
        if lost:
            # Before the first verdict no worker has been here, and nothing can have been lost.
            judged = store.run(verdicts.any_given, write=False)
            log.log(logging.WARNING if judged else logging.INFO, "broker_without_mark", jobs_published_again=lost)

    def _unheard(self) -> Sequence[jobs.DueJob]:
        """Jobs that were published and not claimed although their queue is empty: somebody deleted their messages."""
        empty = [queue for queue in QUEUES if self._publisher.depth(queue) == 0]
        if not empty:
            return []
        return self._ledger.store.run(
            lambda session: jobs.with_lost_messages(session, empty, older_than_s=_LOST_AFTER_S, limit=_LIMIT)
        )

    def _publish(self, due: Sequence[jobs.DueJob], waits: dict[str, float]) -> int:
        published = 0
        for queue in QUEUES:
            mine = [job for job in due if job.queue == queue]
            fresh = [job.id for job in mine if not job.attempts]
            # Suspects in short messages, so that several workers can look at them.
            suspects = [job.id for job in mine if job.attempts]
            for group in [*chunks(fresh), *chunks(suspects, SUSPECTS_PER_MESSAGE)]:
                self._publish_group(queue, group, waits[queue])
                published += len(group)
        return published

    def _publish_group(self, queue: str, group: list[str], wait_s: float) -> None:
        # Published first, noted after: should the process die between the two, the jobs stay due and are published
        # once more. A message too many costs a look; one too few would cost a verdict.
        self._publisher.publish(queue, group)
        self._ledger.store.run(lambda session: jobs.mark_published(session, group, wait_s=wait_s))
