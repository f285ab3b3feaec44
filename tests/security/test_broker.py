"""A broker that anybody on the network could feed: no part starts against it unless it is told to."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from pydantic import SecretStr

from code_worker.broker import celery_config, check_broker, tls_options
from code_worker.doctor.services import is_vulnerable
from code_worker.errors import ConfigurationError
from code_worker.publisher import Publisher
from code_worker.settings import Settings
from tests.fork_server import forking_python

OPEN = "redis://10.255.255.1:6379/0"
PARTS = ("code_worker.stack.worker_process", "code_worker.stack.beat_process", "code_worker.stack.trainer_process")


def settings(url: str, tmp_path: Path, **broker: object) -> Settings:
    return Settings(data_dir=tmp_path, broker_url=SecretStr(url), broker=broker)


@pytest.mark.parametrize(
    "url",
    [
        OPEN,
        "redis://user@redis.internal/0",
        "redis://redis/0",
        "redis://0.0.0.0/0",
        "redis://[::]/0",
        "redis://[fd00::1]:6379/0",
        "redis://127.0.0.1.example.org/0",
        "redis://localhost.example.org/0",
    ],
)
def test_one_elsewhere_needs_a_password_or_tls(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="neither password nor TLS"):
        check_broker(settings(url, tmp_path))
    assert check_broker(settings(url, tmp_path, allow_insecure=True)) == url


@pytest.mark.parametrize(
    "url",
    [
        *("redis://:secret@redis.internal/0", "redis://user:secret@10.0.0.1/0", "rediss://redis.internal/0"),
        *("redis://127.0.0.1:6379/0", "redis://localhost/0", "redis://[::1]:6379/0"),
    ],
)
def test_a_protected_or_a_local_one_is_taken(url: str, tmp_path: Path) -> None:
    assert check_broker(settings(url, tmp_path)) == url


def test_a_producer_does_not_ring_through_it_either(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="neither password nor TLS"):
        Publisher.for_producer(settings(OPEN, tmp_path))


def test_every_process_ends_with_status_2_and_says_why(tmp_path: Path) -> None:
    environment = {**os.environ, "CODE_WORKER_DATA_DIR": str(tmp_path), "CODE_WORKER_BROKER_URL": OPEN}
    with_tables = [forking_python(), "-m", "code_worker", "db", "upgrade"]
    subprocess.run(with_tables, env=environment, capture_output=True, check=True)
    started = [
        subprocess.Popen([forking_python(), "-m", part], env=environment, stderr=subprocess.PIPE, text=True)
        for part in PARTS
    ]
    for part, process in zip(PARTS, started, strict=True):
        _, said = process.communicate(timeout=120)
        assert (process.returncode, "neither password nor TLS" in said) == (2, True), f"{part}: {said}"


@pytest.mark.parametrize(
    ("name", "version", "vulnerable"),
    [
        *(("redis", "6.2.19", True), ("redis", "6.2.20", False), ("redis", "7.0.15", True), ("redis", "8.2.1", True)),
        *(("redis", "8.2.2", False), ("redis", "8.4.0", False), ("redis", "5.0.14", True)),
        *(("valkey", "8.1.3", True), ("valkey", "8.1.4", False), ("valkey", "9.0.0", False)),
        *(("dragonfly", "1.0.0", False), ("redis", "unstable", False)),
    ],
)
def test_a_server_that_a_script_takes_over_is_told(name: str, version: str, vulnerable: bool) -> None:
    assert is_vulnerable(name, version) is vulnerable


def test_certificates_are_checked(tmp_path: Path) -> None:
    options = tls_options("rediss://redis.internal/0")
    assert options is not None
    assert options["ssl_cert_reqs"].name == "CERT_REQUIRED"


def test_messages_are_json_and_nothing_controls_a_worker_from_afar(tmp_path: Path) -> None:
    config = celery_config(settings("redis://127.0.0.1/0", tmp_path))
    assert (config["accept_content"], config["task_serializer"]) == (["json"], "json")
    assert config["worker_enable_remote_control"] is False
    assert config["worker_send_task_events"] is False
    assert "result_backend" not in config
