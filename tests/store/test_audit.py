"""The audit: one chain under many writers, and tables of record that lose nothing behind its back."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import text

from code_worker.errors import StoreError
from code_worker.store import audit, policies
from code_worker.store.audit import FIRST, AuditFilter, Entry
from code_worker.store.engine import Session, Store
from code_worker.store.learning import labels, snapshots
from code_worker.store.learning.labels import NewLabel
from tests.store.acts import accept, judged, write

KEPT = ("verdicts", "labels", "policies", "snapshots", "alias_moves")


def record(store: Store, action: str = "release.promote", **more: Any) -> Entry:
    fields: dict[str, Any] = {"actor": "alice", "subject": "release-1", "details": {}, **more}
    return store.run(lambda session: audit.record(session, action=action, **fields))


def run_sql(store: Store, *statements: str) -> None:
    def work(session: Session) -> None:
        for statement in statements:
            session.execute(text(statement))

    store.run(work)


def fill(store: Store) -> None:
    """One row in each table of record but `alias_moves`, and one entry: of the policy."""
    (job_id,) = accept(store, "s3://b/a.jpg")
    write(store, judged(job_id))

    def work(session: Session) -> None:
        labels.add(session, [NewLabel("a" * 64, "fake", "alice", "api")])
        policies.put(session, low=0.4, high=0.6, by="alice")
        snapshots.add(session, id=job_id, digest="d" * 64, rule="latest", counts={}, members=snapshots.pack([]))

    store.run(work)


def count(store: Store, table: str) -> int:
    return store.run(lambda session: session.scalar(text(f"SELECT count(*) FROM {table}")) or 0, write=False)


def unguard(store: Store, verb: str) -> None:
    """What somebody with the owner's rights does first."""
    if store.dialect == "postgresql":
        run_sql(store, "ALTER TABLE audit DISABLE TRIGGER USER")
    else:
        run_sql(store, f"DROP TRIGGER audit_no_{verb}")


def test_entries_follow_each_other(store: Store) -> None:
    first = record(store, details={"reason": "größer\0", "moved": [1, 2.5, None]})
    second = record(store, "release.rollback", actor="bob")
    assert (first.seq, first.previous) == (1, FIRST)
    assert (second.seq, second.previous) == (2, first.hash)
    read = store.run(lambda session: audit.list_entries(session, limit=10), write=False)
    assert read == [second, first]
    assert json.loads(read[1].details) == {"reason": "größer\0", "moved": [1, 2.5, None]}
    assert first.at <= second.at
    assert audit.verify(store) == audit.Verified(2, second.hash, ())


def test_nothing_recorded_is_a_chain_that_holds(store: Store) -> None:
    assert audit.verify(store) == audit.Verified(0, FIRST, ())


def test_entries_are_found_by_what_they_say(store: Store) -> None:
    made = [record(store), record(store, "release.rollback"), record(store, "policy.put", actor="bob", subject="*")]

    def found(**wanted: Any) -> list[int]:
        read = partial(audit.list_entries, wanted=AuditFilter(**wanted), limit=10)
        return [entry.seq for entry in store.run(read, write=False)]

    assert found(actor="bob") == [3]
    assert found(action="release.") == [2, 1]
    assert found(action="release") == []
    assert found(action="release.promote", subject="release-1") == [1]
    # SQLite's clock counts milliseconds: a fast machine makes two entries in one.
    assert found(since=made[2].at) == [entry.seq for entry in reversed(made) if entry.at == made[2].at]
    assert found(since=made[2].at + timedelta(milliseconds=1)) == []
    assert found(until=made[0].at) == []
    page = partial(audit.list_entries, after=3, limit=1)
    assert [entry.seq for entry in store.run(page, write=False)] == [2]
    assert store.run(lambda session: audit.last(session, action="release.promote", subject="release-1")) == made[0]
    assert [entry.seq for entry in audit.stream(store, page=2)] == [1, 2, 3]


def test_what_is_rolled_back_leaves_no_entry(store: Store) -> None:
    def work(session: Session) -> None:
        audit.record(session, actor="alice", action="a.b", subject="c")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.run(work)
    assert record(store).seq == 1


def test_details_that_are_no_json_are_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="JSON"):
        record(store, details={"score": float("nan")})


def test_many_writers_make_one_chain(store: Store) -> None:
    def writer(number: int) -> None:
        for turn in range(10):
            record(store, actor=f"writer {number}", subject=str(turn))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(writer, range(6)))
    found = audit.verify(store)
    assert (found.entries, found.flaws) == (60, ())
    turns = [(entry.actor, int(entry.subject)) for entry in audit.stream(store)]
    for number in range(6):
        assert [turn for actor, turn in turns if actor == f"writer {number}"] == list(range(10))


@pytest.mark.parametrize(
    "statement",
    ["UPDATE audit SET actor = 'bob'", "DELETE FROM audit", "UPDATE audit SET details = details WHERE seq = 1"],
)
def test_the_database_refuses_to_change_an_entry(store: Store, statement: str) -> None:
    before = record(store)
    with pytest.raises(StoreError, match="audit entries are immutable"):
        run_sql(store, statement)
    assert audit.verify(store) == audit.Verified(1, before.hash, ())


def test_sqlite_refuses_to_replace_an_entry(sqlite_store: Store) -> None:
    record(sqlite_store)
    values = "1, '2026-01-01 00:00:00.000000', 'bob', 'a.b', 'c', '{}', 'd', 'e'"
    with pytest.raises(StoreError, match="audit entries are immutable"):
        run_sql(sqlite_store, f"REPLACE INTO audit VALUES ({values})")


@pytest.mark.parametrize("table", ["audit", *KEPT])
def test_postgresql_refuses_to_truncate(postgres_store: Store, table: str) -> None:
    with pytest.raises(StoreError, match=r"immutable|are kept"):
        run_sql(postgres_store, f"TRUNCATE {table} CASCADE")


@pytest.mark.parametrize(
    ("statement", "verb", "flaws"),
    [
        ("UPDATE audit SET actor = 'mallory' WHERE seq = 2", "update", {2: "its hash"}),
        ("UPDATE audit SET details = '{}' WHERE seq = 1", "update", {1: "its hash"}),
        ("DELETE FROM audit WHERE seq = 2", "delete", {3: "entries 2 to 2 are missing"}),
        ("DELETE FROM audit WHERE seq = 1", "delete", {2: "entries 1 to 1 are missing"}),
        (f"UPDATE audit SET hash = '{'0' * 64}' WHERE seq = 1", "update", {1: "its hash", 2: "does not follow"}),
    ],
)
def test_a_chain_that_was_tampered_with_does_not_hold(
    store: Store, statement: str, verb: str, flaws: dict[int, str]
) -> None:
    for number in range(3):
        record(store, details={"number": number})
    unguard(store, verb)
    run_sql(store, statement)
    found = audit.verify(store)
    assert {flaw.seq for flaw in found.flaws} == set(flaws)
    for seq, problem in flaws.items():
        assert any(flaw.seq == seq and problem in flaw.problem for flaw in found.flaws), found


@pytest.mark.parametrize("table", KEPT)
def test_tables_of_record_lose_no_row_behind_the_audit(store: Store, table: str) -> None:
    fill(store)
    if table == "alias_moves":
        run_sql(
            store,
            "INSERT INTO releases (id, manifest_sha256, location, manifest, created_at, source, status) "
            "VALUES ('r', 'm', 'l', '{}', '2026-01-01', 's', 'ready')",
            "INSERT INTO alias_moves (alias, release_id, at, by, reason) VALUES ('a', 'r', '2026-01-01', 'b', '')",
        )
    with pytest.raises(StoreError, match=f"{table} are kept: only erasure and retention remove them"):
        run_sql(store, f"DELETE FROM {table}")
    assert count(store, table) == 1


def test_a_removal_with_an_entry_goes_through(store: Store) -> None:
    fill(store)

    def work(session: Session) -> None:
        entry = audit.record(session, actor="alice", action="erase", subject="tenant acme", details={"labels": 1})
        with audit.removal(session, entry):
            for table in ("verdicts", "labels", "policies"):
                session.execute(text(f"DELETE FROM {table}"))
            session.execute(text("UPDATE snapshots SET rule = 'rewritten'"))

    store.run(work)
    assert [count(store, table) for table in ("verdicts", "labels", "policies", "snapshots", "removals")] == [
        *(0, 0, 0),
        *(1, 0),
    ]
    assert audit.verify(store).flaws == ()
    with pytest.raises(StoreError, match="snapshots are immutable"):
        run_sql(store, "UPDATE snapshots SET rule = 'again'")


def test_a_removal_ends_with_its_block(store: Store) -> None:
    fill(store)

    def work(session: Session) -> None:
        entry = audit.record(session, actor="alice", action="erase", subject="x")
        with audit.removal(session, entry):
            pass
        session.execute(text("DELETE FROM labels"))

    with pytest.raises(StoreError, match="labels are kept"):
        store.run(work)
    assert (count(store, "labels"), count(store, "audit")) == (1, 1)


def test_a_removal_that_is_left_open_cannot_be_committed(store: Store) -> None:
    fill(store)

    def work(session: Session) -> None:
        entry = audit.record(session, actor="alice", action="erase", subject="x")
        audit.removal(session, entry).__enter__()
        session.execute(text("DELETE FROM labels"))

    with pytest.raises(StoreError, match="the database refused"):
        store.run(work)
    assert (count(store, "labels"), count(store, "removals")) == (1, 0)


def test_a_removal_without_its_entry_is_refused(store: Store) -> None:
    fill(store)
    with pytest.raises(StoreError, match="the database refused"):
        run_sql(store, "INSERT INTO removals (audit_seq, closed) VALUES (99, -99)", "DELETE FROM labels")
    assert count(store, "labels") == 1


def test_the_leave_of_one_transaction_is_none_for_another(postgres_store: Store) -> None:
    fill(postgres_store)

    def work(session: Session) -> None:
        entry = audit.record(session, actor="alice", action="erase", subject="x")
        with audit.removal(session, entry), pytest.raises(StoreError, match="labels are kept"):
            run_sql(postgres_store, "DELETE FROM labels")

    postgres_store.run(work)
    assert count(postgres_store, "labels") == 1
