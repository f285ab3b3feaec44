"""Whoever writes something personal asks first whether it is erased; found by reading the code, and by doing it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

import code_worker.store
from code_worker.store import embeddings, jobs, verdicts
from code_worker.store.engine import Session, Store
from code_worker.store.erasure import personal, receipts
from code_worker.store.erasure import rows as erasing
from code_worker.store.erasure.scopes import Scope
from code_worker.store.ids import uuid7
from code_worker.store.learning import challenger_scores, kept_images, labels
from code_worker.store.learning.kept_images import KeptImage
from code_worker.store.learning.labels import NewLabel
from code_worker.store.models import Base
from code_worker.types import ImageFacts, Job, ShadowScore
from tests.store.acts import accept, claim, judged

SHA, ENCODER = "c" * 64, "e" * 64
ASKS = {"left", "keep_out"}
INSERTS = {"insert_new", "insert_into", "insert"}
OTHERWISE = {
    "claims.accept": "it makes the job that all others ask for",
    "rows._restate": "the same statements as before, without what leads to a job",
    "receipts.add_targets": "the erasure's own list, deleted when it is done",
    "receipts.begin": "the erasure itself",
    "receipts.turn_targets": "the erasure's own list",
    "snapshots.note_kept_heads": "check_kept_heads, which its caller calls first, asks",
    "kept_images.to_drop": "what is about to be deleted",
    "personal.note_labelled": "of a job for which its caller has asked",
    "personal.note_origins": "of jobs that its caller has locked",
    "runs.start": "a run begins with an empty report; erasing ends it before it has another",
    "snapshots.add": "training.snapshot.freeze, which alone calls it, asks",
}
"""Functions that write to a table with personal columns and do not ask, and why they need not."""


def personal_tables() -> dict[str, set[str]]:
    """Names of the tables that have personal columns, with these."""
    found = {
        table.name: {column.name for column in table.columns if column.info.get("personal")}
        for table in Base.metadata.sorted_tables
    }
    return {name: columns for name, columns in found.items() if columns}


def functions() -> Iterator[tuple[str, ast.FunctionDef, dict[str, str]]]:
    """Each function of the store as `module.name`, and its module's names for tables and rows, with the table."""
    rows = {mapper.class_.__name__: str(mapper.local_table) for mapper in Base.registry.mappers}
    for path in sorted(Path(code_worker.store.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text())
        named = dict(rows)
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and called(node.value) == "table_of":
                (row,) = node.value.args
                assert isinstance(row, ast.Name) and isinstance(node.targets[0], ast.Name)  # noqa: PT018 - for mypy
                named[node.targets[0].id] = rows[row.id]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield f"{path.stem}.{node.name}", node, named


def called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def inserted(function: ast.FunctionDef, named: dict[str, str]) -> set[str]:
    """Tables that a function inserts into."""
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and called(node) in INSERTS:
            within = [*node.args, *([node.func.value] if isinstance(node.func, ast.Attribute) else [])]
            found |= {named[each.id] for each in within if isinstance(each, ast.Name) and each.id in named}
    return found


def writers() -> dict[str, tuple[set[str], bool]]:
    """Functions that insert into tables with personal columns: which, and whether they ask."""
    wanted = personal_tables().keys()
    return {
        name: (tables, any(isinstance(node, ast.Call) and called(node) in ASKS for node in ast.walk(function)))
        for name, function, named in functions()
        if (tables := inserted(function, named) & wanted)
    }


def test_every_table_that_names_images_jobs_or_tenants_says_so() -> None:
    telling = {"sha256", "uri", "tenant", "job_id", "metadata", "key", "vector", "members", "body"}
    # A policy is of a tenant whatever becomes of its images; where a dead letter or a manifest has such words, they
    # mean something else.
    other = {"policies.tenant", "policies.key", "imported_rows.key", "workers.key"}
    for table in Base.metadata.sorted_tables:
        unmarked = {column.name for column in table.columns if not column.info.get("personal")} & telling
        assert {f"{table.name}.{name}" for name in unmarked} <= other, table.name


def test_every_writer_of_something_personal_asks_first() -> None:
    found = writers()
    assert {table for tables, _ in found.values() for table in tables} == personal_tables().keys()
    silent = {name for name, (_, asks) in found.items() if not asks}
    assert silent == OTHERWISE.keys()


def rows(store: Store) -> dict[str, int]:
    """How many rows each table has that may hold something of an image or job."""
    names = personal_tables().keys() - {"erasures", "erasure_targets", "copies_to_drop"}
    with store.engine.connect() as connection:
        return {
            name: count
            for name in names
            if (count := connection.exec_driver_sql(f"SELECT count(*) FROM {name}").scalar_one())
        }


def late_writes(session: Session, job: Job, since: datetime) -> None:
    """All that is written about a job and its image by processes that were at it before it was erased."""
    facts = ImageFacts(SHA, 10, "JPEG", 8, 8, "RGB")
    verdicts.write(session, [judged(job.id, uri=job.uri, facts=facts, tenant=job.tenant)])
    score = ShadowScore(job.id, 0, SHA, "r-2", "linear", 0.1, "real", "r-1", "linear", 0.9, "fake", job.tenant)
    challenger_scores.add(session, [score])
    embeddings.keep(session, ENCODER, {SHA: bytes(768)}, jobs={SHA: [job.id]})
    # A training run, a data set that is measured, an import: these know the image and no job.
    embeddings.keep(session, "f" * 64, {SHA: bytes(768)}, since=since)
    kept_images.note_kept(session, [KeptImage(SHA, 10, "jpeg", 8, 8, job.uri)], since=since)
    if personal.left(session, jobs=[job.id], images=[SHA], since=since).images:
        labels.add(session, [NewLabel(SHA, "fake", "rob", "api", uri=job.uri)])
        labels.note_imported(session, {"1" * 64: SHA})
    labels.add(session, [NewLabel(SHA, "fake", "rosa", "api", uri=job.uri, job_id=job.id)])


def erase(store: Store, job: Job, *, finish: bool) -> str:
    """As the eraser's first steps."""
    erasure_id, salt = uuid7(), receipts.new_salt()

    def work(session: Session) -> None:
        scope = Scope(tenant="acme")
        receipts.begin(session, id=erasure_id, scope=str(scope), target=scope.target(), by="olga", why="", salt=salt)
        receipts.add_targets(session, erasure_id, receipts.IMAGE, [SHA])
        erasing.erase_jobs(session, erasure_id, [job.id], scope=scope, actor="olga")
        erasing.spare_shared(session, erasure_id, [SHA], scope=scope)
        if finish:
            receipts.finish(session, erasure_id, {})

    store.run(work)
    return erasure_id


@pytest.mark.parametrize("finished", [False, True], ids=["under way", "done"])
def test_who_was_at_an_image_when_it_was_erased_writes_nothing_more(store: Store, finished: bool) -> None:
    (job_id,) = accept(store, jobs.NewJob("s3://b/private.jpg", tenant="acme"))
    (job,) = claim(store, [job_id], lease_s=0.0)
    since = store.run(personal.moment)
    erase(store, job, finish=finished)
    store.run(lambda session: late_writes(session, job, since))
    assert rows(store) == {}
    now = store.run(personal.moment)
    there = store.run(lambda session: personal.left(session, images=[SHA], since=now)).images
    assert there == ({SHA} if finished else set()), "what is done keeps nobody from beginning anew"


def test_all_of_it_is_written_while_nobody_erases(store: Store) -> None:
    (job_id,) = accept(store, jobs.NewJob("s3://b/private.jpg", tenant="acme"))
    (job,) = claim(store, [job_id])
    store.run(lambda session: late_writes(session, job, personal.moment(session)))
    written = {"jobs", "verdicts", "shadow_scores", "embeddings", "kept_images", "labels", "imported_rows"}
    assert rows(store).keys() == written


def test_one_deleted_job_refuses_nothing_of_its_neighbours(store: Store) -> None:
    ids = accept(store, *(f"s3://b/{number}.jpg" for number in range(64)))
    claimed = claim(store, ids, lease_s=0.0)
    erase(store, claimed[7], finish=True)
    written = store.run(lambda session: verdicts.write(session, [judged(job.id) for job in claimed]))
    assert written == [job_id for job_id in ids if job_id != claimed[7].id]
