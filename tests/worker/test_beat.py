"""The scheduler's process keeps its entries whatever becomes of Redis, and dies in the form of its log."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import redis
from redbeat.schedulers import ensure_conf

from code_worker.settings import Settings, load_settings
from code_worker.stack.beat_process import KeptScheduler
from code_worker.store import workers
from code_worker.store.engine import open_store
from code_worker.wire import RETRAIN
from code_worker.worker.app import create_app
from tests.patience import LIMIT_S
from tests.servers import RedisServer, free_port
from tests.worker.harness import WorkerProcess, wait_until

# The last is redbeat's own.
ENTRIES = {"code_worker.sweep", RETRAIN, "celery.backend_cleanup"}


@pytest.fixture
def scheduler(redis_server: RedisServer, tmp_path: Path) -> Iterator[KeptScheduler]:
    """As it is before it has the lock: its entries stored, nothing sent."""
    settings = Settings(data_dir=tmp_path, broker_url=redis_server.url, schedule={"retrain": "0 3 * * sun"})
    app = create_app(settings)
    made = KeptScheduler(app)
    made.lock_key = None
    yield made
    made.close()
    app.close()


def stored(server: redis.Redis, scheduler: KeptScheduler) -> dict[str, str]:
    """Definitions in the schedule, by name."""
    conf = ensure_conf(scheduler.app)
    keys = [key.decode() for key in server.zrange(conf.schedule_key, 0, -1)]
    return {key.removeprefix(conf.key_prefix): server.hget(key, "definition").decode() for key in keys}


def test_a_schedule_that_redis_lost_is_put_back_at_the_next_tick_and_is_an_alarm(
    scheduler: KeptScheduler, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    with redis.Redis.from_url(redis_server.url) as server:
        scheduler.tick()
        before = stored(server, scheduler)
        assert set(before) == ENTRIES
        assert "schedule_" not in caplog.text
        server.flushall()
        scheduler.tick()
        assert stored(server, scheduler) == before
        assert "schedule_empty" in caplog.text
        assert {"ERROR"} == {each.levelname for each in caplog.records if "schedule_" in each.getMessage()}


def test_an_entry_that_somebody_removed_or_changed_is_put_back(
    scheduler: KeptScheduler, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    with redis.Redis.from_url(redis_server.url) as server:
        scheduler.tick()
        before = stored(server, scheduler)
        conf = ensure_conf(scheduler.app)
        other = {**json.loads(before[RETRAIN]), "enabled": False}
        server.hset(f"{conf.key_prefix}{RETRAIN}", "definition", json.dumps(other))
        server.zrem(conf.schedule_key, f"{conf.key_prefix}code_worker.sweep")
        scheduler.tick()
        assert stored(server, scheduler) == before
        assert "schedule_differed" in caplog.text
        caplog.clear()
        scheduler.tick()
        assert "schedule_" not in caplog.text


def test_a_beat_that_dies_for_want_of_its_broker_says_so_in_the_form_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    environment = {
        **os.environ,
        "CODE_WORKER_DATA_DIR": str(tmp_path),
        "CODE_WORKER_BROKER_URL": f"redis://:s3cret@127.0.0.1:{free_port()}/0",
        "CODE_WORKER_LOG_FORMAT": "json",
    }
    beat = WorkerProcess([sys.executable, "-m", "code_worker.stack.beat_process"], environment, log)
    try:
        assert beat.process.wait(LIMIT_S) == 1
    finally:
        beat.kill()
    lines = log.read_text().splitlines()
    assert all(line.startswith('{"') for line in lines), lines
    (died,) = [event for event in map(json.loads, lines) if event["event"] == "beat_died"]
    assert "ConnectionError" in died["error"]
    assert "s3cret" not in log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_beat_that_ends_in_order_is_heard_of_no_more(
    redis_server: RedisServer, migrated_sqlite: Path, tmp_path: Path, number: signal.Signals
) -> None:
    shutil.copy(migrated_sqlite, tmp_path / "code_worker.db")
    given = {"CODE_WORKER_DATA_DIR": str(tmp_path), "CODE_WORKER_BROKER_URL": redis_server.url}
    beat = WorkerProcess(
        [sys.executable, "-m", "code_worker.stack.beat_process"], {**os.environ, **given}, tmp_path / "log"
    )
    with closing(open_store(load_settings(data_dir=tmp_path).resolved_database_url)) as store:

        def heard_of() -> list[str]:
            alive = store.run(lambda session: workers.alive(session, within_s=3600.0, role=None), write=False)
            return [part.role for part in alive]

        try:
            wait_until(lambda: heard_of() == ["beat"], LIMIT_S, "the beat's first word")
            beat.process.send_signal(number)
            assert beat.process.wait(LIMIT_S) == 0, (tmp_path / "log").read_text()
        finally:
            beat.kill()
        assert heard_of() == []
