"""Why jobs have no verdict yet, for whoever waits for them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from code_worker.images.source import source_name
from code_worker.releases.registry import CHAMPION
from code_worker.store import health, joblist, releases
from code_worker.store import workers as fleet
from code_worker.types import JobState
from code_worker.worker.report import silence_s

if TYPE_CHECKING:
    from code_worker.settings import Settings
    from code_worker.store.engine import Session, Store
    from code_worker.store.joblist import JobInfo
    from code_worker.store.workers import SourcePause, WorkerInfo

__all__ = ["why_waiting"]


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the ledger says of everything that a job may wait for.

    Attributes:
        champion: the release that judges.
        alive: every part that was heard of lately.
        pauses: sources that are left alone now.
        now: the database's time.
    """

    champion: str | None
    alive: Sequence[WorkerInfo]
    pauses: Mapping[str, SourcePause]
    now: datetime

    @property
    def queues(self) -> Collection[str] | None:
        """Queues that somebody takes from; None where a worker does not say which it takes."""
        if any("queues" not in part.info for part in self.alive if part.role == fleet.JUDGES):
            return None
        return {queue for part in self.alive for queue in part.info.get("queues", ())}


def why_waiting(settings: Settings, store: Store, job_ids: Sequence[str]) -> dict[str, str]:
    """For each of these jobs that is not decided, what it waits for and what to do about it."""

    def read(session: Session) -> tuple[_Seen, list[JobInfo]]:
        seen = _Seen(
            releases.alias(session, CHAMPION),
            fleet.alive(session, within_s=silence_s(settings), role=None),
            fleet.paused_sources(session),
            health.server_time(session),
        )
        found = (joblist.get(session, job_id) for job_id in job_ids)
        return seen, [job for job in found if job is not None and job.finished_at is None]

    seen, waiting = store.run(read, write=False)
    return {job.id: next(_why(job, seen)) for job in waiting}


def _why(job: JobInfo, seen: _Seen) -> Iterator[str]:
    """What holds the job up, the first of it before what would come after."""
    if job.state is JobState.RUNNING:
        yield f"{job.owner} is judging it"
    if seen.champion is None:
        yield "there is no release to judge with (code-worker releases list, then import or promote one)"
    if not seen.alive:
        yield "no worker was heard of lately (code-worker worker, or code-worker up)"
    if (queues := seen.queues) is not None and job.queue not in queues:
        yield f"no worker takes from the queue {job.queue} (code-worker doctor queues)"
    if (refusal := _refusal(job, seen)) is not None:
        yield f"no worker of its queue can use the release {seen.champion}: {refusal}"
    if (pause := seen.pauses.get(source_name(job.uri))) is not None:
        yield f"its source {pause.source} is paused: {pause.detail or 'it refuses whatever is asked'}"
    if job.not_before is not None and job.not_before > seen.now:
        yield f"it is tried again at {job.not_before:%H:%M:%S} UTC, after {job.last_fault or 'a fault'}"
    if job.published_at is None:
        after = f", after {job.last_fault}" if job.last_fault else ""
        yield f"workers were not told of it yet{after}; is the broker away? (code-worker doctor broker)"
    yield f"a worker has not come to it yet; it is in the queue {job.queue}"


def _refusal(job: JobInfo, seen: _Seen) -> str | None:
    """Why workers do not load the champion, where all that take from the job's queue have none."""
    takers = [part for part in seen.alive if job.queue in part.info.get("queues", ())]
    refused = [part.info.get("refused", ("", "")) for part in takers if part.release is None]
    if not takers or len(refused) < len(takers) or any(release != seen.champion for release, _ in refused):
        return None
    return str(refused[0][1])
