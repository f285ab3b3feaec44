"""Checks of services: broker, database, object store, and clocks that agree."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from code_worker.broker import check_broker, check_visibility, is_redis
from code_worker.doctor.check import Check, Status
from code_worker.errors import ConfigurationError, ImageRejectedError, TransientError
from code_worker.settings import Settings
from code_worker.types import RejectReason

if TYPE_CHECKING:
    from code_worker.images.source import Sources

_TIMEOUT_S: Final = 4.0
_FIXED: Final = {
    "redis": {(6, 2): 20, (7, 2): 11, (7, 4): 6, (8, 0): 4, (8, 2): 2},
    "valkey": {(7, 2): 11, (8, 0): 6, (8, 1): 4},
}
"""CVE-2025-49844 (a Lua script takes the server over): the patch level of each series that has the fix."""
_NO_OBJECT: Final = "code-worker-doctor-asks-for-what-is-not-there"
_SKEW_WARN_S: Final = 5.0
_SKEW_FAIL_S: Final = 60.0


def broker(settings: Settings) -> Iterator[Check]:
    """Reachable, protected, and set up as a queue rather than a cache."""
    url = check_broker(settings)
    if is_redis(url):
        try:
            check_visibility(settings.broker.visibility_timeout_s, settings)
        except ConfigurationError as error:
            yield Check("broker", Status.FAIL, str(error))
        yield from _redis(url)
    else:
        yield _other_broker(url)


def _redis(url: str) -> Iterator[Check]:
    from redis import Redis  # another broker needs none
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    limits: dict[str, Any] = {"socket_timeout": _TIMEOUT_S, "socket_connect_timeout": _TIMEOUT_S}
    # Once more: a machine that stood still overslept the limit of what was under way.
    with Redis.from_url(url, retry=Retry(NoBackoff(), 1), **limits) as client:
        asked = time.time()
        seconds, micros = client.time()
        answered = time.time()
        info = client.info()
    name, version = str(info.get("server_name", "redis")), str(info.get("valkey_version") or info["redis_version"])
    where = f"{name} {version}"
    if is_vulnerable(name, version):
        yield Check(
            "broker", Status.WARN, f"{where} can be taken over by a script (CVE-2025-49844)", "update the server"
        )
    yield Check("broker", Status.OK, f"{where} at {urlsplit(url).hostname}:{urlsplit(url).port or 6379} answers")
    yield from _queue_settings(info)
    yield clock("broker", seconds + micros / 1e6, asked, answered)


def is_vulnerable(name: str, version: str) -> bool:
    """Returns whether this server is known to lack the fix of CVE-2025-49844.

    One of another kind or form is not known.
    """
    series = _FIXED.get(name)
    numbers = [int(part) for part in version.split(".")[:3] if part.isdecimal()]
    if series is None or len(numbers) != 3:
        return False
    major, minor, patch = numbers
    # A series that is not listed is older than the fix, unless it is newer than all that are.
    return patch < series[major, minor] if (major, minor) in series else (major, minor) < max(series)


def _queue_settings(info: dict[str, Any]) -> Iterator[Check]:
    # INFO, not CONFIG GET: hosted servers and narrow ACLs refuse that command.
    if (policy := info.get("maxmemory_policy")) != "noeviction":
        yield Check(
            "broker",
            Status.WARN,
            f"maxmemory-policy is {policy}: when memory is short, messages are dropped",
            "redis-cli CONFIG SET maxmemory-policy noeviction, and set it in the server's configuration",
        )
    if not info.get("aof_enabled"):
        yield Check(
            "broker",
            Status.WARN,
            "appendonly is off: after a crash every waiting job is sent again from SQL, later",
            "redis-cli CONFIG SET appendonly yes, and set it in the server's configuration",
        )
    if info.get("aof_last_write_status", "ok") != "ok":
        yield Check("broker", Status.FAIL, "it cannot write its append-only file", "free its disk")


def _other_broker(url: str) -> Check:
    from kombu import Connection  # only for brokers other than Redis

    with Connection(url, connect_timeout=_TIMEOUT_S) as connection:
        connection.connect()
        where = f"{connection.transport_cls} at {urlsplit(url).hostname}"
    return Check("broker", Status.OK, f"{where} answers")


def clock(whose: str, there_s: float, asked_s: float, answered_s: float) -> Check:
    """Returns whether a server's clock agrees with ours: message timeouts are reckoned by both.

    Args:
        whose: The server.
        there_s: Its time (Unix seconds), read at some moment between our question and its answer.
        asked_s: Our time before the question.
        answered_s: Our time after the answer.
    """
    # The server's time was read between our two: only what lies outside of them is a difference of clocks.
    skew_s = max(asked_s - there_s, there_s - answered_s, 0.0)
    text = f"this machine and the {whose} differ by {skew_s:.1f} s"
    hint = "run a time service (chrony, systemd-timesyncd) on both"
    if skew_s > _SKEW_FAIL_S:
        return Check("clock", Status.FAIL, text, hint)
    if skew_s > _SKEW_WARN_S:
        return Check("clock", Status.WARN, text, hint)
    return Check("clock", Status.OK, f"agrees with the {whose}'s")


def database(settings: Settings) -> Iterator[Check]:
    """Reachable, migrated, and of our time."""
    from code_worker.store import migrate
    from code_worker.store.engine import open_store

    url = settings.resolved_database_url
    if migrate.is_missing(url):
        yield Check("database", Status.FAIL, f"{migrate.place(url)} is not there yet", "code-worker db upgrade")
        return
    with closing(open_store(url, threads=1, create=False)) as store:
        asked = time.time()
        there = store.run(migrate.server_time, write=False)
        answered = time.time()
        migrate.require_current(store)
        yield Check("database", Status.OK, f"{migrate.place(url)} answers; revision {migrate.current(store)}")
    yield clock("database", there.timestamp(), asked, answered)


def object_store(settings: Settings) -> Iterator[Check]:
    """Every bucket that images may come from, and the one that keeps releases."""
    from code_worker.images.source import Sources

    if not settings.s3.buckets:
        yield Check("s3", Status.OK, "not configured: no bucket may be read")
    with closing(Sources(settings)) as sources:
        for bucket in settings.s3.buckets:
            yield _bucket(sources, f"s3://{bucket.removeprefix('s3://').rstrip('/')}")
    if settings.resolved_artifacts.startswith("s3://"):
        from code_worker.releases.artifacts import open_artifacts

        kept = open_artifacts(settings).list()
        yield Check("s3", Status.OK, f"{settings.resolved_artifacts} holds {len(kept)} releases")


def _bucket(sources: Sources, prefix: str) -> Check:
    """Lists, and reads as a worker does: the same client, the same headers."""
    try:
        first = next(sources.list(f"{prefix}/"), None)
    except ImageRejectedError as error:
        if error.reason is RejectReason.ACCESS_DENIED:
            return _read(sources, prefix, None, f"{prefix} may not be listed: {error.detail}")
        return Check("s3", Status.FAIL, f"{prefix}: {error}", "create it, or take it out of CODE_WORKER_S3__BUCKETS")
    except TransientError as error:
        return Check("s3", Status.FAIL, f"{prefix}: {error}", "see the CODE_WORKER_S3__… settings")
    return _read(sources, prefix, first)


def _read(sources: Sources, prefix: str, first: str | None, unlisted: str = "") -> Check:
    """Returns whether the first object can be read; where none is known, what is said of one that cannot be there."""
    try:
        sources.fetch(first or f"{prefix}/{_NO_OBJECT}")
    except ImageRejectedError as error:
        if error.reason is RejectReason.ACCESS_DENIED and not unlisted:
            return Check("s3", Status.FAIL, f"{prefix} may be listed, not read: {error.detail}", "allow s3:GetObject")
    except TransientError as error:
        return Check("s3", Status.FAIL, f"{prefix}: {error}", "see the CODE_WORKER_S3__… settings")
    if unlisted:
        hint = "allow s3:ListBucket for `enqueue --prefix`; s3:GetObject is what workers need"
        return Check("s3", Status.WARN, unlisted, hint)
    text = f"{prefix} can be listed{' and read' if first else '; it holds nothing to read'}"
    return Check("s3", Status.OK, text)
