"""The harness itself: a proxy that fails as told, a checker that sees what it must, a report that keeps its lines."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from sqlalchemy import text

from code_worker.moderation.judge import rejected_job
from code_worker.store import jobs, verdicts
from code_worker.store.engine import Store
from code_worker.system.failpoints import FAILPOINT_STATUS, NAMES, FailpointError, armed
from code_worker.types import Job, RejectReason
from tests.faults.checker import broker_violations, idle_violations, ledger_violations, log_violations, overdue
from tests.faults.operations import operations_of
from tests.faults.proxy import TcpProxy
from tests.faults.report import Line, lines_of, merge_into
from tests.servers import RedisServer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def echo_port() -> Iterator[int]:
    """A server that sends back what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(connection: socket.socket) -> None:
            with closing(connection), suppress(ConnectionResetError):
                while data := connection.recv(4096):
                    connection.sendall(data)

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield int(listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)


def _through(proxy: TcpProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=120)


def test_a_proxy_passes_on_until_old_connections_fall_silent(echo_port: int) -> None:
    with TcpProxy(echo_port) as proxy, _through(proxy) as old:
        old.sendall(b"hello")
        assert old.recv(5) == b"hello"
        assert proxy.black_hole() == 1
        old.sendall(b"anybody?")
        old.settimeout(0.3)
        with pytest.raises(TimeoutError):
            old.recv(1)
        with _through(proxy) as new:
            new.sendall(b"hello")
            assert new.recv(5) == b"hello"


def test_a_proxy_resets_slows_down_and_refuses(echo_port: int) -> None:
    with TcpProxy(echo_port) as proxy:
        with _through(proxy) as old:
            old.sendall(b"hello")
            assert old.recv(5) == b"hello"
            proxy.reset()
            with pytest.raises(ConnectionResetError):
                old.recv(1)
        proxy.throttle(10_000)
        with _through(proxy) as slow:
            began = time.monotonic()
            slow.sendall(bytes(3000))
            got = 0
            while got < 3000:
                got += len(slow.recv(3000))
            slow.sendall(b"x")
            assert slow.recv(1) == b"x"
            assert time.monotonic() - began > 0.2
        proxy.refuse()
        with _through(proxy) as refused:
            assert refused.recv(1) == b""


def _decide(store: Store, *ids: str) -> None:
    rows = [rejected_job(Job(id=job, uri="s3://b/k"), RejectReason.NOT_FOUND, "gone") for job in ids]
    store.run(lambda session: verdicts.write(session, rows))


def test_the_checker_sees_what_was_lost_and_what_is_undecided(store: Store) -> None:
    ids = store.run(lambda session: jobs.accept(session, [jobs.NewJob(f"s3://b/{n}") for n in range(3)]))
    store.run(lambda session: jobs.claim(session, ids, owner="a", lease_s=60, max_attempts=3))
    _decide(store, ids[0], ids[1])
    assert list(ledger_violations(store, ids[:2])) == [
        f"A: job {ids[2].replace('-', '')} is still running",
        f"A: job {ids[2].replace('-', '')} has no verdict",
    ]
    _decide(store, ids[2])
    assert list(ledger_violations(store, ids)) == []
    missing = "0" * 32
    assert list(ledger_violations(store, [*ids, missing])) == [
        f"A: job {missing} was accepted and is not in the ledger",
        f"A: job {missing} has no verdict",
    ]


def test_the_checker_sees_a_verdict_of_a_release_that_was_never_live(store: Store) -> None:
    ids = store.run(lambda session: jobs.accept(session, [jobs.NewJob(f"s3://b/{n}") for n in range(2)]))
    _decide(store, ids[0])
    with store.engine.begin() as connection:
        row = dict(connection.execute(text("select * from verdicts")).mappings().one())
        other = connection.execute(text("select id from jobs where state <> 'done'")).scalar_one()
        row |= {"id": other, "job_id": other, "outcome": "judged", "reason": None, "label": "real", "score": 0.1}
        row |= {"release": "r-0", "head": "knn"}
        names = ", ".join(row)
        row["metadata"] = row["timings_ms"] = "{}"
        values = ", ".join(f":{name}" for name in row)
        connection.execute(text(f"insert into verdicts ({names}) values ({values})"), row)
        connection.execute(text("update jobs set state = 'done', due_at = null"))
    (found,) = ledger_violations(store, ids)
    assert found.startswith(f"D: job {other} was judged by r-0, which was not live at")


def test_the_checker_sees_a_claim_that_outlived_its_lease(store: Store) -> None:
    ids = store.run(lambda session: jobs.accept(session, [jobs.NewJob("s3://b/k")]))
    store.run(lambda session: jobs.claim(session, ids, owner="dead", lease_s=-3, max_attempts=3))
    assert list(overdue(store, 20)) == []
    assert [line.split(" is ")[0][:6] for line in overdue(store, 1)] == ["F: job"]


def test_the_checker_sees_what_the_broker_still_holds_and_idle_transactions(
    postgres_store: Store, redis_server: RedisServer
) -> None:
    import redis

    assert [*broker_violations(redis_server.url, "cw:"), *idle_violations(postgres_store)] == []
    with redis.Redis.from_url(redis_server.url) as server, postgres_store.engine.connect() as connection:
        server.hset("cw:unacked", "tag", "message")
        connection.execute(text("select 1"))
        found = [*broker_violations(redis_server.url, "cw:"), *idle_violations(postgres_store)]
    assert [line[:4] for line in found] == ["E: t", "E: 1"]


def test_the_checker_sees_errors_that_nobody_knew(tmp_path: Path) -> None:
    log = [{"event": "fine"}, {"event": "broke", "exception": "Traceback …\nKeyError: 'x'"}]
    assert list(log_violations(log)) == ["unknown error: broke: KeyError: 'x'"]
    assert list(log_violations(log, {"bro"})) == []


def test_operations_are_read_from_the_log() -> None:
    log = [
        {"event": "jobs_claimed", "jobs": ["a", "b"]},
        {"event": "jobs_claimed", "jobs": ["a"]},
        {"event": "verdicts_committed", "jobs": ["a", "b"]},
        {"event": "message_acknowledged", "message": "m"},
    ]
    found = operations_of(log)
    assert (found.executed_again, found.committed.total(), found.acknowledged["m"]) == (1, 2, 1)


def _line(row: str, injection: str, seen: str) -> Line:
    return Line(row, injection, "all | done", "SQLite", seen, "2026-11-28")


def test_rows_that_ran_replace_their_lines_and_the_others_stay(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- rows -->\n<!-- end of rows -->\nafter\n")
    known = {("F10", "a"), ("F2", "b"), ("F2", "c")}
    merge_into(page, [_line("F10", "a", "old"), _line("F2", "b", "old"), _line("F2", "c", "old")], known)
    merge_into(page, [_line("F2", "b", "new")], known - {("F2", "c")})
    text = page.read_text()
    assert [(line.id, line.injection, line.seen) for line in lines_of(text)] == [
        ("F2", "b", "new"),
        ("F10", "a", "old"),
    ]
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert lines_of(text)[0].expected == r"all \| done"
    merge_into(page, [], known)
    assert page.read_text() == text, "nothing ran, nothing changed"


def test_a_failure_is_not_made_good_by_the_next_test_of_the_same_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- rows -->\n<!-- end of rows -->\n")
    ran = [_line("F1", "a", seen) for seen in ("as expected", "**failed**: 3 lost", "as expected")]
    merge_into(page, ran, {("F1", "a")})
    assert [line.seen for line in lines_of(page.read_text())] == ["**failed**: 3 lost"]
    merge_into(page, ran[:1], {("F1", "a")})
    assert [line.seen for line in lines_of(page.read_text())] == ["as expected"]


def test_a_failpoint_does_what_it_was_told_and_only_there() -> None:
    armed("")("after_claim")
    with pytest.raises(FailpointError):
        armed("after_claim:raise")("after_claim")
    armed("after_claim:raise")("before_ack")
    for wrong in ("after_clam", "after_claim:explode"):
        with pytest.raises(ValueError, match="CODE_WORKER_FAILPOINT"):
            armed(wrong)


def test_a_failpoint_ends_its_process() -> None:
    script = "from code_worker.system.failpoints import failpoint; failpoint('before_ack'); failpoint('after_claim')"
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "CODE_WORKER_FAILPOINT": "after_claim"}, check=False
    )
    assert done.returncode == FAILPOINT_STATUS


def test_each_failpoint_is_somewhere_in_the_product() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "code_worker").rglob("*.py"))
    assert {name for name in NAMES if f'failpoint("{name}")' not in source} == set()
