"""The Celery app: one of our own, or yours with our tasks in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import click
from celery import Celery, signals

from code_worker.broker import ALL_QUEUES, celery_config
from code_worker.errors import BrokerUnavailableError, CodeWorkerError, ConfigurationError
from code_worker.logs import get_logger
from code_worker.publisher import Publisher
from code_worker.settings import Settings, load_settings
from code_worker.wire import QUEUES, SWEEP, SWEEP_QUEUE, TRAIN_QUEUE
from code_worker.worker.app_configuration import (
    add_entries,
    add_queues,
    add_routes,
    add_transport,
    limit_remote_control,
    settings_in,
    warn_of_idle,
)
from code_worker.worker.app_state import AppState
from code_worker.worker.kombu_redis import add_waker, on_unreadable
from code_worker.worker.launch_checks import Bystander, check_content, refuse_to_start, refusing, threads_of
from code_worker.worker.schedule import beat_entries
from code_worker.worker.tasks import register_learning, register_tasks

if TYPE_CHECKING:
    from celery.apps.worker import Worker

__all__ = [
    "create_app",
    "host_of",
    "install",
]


log = get_logger(__name__)
_INSTALLED: WeakKeyDictionary[Celery, _Installed] = WeakKeyDictionary()
_SWEEP_EVERY_S = 30.0
_JUDGING = frozenset({*QUEUES, SWEEP_QUEUE})


def create_app(settings: Settings | None = None) -> Celery:
    """A Celery app with our settings, tasks, queues and beat entry.

    Raises:
        ConfigurationError: no broker, or one that is open to the network.
    """
    settings = settings or load_settings()
    app = Celery("code_worker", set_as_current=False)
    app.config_from_object(celery_config(settings))
    limit_remote_control(app, settings)
    return install(app, settings)


def install(app: Celery, settings: Settings | None = None) -> Celery:
    """Adds our tasks to an app you already have, and our routes and beat entries once it reads its configuration.

    Call it anywhere after `Celery(...)`: it reads no configuration, and what is set later keeps ours. Settings that
    are not given come from the environment and the file, and below these from `app.conf.code_worker`.

    Workers take our jobs when they name our queues, in this order of urgency:
    `celery -A yours worker -P threads -Q code_worker.live,code_worker.normal,code_worker.backfill,code_worker.sweep`.
    Training takes long and holds a device: give it a worker of its own, `-P threads -c 1 -Q code_worker.train`.
    On Redis, an app that sets no transport of its own gets ours, which survives a Redis restart; that of kombu 5.7.0
    does not. `enqueue` in this process publishes through the app, by its settings; producers elsewhere need its
    broker URL and key prefix. Let a supervisor restart the workers: a process in which a batch is stuck or whose
    device is lost ends with status 70, since threads cannot be stopped.

    Raises:
        ConfigurationError: called twice on one app, something that is no app or no `Settings`, a configured app that
            accepts no JSON. What is wrong with settings that are read is logged, since a process that only publishes,
            or runs tasks of its own, can go on: workers of our queues and beat say it when they start, and end with
            status 2.
    """
    if not isinstance(app, Celery) or not isinstance(settings, Settings | None):
        raise ConfigurationError(
            f"install takes a Celery app and, if any, code_worker.settings.Settings, not {type(app).__name__} and "
            f"{type(settings).__name__}"
        )
    if app in _INSTALLED:
        raise ConfigurationError(f"code_worker is installed in the app {app.main!r} already")
    installed = _Installed(app, settings)
    if app.configured:
        check_content(app)
    register_tasks(app, installed.host)
    register_learning(app, installed.host)
    add_waker(app)
    app.on_after_configure.connect(installed.configure, weak=False)
    app.on_after_finalize.connect(installed.configure, weak=False)
    if app.configured:
        installed.configure()
    _INSTALLED[app] = installed
    Publisher.adopt(app)
    Settings.of_app = installed.settings
    return app


def host_of(app: Celery) -> AppState:
    """Returns what `install` put beside the app.

    Raises:
        ConfigurationError: `install` was not called on it.
    """
    try:
        return _INSTALLED[app].host
    except KeyError:
        raise ConfigurationError(f"code_worker is not installed in the app {app.main!r}") from None


class _Installed:
    """One app with our tasks: follows its configuration, however often and late that is read."""

    def __init__(self, app: Celery, settings: Settings | None) -> None:
        self._app = app
        self._given = settings
        self._below: Mapping[str, object] | None = None
        self._read: Settings | None = None
        self.host = AppState(app, self.settings)
        self.bystander = Bystander(app)
        self._wrong = ""

    def settings(self) -> Settings:
        """Those given, else those that environment, file and the app's configuration say.

        Raises:
            ConfigurationError: they cannot be read.
        """
        if self._given is not None:
            return self._given
        below = settings_in(self._app)
        if self._read is None or below != self._below:
            self._read, self._below = load_settings(below=below), below
            warn_of_idle(below or {})
        return self._read

    def configure(self, **_: Any) -> None:
        """Adds what is ours at each reading of the configuration; workers and beat refuse what is wrong with it."""
        said, self._wrong = self._wrong, ""
        try:
            self.add()
        except CodeWorkerError as error:
            self._wrong = str(error)
            # In a web process, too, that only publishes and must go on; its app is read and then finalized.
            if self._wrong != said and not _celery_starts_worker_or_beat():
                self.say_what_is_wrong()

    def say_what_is_wrong(self) -> None:
        """Logs why something could not be added when the configuration was read last, if anything could not."""
        if self._wrong:
            log.error("configuration_error", error=self._wrong)

    def add(self) -> list[str]:
        """Adds what is missing, and says what that was.

        Raises:
            ConfigurationError: see `add_entries`; all else is added.
        """
        add_queues(self._app)
        added = [*add_transport(self._app), *(f"route of {task}" for task in add_routes(self._app))]
        return [*added, *(f"beat entry {name}" for name in self.add_entries())]

    def add_entries(self) -> list[str]:
        """Adds the entries that beat's schedule lacks, and returns their names.

        Raises:
            ConfigurationError: settings that cannot be read, or an entry that has our name and runs something else.
        """
        sweep = {
            "task": SWEEP,
            "schedule": _SWEEP_EVERY_S,
            # While no worker takes them sweeps pile up; one that is older than the next has nothing to add to it.
            "options": {"queue": SWEEP_QUEUE, "expires": _SWEEP_EVERY_S},
        }
        return add_entries(self._app, {SWEEP: sweep, **beat_entries(self.settings())})

    def check(self) -> None:
        """Adds what was dropped since, and refuses what is wrong.

        Raises:
            ConfigurationError: settings, schedule or accepted content with which neither worker nor beat can go on.
        """
        if added := self.add():
            log.info("configuration_put_back", added=added)
        check_content(self._app)

    def unbind(self) -> None:
        """Takes our queues from the app's default exchange, to which an earlier version bound them in Redis.

        Unless the app lists them so: then it is meant.
        """
        conf, queues = self._app.conf, self._app.amqp.queues
        for exchange in {conf.task_default_exchange, conf.task_default_queue} - {*ALL_QUEUES}:
            # Not by the brackets: Celery 5.6 would take from a queue that is asked for.
            known = {name: dict.get(queues, name) for name in ALL_QUEUES}
            strays = [name for name, queue in known.items() if queue is None or queue.exchange.name != exchange]
            try:
                unbound = Publisher(self._app).unbind(exchange, strays)
            except BrokerUnavailableError as error:
                log.warning("bindings_not_looked_at", exchange=exchange, error=str(error))
                return
            if unbound:
                log.info("bindings_removed", exchange=exchange, queues=unbound)


def _celery_starts_worker_or_beat() -> bool:
    """Returns whether this process is Celery's command for one of them: it says itself what is wrong."""
    context = click.get_current_context(silent=True)
    if context is None or context.find_root().command.name != "celery":
        return False
    return not {context.info_name, context.invoked_subcommand}.isdisjoint({"worker", "beat"})


def _of_worker(sender: Any) -> _Installed | None:
    worker: Worker | None = getattr(sender, "controller", sender)
    app = getattr(worker, "app", None)
    return _INSTALLED.get(app) if app is not None else None


def _start_background(sender: Any, **_: Any) -> None:
    if (installed := _of_worker(sender)) is None:
        return
    host = installed.host
    # Sent by the consumer, and only now: `-Q` and `-X` are settled when it has declared its queues.
    queues = {queue.name for queue in sender.task_consumer.queues}
    if not queues & frozenset(ALL_QUEUES):
        # It may not even reach the ledger.
        installed.bystander.start()
        return
    installed.unbind()
    host.start_reporting(queues & frozenset(ALL_QUEUES))
    if queues & _JUDGING:
        host.start_sweeping()
    if queues & frozenset(QUEUES):
        on_unreadable(host.keep_unreadable)
    if TRAIN_QUEUE in queues:
        host.start_watching()


def _stop_taking(**_: Any) -> None:
    # Celery sends the host's name here; one process runs one worker.
    for installed in _INSTALLED.values():
        installed.host.stop_taking()


def _close(sender: Any, **_: Any) -> None:
    if (installed := _of_worker(sender)) is not None:
        installed.bystander.stop()
        installed.host.close()


def _check_worker(sender: Any, **_: Any) -> None:
    if (installed := _of_worker(sender)) is not None:
        if not refuse_to_start(sender, installed.check, installed.settings):
            installed.say_what_is_wrong()
        # Before anything opens the store, whose pool of connections has a place for each of these threads.
        installed.host.judge_on(threads_of(sender))


def _check_beat(sender: Any, **_: Any) -> None:
    """Beat's scheduler has read the schedule by now: what is put back in it is also told to the scheduler."""
    if (installed := _of_worker(sender)) is None:
        return
    with refusing():
        if names := installed.add_entries():
            _tell_scheduler(sender.scheduler, {name: sender.app.conf.beat_schedule[name] for name in names})
        installed.check()


def _tell_scheduler(scheduler: Any, entries: Mapping[str, Any]) -> None:
    names = ", ".join(sorted(entries))
    try:
        scheduler.update_from_dict(entries)
    except Exception as error:
        raise ConfigurationError(
            f"beat_schedule lacks {names}, and the scheduler {type(scheduler).__name__} takes no entry after its "
            f"start ({type(error).__name__}): set beat_schedule before the app is used, or call install after it"
        ) from error
    log.info("beat_entries_put_back", entries=names)


# A worker's, in the order in which Celery sends them: before pool and connection are made, so that a refusal costs
# nothing; when the consumer is connected and knows its queues; in the handler of SIGTERM; when its pool has ended.
signals.worker_init.connect(_check_worker, weak=False)
signals.beat_init.connect(_check_beat, weak=False)
signals.worker_ready.connect(_start_background, weak=False)
signals.worker_shutting_down.connect(_stop_taking, weak=False)
signals.worker_shutdown.connect(_close, weak=False)
