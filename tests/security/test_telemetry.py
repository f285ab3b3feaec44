"""Our programs talk to our servers, write into our directories, and fork no threads: nobody is told that they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from code_worker.store import migrate
from code_worker.store.engine import open_store
from code_worker.types import Outcome
from code_worker.wire import REFIT, RETRAIN
from tests.fork_server import ADDRESS_ENV, CHILDREN_ENV
from tests.servers import RedisServer, S3Server
from tests.training.learning import build_champion, label_world
from tests.worker.harness import Deployment, decided, environment_in, jpeg, promote_release
from tests.worker.learning_deployment import LearningDeployment

ROOT = Path(__file__).resolve().parents[2]
WATCHED = Path(__file__).with_name("watched")
LOOPBACK = {"127.0.0.1", "::1", "localhost", None, ""}


class World:
    """Where a watched program lives, and what it did."""

    def __init__(self, directory: Path) -> None:
        self.home, self.temporary = directory / "home", directory / "temporary"
        self._directory, self._log = directory, directory / "watched.log"
        for each in (self.home, self.temporary):
            each.mkdir()
        self.environment = {
            "HOME": str(self.home),
            "TMPDIR": str(self.temporary),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": os.pathsep.join([str(WATCHED), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "WATCHED_LOG": str(self._log),
        }

    def seen(self) -> dict[str, list[Any]]:
        """What was noted, by kind."""
        found: dict[str, list[Any]] = defaultdict(list)
        for line in self._log.read_text().splitlines():
            event = json.loads(line)
            found[event["what"]].append(event["value"])
        return found

    def check(self, ports: set[int]) -> None:
        """Nothing but loopback and these ports, nothing outside the directory, no fork of threads, an empty home."""
        seen = self.seen()
        assert {name for name in seen["lookup"] if name not in LOOPBACK} == set()
        local = {address for address in seen["connect"] if isinstance(address, str) and not self._is_ours(address)}
        assert local == set(), "sockets of the file system"
        addresses = [address for address in seen["connect"] if not isinstance(address, str)]
        assert [each for each in addresses if each[0] not in LOOPBACK or each[1] not in ports] == []
        assert {path for path in seen["write"] if not self._is_ours(str(path))} == set()
        assert [threads for threads in seen["fork"] if threads > 1] == []
        assert [path.name for path in self.home.iterdir()] == []

    def _is_ours(self, path: str) -> bool:
        return Path(path.removeprefix("file:").partition("?")[0]).is_relative_to(self._directory) or path in {
            os.devnull,
            ":memory:",
        }


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Programs start from nothing, and where `CI` is set some libraries report nothing anyway."""
    for name in ("CI", ADDRESS_ENV, CHILDREN_ENV, "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.delenv(name, raising=False)
    return World(tmp_path)


def ran(world: World, *arguments: str, **environment: str) -> str:
    command = [sys.executable, "-m", "code_worker", *arguments]
    everything = {**os.environ, **world.environment, **environment}
    done = subprocess.run(command, env=everything, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in {0, 1}, done.stderr
    return done.stdout


def test_a_scan_tells_nobody(world: World, toy_release_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    data = {"CODE_WORKER_DATA_DIR": str(tmp_path / "data"), "CODE_WORKER_ENGINE": "openvino"}
    said = ran(world, "scan", str(tmp_path / "a.jpg"), "--release", str(toy_release_dir), "--json", **data)
    assert json.loads(said)["outcome"] == "judged"
    world.check(ports=set())


def ports_of(*urls: str) -> set[int]:
    return {int(url.rpartition(":")[2].partition("/")[0]) for url in urls}


@pytest.fixture
def deployment(
    world: World, redis_server: RedisServer, s3_server: S3Server, toy_release_dir: Path, tmp_path: Path
) -> Iterator[Deployment]:
    url = f"sqlite:///{tmp_path / 'db.sqlite'}"
    environment = environment_in(tmp_path, url, redis_server.url) | s3_server.environment | world.environment
    made = Deployment(environment, tmp_path / "workers.log")
    with closing(open_store(url)) as store:
        migrate.upgrade(store)
    promote_release(made, toy_release_dir)
    yield made
    made.close()


def test_a_worker_tells_nobody(
    world: World, deployment: Deployment, redis_server: RedisServer, s3_server: S3Server, tmp_path: Path
) -> None:
    (tmp_path / "files" / "a.jpg").write_bytes(jpeg(1))
    worker = deployment.worker("worker", module="code_worker")
    client = deployment.client()
    (verdict,) = decided(client, [client.enqueue(str(tmp_path / "files" / "a.jpg"))])
    assert verdict.outcome is Outcome.JUDGED
    assert worker.terminate() == 0
    world.check(ports_of(redis_server.url, s3_server.url))


def test_doctor_tells_nobody(
    world: World, deployment: Deployment, redis_server: RedisServer, s3_server: S3Server
) -> None:
    found = [json.loads(line) for line in ran(world, "doctor", "--json", **deployment.environment).splitlines()]
    assert {one["name"] for one in found} >= {"broker", "database"}
    world.check(ports_of(redis_server.url, s3_server.url))


@pytest.fixture
def learning(world: World, redis_server: RedisServer, tmp_path: Path) -> Iterator[LearningDeployment]:
    directory = tmp_path / "learning"
    directory.mkdir()
    made = LearningDeployment(directory, redis_server.url, build_champion(tmp_path / "champion"))
    del made.environment[CHILDREN_ENV]
    made.environment |= world.environment | {"CODE_WORKER_TRAINING__EPOCHS": "1"}
    yield made
    made.close()


def check_a_trainer(world: World, learning: LearningDeployment, port: set[int], task: str) -> None:
    label_world(learning.settings, learning.store)
    trainer = learning.trainer()
    learning.send(task, by="alice")
    (run,) = learning.ended()
    assert run.state in {"promoted", "rejected"}, run
    assert trainer.terminate() == 0
    world.check(port)


def test_a_trainer_that_fits_heads_tells_nobody(
    world: World, learning: LearningDeployment, redis_server: RedisServer
) -> None:
    check_a_trainer(world, learning, ports_of(redis_server.url), REFIT)


@pytest.mark.nightly
def test_a_trainer_that_trains_tells_nobody(
    world: World, learning: LearningDeployment, redis_server: RedisServer
) -> None:
    check_a_trainer(world, learning, ports_of(redis_server.url), RETRAIN)


IMPORTS = """
import numpy as np
from pathlib import Path
from code_worker.data.datasets import hub as data_hub
from code_worker.encoder import download as hub
from code_worker.encoder.architecture import VitConfig
from code_worker.training.evaluation import plots
from code_worker.training.fitting.network import build_vit
from code_worker.training.evaluation.plots import draw_embeddings
from huggingface_hub.utils import send_telemetry

assert hub.constants.HF_HUB_DISABLE_TELEMETRY
send_telemetry("topic")
list(data_hub.parquet_examples([Path(TABLE)], max_bytes=1, skipped=[]))
build_vit(VitConfig(depth=1))
draw_embeddings(Path(PICTURE), np.eye(9, 192, dtype=np.float32), ["real"] * 9, title="")
"""


def test_libraries_that_could_report_are_imported_so_that_they_do_not(world: World, tmp_path: Path) -> None:
    table = tmp_path / "train.parquet"
    pq.write_table(pa.table({"id": ["a"], "image_gen0": [b"x"]}), table)
    picture = tmp_path / "picture.png"
    program = f"TABLE, PICTURE = {str(table)!r}, {str(picture)!r}\n{IMPORTS}"
    environment = os.environ | world.environment
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert picture.exists()
    world.check(ports=set())


def test_what_would_be_told_is_heard(world: World) -> None:
    program = (
        "import os, socket, threading; threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "socket.socket().connect_ex(('127.0.0.1', 9))\n"
        "open(os.path.expanduser('~/counter'), 'w').close()\n"
        "os._exit(0) if os.fork() == 0 else os.wait()\n"
    )
    subprocess.run([sys.executable, "-c", program], env=os.environ | world.environment, check=True)
    seen = world.seen()
    assert seen["connect"] == [["127.0.0.1", 9]]
    assert seen["write"] == [str(world.home / "counter")]
    assert seen["fork"] == [2]
    with pytest.raises(AssertionError):
        world.check(ports=set())
