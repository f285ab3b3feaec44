"""Our settings in the configuration of somebody's app: read as they are now, and said once where they are wrong."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from celery import Celery

from code_worker.errors import ConfigurationError
from code_worker.wire import LIVE, REFIT
from code_worker.worker.app import host_of, install
from tests.patience import LIMIT_S
from tests.servers import RedisServer
from tests.worker.harness import WorkerProcess, wait_until

URL = "redis://127.0.0.1:1/0"


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CODE_WORKER_DATA_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_settings(values: Any) -> Celery:
    app = install(Celery("theirs", broker=URL, set_as_current=False))
    app.conf.code_worker = values
    return app


@pytest.mark.parametrize("as_is", [True, False])
def test_a_change_within_the_mapping_is_a_change_of_the_settings(as_is: bool) -> None:
    theirs: dict[str, Any] = {"worker": {"concurrency": 7}, "s3": {"buckets": ["uploads"]}}
    app = with_settings(theirs if as_is else MappingProxyType(theirs))
    app.finalize()
    first = host_of(app).settings
    assert host_of(app).settings is first, "nothing changed"
    theirs["s3"]["buckets"].append("archive")
    theirs["worker"]["concurrency"] = 8
    second = host_of(app).settings
    assert (first.worker.concurrency, first.s3.buckets) == (7, ("uploads",))
    assert (second.worker.concurrency, second.s3.buckets) == (8, ("uploads", "archive"))
    theirs["schedule"] = {"refit": "every day"}
    with pytest.raises(SystemExit):
        app.WorkController(queues=[LIVE], pool="threads")
    theirs["schedule"] = {"refit": "0 3 * * *"}
    app.conf.broker_transport_options = {"visibility_timeout": 600}
    app.WorkController(queues=[LIVE], pool="threads")
    assert REFIT in app.conf.beat_schedule


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("task_routes", "app.conf.task_routes"),
        ("worker_concurrency", "app.conf.worker_concurrency"),
        ("timezone", "app.conf.timezone"),
        ("CELERY_RESULT_BACKEND", "app.conf.result_backend"),
        ("BROKER_URL", "app.conf.broker_url"),
    ],
)
def test_a_setting_of_celerys_in_ours_is_refused_with_where_it_belongs(name: str, place: str) -> None:
    app = with_settings({name: "x", "worker": {"concurrency": 7}})
    with pytest.raises(ConfigurationError) as refused:
        _ = host_of(app).settings
    assert str(refused.value) == (
        f"settings of Celery's, and not of ours, in app.conf.code_worker: {name} (set {place})"
    )


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"broker_url": "redis://127.0.0.1:2/0"}, "app.conf.broker_url"),
        ({"broker": {"key_prefix": "x:"}}, "app.conf.broker_transport_options['global_keyprefix']"),
        ({"broker": {"visibility_timeout_s": 900}}, "app.conf.broker_transport_options['visibility_timeout']"),
    ],
)
def test_a_setting_that_only_our_own_app_has_is_warned_of_once(
    values: dict[str, Any], place: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = with_settings(values)
    app.finalize()
    assert host_of(app).settings
    (line,) = [record.getMessage() for record in caplog.records if "setting_without_effect" in record.getMessage()]
    assert "in app.conf.code_worker" in line
    assert f"set {place}" in line
    assert "127.0.0.1:2" not in line


@pytest.mark.parametrize(
    "command",
    [("worker", "-P", "threads", "-Q", LIVE), ("beat",), ("report",), ("worker", "-P", "threads", "-Q", "theirs")],
    ids=["worker of ours", "beat", "report", "worker of theirs"],
)
def test_each_command_of_celerys_says_once_what_is_wrong(
    command: tuple[str, ...], redis_server: RedisServer, tmp_path: Path
) -> None:
    log = tmp_path / "said"
    environment = {
        **os.environ,
        "CODE_WORKER_BROKER_URL": redis_server.url,
        "CODE_WORKER_SCHEDULE__REFIT": "every day",
        "THEIRS_DIRECTORY": str(tmp_path),
    }
    celery = [sys.executable, "-m", "celery", "-A", "tests.worker.foreign_app", *command]
    process = WorkerProcess([*celery, *(["-l", "INFO"] if "theirs" in command else [])], environment, log)
    try:
        if "theirs" in command:
            wait_until(lambda: " ready." in log.read_text(), LIMIT_S, "a worker of others' queues goes on")
            assert process.terminate() == 0
        else:
            assert process.process.wait(LIMIT_S) == (0 if command == ("report",) else 2)
    finally:
        process.kill()
    assert log.read_text().count("is no cron line") == 1, log.read_text()
