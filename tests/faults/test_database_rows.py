"""The database is restarted, gone for a minute, or full: nothing that was committed is missing, and work goes on."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from sqlalchemy import text

from tests.faults.conftest import Deploy
from tests.faults.deployment import FaultDeployment
from tests.faults.postgres import WAYS, MortalPostgres
from tests.faults.rows import Bar, Seen, row
from tests.worker.harness import wait_until


@pytest.fixture
def mortal_postgres() -> Iterator[MortalPostgres]:
    with tempfile.TemporaryDirectory(prefix="code-worker-mortal-") as directory:
        server = MortalPostgres(Path(directory) / "data")
        yield server
        server.stop()


def _tolerate_what_was_put_back(deployment: FaultDeployment) -> None:
    """Celery shows a message that is put back with its traceback."""
    marker = " reject requeue=True: "

    def rejected() -> list[str]:
        return [event["event"] for event in deployment.log() if marker in event["event"]]

    # A message rests for some seconds before it goes back.
    wait_until(lambda: len(rejected()) >= len(deployment.events("message_put_back")), 120, "messages put back")
    deployment.tolerated |= set(rejected())


def _seconds_to_the_next(deployment: FaultDeployment, paths: Sequence[str]) -> float:
    """Seconds until one job more has a verdict."""
    began, before = time.monotonic(), deployment.decided()
    # All of those before may be decided by now: the worker does not wait for this process.
    deployment.enqueue(paths)
    wait_until(lambda: deployment.decided() > before, 120, "the first verdict after the fault")
    return time.monotonic() - began


@row(
    "F12",
    injection="PostgreSQL ended fast, immediately and by SIGKILL while verdicts are written, {rounds} times each",
    expected="0 committed verdicts missing, no job blamed; first job done within 10 s of its return",
)
@pytest.mark.parametrize("rounds", [1, pytest.param(3, marks=pytest.mark.nightly)])
def test_postgresql_that_is_restarted_in_the_midst_of_writing_loses_nothing(
    mortal_postgres: MortalPostgres, deploy: Deploy, rounds: int, seen: Seen, bar: Bar
) -> None:
    deployment = deploy(mortal_postgres.new_database(), CODE_WORKER_WORKER__STORE_EMBEDDINGS="false")
    paths, slowest, committed = deployment.images(200), 0.0, 0
    deployment.worker()
    deployment.started()
    for way in [*WAYS] * rounds:
        ids = deployment.enqueue(paths)
        wait_until(lambda ids=ids: deployment.decided(ids) >= 4, 120, "verdicts are being written")
        before = set(deployment.operations().committed)
        deployment.ledger.close()
        mortal_postgres.end(way)
        time.sleep(0.5)
        mortal_postgres.again()
        slowest = max(slowest, _seconds_to_the_next(deployment, paths[:8]))
        committed = len(before)
        wait_until(lambda: not deployment.unfinished(), 120, "all of them")
        assert deployment.decided(list(before)) == len(before), "what was committed is there"
    _tolerate_what_was_put_back(deployment)
    with deployment.ledger.engine.connect() as connection:
        blamed = connection.execute(text("select count(*) from jobs where faults > 0")).scalar_one()
        rejected = connection.execute(text("select count(*) from verdicts where outcome = 'rejected'")).scalar_one()
    assert (blamed, rejected) == (0, 0)
    assert slowest <= bar(10)
    seen(first_job_done_s=slowest, committed=committed, missing=0, blamed=blamed)


@row(
    "F13",
    injection="PostgreSQL away for 60 s under 2 busy workers",
    expected="workers live on, acknowledge nothing and claim nothing; all done afterwards; no job blamed",
)
@pytest.mark.nightly
def test_postgresql_that_is_away_for_a_minute_is_waited_for(
    mortal_postgres: MortalPostgres, deploy: Deploy, seen: Seen
) -> None:
    deployment = deploy(mortal_postgres.new_database(), CODE_WORKER_WORKER__STORE_EMBEDDINGS="false")
    workers = [deployment.worker() for _ in range(2)]
    deployment.started(2)
    ids = deployment.enqueue(deployment.images(400))
    wait_until(lambda: deployment.decided(ids) >= 8, 120, "verdicts are being written")
    deployment.ledger.close()
    mortal_postgres.end("fast")
    # What was in the last transaction's answer is acknowledged a moment after.
    time.sleep(2)
    before = deployment.operations()
    time.sleep(58)
    meanwhile = deployment.operations()
    assert all(worker.alive for worker in workers)
    assert len(before.committed) < len(ids), "the test wants some to be left"
    assert (meanwhile.claimed, meanwhile.committed) == (before.claimed, before.committed)
    assert any("database does not answer" in str(event.get("error")) for event in deployment.log()), "it is said"
    mortal_postgres.again()
    began = time.monotonic()
    wait_until(lambda: not deployment.unfinished(), 120, "all of them")
    _tolerate_what_was_put_back(deployment)
    left = len(ids) - len(before.committed)
    seen(away_s=60, left=left, all_done_s=time.monotonic() - began, committed_meanwhile=0)


_FILLS_UP = '''
"""Every connection is told that the file may grow no further, while a flag lies there."""
import os
from sqlalchemy import event
from sqlalchemy.engine import Engine
from code_worker import hookimpl

@event.listens_for(Engine, "checkout")
def limit(connection, record, proxy):
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    full = os.path.exists(os.environ["FULL_FLAG"])
    connection.execute(f"PRAGMA max_page_count = {pages if full else 1073741823}")

@hookimpl
def code_worker_select_head(job, heads):
    return None
'''


@row(
    "F16",
    injection="SQLite answers SQLITE_FULL to statements that need another page, for 15 s",
    expected="nothing acknowledged or blamed, storage_full is said, goes on by itself; integrity_check ok",
)
@pytest.mark.nightly
def test_a_full_disk_of_the_database_is_waited_out(
    deploy: Deploy, sqlite_url: str, tmp_path: Path, seen: Seen
) -> None:
    (tmp_path / "plugins").mkdir()
    flag = tmp_path / "full"
    deployment = deploy(sqlite_url, CODE_WORKER_PLUGINS_DIR=str(tmp_path / "plugins"), FULL_FLAG=str(flag))
    # Only now: this process has loaded its plugins, and is to keep its own connections as they are.
    (tmp_path / "plugins" / "full.py").write_text(_FILLS_UP)
    worker = deployment.worker()
    deployment.started()
    paths = deployment.images(60)
    flag.touch()
    # Producers have room still; the worker has none.
    ids = deployment.enqueue([{"uri": path, "metadata": {"filler": "x" * 3000}} for path in paths])
    wait_until(lambda: _said_full(deployment), 120, "storage_full is said")
    time.sleep(15)
    assert worker.alive
    assert deployment.decided(ids) == 0
    flag.unlink()
    began = time.monotonic()
    wait_until(lambda: not deployment.unfinished(), 120, "all of them")
    with deployment.ledger.engine.connect() as connection:
        assert connection.execute(text("PRAGMA integrity_check")).scalar_one() == "ok"
        assert connection.execute(text("select count(*) from verdicts where outcome = 'rejected'")).scalar_one() == 0
    seen(full_s=15, all_done_after_s=time.monotonic() - began)


def _said_full(deployment: FaultDeployment) -> bool:
    return any("storage_full" in str(event.get("error")) for event in deployment.log())
