"""Installed at any point of an app's configuration: all of theirs stays as without us, and ours is there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from kombu import Exchange, Queue

import code_worker
from code_worker.broker import ALL_QUEUES, REDIS_TRANSPORT, TRANSPORTS
from code_worker.errors import ConfigurationError
from code_worker.wire import MODERATE, QUEUES, REFIT, RETRAIN, SWEEP, SWEEP_QUEUE, TRAIN_QUEUE, WATCH
from code_worker.worker.app import host_of, install

URL = "redis://127.0.0.1:1/0"
ENTRIES = {"theirs.hourly": {"task": "theirs.resize", "schedule": 3600.0}}
ROUTES = {"theirs.resize": {"queue": "images"}}
Step = Callable[[Celery], object]


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings of the environment, as a host's process has them."""
    monkeypatch.setenv("CODE_WORKER_DATA_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def namespaced() -> SimpleNamespace:
    """A module of settings as Django has it."""
    entries, routes = dict(ENTRIES), dict(ROUTES)
    return SimpleNamespace(CELERY_BROKER_URL=URL, CELERY_BEAT_SCHEDULE=entries, CELERY_TASK_ROUTES=routes, DEBUG=True)


def plain() -> dict[str, Any]:
    return {"broker_url": URL, "beat_schedule": dict(ENTRIES), "task_routes": dict(ROUTES)}


def guide(app: Celery) -> None:
    """Queues and a topic exchange as in Celery's routing guide."""
    app.conf.task_queues = (
        Queue("default", routing_key="task.#"),
        Queue("feed_tasks", routing_key="feed.#"),
        Queue("images", routing_key="images.#"),
    )
    app.conf.task_default_queue = "default"
    app.conf.task_default_exchange = "tasks"
    app.conf.task_default_exchange_type = "topic"
    app.conf.task_default_routing_key = "task.default"


def entries(app: Celery) -> None:
    app.conf.beat_schedule = dict(ENTRIES)


def routes(app: Celery) -> None:
    app.conf.task_routes = dict(ROUTES)


def broker(app: Celery) -> None:
    app.conf.broker_url = URL


def read(app: Celery) -> None:
    assert app.conf.enable_utc


def route_all(name: str, *_: Any, **__: Any) -> dict[str, str]:
    return {"queue": "images", "exchange": "images", "routing_key": "images.x"}


LAYOUTS: dict[str, list[Step]] = {
    "assigned": [broker, entries, routes],
    "object": [lambda app: app.config_from_object(plain())],
    "django": [lambda app: app.config_from_object(namespaced(), namespace="CELERY")],
    "read first": [broker, read, entries, routes],
    "read, then an object": [read, lambda app: app.config_from_object(plain())],
    "forced": [lambda app: app.config_from_object(plain(), force=True), read],
    "updated": [read, lambda app: app.conf.update(plain())],
    "topic exchange": [broker, guide, entries, routes],
    "topic exchange, read": [broker, guide, read, entries, routes],
    "only known queues": [
        broker,
        guide,
        lambda app: setattr(app.conf, "task_create_missing_queues", False),
        entries,
        routes,
    ],
    "autodiscovered": [
        broker,
        entries,
        lambda app: app.autodiscover_tasks(["tests.worker"], related_name="discovered"),
    ],
    "catch-all glob": [broker, lambda app: setattr(app.conf, "task_routes", {"*": {"queue": "images"}})],
    "catch-all function": [broker, lambda app: setattr(app.conf, "task_routes", route_all)],
    "list of routes": [
        broker,
        lambda app: setattr(app.conf, "task_routes", ([("theirs.*", {"queue": "a"})], route_all)),
    ],
}
CASES = [(name, at) for name, steps in LAYOUTS.items() for at in range(len(steps) + 1)]


def configured(steps: list[Step], *, install_at: int | None) -> tuple[Celery, list[str]]:
    """An app after these steps, of which the handler that Celery's own guide teaches is the first."""
    app = Celery("theirs", set_as_current=False)
    heard: list[str] = []

    @app.task(name="theirs.resize", shared=False)
    def resize() -> None: ...

    if install_at == 0:
        install(app)

    @app.on_after_configure.connect(weak=False)
    def setup(sender: Celery, **_: Any) -> None:
        heard.append("configured")
        sender.add_periodic_task(10.0, resize.s(), name="theirs.periodic")

    for at, step in enumerate(steps, 1):
        step(app)
        if install_at == at:
            install(app)
    app.loader.init_worker()
    app.finalize()
    return app, heard


def destination(app: Celery, task: str) -> tuple[Any, ...]:
    """Where a message goes that names no queue."""
    options = app.amqp.router.route({}, task, args=(), kwargs={})
    queue = options["queue"]
    sent = {name: value for name, value in options.items() if name != "queue"}
    return queue.name, queue.exchange.name, queue.exchange.type, queue.routing_key, tuple(sorted(sent.items()))


def of_theirs(app: Celery) -> dict[str, Any]:
    """What an app does by itself."""
    conf = app.conf
    return {
        "entries": {name: entry for name, entry in conf.beat_schedule.items() if not name.startswith("code_worker.")},
        "destination": destination(app, "theirs.resize"),
        "elsewhere": destination(app, "somebody.elses"),
        "consumed": {name: (q.exchange.name, q.routing_key) for name, q in app.amqp.queues.consume_from.items()},
        "known": sorted(app.amqp.queues),
        "listed": [queue.name for queue in conf.task_queues or ()],
        "default": (conf.task_default_queue, conf.task_default_exchange, conf.task_default_routing_key),
        "uri": app.connection().as_uri(include_password=True),
        "conf": {
            name: conf[name] for name in conf if not re.search("(?i)^__|schedule|routes|transport$|use_ssl", name)
        },
        "tasks": sorted(name for name in app.tasks if not name.startswith("code_worker.")),
    }


@pytest.mark.parametrize(("layout", "at"), CASES)
def test_theirs_is_as_without_us_and_ours_is_there(layout: str, at: int) -> None:
    alone, heard_alone = configured(LAYOUTS[layout], install_at=None)
    app, heard = configured(LAYOUTS[layout], install_at=at)
    ours, theirs = of_theirs(app), of_theirs(alone)
    for each in (ours, theirs):
        for listed in each["conf"].values():
            if isinstance(listed, tuple | list) and listed and isinstance(listed[0], Queue):
                each["conf"] = {**each["conf"], "task_queues": [queue.name for queue in listed]}
    assert ours == theirs
    assert heard == heard_alone
    assert SWEEP in app.conf.beat_schedule
    assert app.conf.broker_transport == REDIS_TRANSPORT
    for task, queue in {MODERATE: QUEUES[1], SWEEP: SWEEP_QUEUE, RETRAIN: TRAIN_QUEUE}.items():
        assert destination(app, task) == (queue, queue, "direct", queue, ())
    app.amqp.queues.select([*ALL_QUEUES])
    bound = {(q.name, q.exchange.name, q.exchange.type, q.routing_key) for q in app.amqp.queues.consume_from.values()}
    assert bound == {(name, name, "direct", name) for name in ALL_QUEUES}


def test_installing_reads_no_configuration() -> None:
    app = Celery("theirs", set_as_current=False)
    app.config_from_object("there.is.no.such.module")
    install(app)
    assert not app.configured
    assert not app.finalized


@pytest.mark.parametrize("form", [{"code_worker.moderate": {"queue": "a"}}, {"code_worker.*": {"queue": "a"}}])
@pytest.mark.parametrize("listed", [False, True])
def test_a_route_that_names_our_tasks_is_meant(form: dict[str, Any], listed: bool) -> None:
    app = Celery("theirs", broker=URL, set_as_current=False)
    app.conf.task_routes = [route_all, form] if listed else form
    install(app)
    app.finalize()
    ours = app.amqp.router.route({}, MODERATE, args=(), kwargs={})
    assert ours["queue"].name == ("images" if listed else "a")
    assert app.amqp.router.route({}, RETRAIN, args=(), kwargs={})["queue"].name == (
        TRAIN_QUEUE if "code_worker.moderate" in form else "images" if listed else "a"
    )


def test_a_queue_of_ours_that_they_list_by_name_is_not_bound_to_their_exchange() -> None:
    app = Celery("theirs", broker=URL, set_as_current=False)
    guide(app)
    app.conf.task_queues = [
        *app.conf.task_queues,
        Queue("code_worker.live"),
        Queue("code_worker.normal", Exchange("x")),
    ]
    install(app)
    taken = app.amqp.queues.consume_from
    assert (taken["code_worker.live"].exchange.name, taken["code_worker.live"].routing_key) == (
        "code_worker.live",
    ) * 2
    assert taken["code_worker.normal"].exchange.name == "x", "that they bound on purpose"


@pytest.mark.parametrize("listed", [None, [Queue("theirs")]])
def test_what_is_asked_for_is_not_taken_from(listed: list[Queue] | None) -> None:
    """As when a task of theirs sends one of ours by name; Celery 5.6 takes from all queues that it knows."""
    app = Celery("theirs", broker=URL, set_as_current=False)
    app.conf.task_queues = listed
    before = set(app.amqp.queues.consume_from)
    install(app)
    assert app.amqp.queues[TRAIN_QUEUE].name == TRAIN_QUEUE
    assert set(app.amqp.queues.consume_from) == before
    late = install(Celery("late", broker=URL, set_as_current=False))
    late.conf.task_queues = listed
    assert late.amqp.queues[TRAIN_QUEUE].name == TRAIN_QUEUE
    assert set(late.amqp.queues.consume_from) == before
    late.amqp.queues.select([TRAIN_QUEUE])
    assert set(late.amqp.queues.consume_from) == {TRAIN_QUEUE}


def test_queues_that_somebody_asked_for_before_we_came_can_be_named() -> None:
    app = Celery("theirs", broker=URL, set_as_current=False)
    app.conf.task_create_missing_queues = False
    app.conf.task_create_missing_queue_type = "quorum"
    assert list(app.amqp.queues) == ["celery"]
    install(app)
    assert app.amqp.queues["code_worker.live"].queue_arguments == {"x-queue-type": "quorum"}
    app.amqp.queues.select(["code_worker.train"])
    assert list(app.amqp.queues.consume_from) == ["code_worker.train"]


SETTINGS = {"worker": {"concurrency": 7}, "schedule": {"retrain": "0 3 * * sun"}}


@pytest.mark.parametrize(
    "configure",
    [
        lambda app: setattr(app.conf, "code_worker", SETTINGS),
        lambda app: app.config_from_object({"code_worker": SETTINGS, "broker_url": URL}),
        lambda app: app.config_from_object(SimpleNamespace(CELERY_CODE_WORKER=SETTINGS), namespace="CELERY"),
        lambda app: (read(app), setattr(app.conf, "code_worker", SETTINGS)),
    ],
    ids=["assigned", "object", "django", "after it was read"],
)
@pytest.mark.parametrize("first", [True, False])
def test_settings_may_stand_in_the_apps_configuration(
    configure: Step, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Celery("theirs", broker=URL, set_as_current=False)
    for step in [install, configure] if first else [configure, install]:
        step(app)
    app.finalize()
    assert host_of(app).settings.worker.concurrency == 7
    assert RETRAIN in app.conf.beat_schedule
    monkeypatch.setenv("CODE_WORKER_WORKER__CONCURRENCY", "3")
    other = Celery("others", broker=URL, set_as_current=False)
    configure(install(other))
    assert host_of(other).settings.worker.concurrency == 3, "the environment counts before"


def test_a_configuration_module_that_imports_us_is_no_table_of_settings() -> None:
    module = ModuleType("celeryconfig")
    module.broker_url, module.code_worker = URL, code_worker  # type: ignore[attr-defined]
    app = Celery("theirs", set_as_current=False)
    app.config_from_object(module)
    install(app)
    assert host_of(app).settings.worker.concurrency == 4
    app.conf.code_worker = "worker"
    with pytest.raises(
        ConfigurationError, match="`code_worker` in the configuration of the app 'theirs' must be a map"
    ):
        _ = host_of(app).settings


@pytest.mark.parametrize(
    ("url", "transport"),
    [
        ("redis://:p%40ss@h:6380/3", REDIS_TRANSPORT),
        ("rediss://user:p%2Fss@h:6380/3?ssl_cert_reqs=required", TRANSPORTS["rediss"]),
        ("redis://h/1;redis://g/1", REDIS_TRANSPORT),
        ("amqp://h//", None),
    ],
)
def test_monitors_see_the_url_that_they_would_without_us(url: str, transport: str | None) -> None:
    alone = Celery("alone", broker=url, set_as_current=False)
    app = install(Celery("theirs", broker=url, set_as_current=False))
    for shown in (True, False):
        assert app.connection().as_uri(include_password=shown) == alone.connection().as_uri(include_password=shown)
    assert app.conf.broker_transport == transport
    assert app.connection().clone().transport_cls == app.connection().transport_cls


HOSTILE = {
    "task_time_limit": 1,
    "task_soft_time_limit": 1,
    "task_default_rate_limit": "1/h",
    "task_default_priority": 9,
    "task_acks_late": False,
    "task_acks_on_failure_or_timeout": False,
    "task_ignore_result": False,
    "task_track_started": True,
    "task_store_errors_even_if_ignored": True,
    "task_serializer": "yaml",
    "task_annotations": {"*": {"rate_limit": "1/h", "time_limit": 1}},
}


def test_what_they_set_for_their_tasks_is_not_set_for_ours() -> None:
    app = install(Celery("theirs", broker=URL, set_as_current=False))

    class Retried(app.Task):  # type: ignore[misc, name-defined]
        autoretry_for = (Exception,)

    app.Task = Retried
    app.conf.update(HOSTILE)
    for name in (MODERATE, SWEEP, RETRAIN, REFIT, WATCH):
        task = app.tasks[name]
        # Of batches no longer: a pool of processes keeps a timer of each for as long, also once it is done.
        wanted = 6 * 3600 if name in (MODERATE, SWEEP) else 10 * 366 * 86_400
        assert (task.time_limit, task.soft_time_limit) == (wanted, wanted)
        assert (task.rate_limit, task.priority, task.serializer) == (0, 0, "json")
        assert (task.ignore_result, task.track_started, task.store_errors_even_if_ignored) == (True, False, False)
        assert task.acks_late is (name in {MODERATE, SWEEP})
        assert task.acks_on_failure_or_timeout
        assert not getattr(task, "autoretry_for", ())


@pytest.mark.parametrize("first", [True, False])
def test_wrong_settings_are_said_once_where_the_app_only_publishes(
    caplog: pytest.LogCaptureFixture, first: bool
) -> None:
    app = Celery("theirs", broker=URL, set_as_current=False)
    if first:
        install(app)
    app.conf.code_worker = {"schedule": {"refit": "every day"}}
    if not first:
        assert app.conf.enable_utc, "it is configured from now on"
        install(app)
    app.finalize()
    (line,) = [record.getMessage() for record in caplog.records if "configuration_error" in record.getMessage()]
    assert "schedule.refit in app.conf.code_worker: 'every day' is no cron line (2 fields)" in line
    assert destination(app, RETRAIN)[0] == TRAIN_QUEUE, "all else is there"
