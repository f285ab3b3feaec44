from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from redis import Redis

from code_worker.cli.operations.doctor import doctor
from code_worker.client import Client
from code_worker.doctor import examine, services
from code_worker.doctor.check import Check, Status, bounded, hung
from code_worker.errors import StoreError
from code_worker.plugins import load_plugins
from code_worker.releases.building import build_toy_release
from code_worker.releases.registry import open_registry
from code_worker.settings import Settings, load_settings
from code_worker.stack.embedded import EmbeddedBroker
from code_worker.stack.supervisor import Supervisor
from code_worker.store import workers
from code_worker.store.engine import Store, open_store
from tests.servers import RedisServer, free_port

Find = Callable[..., list[Check]]


@pytest.fixture
def data_dir(tmp_path: Path, migrated_sqlite: Path) -> Path:
    """A private data directory with a migrated database."""
    path = tmp_path / "data"
    path.mkdir(mode=0o700)
    shutil.copy(migrated_sqlite, path / "code_worker.db")
    return path


@pytest.fixture
def settings(data_dir: Path) -> Settings:
    return load_settings(data_dir=data_dir)


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    with closing(open_store(settings.resolved_database_url)) as opened:
        yield opened


@pytest.fixture
def find(data_dir: Path) -> Find:
    """The findings about one part."""

    def run(name: str, **overrides: object) -> list[Check]:
        return [check for check in examine([name], **{"data_dir": data_dir, **overrides}) if check.name == name]

    return run


@pytest.fixture(scope="module")
def toy_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    crops = np.random.default_rng(0).integers(0, 256, (8, 224, 224, 3), dtype=np.uint8)
    directory = tmp_path_factory.mktemp("toy") / "release"
    labels = np.array([0, 1] * 4, dtype=np.int8)
    build_toy_release(directory, crops, labels, load_plugins(load_settings()), heads=("linear",), depth=1)
    return directory


@pytest.fixture
def champion(settings: Settings, store: Store, toy_release: Path) -> str:
    registry = open_registry(settings, store=store, plugins=load_plugins(settings))
    release = registry.add(toy_release)
    registry.promote(release, by="test", reason="test")
    return release


def _statuses(found: list[Check]) -> list[Status]:
    return [check.status for check in found]


def test_a_whole_installation_has_no_fault(data_dir: Path, store: Store, champion: str) -> None:
    store.run(lambda session: workers.beat(session, "here:1", version="0", release=champion))
    broker, supervisor = EmbeddedBroker(data_dir), Supervisor()
    supervisor.add(broker.prepare())
    supervisor.start()
    try:
        broker.wait_ready()
        (data_dir / "run").mkdir()
        broker.publish()
        found = list(examine(data_dir=data_dir))
    finally:
        supervisor.stop()
    assert [check for check in found if check.status is Status.FAIL] == []
    assert {check.name for check in found if check.status is Status.OK} >= {
        *("python", "settings", "data directory", "broker", "clock", "database", "s3", "files"),
        *("plugins", "decoding", "device", "release", "policies", "workers", "jobs", "sources"),
    }
    assert f"champion {champion} is whole" in next(check.message for check in found if check.name == "release")


def test_json_has_a_line_per_finding_and_a_fault_makes_the_exit_status_one(data_dir: Path) -> None:
    ended = CliRunner().invoke(doctor, ["--json", "--data-dir", str(data_dir), "broker", "database"])
    rows = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.exit_code == 1
    assert all(set(row) == {"name", "status", "message", "hint"} for row in rows)
    (broker,) = [row for row in rows if row["name"] == "broker"]
    assert broker["status"] == "fail"
    assert "code-worker up" in broker["hint"]


def test_the_table_shows_hints_and_warnings_alone_leave_the_exit_status_zero(
    data_dir: Path, redis_server: RedisServer, champion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODE_WORKER_BROKER_URL", redis_server.url)
    ended = CliRunner().invoke(doctor, ["--data-dir", str(data_dir)])
    assert ended.exit_code == 0, ended.output
    assert f"champion {champion}" in ended.stdout
    assert "→ redis-cli CONFIG SET appendonly yes" in ended.stdout


def test_wrong_settings_are_a_finding_that_hides_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODE_WORKER_WORKER__CONCURRENCY", "s3cret")
    found = list(examine())
    assert (found[-1].name, found[-1].status) == ("settings", Status.FAIL)
    assert "concurrency" in found[-1].message.lower()
    assert "s3cret" not in found[-1].message


def test_a_misspelt_setting_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODE_WORKER_BROKR_URL", "redis://elsewhere/0")
    found = list(examine())
    assert (found[-1].name, found[-1].status) == ("settings", Status.FAIL)
    assert "did you mean CODE_WORKER_BROKER_URL?" in found[-1].message


def test_an_open_data_directory_is_warned_of(find: Find, data_dir: Path) -> None:
    data_dir.chmod(0o755)
    (found,) = find("data directory")
    assert found.status is Status.WARN
    assert found.hint == f"chmod 700 {data_dir}"


def test_looking_at_an_empty_place_leaves_it_empty(tmp_path: Path) -> None:
    found = {check.name: check for check in examine(data_dir=tmp_path / "none")}
    assert found["database"].status is Status.FAIL
    assert found["database"].hint == "code-worker db upgrade"
    assert "not looked at" in found["jobs"].message
    assert not (tmp_path / "none").exists()


def test_a_database_without_tables_is_a_fault(find: Find, data_dir: Path) -> None:
    (data_dir / "code_worker.db").write_bytes(b"")
    (found,) = find("database")
    assert found.status is Status.FAIL
    assert "code-worker db upgrade" in found.message


def test_a_database_that_does_not_answer_is_a_fault_without_its_password(find: Find) -> None:
    (found,) = find("database", database_url=f"postgresql://me:s3cret@127.0.0.1:{free_port()}/db")
    assert found.status is Status.FAIL
    assert "s3cret" not in found.message


def test_postgresql_is_named_by_host_and_database(find: Find, migrated_postgres_url: str) -> None:
    (found,) = find("database", database_url=migrated_postgres_url)
    assert found.status is Status.OK
    assert "PostgreSQL at" in found.message


def test_a_broker_that_does_not_answer_is_a_fault(find: Find) -> None:
    (found,) = find("broker", broker_url=f"redis://:s3cret@127.0.0.1:{free_port()}/0")
    assert found.status is Status.FAIL
    assert "s3cret" not in found.message


def test_a_broker_open_to_the_network_is_a_fault(find: Find) -> None:
    (found,) = find("broker", broker_url="redis://broker.example/0")
    assert found.status is Status.FAIL
    assert "neither password nor TLS" in found.message


def test_a_broker_set_up_as_a_cache_is_warned_of(find: Find, redis_server: RedisServer) -> None:
    with Redis.from_url(redis_server.url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
    found = find("broker", broker_url=redis_server.url)
    assert _statuses(found) == [Status.OK, Status.WARN, Status.WARN]
    assert "allkeys-lru" in found[1].message
    assert "appendonly is off" in found[2].message


def test_a_visibility_timeout_below_four_batches_is_a_fault(find: Find, redis_server: RedisServer) -> None:
    found = find("broker", broker_url=redis_server.url, broker={"visibility_timeout_s": 479})
    assert found[0].status is Status.FAIL
    assert "CODE_WORKER_BROKER__VISIBILITY_TIMEOUT_S to 480 or more" in found[0].message


@pytest.mark.parametrize(("there_s", "status"), [(1004.0, "ok"), (994.0, "warn"), (1061.0, "fail")])
def test_clocks_that_disagree_are_warned_of_and_then_a_fault(there_s: float, status: str) -> None:
    assert services.clock("broker", there_s, 1000.0, 1000.1).status == status


def test_an_answer_that_took_long_is_no_wrong_clock() -> None:
    assert services.clock("broker", 1001.0, asked_s=1000.0, answered_s=1120.0).status is Status.OK


def test_a_missing_image_directory_is_a_fault(find: Find, tmp_path: Path) -> None:
    found = find("files", files={"roots": [tmp_path, tmp_path / "gone"]})
    assert _statuses(found) == [Status.OK, Status.FAIL]


@pytest.mark.parametrize("wrong", [{"device": "cuda:99"}, {"device": "cpu", "precision": "fp16"}])
def test_a_device_or_precision_that_is_not_there_is_a_fault(find: Find, wrong: dict[str, str]) -> None:
    (found,) = find("device", **wrong)
    assert found.status is Status.FAIL


def test_a_broken_plugin_is_a_fault_and_the_rest_is_still_looked_at(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "broken.py").write_text("from code_worker import hookimpl\nraise RuntimeError('boom')\n")
    found = {check.name: check for check in examine(data_dir=data_dir, plugins_dir=tmp_path / "plugins")}
    assert found["plugins"].status is Status.FAIL
    assert "broken.py" in found["plugins"].message
    assert found["sources"].status is Status.OK


def test_settings_of_a_head_that_nobody_offers_are_warned_of_with_the_nearest_name(find: Find) -> None:
    found = find("plugins", heads={"liner": {"C": 1}, "knn": {"n_neighbors": 5}})
    assert [check.status for check in found] == [Status.OK, Status.WARN]
    assert "settings for a head 'liner'" in found[1].message
    assert "did you mean 'linear'?" in found[1].message


def test_a_default_head_that_nobody_offers_is_a_fault(find: Find) -> None:
    (found,) = find("plugins", head="nobody")
    assert found.status is Status.FAIL
    assert "'nobody'" in found.message


def test_no_release_is_a_warning_with_the_command_that_gets_one(find: Find) -> None:
    (found,) = find("release")
    assert found.status is Status.WARN
    assert "code-worker releases import" in found.hint


def test_a_release_whose_bytes_changed_is_a_fault(find: Find, settings: Settings, champion: str) -> None:
    weights = Path(settings.resolved_artifacts) / champion / "encoder" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    (found,) = find("release")
    assert found.status is Status.FAIL
    assert "encoder/model.safetensors" in found.message


@pytest.mark.usefixtures("champion")
def test_a_release_without_the_default_head_is_a_fault(find: Find) -> None:
    assert _statuses(find("release", head="knn")) == [Status.OK, Status.FAIL]


def test_workers_that_judge_with_something_else_are_named(find: Find, store: Store, champion: str) -> None:
    (silent,) = find("workers")
    assert silent.status is Status.WARN
    store.run(lambda session: workers.beat(session, "a", version="0", release=champion, host="first", pid=1))
    store.run(lambda session: workers.beat(session, "b", version="0", release="r-old", host="second", pid=2))
    well, behind = find("workers")
    assert "first:1" in well.message
    assert behind.status is Status.WARN
    assert "second:2 has release r-old" in behind.message
    said = {"refused": (champion, "head 'mine' does not score as it did")}
    store.run(
        lambda session: workers.beat(session, "b", version="0", release="r-old", info=said, host="second", pid=2)
    )
    _, behind = find("workers")
    assert behind.status is Status.FAIL
    assert f"second:2 cannot use champion {champion} and judges with r-old: head 'mine' does not" in behind.message


def test_waiting_jobs_unreadable_messages_and_pauses_are_told(find: Find, store: Store, settings: Settings) -> None:
    def trouble(session) -> None:  # type: ignore[no-untyped-def]
        workers.dead_letter(session, task="code_worker.moderate", body="?", error="message version 9 is unknown")
        workers.pause_source(session, "s3://uploads", seconds=600, detail="InvalidAccessKeyId")

    store.run(trouble)
    broker = f"redis://127.0.0.1:{free_port()}/0"
    with closing(Client(settings.model_copy(update={"broker_url": None}))) as client:
        client.enqueue("s3://uploads/a.jpg")
    waiting, unreadable = find("jobs", broker_url=broker)
    assert "1 accepted" in waiting.message
    assert "version 9 is unknown" in unreadable.message
    (paused,) = find("sources")
    assert paused.status is Status.WARN
    assert "s3://uploads" in paused.message


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Ends what a test's probes do for ever."""
    event = threading.Event()
    yield event
    event.set()
    while hung():
        time.sleep(0.01)


def test_a_probe_that_raises_is_a_finding() -> None:
    def fail() -> Iterator[Check]:
        raise StoreError("redis://:s3cret@host refused")
        yield

    (failed,) = bounded("part", fail, hint="do this")
    assert failed == Check("part", Status.FAIL, "redis://:***@host refused", "do this")


def test_a_probe_that_waits_for_ever_has_no_answer(released: threading.Event) -> None:
    def wait() -> Iterator[Check]:
        yield Check("part", Status.OK, "first half")
        released.wait()

    first, late = bounded("part", wait, hint="do this", wait_s=0.2)
    assert hung()
    assert first.message == "first half"
    assert late == Check("part", Status.FAIL, "no answer in 0.2 s", "do this")


def test_a_probe_that_works_is_slow_and_not_broken(released: threading.Event) -> None:
    def work() -> Iterator[Check]:
        while not released.is_set():
            pass
        yield Check("part", Status.OK, "done")

    (slow,) = bounded("data directory", work, wait_s=0.5, work_s=0.7)
    assert slow.status is Status.WARN
    assert slow.message.startswith("slow: not done after ")
    assert slow.hint == "code-worker doctor 'data directory', when less is running"


def test_a_probe_whose_library_works_in_another_thread_is_slow_and_not_broken(released: threading.Event) -> None:
    def work() -> Iterator[Check]:
        helper = threading.Thread(target=lambda: all(not released.is_set() for _ in iter(int, 1)))
        helper.start()
        helper.join()
        yield Check("part", Status.OK, "done")

    (slow,) = bounded("part", work, wait_s=0.5, work_s=0.7)
    assert slow.status is Status.WARN


def test_beside_a_probe_that_still_works_one_that_waits_has_no_answer(released: threading.Event) -> None:
    def work() -> Iterator[Check]:
        while not released.is_set():
            pass
        yield Check("part", Status.OK, "done")

    def wait() -> Iterator[Check]:
        released.wait()
        yield Check("part", Status.OK, "done")

    bounded("part", work, work_s=0.1)
    (late,) = bounded("part", wait, wait_s=0.2)
    assert late.status is Status.FAIL


def test_a_machine_that_stands_still_has_not_waited() -> None:
    program = (
        "import sys\nfrom code_worker.doctor.check import Check, Status, bounded\n"
        "def wait():\n"
        "    print('begun', flush=True)\n"
        "    yield Check('part', Status.OK, sys.stdin.readline())\n"
        "(found,) = bounded('part', wait, wait_s=1.5)\nprint(found.status)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as child:
        assert child.stdout.readline() == "begun\n"
        child.send_signal(signal.SIGSTOP)
        time.sleep(1.6)
        child.send_signal(signal.SIGCONT)
        assert child.communicate("answer\n", timeout=120)[0] == "ok\n"


def test_without_the_workers_packages_it_says_what_is_missing() -> None:
    program = (
        "import importlib.metadata as metadata\nfound = metadata.version\n"
        "def version(name):\n"
        "    if name == 'torch': raise metadata.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "metadata.version = version\n"
        "from code_worker.doctor.installation import python\nprint(*python())"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert "no torch: enough to enqueue, not to judge" in ended.stdout
    assert "pip install 'code-worker[worker]'" in ended.stdout
