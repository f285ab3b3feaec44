"""Finds and deletes the rows of jobs and images that must be forgotten."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import RowMapping, Uuid, delete, func, select, update
from sqlalchemy.orm import Session

from code_worker.store import audit, releases
from code_worker.store.erasure import personal, receipts, scopes
from code_worker.store.erasure.scopes import Scope
from code_worker.store.learning import image_groups, kept_images, snapshots
from code_worker.store.learning.label_rules import Split
from code_worker.store.models import (
    EmbeddingRow,
    ImageOriginRow,
    ImportedRow,
    JobRow,
    KeptImageRow,
    LabelRow,
    ReleaseRow,
    RunRow,
    ShadowScoreRow,
    SnapshotRow,
    VerdictRow,
    db_now,
)
from code_worker.store.retention import rowcount
from code_worker.store.sql import IN_LIST, among, insert_new, table_of
from code_worker.wire import chunks

_JOBS = table_of(JobRow)
_VERDICTS = table_of(VerdictRow)
_SHADOW = table_of(ShadowScoreRow)
_LABELS = table_of(LabelRow)
_ROWS = table_of(ImportedRow)
_KEPT = table_of(KeptImageRow)
_EMBEDDINGS = table_of(EmbeddingRow)
_ORIGINS = table_of(ImageOriginRow)
_RELEASES = table_of(ReleaseRow)
_RUNS = table_of(RunRow)
_SNAPSHOTS = table_of(SnapshotRow)
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_MADE: Final = re.compile(r"(?:refit|retrain) of (?P<base>\S+) on snapshot (?P<snapshot>\S+)")
"""What a release says of its making by a run, see `training.refit.Origin`."""
_OF_IMAGES: Final = (_LABELS, _ROWS, _KEPT, _SHADOW, _ORIGINS)
"""Tables whose rows go with an image; embeddings beside them, which are found by encoder."""
_UNKNOWN: Final = "erased"
"""Stands for the address of a copy that others share, where none of theirs is known."""


@dataclass(slots=True)
class Erased:
    """Result of one transaction: deleted rows by kind, and jobs that a worker is judging now."""

    counts: Counter[str] = field(default_factory=Counter)
    busy: list[str] = field(default_factory=list)


def erase_jobs(session: Session, erasure_id: str, job_ids: Sequence[str], *, scope: Scope, actor: str) -> Erased:
    """Deletes jobs with all that hangs on them, and notes in the same transaction which images were theirs.

    Jobs that a worker is judging are left until their lease lapses or their verdict is there; one that was accepted
    since under an id of these stays.
    """
    ids = sorted(set(job_ids) - scopes.accepted_since(session, scope, job_ids))
    held = (_JOBS.c.state == "running") & (_JOBS.c.due_at > db_now())
    rows = session.execute(
        select(_JOBS.c.id, _JOBS.c.uri, held.label("held"))
        .where(among(session, _JOBS.c.id, ids))
        .order_by(_JOBS.c.id)
        # Waits for the KEY SHARE of writers that asked `personal.left` first; their rows are then there to be found.
        .with_for_update()
    ).all()
    done = Erased(busy=[row.id for row in rows if row.held])
    # From here on nobody writes a verdict, score or label of these: who did is read, who comes finds no row.
    if not (free := [job_id for job_id in ids if job_id not in set(done.busy)]):
        return done
    if not rows and not scopes.images_of(session, free):
        # They went before, perhaps in a try of this transaction whose commit was not answered.
        return done
    _note(session, erasure_id, free, {row.uri for row in rows if not row.held}, scope)
    # The audit's lock after those of the jobs, as retention takes them: in two orders they could deadlock.
    with audit.removal(session, _entry(session, erasure_id, actor, {"jobs": len(free)})):
        for name, table in (("shadow_scores", _SHADOW), ("verdicts", _VERDICTS)):
            done.counts[name] = _delete(session, table, table.c.job_id, free)
        # Gone with their images; but of an image that others share it stays what was said, by whomever's job.
        _restate(session, session.execute(select(_LABELS).where(among(session, _LABELS.c.job_id, free))).mappings())
        # Last, since verdicts refer to it; a crash before commit leaves all of it, one after it nothing.
        done.counts["jobs"] = _delete(session, _JOBS, _JOBS.c.id, free)
    if scope.sha256 is None:
        _delete(session, _ORIGINS, _ORIGINS.c.job_id, free)
    return done


def _note(session: Session, erasure_id: str, job_ids: Sequence[str], uris: set[str], scope: Scope) -> None:
    """Notes what is to be erased beside these jobs: an image that was named by its hash is meant alone."""
    if scope.sha256 is None:
        images = scopes.images_of(session, job_ids)
    else:
        images = {scope.sha256}
        personal.note_origins(session, job_ids, but=scope.sha256)
    read = select(_VERDICTS.c.uri).where(among(session, _VERDICTS.c.job_id, job_ids)).distinct()
    receipts.add_targets(session, erasure_id, receipts.JOB, job_ids)
    receipts.add_targets(session, erasure_id, receipts.IMAGE, images)
    receipts.add_targets(session, erasure_id, receipts.URI, uris | set(session.scalars(read)))


def erase_strays(session: Session, erasure_id: str, found: Sequence[tuple[str, str]], *, scope: Scope) -> Erased:
    """Deletes what names a job in scope that is gone: origins and shadow scores, by content hash and job."""
    done, jobs = Erased(), sorted({job_id for _, job_id in found})
    images = sorted({sha256 for sha256, _ in found})
    receipts.add_targets(session, erasure_id, receipts.IMAGE, images)
    if scope.sha256 is not None:
        # The image alone is meant, and not what else these jobs judged.
        done.counts["origins"] = _delete(session, _ORIGINS, _ORIGINS.c.sha256, images)
        return done
    receipts.add_targets(session, erasure_id, receipts.JOB, jobs)
    done.counts["shadow_scores"] = _delete(session, _SHADOW, _SHADOW.c.job_id, jobs)
    done.counts["origins"] = _delete(session, _ORIGINS, _ORIGINS.c.job_id, jobs)
    return done


def erase_addresses(
    session: Session, erasure_id: str, *, after: str, limit: int, actor: str
) -> tuple[Erased, str | None]:
    """Takes addresses of erased jobs out of labels, of a page of all; their images are to be erased.

    What is said of an image that others share stays, without the address. An address at which others had the same
    image judged is theirs.

    Returns:
        What was done, and the id after which the next page begins; None after the last page.
    """
    personal.keep_out(session)
    page = select(_LABELS).order_by(_LABELS.c.id).limit(limit)
    rows = session.execute(page.where(_LABELS.c.id > after) if after else page).mappings().all()
    given = [(row["sha256"], row["uri"]) for row in rows if row["uri"] is not None]
    mine = _erased_addresses(session, erasure_id, given)
    done, named = Erased(), [row for row in rows if (row["sha256"], row["uri"]) in mine]
    if named:
        receipts.add_targets(session, erasure_id, receipts.IMAGE, {sha256 for sha256, _ in mine})
        with audit.removal(session, _entry(session, erasure_id, actor, {"addresses": len(named)})):
            _restate(session, named)
        done.counts["addresses"] = len(named)
    return done, rows[-1]["id"] if len(rows) == limit else None


def _restate(session: Session, found: Iterable[RowMapping]) -> None:
    """The same statements without what leads to a job; they refuse UPDATE."""
    rows = [{**row, "uri": None, "job_id": None, "group": None, "note": audit.blank(row["note"])} for row in found]
    _delete(session, _LABELS, _LABELS.c.id, [row["id"] for row in rows])
    insert_new(session, LabelRow, rows, same=["id"])


def erase_copy_addresses(session: Session, erasure_id: str, *, after: str, limit: int) -> tuple[int, str | None]:
    """Takes addresses of erased jobs out of the notes on copies, of a page of all; their images are to be erased.

    Returns:
        How many had one, and the content hash after which the next page begins; None after the last page.
    """
    personal.keep_out(session)
    page = select(_KEPT.c.sha256, _KEPT.c.uri).where(_KEPT.c.sha256 > after).order_by(_KEPT.c.sha256).limit(limit)
    rows = session.execute(page).all()
    mine = _erased_addresses(session, erasure_id, [(row.sha256, row.uri) for row in rows])
    receipts.add_targets(session, erasure_id, receipts.IMAGE, {sha256 for sha256, _ in mine})
    for sha256, _ in sorted(mine):
        # Of those who share the image; of an image that goes, this row goes as well.
        other = session.scalar(select(_VERDICTS.c.uri).where(_VERDICTS.c.sha256 == sha256).limit(1))
        session.execute(update(_KEPT).where(_KEPT.c.sha256 == sha256).values(uri=other or _UNKNOWN))
    return len(mine), rows[-1].sha256 if len(rows) == limit else None


def _erased_addresses(session: Session, erasure_id: str, given: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those of these content hashes and addresses at which an erased job had its image, and no other job the same."""
    salt = receipts.salt_of(session, erasure_id)
    named = {pair: receipts.digest(salt, receipts.URI, pair[1]) for pair in set(given)}
    hits = receipts.targeted(session, erasure_id, receipts.URI, set(named.values()))
    mine = {pair for pair, digest in named.items() if digest in hits}
    theirs: set[tuple[str, str]] = set()
    for some in chunks(sorted({sha256 for sha256, _ in mine}), IN_LIST):
        judged = select(_VERDICTS.c.sha256, _VERDICTS.c.uri).where(_VERDICTS.c.sha256.in_(some)).distinct()
        theirs |= {(row.sha256, receipts.digest(salt, receipts.URI, row.uri)) for row in session.execute(judged)}
    return {(sha256, uri) for sha256, uri in mine if (sha256, named[sha256, uri]) not in theirs}


def spare_shared(session: Session, erasure_id: str, hashes: Sequence[str], *, scope: Scope) -> int:
    """Takes images that others share off the list of what is to be erased; returns how many of it these were.

    About the others nobody writes any more.
    """
    personal.keep_out(session)
    listed = receipts.targeted(session, erasure_id, receipts.IMAGE, hashes)
    stay = scopes.shared(session, scope, listed, erasure_id=erasure_id)
    receipts.spare(session, erasure_id, stay)
    receipts.mark(session, erasure_id, listed - stay)
    return len(stay)


def erase_images(session: Session, erasure_id: str, hashes: Sequence[str], *, scope: Scope, actor: str) -> Erased:
    """Deletes all rows of images but those of jobs; the files of their copies are `kept_images.copies_to_drop`.

    What others share since it was looked at last stays: nobody writes about an image while this goes on.
    """
    stay = spare_shared(session, erasure_id, hashes, scope=scope)
    done, mine = Erased(), sorted(receipts.targeted(session, erasure_id, receipts.IMAGE, hashes))
    done.counts["images_shared"] = stay
    if not mine:
        return done
    # Before the rows of the copies go, by which an image's group is known; and before the audit's lock is taken.
    image_groups.forget(session, mine)
    with audit.removal(session, _entry(session, erasure_id, actor, {"images": len(mine)})):
        for table in _OF_IMAGES:
            done.counts[table.name] = _delete(session, table, table.c.sha256, mine)
    for encoder in personal.encoders(session):
        of_encoder = _EMBEDDINGS.c.encoder_sha256 == encoder
        done.counts["embeddings"] += _delete(session, _EMBEDDINGS, _EMBEDDINGS.c.sha256, mine, of_encoder)
    done.counts["images"] = len(mine)
    # The files go after commit, by this list: who dies in between leaves a file that retention still finds.
    kept_images.to_drop(session, mine)
    # In the same transaction: at no moment is an image on neither list, where the last look would miss it.
    receipts.turn_targets(session, erasure_id, mine, was=receipts.IMAGE, now=receipts.ERASED)
    return done


def rows_left(
    session: Session, erasure_id: str, *, scope: Scope, hashes: Sequence[str], job_ids: Sequence[str]
) -> int:
    """Returns how many rows name these images or jobs, which were erased.

    What of an image came back is to be erased again.

    An image that others had judged since is theirs.
    """
    personal.keep_out(session)
    mine = sorted(set(hashes) - scopes.shared(session, scope, hashes, erasure_id=erasure_id))
    again: Counter[str] = Counter()
    for table in _OF_IMAGES:
        again.update(session.scalars(select(table.c.sha256).where(table.c.sha256.in_(mine))))
    for encoder in personal.encoders(session):
        of_encoder = (_EMBEDDINGS.c.encoder_sha256 == encoder, _EMBEDDINGS.c.sha256.in_(mine))
        again.update(session.scalars(select(_EMBEDDINGS.c.sha256).where(*of_encoder)))
    receipts.turn_targets(session, erasure_id, list(again), was=receipts.ERASED, now=receipts.IMAGE)
    named, gone = 0, sorted(set(job_ids) - scopes.accepted_since(session, scope, job_ids))
    for table in (_SHADOW, _LABELS, _ORIGINS) if gone else ():
        of_jobs = select(func.count()).select_from(table).where(among(session, table.c.job_id, gone))
        named += session.scalar(of_jobs) or 0
    return again.total() + named


def _entry(session: Session, erasure_id: str, actor: str, details: Mapping[str, int]) -> audit.Entry:
    """Only where something is removed: an erasure that waits says nothing."""
    return audit.record(session, actor=actor, action="erasure.remove", subject=erasure_id, details=dict(details))


def _delete(session: Session, table: Any, column: Any, values: Sequence[str], *more: Any) -> int:
    """Deletes rows by a list of ids or content hashes; returns how many."""
    count = 0
    for some in chunks(values, IN_LIST):
        listed = among(session, column, some) if isinstance(column.type, Uuid) else column.in_(some)
        count += rowcount(session.execute(delete(table).where(listed, *more)))
    return count


def snapshots_with(session: Session, hashes: Collection[str]) -> dict[str, dict[str, Split]]:
    """Snapshots that have one of these images, with those that each has and the part that it recorded for them."""
    found: dict[str, dict[str, Split]] = {}
    for snapshot in list(session.scalars(select(_SNAPSHOTS.c.id).order_by(_SNAPSHOTS.c.id))):
        rows = snapshots.unpack(snapshots.members(session, snapshot))
        mine = (row for row in rows if row["sha256"] in hashes)
        if parts := {row["sha256"]: row["split"] for row in mine}:
            found[snapshot] = parts
    return found


def counted(session: Session, job_ids: Collection[str], hashes: Collection[str]) -> tuple[int, int]:
    """Returns how many statements there are of these jobs and images, and how many kept copies."""
    said, copies = set[str](), 0
    for some in chunks(sorted(hashes), IN_LIST):
        said.update(session.scalars(select(_LABELS.c.id).where(_LABELS.c.sha256.in_(some))))
        copies += session.scalar(select(func.count()).select_from(_KEPT).where(_KEPT.c.sha256.in_(some))) or 0
    for some in chunks(sorted(job_ids), IN_LIST):
        said.update(session.scalars(select(_LABELS.c.id).where(among(session, _LABELS.c.job_id, some))))
    return len(said), copies


def forget_in_snapshot(
    session: Session, snapshot_id: str, hashes: Collection[str], *, actor: str, subject: str
) -> bool:
    """Takes images out of a frozen snapshot and returns whether it had one; else it stays as it is."""
    info = snapshots.get(session, snapshot_id)
    if info is None:
        return False
    rows = snapshots.unpack(snapshots.members(session, snapshot_id))
    stay = [row for row in rows if row["sha256"] not in hashes]
    gone = len(rows) - len(stay)
    if not gone:
        return False
    details = {"snapshot": snapshot_id, "images": gone}
    entry = audit.record(session, actor=actor, action="erasure.snapshot", subject=subject, details=details)
    with audit.removal(session, entry):
        session.execute(
            update(_SNAPSHOTS)
            .where(_SNAPSHOTS.c.id == snapshot_id)
            .values(
                members=snapshots.pack(stay),
                digest=snapshots.digest_of(stay),
                counts={**info.counts, "erased": int(info.counts.get("erased", 0)) + gone},
            )
        )
    return True


def runs_on(session: Session, snapshot_ids: Collection[str]) -> list[str]:
    """Runs that learn from these snapshots or measure on them."""
    rows = session.execute(select(_RUNS.c.id, _RUNS.c.snapshot_id).order_by(_RUNS.c.id))
    return [row.id for row in rows if row.snapshot_id in snapshot_ids]


def learned_from(session: Session, snapshot_ids: Collection[str]) -> Mapping[str, str]:
    """Releases that were made of these snapshots, with how each is concerned.

    `learned`: made of one of these snapshots, or from a release that was, with one of its heads. `descends`: made
    from one that did, whose encoder it inherited. What a run noted counts, and what a release says of its making.
    """
    noted = session.execute(select(_RUNS.c.candidate, _RUNS.c.base_release, _RUNS.c.snapshot_id))
    made = [(row.candidate, row.base_release, row.snapshot_id) for row in noted if row.candidate is not None]
    rows = session.execute(select(_RELEASES.c.id, _RELEASES.c.source, _RELEASES.c.manifest)).all()
    said = ((row.id, _MADE.fullmatch(row.source)) for row in rows)
    heads = {row.id: {head["sha256"] for head in (row.manifest or {}).get("heads", {}).values()} for row in rows}
    made += [(release, making["base"], making["snapshot"]) for release, making in said if making is not None]
    concerned = dict.fromkeys((release for release, _, snapshot in made if snapshot in snapshot_ids), "learned")
    # To the end of every line of descent: a release may be made of one that was made of another.
    while more := {(release, base) for release, base, _ in made if base in concerned and release not in concerned}:
        for release, base in sorted(more):
            if concerned[base] == "learned" and heads.get(release, set()) & heads.get(base, set()):
                concerned[release] = "learned"
            concerned.setdefault(release, "descends")
    return concerned


def unregistered(session: Session, sources: Mapping[str, str]) -> set[str]:
    """Those of these releases that runs made which an erasure ended, and that nobody registered.

    Args:
        session: the unit of work.
        sources: what each release says of its making.
    """
    named = {run for receipt in receipts.learned(session) for run in receipt.runs}
    rows = session.execute(select(_RUNS.c.id, _RUNS.c.snapshot_id).where(_RUNS.c.state != "running"))
    ended = {row.snapshot_id for row in rows if row.id in named}
    made = {release: said["snapshot"] for release, source in sources.items() if (said := _MADE.fullmatch(source))}
    return {release for release, snapshot in made.items() if snapshot in ended} - releases.registered(session)


def forget_in_runs(session: Session, hashes: Collection[str]) -> int:
    """Strikes content hashes out of what runs reported; returns how many runs named one."""
    changed = 0
    for row in session.execute(select(_RUNS.c.id, _RUNS.c.report, _RUNS.c.reasons)).all():
        text = json.dumps([row.report, row.reasons])
        # Hashes anywhere in the report, no matter how deep: its form is that of whichever version wrote it.
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
