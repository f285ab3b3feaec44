"""What runs all the time must read neither all of history nor all of the backlog."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event, text

from code_worker.store import jobs, verdicts
from code_worker.store.engine import Session, Store
from code_worker.store.erasure import personal, receipts
from code_worker.store.ids import uuid7
from code_worker.types import JobState, Label, RejectReason
from tests.store.acts import accept, judged

NORMAL = "code_worker.normal"
IDS = [uuid7(), uuid7()]
FAULT = jobs.Fault(IDS[0], RejectReason.FETCH_FAILED, "", 1.0)

QUERIES: dict[str, Callable[[Session], object]] = {
    "attempts_of": lambda session: jobs.attempts_of(session, IDS),
    "claim": lambda session: jobs.claim(session, IDS, owner="me", lease_s=1, max_attempts=3),
    "due": lambda session: jobs.due(session, limit=9, min_wait_s={NORMAL: 60.0}),
    "exhausted": lambda session: jobs.exhausted(session, max_attempts=3, limit=9),
    "get": lambda session: jobs.get(session, IDS[0]),
    "list_jobs": lambda session: jobs.list_jobs(session, limit=9),
    "list_jobs_of_state": lambda session: jobs.list_jobs(session, jobs.JobFilter(state=JobState.DONE), limit=9),
    "list_jobs_of_tenant": lambda session: jobs.list_jobs(session, jobs.JobFilter(tenant="acme"), limit=9),
    "live": lambda session: verdicts.live(session, IDS[0]),
    "list_verdicts": lambda session: verdicts.list_verdicts(session, limit=9),
    "mark_published": lambda session: jobs.mark_published(session, IDS),
    "oldest_unfinished_s": jobs.oldest_unfinished_s,
    "put_back": lambda session: jobs.put_back(session, [FAULT]),
    "queue_wait_s": lambda session: jobs.queue_wait_s(session, NORMAL),
    "release_owner": lambda session: jobs.release_owner(session, "me"),
    "renew": lambda session: jobs.renew(session, owner="me", lease_s=1),
    "retry": lambda session: jobs.retry(session, IDS),
    "with_lost_messages": lambda session: jobs.with_lost_messages(session, [NORMAL], older_than_s=5, limit=9),
    "unfinished_counts": lambda session: jobs.counts(session, finished=False),
    **{
        f"list_verdicts_of_{name}": lambda session, name=name, value=value: verdicts.list_verdicts(
            session, verdicts.VerdictFilter(**{name: value}), limit=9
        )
        for name, value in {
            "label": Label.FAKE,
            "reason": RejectReason.EMPTY,
            "release": "r",
            "sha256": "a" * 64,
            "tenant": "acme",
        }.items()
    },
}


def plans(store: Store, work: Callable[[Session], object]) -> list[str]:
    """SQLite's plan of each statement that the work runs."""
    seen: list[tuple[str, Any]] = []

    def note(_: object, __: object, statement: str, parameters: Any, ___: object, many: bool) -> None:
        if statement.split(maxsplit=1)[0] in {"SELECT", "UPDATE", "WITH"}:
            seen.append((statement, parameters[0] if many else parameters))

    event.listen(store.engine, "before_cursor_execute", note)
    store.run(work)
    event.remove(store.engine, "before_cursor_execute", note)

    def explain(session: Session) -> list[str]:
        connection = session.connection()
        return [
            f"{row[3]} [{statement}]"
            for statement, parameters in seen
            for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
        ]

    return store.run(explain)


@pytest.mark.parametrize("name", QUERIES)
def test_no_frequent_query_reads_a_whole_table_or_sorts_it(sqlite_store: Store, name: str) -> None:
    steps = plans(sqlite_store, QUERIES[name])
    assert steps
    for step in steps:
        full = step.startswith(("SCAN jobs", "SCAN verdicts")) and "USING" not in step.partition(" [")[0]
        assert not full, step
        assert not step.startswith("USE TEMP B-TREE FOR ORDER BY"), step


OF_RECEIPTS: dict[str, Callable[[Session], object]] = {
    "still_open": receipts.still_open,
    "releases_owed": receipts.releases_owed,
    "left": lambda session: personal.left(session, images=["a" * 64], since=personal.moment(session)),
}


@pytest.mark.parametrize("name", OF_RECEIPTS)
def test_no_receipt_that_is_closed_and_names_no_release_is_looked_at(sqlite_store: Store, name: str) -> None:
    steps = [step for step in plans(sqlite_store, OF_RECEIPTS[name]) if "erasures" in step.partition(" [")[0]]
    assert steps
    for step in steps:
        assert "USING INDEX ix_erasures_" in step, step


BY_ID: dict[str, Callable[[Session, list[str]], object]] = {
    "attempts_of": jobs.attempts_of,
    "claim": lambda session, ids: jobs.claim(session, ids, owner="me", lease_s=1, max_attempts=3),
    "mark_published": jobs.mark_published,
    "verdicts": lambda session, ids: verdicts.write(session, [judged(job_id) for job_id in ids]),
}


@pytest.mark.parametrize("name", BY_ID)
def test_jobs_named_by_id_are_found_by_id_however_old_the_statistics(postgres_store: Store, name: str) -> None:
    postgres_store.run(lambda session: session.execute(text("ANALYZE jobs")))
    ids = accept(postgres_store, *(f"s3://b/{number}" for number in range(3000)))
    seen: list[tuple[str, Any]] = []

    def note(_: object, __: object, statement: str, parameters: Any, ___: object, ____: bool) -> None:
        seen.append((statement, parameters))

    event.listen(postgres_store.engine, "before_cursor_execute", note)
    postgres_store.run(lambda session: BY_ID[name](session, ids[:64]))
    event.remove(postgres_store.engine, "before_cursor_execute", note)

    def explain(session: Session) -> set[str]:
        session.execute(text("SET LOCAL enable_seqscan = off"))
        steps = [
            row[0]
            for statement, parameters in seen
            for row in session.connection().exec_driver_sql(f"EXPLAIN {statement}", parameters)
        ]
        return {index for step in steps for index in re.findall(r"\b(?:ix|pk)_jobs\w*", step)}

    assert postgres_store.run(explain) == {"pk_jobs"}
