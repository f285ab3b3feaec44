from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from redis import Redis

from code_worker.errors import ConfigurationError, StoreError
from code_worker.settings import load_settings
from code_worker.stack.up import Stack
from code_worker.store import migrate
from code_worker.store.engine import open_store
from tests.embedded.processes import CLI, Up, is_gone, until
from tests.fork_server import forking_python
from tests.servers import RedisServer


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    made = Up(tmp_path / "data", tmp_path / "output")
    yield made
    made.kill()


def test_up_says_what_it_runs_and_ctrl_c_leaves_no_process_and_no_address(up: Up) -> None:
    up.wait_ready()
    until(lambda: len(up.children()) == 4)
    children = up.children()
    assert str(up.data_dir) in up.text()
    assert "releases import" in up.text()
    with Redis.from_url(load_settings(data_dir=up.data_dir).resolved_broker_url) as client:
        assert client.ping()
    os.killpg(up.process.pid, signal.SIGINT)  # as a terminal does
    assert up.process.wait(120) == 0, up.text()
    assert all(is_gone(pid) for pid in children)
    assert not (up.data_dir / "run" / "broker.url").exists()


def test_a_second_up_on_the_same_directory_is_refused_and_harms_nothing(up: Up, tmp_path: Path) -> None:
    up.wait_ready()
    second = Up(up.data_dir, tmp_path / "second")
    assert second.process.wait(120) == 2
    assert f"process {up.process.pid}" in second.text()
    with Redis.from_url(load_settings(data_dir=up.data_dir).resolved_broker_url) as client:
        assert client.ping()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("CODE_WORKER_DEVICE", "cudaa", "CODE_WORKER_DEVICE: choose auto, cpu, cuda or cuda:N"),
        ("CODE_WORKER_DEVICE", "cuda:999", "device 'cuda:999' is not there"),
        (
            "CODE_WORKER_SCHEDULE__RETRAIN",
            "0 3 * * funday",
            "is no cron line (day of week: 'funday')",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    tmp_path: Path, variable: str, value: str, said: str
) -> None:
    words = [forking_python(), "-m", "code_worker", "up", "--data-dir", str(tmp_path / "data")]
    ran = subprocess.run(words, env={**os.environ, variable: value}, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
    assert said in ran.stderr
    assert not (tmp_path / "data").exists()


def test_when_up_is_killed_nothing_stays_and_the_next_one_goes_on(up: Up, tmp_path: Path) -> None:
    up.wait_ready()
    until(lambda: len(up.children()) == 4)
    with Redis.from_url(load_settings(data_dir=up.data_dir).resolved_broker_url) as client:
        client.rpush("queue", "kept")
    children = up.children()
    up.kill()
    until(lambda: all(is_gone(pid) for pid in children))
    again = Up(up.data_dir, tmp_path / "again")
    try:
        again.wait_ready()
        with Redis.from_url(load_settings(data_dir=up.data_dir).resolved_broker_url) as client:
            assert client.lrange("queue", 0, -1) == [b"kept"]
    finally:
        again.kill()


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a stack of this process; what that starts is forked, while `code-worker up` starts all from nothing."""
    monkeypatch.setattr(sys, "executable", forking_python())
    return tmp_path / "data"


def test_a_stack_restarts_each_part_that_dies(data_dir: Path) -> None:
    with Stack(load_settings(data_dir=data_dir)) as stack:
        until(lambda: len(stack.pids()) == 4)
        before = stack.pids()
        for pid in before.values():
            os.kill(pid, signal.SIGKILL)
        until(lambda: len(stack.pids()) == 4 and not set(stack.pids().values()) & set(before.values()))


def test_its_directories_are_private_and_its_database_is_current(data_dir: Path) -> None:
    with Stack(load_settings(data_dir=data_dir)) as stack:
        for path in (data_dir, data_dir / "run", data_dir / "broker", data_dir / "releases"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
        with closing(open_store(stack.settings.resolved_database_url)) as store:
            migrate.require_current(store)


def test_a_broker_of_ones_own_is_used_and_none_is_started(data_dir: Path, redis_server: RedisServer) -> None:
    settings = load_settings(data_dir=data_dir, broker_url=redis_server.url)
    with Stack(settings, env={"CODE_WORKER_BROKER_URL": redis_server.url}) as stack:
        until(lambda: set(stack.pids()) == {"worker", "trainer", "beat"})
        assert not (data_dir / "broker").exists()
        with Redis.from_url(redis_server.url) as client:
            until(lambda: client.exists("cw:redbeat::lock"))


def test_a_database_of_ones_own_is_not_migrated_behind_ones_back(data_dir: Path, database_url: str) -> None:
    stack = Stack(load_settings(data_dir=data_dir, database_url=database_url))
    with pytest.raises(StoreError, match="code-worker db upgrade"), stack:
        pass
    assert stack.pids() == {}


def test_two_stacks_in_one_directory_are_refused_by_the_lock(data_dir: Path) -> None:
    settings = load_settings(data_dir=data_dir)
    with Stack(settings):
        with pytest.raises(ConfigurationError, match=f"process {os.getpid()}"), Stack(settings):
            pass
        assert load_settings(data_dir=data_dir).resolved_broker_url
    with Stack(settings):
        pass


def test_a_data_directory_that_cannot_be_made_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigurationError, match="CODE_WORKER_DATA_DIR"),
        Stack(load_settings(data_dir=tmp_path / "file" / "data")),
    ):
        pass


def test_worker_trainer_and_beat_show_a_missing_broker_in_one_line(data_dir: Path) -> None:
    for command in ("worker", "trainer", "beat"):
        ended = subprocess.run(
            [sys.executable, *CLI[1:], command],
            env={**os.environ, "CODE_WORKER_DATA_DIR": str(data_dir)},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert ended.returncode == 2
        assert "no broker: set CODE_WORKER_BROKER_URL" in ended.stderr
        assert "Traceback" not in ended.stderr
