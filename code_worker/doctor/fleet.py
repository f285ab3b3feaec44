"""Checks of the running parts by what they report of themselves; reasons why jobs have no verdict yet."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from code_worker.doctor.check import Check, Status
from code_worker.errors import BrokerUnavailableError, ConfigurationError
from code_worker.images.source import source_name
from code_worker.settings import Settings
from code_worker.store import migrate, releases, workers
from code_worker.store.engine import open_store
from code_worker.store.jobs import queries
from code_worker.store.releases import CHAMPION
from code_worker.types import JobState
from code_worker.wire import QUEUES, TRAIN_QUEUE
from code_worker.worker.background import differing, silence_s

if TYPE_CHECKING:
    from code_worker.store.engine import Session, Store
    from code_worker.store.jobs.queries import JobInfo
    from code_worker.store.workers import SourcePause, WorkerInfo

_UNTAKEN_S: Final = 30.0
_UNPUBLISHED_S: Final = 15.0
_NOTED_S: Final = 180.0
"""Three of a bystander's looks."""
_LATELY: Final = timedelta(minutes=10)


def running_parts(settings: Settings) -> Iterator[Check]:
    """Somebody works, with the champion, with its plugins and with these settings, and nothing fails in it."""
    # By the database's clock on both sides: when a part was heard of, and now.
    within_s = silence_s(settings)

    def read(session: Session) -> tuple[list[WorkerInfo], str | None, dict[str, str]]:
        champion = releases.alias(session, CHAMPION)
        info = None if champion is None else releases.get(session, champion)
        heads = {} if info is None else needed_heads(info.manifest)
        return workers.alive(session, within_s=within_s, role=None), champion, heads

    with closing(open_store(settings.resolved_database_url, threads=1, create=False)) as store:
        alive, champion, heads = store.run(read, write=False)
    judging = [part for part in alive if part.role == workers.JUDGES]
    if not judging:
        waiting = [_named(part) for part in alive if part.role == "consumer"]
        none = f"none was heard of for {within_s:.0f} s"
        text = f"{', '.join(waiting)} has no model yet, and loads it now or with the first job" if waiting else none
        yield Check("workers", Status.OK if waiting else Status.WARN, text, "code-worker worker")
    else:
        yield Check("workers", Status.OK, f"{len(judging)} at work: {', '.join(map(_named, judging))}")
    for part in judging:
        yield from _follows(part, champion, heads)
    for part in alive:
        yield from _fails(part)
        yield from _differs(settings, part)


def needed_heads(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Plugin heads that a release needs, with the distribution that has each."""
    entries = manifest.get("heads", {}).values()
    return {entry["plugin_head"]: f"{entry['distribution']} {entry['distribution_version']}" for entry in entries}


def _named(part: WorkerInfo) -> str:
    return f"{part.host}:{part.pid}"


def _follows(part: WorkerInfo, champion: str | None, heads: Mapping[str, str]) -> Iterator[Check]:
    # One of an older version does not say which heads it has.
    missing = sorted(set(heads).difference(part.info.get("heads", heads)))
    for name in missing:
        yield Check(
            "workers",
            Status.FAIL,
            f"{_named(part)} has no plugin for the head {name!r} of champion {champion}",
            f"install {heads[name]} there, and restart it",
        )
    refused, why = part.info.get("refused", ("", ""))
    if champion is not None and refused == champion and not missing:
        yield Check(
            "workers",
            Status.FAIL,
            f"{_named(part)} cannot use champion {champion} and judges with {part.release or 'none'}: {why}",
            "mend what it says there; it is tried again every half minute",
        )
    elif champion is not None and part.release != champion and not missing:
        yield Check(
            "workers",
            Status.WARN,
            f"{_named(part)} has release {part.release or 'none'}, the champion is {champion}",
            "it follows within seconds; if not, its log says why",
        )


def _fails(part: WorkerInfo) -> Iterator[Check]:
    for name, facts in part.info.get("failing", {}).items():
        text = f"{name!r} failed {facts['failures']} times in a row, for {facts['seconds']:.0f} s: {facts['error']}"
        yield Check("workers", Status.FAIL, f"{part.role} {_named(part)}: {text}", "see background_part_… in its log")


def _differs(settings: Settings, part: WorkerInfo) -> Iterator[Check]:
    if sections := differing(settings, part.info, version=part.version):
        since = f"{part.started_at:%Y-%m-%d %H:%M} UTC"
        text = (
            f"{part.role} {_named(part)}, running since {since}, has other settings than here: {', '.join(sections)}"
        )
        hint = (
            "restart it, so that it reads them, or set the same here (what stands in app.conf.code_worker, too): "
            "all parts should share them"
        )
        yield Check("workers", Status.WARN, text, hint)


def queues(settings: Settings) -> Iterator[Check]:
    """Somebody takes from each queue in which jobs wait, and producers publish where workers take from."""

    def read(session: Session) -> tuple[list[WorkerInfo], dict[str, tuple[int, float]], tuple[int, float]]:
        alive = workers.alive(session, within_s=silence_s(settings), role=None)
        return alive, queries.waiting(session), queries.unpublished(session)

    with closing(open_store(settings.resolved_database_url, threads=1, create=False)) as store:
        alive, waiting, unpublished = store.run(read, write=False)
    found = [
        *_unpublished(*unpublished),
        *_untaken(settings, alive, waiting),
        *_elsewhere(settings, alive),
        *_unheard(alive),
    ]
    yield from found
    if not found:
        number = sum(count for count, _ in waiting.values())
        yield Check("queues", Status.OK, f"{number} published and not taken yet" if number else "none waits")


def _unpublished(number: int, first_s: float) -> Iterator[Check]:
    """The sweeper publishes within seconds what a producer could not."""
    if number and first_s > _UNPUBLISHED_S:
        jobs = f"{number} job{'s' if number > 1 else ''}"
        text = f"{jobs} accepted of which no message could be published, the first for {first_s:.0f} s"
        hint = "code-worker doctor broker; when it answers, the sweeper of any running worker publishes them"
        yield Check("queues", Status.WARN, text, hint)


def _untaken(
    settings: Settings, alive: Sequence[WorkerInfo], waiting: Mapping[str, tuple[int, float]]
) -> Iterator[Check]:
    if any("queues" not in part.info for part in alive if part.role == workers.JUDGES):
        return  # of an older version, or a child of a pool whose parent says it
    taken = {queue for part in alive for queue in part.info.get("queues", ())}
    left = {queue: facts for queue, facts in waiting.items() if queue not in taken and facts[1] > _UNTAKEN_S}
    if left:
        yield from _bystanders(settings)
    for queue, (number, oldest_s) in sorted(left.items()):
        yield Check(
            "queues",
            Status.FAIL,
            f"no worker takes from {queue}: {number} wait, the oldest for {oldest_s:.0f} s",
            f"code-worker worker, or in your own app a worker with -Q {','.join(QUEUES)}",
        )
    if (settings.schedule.retrain or settings.schedule.refit) and TRAIN_QUEUE not in taken:
        text = f"a schedule is set and nobody takes from {TRAIN_QUEUE}"
        yield Check("queues", Status.WARN, text, f"code-worker trainer, or a worker with -Q {TRAIN_QUEUE}")


def _bystanders(settings: Settings) -> Iterator[Check]:
    from code_worker.publisher import Publisher

    try:
        with closing(Publisher.for_producer(settings)) as publisher:
            names = publisher.bystanders(within_s=_NOTED_S)
    except (BrokerUnavailableError, ConfigurationError):
        return  # the part `broker` says it
    if names:
        text = f"{', '.join(names)}: a worker of an app with our tasks that takes none of our queues"
        yield Check("queues", Status.WARN, text, f"if it is meant to judge, start it with -Q {','.join(QUEUES)}")


def _elsewhere(settings: Settings, alive: Sequence[WorkerInfo]) -> Iterator[Check]:
    # One part for each identity is enough to name; a part that saw no broker says nothing here.
    theirs = {part.info["broker"]: part for part in alive if part.info.get("broker")}
    if not theirs:
        return
    from code_worker.publisher import Publisher

    try:
        with closing(Publisher.for_producer(settings)) as publisher:
            here = publisher.identity()
    except (BrokerUnavailableError, ConfigurationError):
        return  # the part `broker` says it
    others = [_named(part) for name, part in theirs.items() if name != here]
    if others:
        status = Status.WARN if here in theirs else Status.FAIL
        text = f"{', '.join(others)} takes from another broker or key prefix than these settings publish to"
        hint = (
            "give producers and workers the same CODE_WORKER_BROKER_URL and CODE_WORKER_BROKER__KEY_PREFIX "
            "(`null` where your own app sets no global_keyprefix)"
        )
        yield Check("queues", status, text, f"{hint}; until then only the sweeper tells workers of jobs")


def _unheard(alive: Sequence[WorkerInfo]) -> Iterator[Check]:
    now = datetime.now(UTC)
    for part in alive:
        last = part.info.get("unheard")
        if last and now - (at := datetime.fromisoformat(last["at"])) < _LATELY:
            jobs = f"{last['jobs']} job{'s' if last['jobs'] > 1 else ''}"
            lost = f"messages of {jobs} were neither in their queue nor held by a worker"
            hint = (
                "has their producer another broker or key prefix, or was a queue emptied? Run "
                "`code-worker doctor queues` with the producer's settings"
            )
            text = f"{lost}; published again at {at:%H:%M} UTC"
            yield Check("queues", Status.WARN, text, hint)


@dataclass(frozen=True, slots=True)
class _Seen:
    """The ledger's state of everything that a job may wait for.

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
        if any("queues" not in part.info for part in self.alive if part.role == workers.JUDGES):
            return None
        return {queue for part in self.alive for queue in part.info.get("queues", ())}


def why_waiting(settings: Settings, store: Store, job_ids: Sequence[str]) -> dict[str, str]:
    """For each of these jobs that is not decided, what it waits for and what to do about it."""

    def read(session: Session) -> tuple[_Seen, list[JobInfo]]:
        seen = _Seen(
            releases.alias(session, CHAMPION),
            workers.alive(session, within_s=silence_s(settings), role=None),
            workers.paused_sources(session),
            migrate.server_time(session),
        )
        found = (queries.get(session, job_id) for job_id in job_ids)
        return seen, [job for job in found if job is not None and job.finished_at is None]

    seen, waiting = store.run(read, write=False)
    return {job.id: next(_why(job, seen)) for job in waiting}


def _why(job: JobInfo, seen: _Seen) -> Iterator[str]:
    """Yields what holds the job up, the first of it before what would come after."""
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
        yield f"its source {pause.source} is paused: {pause.detail or 'it refuses all that is asked'}"
    if job.not_before is not None and job.not_before > seen.now:
        yield f"it is tried again at {job.not_before:%H:%M:%S} UTC, after {job.last_fault or 'a fault'}"
    if job.published_at is None:
        after = f", after {job.last_fault}" if job.last_fault else ""
        yield f"workers were not told of it yet{after}; is the broker away? (code-worker doctor broker)"
    yield f"a worker has not come to it yet; it is in the queue {job.queue}"


def _refusal(job: JobInfo, seen: _Seen) -> str | None:
    """Returns why workers do not load the champion, where all that take from the job's queue have none."""
    takers = [part for part in seen.alive if job.queue in part.info.get("queues", ())]
    refused = [part.info.get("refused", ("", "")) for part in takers if part.release is None]
    if not takers or len(refused) < len(takers) or any(release != seen.champion for release, _ in refused):
        return None
    return str(refused[0][1])
