"""What rows there are of jobs and images that must be forgotten, and how they go."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, delete, exists, func, or_, select, update
from sqlalchemy.orm import Session

from code_worker.queues import chunks
from code_worker.store import audit, image_groups, snapshots
from code_worker.store.models import (
    DeadLetterRow,
    EmbeddingRow,
    ImportedRow,
    JobRow,
    KeptImageRow,
    LabelRow,
    RunRow,
    ShadowScoreRow,
    SnapshotRow,
    VerdictRow,
    db_now,
)
from code_worker.store.retention import rowcount
from code_worker.store.splits import Split, recorded_split
from code_worker.store.sql import IN_LIST, among, table_of

__all__ = [
    "Scope",
    "counted",
    "end_run",
    "erase_images",
    "erase_jobs",
    "forget_in_runs",
    "forget_in_snapshot",
    "images_of",
    "job_page",
    "judged_for",
    "learned_from",
    "snapshots_with",
    "spoken_of",
]

_JOBS = table_of(JobRow)
_VERDICTS = table_of(VerdictRow)
_SHADOW = table_of(ShadowScoreRow)
_LABELS = table_of(LabelRow)
_LATER = _LABELS.alias("later")
_ROWS = table_of(ImportedRow)
_KEPT = table_of(KeptImageRow)
_EMBEDDINGS = table_of(EmbeddingRow)
_LETTERS = table_of(DeadLetterRow)
_RUNS = table_of(RunRow)
_SNAPSHOTS = table_of(SnapshotRow)
_HASH: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Scope:
    """What to forget; exactly one of these is given.

    Attributes:
        job: its id; the image is forgotten as well, unless another job judged it.
        sha256: an image with every job that judged it.
        tenant: all its jobs, and their images as above.
        before: everything accepted or labelled before this moment, and not spoken of since.
    """

    job: str | None = None
    sha256: str | None = None
    tenant: str | None = None
    before: datetime | None = None

    def __str__(self) -> str:
        """As a receipt may say it: without what it names."""
        if self.before is not None:
            return f"before {self.before.isoformat(timespec='seconds')}"
        return next(name for name in ("job", "sha256", "tenant") if getattr(self, name) is not None)


def job_page(session: Session, scope: Scope, *, after: str | None, limit: int) -> list[str]:
    """Ids of the jobs in scope, sorted, after the last one of the page before."""
    column: ColumnElement[Any] = _VERDICTS.c.job_id if scope.sha256 is not None else _JOBS.c.id
    statement = select(column).distinct().order_by(column).limit(limit)
    if scope.sha256 is not None:
        statement = statement.where(_VERDICTS.c.sha256 == scope.sha256)
    elif scope.job is not None:
        statement = statement.where(_JOBS.c.id == scope.job)
    elif scope.tenant is not None:
        statement = statement.where(_JOBS.c.tenant == scope.tenant)
    else:
        statement = statement.where(_JOBS.c.created_at < scope.before)
    if after is not None:
        statement = statement.where(column > after)
    return list(session.scalars(statement))


def images_of(session: Session, job_ids: Sequence[str]) -> set[str]:
    """Content hashes of what was judged for these jobs, or labelled by their ids."""
    found: set[str] = set()
    for table in (_VERDICTS, _LABELS, _SHADOW):
        rows = session.scalars(select(table.c.sha256).where(among(session, table.c.job_id, job_ids)).distinct())
        found.update(sha256 for sha256 in rows if sha256 is not None)
    return found


def judged_for(session: Session, hashes: Collection[str]) -> list[tuple[str, str]]:
    """Content hash and job of every verdict on these images."""
    found: list[tuple[str, str]] = []
    for some in chunks(sorted(hashes), IN_LIST):
        rows = session.execute(
            select(_VERDICTS.c.sha256, _VERDICTS.c.job_id).where(_VERDICTS.c.sha256.in_(some)).distinct()
        )
        found.extend((row.sha256, row.job_id) for row in rows)
    return found


def spoken_of(session: Session, before: datetime, *, after: str, limit: int) -> list[str]:
    """Images of which something was said before a moment and nothing since, by content hash."""
    later = exists().where(_LATER.c.sha256 == _LABELS.c.sha256, _LATER.c.created_at >= before)
    statement = select(_LABELS.c.sha256).distinct().where(_LABELS.c.sha256 > after, _LABELS.c.created_at < before)
    return list(session.scalars(statement.where(~later).order_by(_LABELS.c.sha256).limit(limit)))


def erase_jobs(session: Session, job_ids: Sequence[str], entry: audit.Entry) -> tuple[Counter[str], list[str]]:
    """Deletes jobs with all that hangs on them; returns counts, and the ids of those that a worker is judging now.

    These are left until their lease lapses or their verdict is there: what a worker still writes would stay.
    """
    held = select(_JOBS.c.id).where(among(session, _JOBS.c.id, job_ids), _JOBS.c.state == "running")
    busy = list(session.scalars(held.where(_JOBS.c.due_at > db_now())))
    free = sorted(set(job_ids) - set(busy))
    counts: Counter[str] = Counter()
    if not free:
        return counts, busy
    uris = list(session.scalars(select(_JOBS.c.uri).where(among(session, _JOBS.c.id, free))))
    with audit.removal(session, entry):
        for name, table in (("shadow_scores", _SHADOW), ("verdicts", _VERDICTS), ("labels", _LABELS)):
            counts[name] = rowcount(session.execute(delete(table).where(among(session, table.c.job_id, free))))
        counts["jobs"] = rowcount(session.execute(delete(_JOBS).where(among(session, _JOBS.c.id, free))))
    counts["dead_letters"] = _erase_letters(session, [*free, *uris])
    return counts, busy


def _erase_letters(session: Session, words: Sequence[str]) -> int:
    """Unreadable messages that name one of the words: they may be anything, so only looking helps."""
    if session.scalar(select(_LETTERS.c.id).limit(1)) is None:
        return 0
    count = 0
    for some in chunks(words, 50):
        names_one = or_(*(_LETTERS.c.body.contains(word, autoescape=True) for word in some))
        count += rowcount(session.execute(delete(_LETTERS).where(names_one)))
    return count


def erase_images(session: Session, hashes: Sequence[str], entry: audit.Entry) -> Counter[str]:
    """Deletes all rows of images but those of jobs; copies in the storage are the caller's."""
    counts: Counter[str] = Counter()
    image_groups.forget(session, hashes)
    with audit.removal(session, entry):
        for name, table in (("labels", _LABELS), ("imported_rows", _ROWS), ("kept_images", _KEPT)):
            counts[name] = rowcount(session.execute(delete(table).where(table.c.sha256.in_(hashes))))
    for encoder in _encoders(session):
        mine = (_EMBEDDINGS.c.encoder_sha256 == encoder, _EMBEDDINGS.c.sha256.in_(hashes))
        counts["embeddings"] += rowcount(session.execute(delete(_EMBEDDINGS).where(*mine)))
    counts["shadow_scores"] = rowcount(session.execute(delete(_SHADOW).where(_SHADOW.c.sha256.in_(hashes))))
    counts["dead_letters"] = _erase_letters(session, hashes)
    return counts


def _encoders(session: Session) -> Iterator[str]:
    """Every encoder of which embeddings are kept, each found by one step along the key."""
    least = func.min(_EMBEDDINGS.c.encoder_sha256)
    encoder = session.scalar(select(least))
    while encoder is not None:
        yield encoder
        encoder = session.scalar(select(least).where(_EMBEDDINGS.c.encoder_sha256 > encoder))


def snapshots_with(session: Session, hashes: Collection[str]) -> dict[str, dict[str, Split]]:
    """Snapshots that have one of these images, with those that each has and the part that it recorded for them."""
    found: dict[str, dict[str, Split]] = {}
    for snapshot in list(session.scalars(select(_SNAPSHOTS.c.id).order_by(_SNAPSHOTS.c.id))):
        rows = snapshots.unpack(snapshots.members(session, snapshot))
        mine = (row for row in rows if row["sha256"] in hashes)
        if parts := {row["sha256"]: recorded_split(row["sha256"], row.get("split")) for row in mine}:
            found[snapshot] = parts
    return found


def counted(session: Session, job_ids: Collection[str], hashes: Collection[str]) -> tuple[int, int]:
    """How many statements there are of these jobs and images, and how many kept copies."""
    said, copies = set[str](), 0
    for some in chunks(sorted(hashes), IN_LIST):
        said.update(session.scalars(select(_LABELS.c.id).where(_LABELS.c.sha256.in_(some))))
        copies += session.scalar(select(func.count()).select_from(_KEPT).where(_KEPT.c.sha256.in_(some))) or 0
    for some in chunks(sorted(job_ids), IN_LIST):
        said.update(session.scalars(select(_LABELS.c.id).where(among(session, _LABELS.c.job_id, some))))
    return len(said), copies


def forget_in_snapshot(
    session: Session, snapshot_id: str, hashes: Collection[str], *, actor: str, subject: str
) -> None:
    """Takes images out of a frozen snapshot; one that has none of them stays as it is."""
    info = snapshots.get(session, snapshot_id)
    if info is None:
        return
    rows = snapshots.unpack(snapshots.members(session, snapshot_id))
    stay = [row for row in rows if row["sha256"] not in hashes]
    gone = len(rows) - len(stay)
    if not gone:
        return
    known = [[row["sha256"], row["label"], row["generator"], row["collection"]] for row in stay]
    details = {"snapshot": snapshot_id, "images": gone}
    entry = audit.record(session, actor=actor, action="erasure.snapshot", subject=subject, details=details)
    with audit.removal(session, entry):
        session.execute(
            update(_SNAPSHOTS)
            .where(_SNAPSHOTS.c.id == snapshot_id)
            .values(
                members=snapshots.pack(stay),
                digest=hashlib.sha256(json.dumps(known).encode()).hexdigest(),
                counts={**info.counts, "erased": int(info.counts.get("erased", 0)) + gone},
            )
        )


def learned_from(session: Session, snapshot_ids: Collection[str]) -> tuple[list[str], Mapping[str, str]]:
    """Runs on these snapshots, and the releases that they made, with how each is concerned.

    `learned`: made of one of these snapshots. `descends`: made from a release that did, whose encoder it inherited.
    """
    rows = session.execute(
        select(_RUNS.c.id, _RUNS.c.snapshot_id, _RUNS.c.base_release, _RUNS.c.candidate).order_by(_RUNS.c.id)
    ).all()
    runs, releases = [], dict[str, str]()
    for row in rows:
        mine = row.snapshot_id in snapshot_ids
        if mine:
            runs.append(row.id)
        if row.candidate is not None and mine:
            releases[row.candidate] = "learned"
        elif row.candidate is not None and row.base_release in releases:
            releases.setdefault(row.candidate, "descends")
    return runs, releases


def forget_in_runs(session: Session, hashes: Collection[str]) -> int:
    """Strikes content hashes out of what runs reported; returns how many runs named one."""
    changed = 0
    for row in session.execute(select(_RUNS.c.id, _RUNS.c.report, _RUNS.c.reasons)).all():
        text = json.dumps([row.report, row.reasons])
        if not any(found in hashes for found in _HASH.findall(text)):
            continue
        report, reasons = json.loads(_HASH.sub(lambda m: "erased" if m[0] in hashes else m[0], text))
        session.execute(update(_RUNS).where(_RUNS.c.id == row.id).values(report=report, reasons=reasons))
        changed += 1
    return changed


def end_run(session: Session, run_id: str, reason: str) -> bool:
    """Ends a run that is under way as failed and spends its token: its process writes nothing more."""
    ended = (
        update(_RUNS)
        .where(_RUNS.c.id == run_id, _RUNS.c.state == "running")
        .values(state="failed", reasons=[reason], finished_at=db_now(), token=_RUNS.c.token + 1, owner=None)
    )
    return session.scalar(ended.returning(_RUNS.c.id)) is not None
