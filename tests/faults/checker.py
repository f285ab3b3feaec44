"""The checker: after every fault, six statements about the ledger, the broker and the database that must hold.

A) what was accepted is decided; B) once; C) nothing else is; D) by a release that was live while the job ran, with
the manifest that is registered; E) the broker holds nothing unacknowledged and the database no idle transaction;
F) nothing runs beyond two leases. And no process met an error that it did not know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import redis
from sqlalchemy import text

if TYPE_CHECKING:
    from code_worker.store.engine import Store

__all__ = ["broker_violations", "idle_violations", "ledger_violations", "log_violations", "overdue"]

_KNOWN_TO_CELERY = (
    "Couldn't ack",
    "Couldn't reject",
    "consumer: Cannot connect",
    "consumer: Connection to broker lost",
)
# A worker looks every few seconds, waits up to two more and loads the release before it swaps: ten seconds, but a
# shared machine may be slow, or stand still for a while.
_FOLLOWS_WITHIN = timedelta(seconds=60)


def _rows(store: Store, statement: str) -> list[Mapping[str, Any]]:
    with store.engine.connect() as connection:
        return [dict(row) for row in connection.execute(text(statement)).mappings()]


def _id(value: object) -> str:
    """An id as SQLite and PostgreSQL keep it, in one form."""
    return str(value).replace("-", "")


def ledger_violations(store: Store, accepted: Collection[str]) -> Iterator[str]:
    """A to D, when everything has come to rest; `accepted` are the ids that producers were given."""
    jobs = {_id(row["id"]): row["state"] for row in _rows(store, "select id, state from jobs")}
    verdicts = _rows(
        store, "select job_id, revision, outcome, release, manifest_sha256, head, created_at from verdicts"
    )
    promised = {_id(job) for job in accepted} | set(jobs)
    first = [_id(row["job_id"]) for row in verdicts if row["revision"] == 0]
    for job in sorted(promised - set(jobs)):
        yield f"A: job {job} was accepted and is not in the ledger"
    for job, state in jobs.items():
        if state not in {"done", "quarantined"}:
            yield f"A: job {job} is still {state}"
    for job in sorted(promised - set(first)):
        yield f"A: job {job} has no verdict"
    for job, count in Counter(first).items():
        if count > 1:
            yield f"B: job {job} has {count} verdicts"
    for job in sorted(set(first) - promised):
        yield f"C: a verdict for job {job}, which nobody accepted"
    yield from _release_violations(store, [row for row in verdicts if row["outcome"] == "judged"])


def _time(value: object) -> datetime:
    moment = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    return moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment


def _release_violations(store: Store, judged: list[Mapping[str, Any]]) -> Iterator[str]:
    known = {row["id"]: row for row in _rows(store, "select id, manifest_sha256, manifest from releases")}
    moves = _rows(store, "select release_id, at from alias_moves where alias = 'champion' order by id")
    begins = [_time(move["at"]) for move in moves]
    ends = [begin + _FOLLOWS_WITHIN for begin in begins[1:]]
    spans = [(move["release_id"], *span) for move, span in zip(moves, zip_longest(begins, ends), strict=True)]
    for verdict in judged:
        release, at = verdict["release"], _time(verdict["created_at"])
        live = [begin <= at and (end is None or at <= end) for champion, begin, end in spans if champion == release]
        if not any(live):
            yield f"D: job {verdict['job_id']} was judged by {release}, which was not live at {at}"
        elif verdict["manifest_sha256"] != known[release]["manifest_sha256"]:
            yield f"D: job {verdict['job_id']} names another manifest than {release} has"
        elif verdict["head"] not in str(known[release]["manifest"]):
            yield f"D: job {verdict['job_id']} names head {verdict['head']}, which {release} lacks"


def overdue(store: Store, lease_s: int) -> Iterator[str]:
    """F: jobs that run although their lease lapsed a whole lease ago."""
    late = (
        f"due_at < now() - interval '{lease_s} seconds'"
        if store.dialect == "postgresql"
        else f"due_at < strftime('%Y-%m-%d %H:%M:%f000', 'now', '-{lease_s} seconds')"
    )
    for row in _rows(store, f"select id, owner, due_at from jobs where state = 'running' and {late}"):
        yield f"F: job {row['id']} is claimed by {row['owner']} since long before {row['due_at']}"


def broker_violations(broker_url: str, prefix: str) -> Iterator[str]:
    """E, once no worker runs any more: what the broker still holds."""
    with redis.Redis.from_url(broker_url, socket_timeout=60) as server:
        held = (server.hlen(f"{prefix}unacked"), server.zcard(f"{prefix}unacked_index"))
    if any(held):
        yield f"E: the broker holds {held[0]} unacknowledged messages and {held[1]} of their times"


def idle_violations(store: Store) -> Iterator[str]:
    """E: transactions that somebody left open; SQLite has no list of them."""
    if store.dialect == "postgresql":
        query = (
            "select count(*) as idle from pg_stat_activity where state like 'idle in transaction%' "
            "and datname = current_database() and pid <> pg_backend_pid()"
        )
        if idle := _rows(store, query)[0]["idle"]:
            yield f"E: {idle} transactions are open and idle"


def log_violations(log: list[dict[str, Any]], tolerated: Collection[str] = ()) -> Iterator[str]:
    """Errors that no part knew how to meet: whatever was logged with a traceback, those that Celery names aside."""
    known = (*_KNOWN_TO_CELERY, *tolerated)
    for event in log:
        if "exception" not in event or event.get("level") == "debug" or " reject requeue=" in event["event"]:
            continue  # the last: a worker that stops puts its message back
        if not event["event"].startswith(known):
            last = str(event["exception"]).strip().splitlines()[-1]
            yield f"unknown error: {event['event']}: {last}"
