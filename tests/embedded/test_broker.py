from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from redis import Redis
from redis.exceptions import AuthenticationError

from code_worker.errors import BrokerUnavailableError, ConfigurationError
from code_worker.settings import load_settings
from code_worker.stack.embedded import EmbeddedBroker
from code_worker.stack.supervisor import Backoff, Supervisor
from tests.embedded.processes import is_gone, lines, until

Start = Callable[[], tuple[EmbeddedBroker, Supervisor]]


@pytest.fixture
def data_path(tmp_path: Path) -> Path:
    """An awkward name: it goes through the server's own configuration syntax."""
    return tmp_path / 'da "ta" \\ dïr'


@pytest.fixture
def start(data_path: Path) -> Iterator[Start]:
    supervisors: list[Supervisor] = []

    def run() -> tuple[EmbeddedBroker, Supervisor]:
        broker = EmbeddedBroker(data_path)
        supervisor = Supervisor(grace_s=120, backoff=Backoff(first_s=0.05))
        supervisors.append(supervisor)
        supervisor.add(broker.prepare())
        supervisor.start()
        broker.wait_ready()
        return broker, supervisor

    yield run
    for supervisor in supervisors:
        supervisor.stop()


def _client(broker: EmbeddedBroker) -> Redis:
    return Redis.from_url(broker.url, decode_responses=True)


def test_it_is_durable_forgets_nothing_and_listens_on_loopback_only(start: Start) -> None:
    broker, _ = start()
    with _client(broker) as client:
        found = client.config_get("appendonly", "appendfsync", "maxmemory-policy", "bind")
    assert found == {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "bind": "127.0.0.1",
    }


def test_who_does_not_know_the_password_is_refused(start: Start) -> None:
    broker, _ = start()
    parts = urlsplit(broker.url)
    assert len(parts.password or "") >= 32
    with Redis(host="127.0.0.1", port=parts.port or 0, retry=None) as stranger, pytest.raises(AuthenticationError):
        stranger.ping()


def test_its_secret_is_in_private_files_and_not_on_its_command_line(start: Start, data_path: Path) -> None:
    broker, supervisor = start()
    broker.publish()
    password = urlsplit(broker.url).password or ""
    holders = [
        path for path in data_path.rglob("*") if path.is_file() and password in path.read_text("utf-8", "replace")
    ]
    assert {path.name for path in holders} == {"valkey.conf", "address", "broker.url"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in holders} == {0o600}
    assert stat.S_IMODE((data_path / "broker").stat().st_mode) == 0o700
    shown = subprocess.run(
        ["ps", "-o", "args=", "-p", str(supervisor.pids()["broker"])], capture_output=True, text=True, check=True
    )
    assert password not in shown.stdout


def test_settings_find_it_while_it_is_published(start: Start, data_path: Path) -> None:
    broker, _ = start()
    broker.publish()
    assert load_settings(data_dir=data_path).resolved_broker_url == broker.url
    broker.withdraw()
    with pytest.raises(ConfigurationError, match="code-worker up"):
        _ = load_settings(data_dir=data_path).resolved_broker_url


def test_killed_it_comes_back_at_the_same_address_with_its_messages(start: Start) -> None:
    broker, supervisor = start()
    with _client(broker) as client:
        client.rpush("queue", *map(str, range(1000)))
    killed = supervisor.pids()["broker"]
    os.kill(killed, signal.SIGKILL)
    until(lambda: supervisor.pids().get("broker", killed) != killed)
    broker.wait_ready()
    with _client(broker) as client:
        assert client.lrange("queue", 0, -1) == [str(number) for number in range(1000)]


def test_stopped_and_started_again_it_keeps_address_and_messages(start: Start) -> None:
    broker, supervisor = start()
    with _client(broker) as client:
        client.rpush("queue", "kept")
    assert supervisor.stop() == 0
    again, _ = start()
    assert again.url == broker.url
    with _client(again) as client:
        assert client.lrange("queue", 0, -1) == ["kept"]


def test_a_port_that_somebody_took_meanwhile_is_left_to_them(start: Start) -> None:
    broker, supervisor = start()
    supervisor.stop()
    with socket.create_server(("127.0.0.1", urlsplit(broker.url).port or 0), reuse_port=False) as taken:
        taken.settimeout(0.1)
        again, _ = start()
        assert urlsplit(again.url).port != urlsplit(broker.url).port


def test_a_server_that_an_earlier_run_left_behind_is_ended_first(start: Start, data_path: Path) -> None:
    lost = EmbeddedBroker(data_path)
    orphan = subprocess.Popen(list(lost.prepare().command))  # nobody supervises it
    try:
        lost.wait_ready()
        with _client(lost) as client:
            client.rpush("queue", "kept")
        again, _ = start()
        orphan.wait(120)
        assert again.url == lost.url
        with _client(again) as client:
            assert client.lrange("queue", 0, -1) == ["kept"]
    finally:
        orphan.kill()
        orphan.wait(120)


def test_a_server_left_behind_that_stood_still_for_a_moment_is_ended_too(data_path: Path) -> None:
    lost = EmbeddedBroker(data_path)
    orphan = subprocess.Popen(list(lost.prepare().command))
    thaw = threading.Timer(2.5, lambda: orphan.send_signal(signal.SIGCONT))
    try:
        lost.wait_ready()
        orphan.send_signal(signal.SIGSTOP)
        thaw.start()
        again = EmbeddedBroker(data_path)
        again.prepare()
        assert orphan.wait(120) == 0
        assert again.url == lost.url
    finally:
        thaw.cancel()
        orphan.kill()
        orphan.wait()


def test_a_damaged_address_file_is_replaced(start: Start, data_path: Path) -> None:
    (data_path / "broker").mkdir(parents=True)
    (data_path / "broker" / "address").write_text("redis://:x@127.0.0.1:port/0")
    broker, _ = start()
    with _client(broker) as client:
        assert client.ping()


def test_one_that_cannot_start_is_reported_with_the_end_of_its_log(data_path: Path) -> None:
    broker = EmbeddedBroker(data_path)
    supervisor = Supervisor(grace_s=120, backoff=Backoff(first_s=0.05))
    supervisor.add(broker.prepare())
    (data_path / "broker" / "appendonlydir").write_text("not a directory")
    supervisor.start()
    try:
        until(lambda: "appendonlydir" in "".join(lines(broker.log_path)))
        with pytest.raises(BrokerUnavailableError, match=r"its log .*valkey\.log ends: .*appendonlydir"):
            broker.wait_ready(0.1)
    finally:
        supervisor.stop()


def test_waiting_for_it_ends_when_the_run_is_called_off(data_path: Path) -> None:
    broker = EmbeddedBroker(data_path)
    broker.prepare()  # and never started
    broker.wait_ready(600, given_up=lambda: True)


def test_nobody_is_left_after_a_stop(start: Start) -> None:
    _, supervisor = start()
    pid = supervisor.pids()["broker"]
    assert supervisor.stop() == 0
    assert is_gone(pid)
