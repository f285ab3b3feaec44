"""The ledger's rates: enqueueing, and writing verdicts, beside bare inserts into the same database.

    python -m bench.ledger intake [--references 100000] [--sizes 10000 100000 1000000] [--rounds 5] [--json FILE]
    python -m bench.ledger verdicts [--jobs 8000] [--rounds 5] [--json FILE]

`intake` enqueues into PostgreSQL and Redis; beside it, SQLAlchemy writes rows of an id and a URI with `executemany`
and publishes nothing. `verdicts` claims jobs and records their verdicts, in batches as messages bring them, beside
`executemany` of rows that are as wide. Both commit per batch. PostgreSQL waits for its disk, as it does by default.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Column, MetaData, Table, Text, Uuid, insert, select

from bench.postgres import ledger, postgres
from bench.rounds import alternate, compared, print_table, rows_of, write_json
from code_worker.client import Client
from code_worker.settings import Settings
from code_worker.store import jobs, verdicts
from code_worker.store.engine import Store
from code_worker.store.ids import uuid7
from code_worker.store.models import VerdictRow
from code_worker.types import ImageFacts, Job, Label, Outcome, Provenance, Verdict
from code_worker.wire import chunks
from tests.servers import RedisServer

BATCHES = (64, 500)
ROWS_PER_COMMIT = 1024
INTAKE_BAR_PER_S = 15_000
BARE = Table("bare_references", MetaData(), Column("id", Uuid(as_uuid=False), primary_key=True), Column("uri", Text))
BARE_VERDICTS = Table(
    "bare_verdicts", MetaData(), *(Column(column.name, column.type) for column in VerdictRow.__table__.columns)
)
OURS = "claim to verdict"
TITLES = ("what", "who", "rows/s", "ours is times", "bar")


def main() -> None:
    """Runs the part that the command line names."""
    parser = argparse.ArgumentParser(prog="bench.ledger")
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("intake", "verdicts"):
        part = parts.add_parser(name)
        part.add_argument("--rounds", type=int, default=5)
        part.add_argument("--json", type=Path)
    parts.choices["intake"].add_argument("--references", type=int, default=100_000)
    parts.choices["intake"].add_argument("--sizes", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parts.choices["verdicts"].add_argument("--jobs", type=int, default=8_000)
    producer = parts.add_parser("produce", help="What `intake` starts, to see the memory of one producer.")
    producer.add_argument("database_url")
    producer.add_argument("broker_url")
    producer.add_argument("references", type=int)
    chosen = parser.parse_args()
    {"intake": intake, "verdicts": verdict_path, "produce": produce}[chosen.part](chosen)


def intake(chosen: argparse.Namespace) -> None:
    """References per second into PostgreSQL and Redis, and the producer's memory by their number."""
    with postgres() as server, RedisServer() as broker, tempfile.TemporaryDirectory() as data:
        url = server.new_database()
        with ledger(url) as store:
            BARE.create(store.engine)
            settings = Settings(data_dir=Path(data), database_url=url, broker_url=broker.url)
            with closing(Client(settings)) as client:
                enqueue(client, ROWS_PER_COMMIT)
                contestants = {"enqueue_stream": partial(enqueue, client), "bare executemany": partial(bare, store)}
                rates = alternate(
                    list(contestants), chosen.rounds, lambda name: rate(contestants[name], chosen.references)
                )
        memory = {str(size): produced(url, broker.url, size) for size in chosen.sizes}
    found = compared(rates, "enqueue_stream", {})
    ours = found["enqueue_stream"]
    ours |= {"bar": INTAKE_BAR_PER_S, "met": ours["per_s"]["median"] >= INTAKE_BAR_PER_S}
    print_table(TITLES, list(rows_of(f"{chosen.references} references", found)))
    print_table(("references", "rows/s", "peak MB"), [(size, *one.values()) for size, one in memory.items()])
    write_json(chosen.json, {"rates": found, "memory": memory})


def rate(work: Callable[[int], object], number: int) -> float:
    """How many a second."""
    began = time.perf_counter()
    work(number)
    return number / (time.perf_counter() - began)


def references(number: int) -> Iterator[str]:
    """URIs as object stores have them, made one at a time."""
    return (f"s3://photographs/2024/11/{place:09d}.jpg" for place in range(number))


def enqueue(client: Client, number: int) -> None:
    """Ours, ids thrown away as they come."""
    for _ in client.enqueue_stream(references(number)):
        pass


def bare(store: Store, number: int) -> None:
    """What SQLAlchemy does by itself."""
    for some in chunks(references(number), ROWS_PER_COMMIT):
        rows = [{"id": uuid7(), "uri": uri} for uri in some]
        with store.engine.begin() as connection:
            connection.execute(insert(BARE), rows)


def produced(database_url: str, broker_url: str, number: int) -> dict[str, float]:
    """Rate and peak memory of a process that enqueues so many and does nothing else."""
    command = [sys.executable, "-m", "bench.ledger", "produce", database_url, broker_url, str(number)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures: dict[str, float] = json.loads(said)
    return figures


def produce(chosen: argparse.Namespace) -> None:
    """Enqueues and says how fast, and how much memory it took at most."""
    with tempfile.TemporaryDirectory() as data:
        settings = Settings(data_dir=Path(data), database_url=chosen.database_url, broker_url=chosen.broker_url)
        with closing(Client(settings)) as client:
            per_s = rate(partial(enqueue, client), chosen.references)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"per_s": round(per_s), "peak_mb": round(peak, 1)}))


def verdict_path(chosen: argparse.Namespace) -> None:
    """Verdicts per second from claim to the finished job, on both databases."""
    found: dict[str, Any] = {}
    with postgres() as server, tempfile.TemporaryDirectory() as data:
        for kind, url in (("postgresql", server.new_database()), ("sqlite", f"sqlite:///{data}/ledger.db")):
            with ledger(url) as store:
                BARE_VERDICTS.create(store.engine)
                for batch in BATCHES:
                    found[f"{kind}, batches of {batch}"] = one_size(store, chosen.jobs, batch, chosen.rounds)
    print_table(TITLES, [row for label, figures in found.items() for row in rows_of(label, figures)])
    write_json(chosen.json, found)


def one_size(store: Store, number: int, batch: int, rounds: int) -> dict[str, Any]:
    """Ours and bare inserts in alternating rounds; acceptance is not timed."""

    def measure(name: str) -> float:
        made = [jobs.NewJob(uri) for uri in references(number)]
        for some in chunks(made, ROWS_PER_COMMIT):
            store.run(partial(jobs.accept, jobs=some))
        ids = [job.id for job in made]
        if name == OURS:
            return rate(lambda _: claim_and_write(store, ids, batch), number)
        rows = [written | {"id": job_id} for job_id in ids]
        return rate(lambda _: bare_verdicts(store, rows, batch), number)

    (first,) = store.run(partial(jobs.accept, jobs=[jobs.NewJob("s3://photographs/first.jpg")]))
    claim_and_write(store, [first], 1)
    with store.engine.connect() as connection:
        statement = select(*VerdictRow.__table__.columns).where(VerdictRow.job_id == first)
        written = dict(connection.execute(statement).mappings().one())
    return compared(alternate([OURS, "bare executemany"], rounds, measure), OURS, {})


def claim_and_write(store: Store, ids: Sequence[str], batch: int) -> None:
    """What a worker's ledger does for each message, judging left out."""
    for some in chunks(ids, batch):
        claimed = store.run(partial(jobs.claim, ids=some, owner="bench", lease_s=600.0, max_attempts=3))
        store.run(partial(verdicts.write, verdicts=[judged(job) for job in claimed]))


def judged(job: Job) -> Verdict:
    """A verdict with every field filled."""
    return Verdict(
        job.id,
        job.uri,
        Outcome.JUDGED,
        label=Label.FAKE,
        score=0.75,
        facts=ImageFacts("a" * 64, 123_456, "JPEG", 640, 480, "RGB", '"etag"', "v1"),
        provenance=Provenance("release-1", "b" * 64, "linear", "c" * 64, "published", 0.5, 0.5, "1.0"),
        timings_ms={"fetch": 1.5, "decode": 2.5, "encode": 30.5},
        revision=job.revision,
    )


def bare_verdicts(store: Store, rows: Sequence[dict[str, Any]], batch: int) -> None:
    """The same columns into a table without an index, a constraint or a job."""
    for some in chunks(rows, batch):
        with store.engine.begin() as connection:
            connection.execute(insert(BARE_VERDICTS), some)


if __name__ == "__main__":
    main()
