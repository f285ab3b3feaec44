"""Our tasks inside an app that somebody has already."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest
import redis
from celery import Celery
from kombu import Queue
from pydantic import SecretStr

from code_worker.broker import REDIS_TRANSPORT
from code_worker.client import Client
from code_worker.encoder.torch_engine import Engine
from code_worker.errors import BrokerUnavailableError, ConfigurationError
from code_worker.images.decode import decode_crop
from code_worker.plugins import load_plugins
from code_worker.publisher import Publisher
from code_worker.releases.loading import load_release
from code_worker.settings import LimitSettings, RetentionSettings, Settings, TrainingSettings, WorkerSettings
from code_worker.store import migrate
from code_worker.store.engine import Store, open_store
from code_worker.store.jobs import queries
from code_worker.types import Outcome, RejectReason
from code_worker.wire import MODERATE, QUEUES, REFIT, RETRAIN, SWEEP, SWEEP_QUEUE, TRAIN_QUEUE, WATCH
from code_worker.worker.app import create_app, host_of, install
from code_worker.worker.background import failing_parts
from tests.patience import LIMIT_S
from tests.servers import RedisServer
from tests.worker.harness import Deployment, WorkerProcess, jpeg, start, wait_until


def scored(release: Path, image: bytes) -> float:
    """What the release says of an image in this process, where nothing is switched."""
    loaded = load_release(release, load_plugins(Settings()))
    crops = decode_crop(image, LimitSettings())[None]
    head = loaded.heads[loaded.manifest.default_head or ""]
    return float(head.score(Engine(loaded.weights, device="cpu").embed(crops))[0])


def test_their_worker_runs_their_tasks_and_ours(
    deploy: Callable[..., Deployment], tmp_path: Path, toy_release_dir: Path
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    deployment = deploy(
        f"sqlite:///{tmp_path / 'db.sqlite'}", THEIRS_DIRECTORY=str(theirs), CODE_WORKER_BROKER__KEY_PREFIX="null"
    )
    (tmp_path / "files" / "a.jpg").write_bytes(jpeg(1))
    (tmp_path / "files" / "cut.jpg").write_bytes(jpeg(2)[:-900])
    queues = ",".join([*QUEUES, SWEEP_QUEUE, "theirs.images"])
    command = [
        *(sys.executable, "-m", "celery", "-A", "tests.worker.foreign_app", "worker"),
        *("--pool", "threads", "--concurrency", "2", "-Q", queues),
    ]
    environment = {**os.environ, **deployment.environment}
    worker = WorkerProcess(command, environment, deployment.log_path)
    deployment.workers.append(worker)
    client = deployment.client()
    job, cut = (client.enqueue(str(tmp_path / "files" / name)) for name in ("a.jpg", "cut.jpg"))
    sender = Celery("sender", broker=deployment.environment["CODE_WORKER_BROKER_URL"], set_as_current=False)
    sender.send_task("theirs.resize", args=("asked",), queue="theirs.images")
    wait_until((theirs / "asked").exists, 120, "their task")
    verdict = wait_until(lambda: client.verdict(job), 120, "our verdict")
    assert verdict.outcome is Outcome.JUDGED
    assert abs(verdict.score - scored(toy_release_dir, jpeg(1))) < 1e-4
    assert wait_until(lambda: client.verdict(cut), 120, "our refusal").reason is RejectReason.TRUNCATED
    assert worker.terminate() == 0
    sender.close()


def test_the_celery_command_finds_our_own_app(deploy: Callable[..., Deployment], tmp_path: Path) -> None:
    deployment = deploy(f"sqlite:///{tmp_path / 'db.sqlite'}")
    url = deployment.environment["CODE_WORKER_BROKER_URL"]
    (tmp_path / "files" / "a.jpg").write_bytes(jpeg(1))

    def run(*arguments: str, **more: str) -> tuple[WorkerProcess, Path]:
        log = tmp_path / f"{arguments[0]}.log"
        command = [sys.executable, "-m", "celery", "-A", "code_worker", *arguments]
        process = WorkerProcess(command, {**os.environ, **deployment.environment, **more}, log)
        deployment.workers.append(process)
        return process, log

    worker, beat = (run(*arguments)[0] for arguments in (("worker", "-l", "INFO"), ("beat", "-l", "INFO")))
    report, said = run("report", CODE_WORKER_BROKER_URL="redis://:s3cret@127.0.0.1:1/0")
    assert report.process.wait(LIMIT_S) == 0
    assert "code_worker.normal" in said.read_text()
    assert "s3cret" not in said.read_text()
    client = deployment.client()
    job = client.enqueue(str(tmp_path / "files" / "a.jpg"))
    assert wait_until(lambda: client.verdict(job), LIMIT_S, "our verdict").outcome is Outcome.JUDGED
    with redis.Redis.from_url(url) as server:
        wait_until(lambda: server.exists("cw:redbeat:code_worker.sweep"), LIMIT_S, "the entry of beat")
    assert (worker.terminate(), beat.terminate()) == (0, 0)


@pytest.mark.parametrize("url", ["", "bogus", "redis://10.255.255.1:6379/0"])
def test_the_celery_command_without_a_broker_ends_with_status_2_and_one_line(tmp_path: Path, url: str) -> None:
    environment = {**os.environ, "CODE_WORKER_DATA_DIR": str(tmp_path), "CODE_WORKER_BROKER_URL": url}
    said = tmp_path / "said"
    with said.open("wb") as stream:
        process = start([sys.executable, "-m", "celery", "-A", "code_worker", "status"], environment, stream)
        assert process.wait(LIMIT_S) == 2
    (line,) = said.read_text().splitlines()
    assert line.startswith("Error: ")
    assert "broker" in line.lower()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path)


def test_install_adds_and_takes_nothing_away(settings: Settings) -> None:
    app = Celery("theirs", broker="redis://127.0.0.1:1/0", set_as_current=False)
    app.conf.task_queues = [Queue("a"), Queue("code_worker.live", max_priority=None)]
    app.conf.task_routes = {"theirs.*": {"queue": "a"}, MODERATE: {"queue": "a"}}
    app.conf.beat_schedule = {"theirs": {"task": "t", "schedule": 1.0}}
    app.conf.task_serializer = "yaml"
    assert install(app, settings) is app
    assert {MODERATE, SWEEP, RETRAIN, REFIT, WATCH} <= set(app.tasks)
    assert [queue.name for queue in app.conf.task_queues] == ["a", "code_worker.live"]
    assert app.conf.task_routes == {
        "theirs.*": {"queue": "a"},
        MODERATE: {"queue": "a"},
        SWEEP: {"queue": SWEEP_QUEUE},
        **{task: {"queue": TRAIN_QUEUE} for task in (RETRAIN, REFIT, WATCH)},
    }
    assert set(app.conf.beat_schedule) == {"theirs", "code_worker.sweep"}
    assert app.conf.task_serializer == "yaml"
    assert app.conf.broker_transport == REDIS_TRANSPORT


@pytest.mark.parametrize("accepted", [["pickle"], ["yaml"], ["application/x-msgpack"], []])
def test_an_app_that_accepts_no_json_is_refused(settings: Settings, accepted: list[str]) -> None:
    app = Celery("theirs", broker="redis://127.0.0.1:1/0", set_as_current=False)
    app.conf.accept_content = accepted
    assert app.conf.enable_utc, "it is configured from now on"
    with pytest.raises(ConfigurationError, match=r"'theirs' accepts .* no JSON.*add 'json'"):
        install(app, settings)
    assert MODERATE not in app.tasks


@pytest.mark.parametrize("accepted", [["json", "pickle"], ["application/json"], None])
def test_an_app_that_accepts_json_among_others_is_not(settings: Settings, accepted: list[str] | None) -> None:
    app = Celery("theirs", broker="redis://127.0.0.1:1/0", set_as_current=False)
    app.conf.accept_content = accepted
    assert MODERATE in install(app, settings).tasks


def test_enqueue_rings_through_the_app_that_was_installed_in(
    redis_server: RedisServer, store: Store, tmp_path: Path
) -> None:
    settings = Settings(data_dir=tmp_path, database_url=store.url, broker_url="redis://127.0.0.1:1/0")
    app = Celery("theirs", broker=redis_server.url, set_as_current=False)
    install(app, settings)
    client = Client(settings)
    client.enqueue("s3://b/k")
    with redis.Redis.from_url(redis_server.url) as server:
        assert server.llen("code_worker.normal") == 1
    client.close()
    app.close()


def test_producers_in_the_process_go_by_the_settings_of_the_app(redis_server: RedisServer, store: Store) -> None:
    app = Celery("theirs", broker=redis_server.url, set_as_current=False)
    install(app)
    app.conf.code_worker = {"database_url": store.url}
    with closing(Client()) as client:
        job = client.enqueue("s3://b/k")
    assert store.run(lambda session: queries.get(session, job), write=False) is not None
    app.close()


@pytest.mark.parametrize("through", [create_app, install])
def test_a_rediss_broker_is_spoken_to_in_tls(through: Callable[..., Celery], tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"rediss://user:password@127.0.0.1:{listener.getsockname()[1]}/0"
        settings = Settings(data_dir=tmp_path, broker_url=url)
        if through is install:
            app = install(Celery("theirs", broker=url, set_as_current=False), settings)
        else:
            app = create_app(settings)
        first: list[bytes] = []

        def answer() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        first.append(connection.recv(1))

        server = threading.Thread(target=answer, daemon=True)
        server.start()
        with pytest.raises(BrokerUnavailableError):
            Publisher(app).depth("code_worker.normal")
        app.close()
        listener.shutdown(socket.SHUT_RDWR)
        server.join(120)
    assert set(first) == {b"\x16"}, "a TLS handshake, and no password before it"


@pytest.mark.parametrize("url", ["redis+socket:///run/redis.sock", "sentinel://127.0.0.1:26379"])
def test_a_broker_that_our_transport_cannot_speak_to_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigurationError, match="use redis:// or rediss://"):
        create_app(Settings(data_dir=tmp_path, broker_url=url))


def test_install_leaves_a_transport_they_chose(settings: Settings) -> None:
    app = Celery("theirs", broker="redis://127.0.0.1:1/0", set_as_current=False)
    app.conf.broker_transport = "memory"
    install(app, settings)
    assert app.conf.broker_transport == "memory"
    other = Celery("theirs", broker="amqp://127.0.0.1:1//", set_as_current=False)
    install(other, settings)
    assert other.conf.broker_transport is None


def test_parts_that_start_before_the_database_has_tables_work_once_it_has(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    settings = Settings(
        data_dir=tmp_path,
        broker_url=SecretStr(redis_server.url),
        worker=WorkerSettings(sweep_interval_s=0.1, lease_s=5),
        retention=RetentionSettings(interval_s=0.1),
        training=TrainingSettings(lease_s=1),
    )
    tmp_path.joinpath("code_worker.db").touch()
    with create_app(settings) as app, closing(host_of(app)) as host:
        host.start_reporting(frozenset((*QUEUES, TRAIN_QUEUE)))
        host.start_sweeping()
        host.start_watching()
        parts = {"report", "sweep", "learning_watch", "retention"}
        wait_until(lambda: parts <= set(failing_parts()), LIMIT_S, "parts without tables")
        with closing(open_store(settings.resolved_database_url)) as store:
            migrate.upgrade(store)
        wait_until(lambda: not failing_parts(), LIMIT_S, "parts with tables")


def test_what_is_no_app_and_what_are_no_settings_are_refused_by_name(settings: Settings) -> None:
    with pytest.raises(ConfigurationError, match=r"install takes a Celery app .*, not NoneType"):
        install(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="not Celery and dict"):
        install(Celery("theirs", set_as_current=False), {"files": {}})  # type: ignore[arg-type]


def test_installing_twice_is_refused(settings: Settings) -> None:
    app = Celery("theirs", broker="memory://", set_as_current=False)
    install(app, settings)
    with pytest.raises(ConfigurationError, match="installed in the app 'theirs' already"):
        install(app, settings)


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("redis://10.0.0.5:6379/0", False),
        ("redis://:password@10.0.0.5:6379/0", True),
        ("rediss://10.0.0.5:6379/0", True),
        ("redis://127.0.0.1:6379/0", True),
        ("redis://[::1]:6379/0", True),
    ],
)
def test_a_broker_open_to_the_network_is_refused(tmp_path: Path, url: str, allowed: bool) -> None:
    if allowed:
        assert create_app(Settings(data_dir=tmp_path, broker_url=url)).conf.accept_content == ["json"]
        return
    with pytest.raises(ConfigurationError, match="neither password nor TLS"):
        create_app(Settings(data_dir=tmp_path, broker_url=url))
    create_app(Settings(data_dir=tmp_path, broker_url=url, broker={"allow_insecure": True}))


@pytest.mark.parametrize(
    ("options", "threads"),
    [
        ({"pool": "threads", "concurrency": 9}, 9),
        ({"pool": "threads", "concurrency": 2, "autoscale": "7,2"}, 7),
        ({"pool": "prefork", "concurrency": 9}, 1),
    ],
)
def test_a_process_opens_as_many_connections_as_it_has_threads_that_judge(
    sqlite_store: Store, tmp_path: Path, options: dict[str, object], threads: int
) -> None:
    settings = Settings(data_dir=tmp_path, database_url=sqlite_store.url)
    app = Celery("theirs", broker="memory://", set_as_current=False)
    app.conf.broker_transport_options = {"visibility_timeout": 600}
    install(app, settings)
    app.WorkController(queues=list(QUEUES), **options)
    with closing(host_of(app).store()) as opened:
        background, spare = 4, 2
        assert opened.connections == threads + settings.worker.fetch_threads + background + spare, "as the page says"
