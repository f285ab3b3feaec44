"""The Celery app: one of our own, or yours with our tasks in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from celery import Celery, signals
from kombu.entity import Queue

from code_worker.broker import REDIS_TRANSPORT, celery_config, is_redis, tls_options
from code_worker.doorbell import Doorbell
from code_worker.errors import ConfigurationError
from code_worker.queues import MODERATE, NORMAL, QUEUES, REFIT, RETRAIN, SWEEP, SWEEP_QUEUE, TRAIN_QUEUE, WATCH
from code_worker.settings import Settings, load_settings
from code_worker.worker.host import Host
from code_worker.worker.refusals import check_content, refuse_to_start
from code_worker.worker.schedule import beat_entries
from code_worker.worker.tasks import register_learning, register_tasks
from code_worker.worker.transport import report_unreadable_to
from code_worker.worker.waker import add_waker

if TYPE_CHECKING:
    from celery.apps.worker import Worker

__all__ = ["create_app", "host_of", "install"]

_HOSTS: WeakKeyDictionary[Celery, Host] = WeakKeyDictionary()
_SWEEP_EVERY_S = 30.0
_JUDGING = frozenset({*QUEUES, SWEEP_QUEUE})
_ALL_QUEUES = (*QUEUES, SWEEP_QUEUE, TRAIN_QUEUE)


def create_app(settings: Settings | None = None) -> Celery:
    """A Celery app with our settings, tasks, queues and beat entry.

    Raises:
        ConfigurationError: no broker, or one that is open to the network.
    """
    settings = settings or load_settings()
    app = Celery("code_worker", set_as_current=False)
    app.config_from_object(celery_config(settings))
    return install(app, settings)


def install(app: Celery, settings: Settings | None = None) -> Celery:
    """Adds our tasks, routes and beat entry to an app you already have, and touches nothing else of it.

    Workers take our jobs when they consume our queues, in this order of urgency:
    `celery -A yours worker -P threads -Q code_worker.live,code_worker.normal,code_worker.backfill,code_worker.sweep`.
    Training takes long and holds a device: give it a worker of its own, `-P threads -c 1 -Q code_worker.train`.
    On Redis, an app that sets no transport of its own gets ours, which survives a Redis restart; that of kombu 5.7.0
    does not. `enqueue` in this process rings through the app; producers elsewhere need its broker URL and key prefix.
    Let a supervisor restart the workers: a process in which a batch is stuck or whose device is lost ends with status
    70, since threads cannot be stopped.

    Raises:
        ConfigurationError: called twice on one app, an app that accepts no JSON, or a schedule that is no cron line.
    """
    if app in _HOSTS:
        raise ConfigurationError(f"code_worker is installed in the app {app.main!r} already")
    check_content(app)
    settings = settings or load_settings()
    scheduled = beat_entries(settings)
    host = Host(app, settings)
    _HOSTS[app] = host
    register_tasks(app, host)
    register_learning(app, host)
    Doorbell.adopt(app)
    _add_routes(app)
    _add_queues(app)
    add_waker(app)
    app.conf.beat_schedule = {
        **(app.conf.beat_schedule or {}),
        "code_worker.sweep": {
            "task": SWEEP,
            "schedule": _SWEEP_EVERY_S,
            "options": {"queue": SWEEP_QUEUE, "expires": _SWEEP_EVERY_S},
        },
        **scheduled,
    }
    if is_redis(str(app.conf.broker_url or "")) and not app.conf.broker_transport:
        app.conf.broker_transport = REDIS_TRANSPORT
        app.conf.broker_use_ssl = app.conf.broker_use_ssl or tls_options(str(app.conf.broker_url))
    return app


def host_of(app: Celery) -> Host:
    """What `install` put beside the app.

    Raises:
        ConfigurationError: `install` was not called on it.
    """
    try:
        return _HOSTS[app]
    except KeyError:
        raise ConfigurationError(f"code_worker is not installed in the app {app.main!r}") from None


def _add_routes(app: Celery) -> None:
    ours = {
        MODERATE: {"queue": NORMAL},
        SWEEP: {"queue": SWEEP_QUEUE},
        **{task: {"queue": TRAIN_QUEUE} for task in (RETRAIN, REFIT, WATCH)},
    }
    theirs = app.conf.task_routes
    if not theirs:
        app.conf.task_routes = ours
    elif isinstance(theirs, Mapping):
        # Theirs win: who routes our tasks elsewhere means it.
        app.conf.task_routes = {**ours, **theirs}
    else:
        app.conf.task_routes = [*(theirs if isinstance(theirs, list | tuple) else [theirs]), ours]


def _add_queues(app: Celery) -> None:
    """An app that lists its queues refuses others; one that lists none creates what a worker asks for."""
    theirs = app.conf.task_queues
    if not theirs:
        return
    if isinstance(theirs, Mapping):
        app.conf.task_queues = {**{name: {} for name in _ALL_QUEUES}, **theirs}
        return
    known = {queue.name for queue in theirs}
    app.conf.task_queues = [*theirs, *(Queue(name) for name in _ALL_QUEUES if name not in known)]


def _of_worker(sender: Any) -> Host | None:
    worker: Worker | None = getattr(sender, "controller", sender)
    app = getattr(worker, "app", None)
    return _HOSTS.get(app) if app is not None else None


def _start_background(sender: Any, **_: Any) -> None:
    if (host := _of_worker(sender)) is None:
        return
    # A worker of other queues may not even reach the ledger.
    queues = {queue.name for queue in sender.task_consumer.queues}
    if queues & _JUDGING:
        host.start_sweeping()
    if queues & frozenset(QUEUES):
        report_unreadable_to(host.bury)
    if TRAIN_QUEUE in queues:
        host.start_watching()


def _stop_taking(**_: Any) -> None:
    # Celery sends the host's name here; one process runs one worker.
    for host in _HOSTS.values():
        host.stop_taking()


def _close(sender: Any, **_: Any) -> None:
    if (host := _of_worker(sender)) is not None:
        host.close()


def _check(sender: Any, **_: Any) -> None:
    if (host := _of_worker(sender)) is not None:
        refuse_to_start(sender, host.settings)


signals.worker_init.connect(_check, weak=False)
signals.worker_ready.connect(_start_background, weak=False)
signals.worker_shutting_down.connect(_stop_taking, weak=False)
signals.worker_shutdown.connect(_close, weak=False)
