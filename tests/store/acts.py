"""What the tests of the store do over and over, each in a transaction of its own."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select

from code_worker.store import jobs, verdicts
from code_worker.store.engine import Store
from code_worker.store.learning import runs
from code_worker.store.models import ScheduleSlotRow
from code_worker.types import ImageFacts, Job, JobState, Label, Outcome, Provenance, RejectReason, Verdict

HASH = "a" * 64


def accept(store: Store, *new: jobs.NewJob | str) -> list[str]:
    made = [job if isinstance(job, jobs.NewJob) else jobs.NewJob(job) for job in new]
    return store.run(lambda session: jobs.accept(session, made))


def claim(
    store: Store, ids: Sequence[str], *, owner: str = "worker", lease_s: float = 600.0, max_attempts: int = 3
) -> list[Job]:
    return store.run(
        lambda session: jobs.claim(session, ids, owner=owner, lease_s=lease_s, max_attempts=max_attempts)
    )


def due(store: Store, *, limit: int = 100, **min_wait_s: float) -> list[jobs.DueJob]:
    waits = {f"code_worker.{queue}": wait_s for queue, wait_s in min_wait_s.items()}
    return store.run(lambda session: jobs.due(session, limit=limit, min_wait_s=waits))


def publish(store: Store, ids: Sequence[str], *, wait_s: float = 60.0) -> None:
    store.run(lambda session: jobs.mark_published(session, ids, wait_s=wait_s))


def info(store: Store, job_id: str) -> jobs.JobInfo:
    found = store.run(lambda session: jobs.get(session, job_id), write=False)
    assert found is not None
    return found


def state(store: Store, job_id: str) -> JobState:
    return info(store, job_id).state


def write(store: Store, *some: Verdict) -> list[str]:
    return store.run(lambda session: verdicts.write(session, some))


def judged(
    job_id: str, *, score: float = 0.75, revision: int = 0, uri: str = "s3://b/a.jpg", **more: object
) -> Verdict:
    """A verdict with every field filled."""
    fields: dict[str, object] = {
        "label": Label.FAKE if score >= 0.5 else Label.REAL,
        "facts": ImageFacts(HASH, 1234, "JPEG", 640, 480, "RGB", '"etag"', "v1"),
        "provenance": Provenance(
            "release-1", "b" * 64, "linear", "c" * 64, "published", 0.5, 0.5, "1.0", "code-worker 1.0"
        ),
        "metadata": {"post": 7},
        "timings_ms": {"fetch": 1.5},
        **more,
    }
    return Verdict(job_id, uri, Outcome.JUDGED, score=score, revision=revision, **fields)  # type: ignore[arg-type]


def rejected(job_id: str, reason: RejectReason = RejectReason.TRUNCATED, *, revision: int = 0) -> Verdict:
    return Verdict(job_id, "s3://b/a.jpg", Outcome.REJECTED, reason=reason, detail="cut short", revision=revision)


def slots(store: Store) -> list[runs.Slot]:
    """All times of schedules that were taken, newest first."""
    columns = (getattr(ScheduleSlotRow, name) for name in runs.Slot.__dataclass_fields__)
    newest = select(*columns).order_by(ScheduleSlotRow.slot.desc(), ScheduleSlotRow.name)
    return store.run(lambda session: [runs.Slot(**row) for row in session.execute(newest).mappings()], write=False)
