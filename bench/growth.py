"""What history costs: the ledger's frequent statements on PostgreSQL with 10³ to 10⁷ finished jobs and verdicts.

    python -m bench.growth [--sizes 1000 10000 100000 1000000 10000000] [--rounds 30] [--json FILE] [--explain FILE]

Finished jobs and their verdicts are made inside the server; 2,000 jobs wait all the while. At each size every piece
of work runs `--rounds` times in a transaction that is rolled back; the median and range are printed in milliseconds,
without the commit. With `--directory` the database is kept there, so that a later run goes on from what it finds, and
`--pause-after` ends a run early, between two portions of rows, for a machine that others need too.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import event, text

from bench.postgres import ledger
from bench.rounds import print_table, spread, write_json
from code_worker.store import embeddings, jobs, verdicts
from code_worker.store.engine import Session, Store
from code_worker.types import Label, RejectReason
from code_worker.wire import NORMAL, QUEUES
from tests.servers import PostgresServer

SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
PORTION = 500_000
WAITING = 2_000
PAGE = 50
BATCH = 64
MOST_EMBEDDINGS = 1_000_000
WAITS_S = dict.fromkeys(QUEUES, 3600.0)
DATABASE = "growth"
DROPPABLE = "tablename IN ('jobs', 'verdicts') AND indexname LIKE 'ix_%'"

# Ids as the product makes them: in the order of time, the number of the row at the end.
ID = "(lpad(to_hex(1700000000000 + n), 12, '0') || '7000{kind}000' || lpad(to_hex(n), 12, '0'))::uuid"
MADE_AT = "now() - make_interval(secs => ({last} - n) * 0.01 + 3600)"
JOBS = f"""
INSERT INTO jobs (id, uri, tenant, priority, queue, metadata, state, attempts, faults, revision, created_at,
                  published_at, claimed_at, finished_at)
SELECT {ID.format(kind=8)}, 's3://photographs/' || n, 'tenant-' || n % 50, 4, 'code_worker.normal', '{{}}',
       CASE WHEN n % 1000 = 0 THEN 'quarantined' ELSE 'done' END, 0, 0, 0, made, made, made, made
FROM (SELECT n, {MADE_AT} AS made
      FROM generate_series(CAST(:first AS bigint), CAST(:last AS bigint)) AS n) AS numbers"""
VERDICTS = f"""
INSERT INTO verdicts (id, job_id, revision, outcome, label, score, reason, detail, uri, sha256, release, tenant,
                      metadata, timings_ms, created_at)
SELECT {ID.format(kind=9)}, {ID.format(kind=8)}, 0,
       CASE WHEN n % 1000 = 0 THEN 'rejected' ELSE 'judged' END,
       CASE WHEN n % 1000 = 0 THEN NULL WHEN n % 3 = 0 THEN 'fake' ELSE 'real' END,
       CASE WHEN n % 1000 = 0 THEN NULL ELSE 0.5 END,
       CASE WHEN n % 1000 = 0 THEN 'quarantined' END,
       '', 's3://photographs/' || n, encode(sha256(n::text::bytea), 'hex'), 'release-' || n / 1000000,
       'tenant-' || n % 50, '{{}}', '{{}}', {MADE_AT}
FROM generate_series(CAST(:first AS bigint), CAST(:last AS bigint)) AS n"""
EMBEDDINGS = """
INSERT INTO embeddings (encoder_sha256, sha256, vector, created_at)
SELECT repeat('e', 64), encode(sha256(n::text::bytea), 'hex'), decode(repeat('00', 768), 'hex'), now()
FROM generate_series(CAST(:first AS bigint), CAST(:last AS bigint)) AS n"""


def main() -> None:
    """Builds each size, measures, prints."""
    parser = argparse.ArgumentParser(prog="bench.growth")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--pause-after", type=float, metavar="SECONDS", default=float("inf"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--explain", type=Path)
    chosen = parser.parse_args()
    deadline = time.monotonic() + chosen.pause_after
    found: dict[str, dict[str, Any]] = {}
    with place(chosen.directory) as directory, server(directory) as url, ledger(url) as store:
        ids = waiting_jobs(store)
        # What was built before cannot be measured any smaller.
        for size in sorted(size for size in chosen.sizes if size >= finished(store)):
            if not grow(store, size, deadline):
                print(f"paused on the way to {size}; run again with the same --directory")
                break
            found[str(size)] = {
                name: measured(store, work, chosen.rounds) for name, work in statements(ids, size).items()
            }
            # After each size: the next may take hours, or be interrupted.
            write_json(chosen.json, {"median_ms": found})
            if chosen.explain:
                plans = [f"== {name}\n{explained(store, work)}\n" for name, work in statements(ids, size).items()]
                chosen.explain.write_text("\n".join(plans), encoding="utf-8")
    if found:
        report(found)


@contextmanager
def place(directory: Path | None) -> Iterator[Path]:
    """Where the database lies; without a directory of the caller's it is deleted at the end."""
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="code-worker-growth-") as made:
        yield Path(made)


@contextmanager
def server(directory: Path) -> Iterator[str]:
    """A server on the directory, and the URL of its one database."""
    running = PostgresServer(directory / "data")
    try:
        running.configure(fsync=None, full_page_writes=None, max_wal_size="2GB", maintenance_work_mem="512MB")
        yield running.database(DATABASE)
    finally:
        running.stop()


def waiting_jobs(store: Store) -> list[str]:
    """Ids of jobs that wait, published and unclaimed, made at the first run."""
    found = store.run(lambda session: jobs.list_jobs(session, jobs.JobFilter(tenant="waiting"), limit=WAITING))
    if found:
        return [job.id for job in found]
    made = [jobs.NewJob(f"s3://waiting/{number}", tenant="waiting", key=str(number)) for number in range(WAITING)]
    ids = store.run(partial(jobs.accept, jobs=made))
    store.run(partial(jobs.mark_published, ids=ids, wait_s=86_400.0))
    return ids


def grow(store: Store, size: int, deadline: float) -> bool:
    """Adds finished jobs up to so many, indexes rebuilt afterwards; False when the time was up before."""
    there = finished(store)
    if there < size:
        definitions = dropped_indexes(store)
        while there < size and time.monotonic() < deadline:
            last = min(size, there + PORTION)
            fill(store, there + 1, last)
            there = last
        if there < size:
            return False
        for definition in definitions:
            on_server(store, definition)
    if time.monotonic() > deadline:
        return False
    for table in ("jobs", "verdicts", "embeddings"):
        on_server(store, f"ANALYZE {table}")
    return True


def finished(store: Store) -> int:
    """How many finished jobs were made."""
    with store.engine.connect() as connection:
        count = text("SELECT count(*) FROM verdicts WHERE release LIKE 'release-%'")
        return int(connection.execute(count).scalar_one())


def dropped_indexes(store: Store) -> list[str]:
    """Drops every index that no constraint needs; returns what makes them again, kept in the database meanwhile."""
    on_server(store, "CREATE TABLE IF NOT EXISTS dropped_indexes (definition text)")
    on_server(
        store,
        "INSERT INTO dropped_indexes SELECT replace(indexdef, 'INDEX ', 'INDEX IF NOT EXISTS ') FROM pg_indexes "
        f"WHERE {DROPPABLE} AND NOT EXISTS (SELECT FROM dropped_indexes)",
    )
    with store.engine.connect() as connection:
        found = list(connection.execute(text("SELECT definition FROM dropped_indexes")).scalars())
        names = list(connection.execute(text(f"SELECT indexname FROM pg_indexes WHERE {DROPPABLE}")).scalars())
    for name in names:
        on_server(store, f"DROP INDEX {name}")
    return found


def fill(store: Store, first: int, last: int) -> None:
    """One portion of finished jobs, their verdicts and, up to a million, embeddings."""
    span = {"first": first, "last": last}
    with store.engine.begin() as connection:
        # The rows refer to each other by construction; checking each would be most of the time.
        for statement in ("SET LOCAL session_replication_role = replica", "SET LOCAL statement_timeout = 0"):
            connection.execute(text(statement))
        connection.execute(text(JOBS.replace("{last}", "CAST(:last AS bigint)")), span)
        connection.execute(text(VERDICTS.replace("{last}", "CAST(:last AS bigint)")), span)
        if first <= MOST_EMBEDDINGS:
            connection.execute(text(EMBEDDINGS), {**span, "last": min(last, MOST_EMBEDDINGS)})


def on_server(store: Store, statement: str) -> None:
    """A statement that may take long."""
    with store.engine.begin() as connection:
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text(statement))


def statements(ids: list[str], size: int) -> dict[str, Callable[[Session], object]]:
    """What is measured, by name; each leaves as many jobs waiting as it found."""
    batch = ids[:BATCH]
    hashes = [_sha256(number) for number in range(1, BATCH + 1)]

    def claim(session: Session) -> None:
        claimed = jobs.claim(session, batch, owner="bench", lease_s=600.0, max_attempts=3)
        faults = [jobs.Fault(job.id, RejectReason.FETCH_FAILED, "", -1.0, blame=False) for job in claimed]
        jobs.put_back(session, faults)
        jobs.mark_published(session, batch, wait_s=86_400.0)

    def sweep(session: Session) -> None:
        jobs.exhausted(session, max_attempts=3, limit=1000)
        for queue in QUEUES:
            jobs.queue_wait_s(session, queue)
        jobs.due(session, limit=1000, min_wait_s=WAITS_S)
        jobs.with_lost_messages(session, [NORMAL], older_than_s=1e6, limit=1000)

    again = [jobs.NewJob(f"s3://waiting/{number}", tenant="waiting", key=str(number)) for number in range(BATCH)]
    middle = ID.format(kind=9).replace("n", str(size // 2))
    return {
        "verdicts list": lambda session: verdicts.list_verdicts(session, limit=PAGE),
        "verdicts list, a page amid history": lambda session: verdicts.list_verdicts(
            session, after=str(session.execute(text(f"SELECT {middle}")).scalar_one()), limit=PAGE
        ),
        "verdicts list, label fake": lambda session: verdicts.list_verdicts(
            session, verdicts.VerdictFilter(label=Label.FAKE), limit=PAGE
        ),
        "jobs list": lambda session: jobs.list_jobs(session, limit=PAGE),
        "jobs list, a tenant": lambda session: jobs.list_jobs(session, jobs.JobFilter(tenant="tenant-7"), limit=PAGE),
        "enqueue 64": lambda session: jobs.accept(session, [jobs.NewJob(f"s3://new/{n}") for n in range(BATCH)]),
        "enqueue 64 known keys": lambda session: jobs.accept(session, again),
        "sweeper's pass": sweep,
        "claim 64 and put back": claim,
        "64 known embeddings": lambda session: embeddings.known(session, "e" * 64, hashes),
    }


def _sha256(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def measured(store: Store, work: Callable[[Session], object], rounds: int) -> dict[str, float]:
    """Milliseconds of a transaction; nothing that it writes is kept."""
    taken = []
    for number in range(rounds + 3):
        began = time.perf_counter()
        with store.engine.connect() as connection, closing(Session(connection)) as session:
            work(session)
            session.flush()
            elapsed = (time.perf_counter() - began) * 1e3
            session.rollback()
        if number >= 3:
            taken.append(elapsed)
    return spread(taken)


def explained(store: Store, work: Callable[[Session], object]) -> str:
    """The server's plan of each statement of a piece of work, with what it really cost."""
    seen: list[tuple[str, Any]] = []

    def note(_: object, __: object, statement: str, parameters: Any, ___: object, many: bool) -> None:
        seen.append((statement, parameters[0] if many else parameters))

    with store.engine.connect() as connection, closing(Session(connection)) as session:
        event.listen(store.engine, "before_cursor_execute", note)
        work(session)
        event.remove(store.engine, "before_cursor_execute", note)
        session.rollback()
    lines: list[str] = []
    with store.engine.connect() as connection:
        for statement, parameters in seen:
            rows = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, COSTS OFF, BUFFERS OFF) {statement}", parameters)
            lines += [row[0][:110] for row in rows]
            connection.rollback()
    return "\n".join(lines)


def report(found: dict[str, dict[str, Any]]) -> None:
    """Medians by size, and the largest size beside the smallest."""
    sizes = list(found)
    rows = []
    for name in found[sizes[0]]:
        medians = [found[size][name]["median"] for size in sizes]
        ranges = ["{median} ({least} to {most})".format(**found[size][name]) for size in sizes]
        rows.append((name, *ranges, round(medians[-1] / medians[0], 2)))
    print_table(("ms", *sizes, "last ÷ first"), rows)


if __name__ == "__main__":
    main()
