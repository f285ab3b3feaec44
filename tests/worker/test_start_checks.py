"""What a worker or beat of somebody's app looks at when it starts: what it puts back, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from celery import Celery, signals
from celery.beat import Service

from code_worker.broker import REDIS_TRANSPORT
from code_worker.system.machine import usable_memory
from code_worker.wire import MODERATE, RETRAIN, SWEEP, TRAIN_QUEUE
from code_worker.worker.app import install
from code_worker.worker.launch_checks import warn_of_prefork
from tests.worker.test_configuration import ENTRIES, ROUTES, URL, destination


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings of the environment, as a host's process has them."""
    monkeypatch.setenv("CODE_WORKER_DATA_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def started(app: Celery, *queues: str, pool: str = "threads") -> object:
    """A worker as far as Celery makes it before it connects."""
    return app.WorkController(queues=list(queues) or None, pool=pool)


@pytest.mark.parametrize(
    ("configuration", "said"),
    [
        ({"code_worker": {"schedule": {"refit": "every day"}}}, "is no cron line"),
        ({"code_worker": {"no_such": 1}}, "no_such"),
        ({"accept_content": ["yaml"]}, "add 'json'"),
        ({"beat_schedule": {SWEEP: {"task": "theirs.resize", "schedule": 1.0}}}, "give it another name"),
        (
            {"broker_transport_options": {"visibility_timeout": 60}},
            "set broker_transport_options['visibility_timeout']",
        ),
    ],
)
def test_what_is_wrong_ends_a_worker_of_our_queues_with_status_2_and_one_line(
    configuration: Mapping[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = install(Celery("theirs", broker=URL, set_as_current=False))
    app.config_from_object(configuration)
    app.finalize()
    caplog.clear()
    with pytest.raises(SystemExit) as ended:
        started(app, "code_worker.train")
    assert ended.value.code == 2
    (line,) = caplog.records
    assert said in line.getMessage()
    assert "\n" not in line.getMessage()
    started(install(other := Celery("others", broker=URL, set_as_current=False)))
    other.config_from_object(configuration)
    started(other)


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1:1/0;redis://127.0.0.1:2/0",
        ["redis://127.0.0.1:1/0", "redis://127.0.0.1:2/0"],
        "sentinel://127.0.0.1:1;sentinel://127.0.0.1:2",
        "redis+socket:///nowhere/redis.sock",
        "rediss://127.0.0.1:1/0",
        "memory://",
    ],
    ids=str,
)
def test_a_timeout_within_which_batches_are_repeated_is_refused_on_every_redis_and_where_it_is_set(
    url: str | list[str], caplog: pytest.LogCaptureFixture
) -> None:
    app = install(Celery("theirs", broker=url, set_as_current=False))
    app.conf.broker_transport_options = {"visibility_timeout": 60}
    with pytest.raises(SystemExit) as ended:
        started(app, "code_worker.live")
    assert ended.value.code == 2
    (line,) = caplog.records
    assert "set broker_transport_options['visibility_timeout']" in line.getMessage()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (URL, None),
        (f"{URL};{URL}", None),
        ("sentinel://127.0.0.1:1", "broker_without_our_transport"),
        ("redis+socket:///nowhere/redis.sock", "broker_without_our_transport"),
        ("memory://", "broker_untested"),
        ("amqp://127.0.0.1:1//", "broker_untested"),
    ],
)
def test_a_worker_of_our_queues_warns_once_of_a_broker_that_is_less_than_redis_by_our_transport(
    url: str, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    app = install(Celery("theirs", broker=url, set_as_current=False))
    if url.startswith("amqp"):
        # Shared with a broker that heeds it; AMQP does not.
        app.conf.broker_transport_options = {"visibility_timeout": 60}
    started(app, "celery")
    assert not caplog.records, "whose queues are none of ours"
    app.amqp.queues.select(["code_worker.live"])
    started(app, "code_worker.live")
    warned = [record.getMessage() for record in caplog.records if "broker_" in record.getMessage()]
    assert [line.split()[0] for line in warned] == ([said] if said else [])


@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_pools_of_green_threads_are_refused(pool: str) -> None:
    app = install(Celery("theirs", broker=URL, set_as_current=False))
    app.conf.broker_transport_options = {"visibility_timeout": 600}
    with pytest.raises(SystemExit) as ended:
        started(app, "code_worker.live", pool=f"celery.concurrency.{pool}:TaskPool")
    assert ended.value.code == 2


def beat(app: Celery, directory: Path) -> Any:
    """What beat has read when it says that it starts."""
    service = Service(app, schedule_filename=str(directory / "schedule"))
    service.scheduler  # noqa: B018 - made when first asked for
    signals.beat_init.send(sender=service)
    return service


def test_beat_gets_back_what_was_dropped_after_all_was_read(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    app = install(Celery("theirs", broker=URL, set_as_current=False))
    app.finalize()
    app.conf.beat_schedule = dict(ENTRIES)
    app.conf.code_worker = {"schedule": {"retrain": "0 3 * * sun"}}
    service = beat(app, directory)
    try:
        assert {*ENTRIES, SWEEP, RETRAIN} <= set(service.scheduler.schedule)
        assert "beat_entries_put_back" in caplog.text
    finally:
        service.scheduler.close()


class Closed:
    """A beat whose scheduler takes nothing after its start."""

    def __init__(self, app: Celery) -> None:
        self.app, self.scheduler = app, self

    def update_from_dict(self, entries: object) -> None:
        raise NotImplementedError


def test_a_schedule_that_cannot_be_changed_is_replaced() -> None:
    app = Celery("theirs", broker=URL, set_as_current=False)
    app.conf.beat_schedule, app.conf.task_routes = MappingProxyType(ENTRIES), MappingProxyType(ROUTES)
    install(app).finalize()
    assert set(app.conf.beat_schedule) == {*ENTRIES, SWEEP}
    assert (destination(app, "theirs.resize")[0], destination(app, RETRAIN)[0]) == ("images", TRAIN_QUEUE)


def test_a_beat_that_lacks_an_entry_for_good_says_which_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    app = install(Celery("theirs", broker=URL, set_as_current=False))
    app.finalize()
    app.conf.beat_schedule = {}
    with pytest.raises(SystemExit) as ended:
        signals.beat_init.send(sender=Closed(app))
    assert ended.value.code == 2
    assert "lacks code_worker.sweep" in caplog.records[-1].getMessage()


def test_a_worker_gets_back_what_was_dropped_after_all_was_read() -> None:
    app = Celery("theirs", set_as_current=False)
    install(app)
    app.conf.broker_url = "memory://"
    app.finalize()
    assert destination(app, RETRAIN)[0] == TRAIN_QUEUE
    app.conf.task_routes, app.conf.broker_url, app.conf.beat_schedule = {}, URL, {}
    app.conf.broker_transport_options = {"visibility_timeout": 600}
    started(app, "code_worker.live")
    assert destination(app, RETRAIN)[0] == TRAIN_QUEUE
    assert app.conf.broker_transport == REDIS_TRANSPORT
    assert SWEEP in app.conf.beat_schedule


def test_a_transport_goes_when_the_app_moves_to_another_broker() -> None:
    app = install(Celery("theirs", broker=URL, set_as_current=False))
    app.finalize()
    app.conf.broker_url = "amqp://127.0.0.1:1//"
    started(app, "code_worker.live")
    assert app.conf.broker_transport is None


@pytest.mark.parametrize(("children", "level"), [(1, "INFO"), (1_000_000, "WARNING")])
def test_a_child_says_once_what_it_took_and_warns_where_that_is_too_much_for_all(
    children: int, level: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(signals.task_postrun, "receivers", [])
    warn_of_prefork(children, None)
    app = install(Celery("theirs", broker=URL, set_as_current=False))
    for name in (SWEEP, MODERATE, MODERATE):
        signals.task_postrun.send(sender=app.tasks[name])
    (said,) = [record for record in caplog.records if "prefork_child_memory" in record.getMessage()]
    assert said.levelname == level
    assert f"usable_mb={round(usable_memory() / 1e6)}" in said.getMessage()
