"""Records a batch's outcome in the ledger: verdicts, jobs put back, embeddings, in one transaction."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, TypeVar

from code_worker.errors import StoreUnavailableError
from code_worker.logs import get_logger
from code_worker.moderation.judge import JobFault, rejected_job
from code_worker.store import embeddings, jobs, verdicts, workers
from code_worker.system.failpoints import failpoint
from code_worker.system.machine import jittered
from code_worker.types import Job, RejectReason, Verdict
from code_worker.worker.judging.fetching import Denials

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from code_worker.moderation.judge import Judged
    from code_worker.settings import WorkerSettings
    from code_worker.store.engine import Store

log = get_logger(__name__)
T = TypeVar("T")
_PAUSE_S = 30.0
"""First pause of a source whose credentials do not work; it grows with the trouble."""
_OUTAGE_S = 60.0
_BEFORE = timedelta(seconds=_OUTAGE_S + 5)
"""How much earlier than it was noted a trouble may have begun: a batch may have waited for the database."""
_CLOSED = "every image in a row was denied; check the bucket's policy: workers need s3:GetObject"

_ERASED = "its image was erased while it was judged"


@dataclass(frozen=True, slots=True)
class _Seen:
    """Findings of a batch on its sources.

    Attributes:
        to_pause: name, why, and for how many seconds it has been so.
        held: jobs that a closed bucket denied; their images are not to blame.
        readable: sources on trial of which something could be read.
    """

    to_pause: Sequence[tuple[str, str, float]]
    held: frozenset[str]
    readable: Sequence[str]


class Recorder:
    """The worker's view of the store."""

    def __init__(self, store: Store, settings: WorkerSettings, owner: str) -> None:
        self.store = store
        self.owner = owner
        self.troubled: Collection[str] = ()
        """Sources that were paused of late, on trial since their pause is over."""
        self._settings = settings
        self._denials = Denials(settings.max_denied)

    def claim(self, job_ids: Sequence[str], *, below: int, held: Callable[[], Sequence[str]] = tuple) -> list[Job]:
        """Takes those of the jobs that are free and had fewer than `below` attempts, with a lease.

        `held` tells which jobs this process works on: others that it is said to have, a claim took whose answer was
        lost, and left to lapse they would count as those of a worker that died.
        """
        lease_s, limit = self._settings.lease_s, min(below, self._settings.max_attempts)
        # Counted over the tries of this one transaction: the first cannot have been committed unheard.
        tries = count(1)

        def take(session: Session) -> list[Job]:
            taken = jobs.claim(session, job_ids, owner=self.owner, lease_s=lease_s, max_attempts=limit)
            if next(tries) > 1:
                others = set(job_ids).difference(held(), (job.id for job in taken))
                taken += jobs.claimed_unheard(session, sorted(others), owner=self.owner, within_s=_OUTAGE_S)
            return taken

        return self.store.run(take)

    def give_back(self, claimed: Sequence[Job]) -> None:
        """Ends claims of which nothing came; a fault each, but no attempt: the worker lives and says so.

        Raises:
            StoreError: the ledger does not take it; the leases lapse instead.
        """
        detail = "the batch ended in an error of the worker"
        faults, again = self._split([JobFault(job, RejectReason.INTERNAL, detail) for job in claimed])
        worn_out = self._with_ids(faults)

        def write(session: Session) -> None:
            verdicts.write(session, worn_out)
            jobs.put_back(session, again, owner=self.owner)

        self.store.run(write)

    def record(self, judged: Judged, encoder_sha256: str, progress: Callable[[], None]) -> list[Verdict]:
        """Writes everything a batch yielded, or nothing; waits out a database that is away for a minute.

        `progress` is called while it waits.

        Returns:
            Those of its verdicts that were written; the others' jobs or images were erased meanwhile, or somebody
            else judged them first.

        Raises:
            StoreUnavailableError: it stayed away; the leases lapse and the sweeper publishes again.
        """
        worn_out, again = self._split(judged.faults)
        seen = self._see_sources(judged)
        again += [self._put_back(job, RejectReason.ACCESS_DENIED, _CLOSED) for job in sorted(seen.held)]
        rows = self._with_ids([one for one in (*judged.verdicts, *worn_out) if one.job_id not in seen.held])
        keep = self._settings.store_embeddings and judged.embeddings

        def write(session: Session) -> tuple[set[str], set[str]]:
            # Verdicts first: they ask for the erasure's lock, which must come before those of rows.
            written = set(verdicts.write(session, rows))
            # Their image was erased meanwhile; of jobs that are gone or have a verdict this does nothing.
            left = [
                self._put_back(one.job_id, RejectReason.INTERNAL, _ERASED)
                for one in rows
                if one.job_id not in written
            ]
            # As the owner: what another worker has claimed since our lease lapsed is its own to end.
            jobs.put_back(session, [*again, *left], owner=self.owner)
            if keep:
                # Only beside a verdict that names the image: nothing else would lead to the embedding.
                named = {one.sha256: [one.job_id] for one in rows if one.sha256 and one.job_id in written}
                vectors = {sha256: vector for sha256, vector in judged.embeddings.items() if sha256 in named}
                embeddings.keep(session, encoder_sha256, vectors, jobs=named)
            works_again = self._note_sources(session, seen)
            failpoint("before_verdict_commit")
            return written, works_again

        written, works_again = self.outlast(lambda: self.store.run(write), progress)
        log.debug("verdicts_committed", jobs=sorted(written))
        failpoint("after_verdict_commit")
        for source, cause, _ in seen.to_pause:
            log.error("source_paused", source=source, cause=cause)
        for source in works_again:
            log.info("source_works_again", source=source)
        return [verdict for verdict in judged.verdicts if verdict.job_id in written]

    def _see_sources(self, judged: Judged) -> _Seen:
        closed, readable = self._denials.look(judged.verdicts, self.troubled)
        # Of an object nothing may stay where nobody who erases it would look.
        refused = {one.source: one.cause or one.reason.value for one in judged.faults if one.source}
        return _Seen(
            # In one order in all workers, so that none waits for another in a circle.
            sorted(
                [
                    *((source, cause, 0.0) for source, cause in refused.items()),
                    *((each.source, _CLOSED, each.began_s) for each in closed),
                ]
            ),
            frozenset[str]().union(*(each.jobs for each in closed)),
            sorted(readable.intersection(self.troubled)),
        )

    def _note_sources(self, session: Session, seen: _Seen) -> set[str]:
        """Pauses and ends pauses; what was denied since the trouble began is judged again, at its end once more."""
        longest_s = self._settings.backoff_max_s
        for source, detail, began_s in seen.to_pause:
            since = workers.pause_source(
                session, source, seconds=_PAUSE_S, longest_s=longest_s, detail=detail, began_s=began_s
            )
            jobs.retry_denied(session, source, since=since - _BEFORE)
        works_again = set()
        for source in seen.readable:
            if (began := workers.resume_source(session, source)) is not None:
                jobs.retry_denied(session, source, since=began - _BEFORE)
                works_again.add(source)
        return works_again

    def quarantine(self, limit: int = 1000) -> int:
        """Ends jobs whose every attempt ended in a dead worker, before anything touches their image again."""

        def write(session: Session) -> list[Job]:
            found = jobs.exhausted(session, max_attempts=self._settings.max_attempts, limit=limit)
            detail = f"{self._settings.max_attempts} attempts ended without a result"
            rejected = [rejected_job(job, RejectReason.QUARANTINED, detail) for job in found]
            verdicts.write(session, self._with_ids(rejected))
            return found

        found = self.store.run(write)
        for job in found:
            log.error("job_quarantined", job=job.id, attempts=job.attempts)
        return len(found)

    @staticmethod
    def outlast(work: Callable[[], T], progress: Callable[[], None] = lambda: None) -> T:
        """Calls `work` until the database is back, for up to a minute."""
        deadline = time.monotonic() + _OUTAGE_S
        while True:
            try:
                return work()
            except StoreUnavailableError as error:
                if time.monotonic() > deadline:
                    raise
                # The watchdog must not take a batch that waits for the database for one that is stuck.
                log.warning("store_unavailable", error=str(error))
                progress()
                time.sleep(jittered(1.0))

    @staticmethod
    def _put_back(job_id: str, reason: RejectReason, why: str) -> jobs.Fault:
        delay_s = _after(_PAUSE_S)
        return jobs.Fault(job_id, reason, why, delay_s, blame=False)

    def _with_ids(self, made: Sequence[Verdict]) -> list[Verdict]:
        """Before the transaction, so that one that is repeated after a lost answer knows its own verdicts."""
        return [replace(verdict, id=self.store.new_id()) for verdict in made]

    def _split(self, faults: Sequence[JobFault]) -> tuple[list[Verdict], list[jobs.Fault]]:
        """Faults that end the job now, and those that let it try again later."""
        worn_out: list[Verdict] = []
        again: list[jobs.Fault] = []
        for fault in faults:
            if fault.blame and fault.job.faults + 1 >= self._settings.max_faults:
                detail = f"gave up after {fault.job.faults + 1} faults; the last: {fault.detail}"
                worn_out.append(rejected_job(fault.job, fault.reason, detail))
            else:
                delay_s = self._delay_s(fault)
                again.append(jobs.Fault(fault.job.id, fault.reason, fault.detail, delay_s, blame=fault.blame))
        return worn_out, again

    def _delay_s(self, fault: JobFault) -> float:
        if not fault.blame:
            # Not before the pause is over, and not all in the moment in which it is.
            return _after(fault.wait_s or _PAUSE_S)
        # Doubled with each fault, and spread by a half: jobs that failed together do not come back together.
        base: float = self._settings.backoff_s * 2**fault.job.faults
        return jittered(min(base, self._settings.backoff_max_s))


def _after(pause_s: float) -> float:
    """A wait of one to one and a half times the pause: never shorter than it."""
    return jittered(1.25 * pause_s, 0.2)
