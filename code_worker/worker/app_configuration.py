"""Configuration of an app: settings of ours, our queues and routes, remote control."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from celery import bootsteps
from celery.app.defaults import SETTING_KEYS
from celery.worker.control import Panel
from kombu.entity import Exchange, Queue

from code_worker.broker import ALL_QUEUES, ROUTES, TRANSPORTS, tls_options
from code_worker.errors import ConfigurationError
from code_worker.logs import get_logger
from code_worker.publisher import bound_queue
from code_worker.settings import Settings

if TYPE_CHECKING:
    from celery import Celery

log = get_logger(__name__)
_CONF: Final = "code_worker"
_OPTIONS: Final = "app.conf.broker_transport_options"
_THEIRS: Final = {
    ("broker_url",): "app.conf.broker_url",
    ("broker", "key_prefix"): f"{_OPTIONS}['global_keyprefix']",
    ("broker", "visibility_timeout_s"): f"{_OPTIONS}['visibility_timeout']",
    ("broker", "socket_timeout_s"): f"{_OPTIONS}['socket_timeout']",
}
"""Settings of our own app that are, in somebody's, Celery's to say."""


def settings_in(app: Celery) -> dict[str, Any] | None:
    """A copy of the mapping as it is now, so that changes within it are seen as such; None where there is none.

    Raises:
        ConfigurationError: it is no mapping, or names a setting of Celery's.
    """
    found = app.conf.get(_CONF)
    # A configuration that is a module may have imported us, and would have our name.
    if found is None or isinstance(found, ModuleType):
        return None
    if not isinstance(found, Mapping):
        raise ConfigurationError(
            f"`code_worker` in the configuration of the app {app.main!r} must be a mapping of settings, "
            f"not {type(found).__name__}"
        )
    if misplaced := [f"{name} (set app.conf.{celerys})" for name, celerys in _of_celery(found)]:
        raise ConfigurationError(
            f"settings of Celery's, and not of ours, in app.conf.code_worker: {', '.join(misplaced)}"
        )
    return {name: _copied(value) for name, value in found.items()}


def _of_celery(found: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    for name in map(str, found):
        celerys = name.lower().removeprefix("celery_")
        if celerys in SETTING_KEYS and name not in Settings.model_fields:
            yield name, celerys


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _copied(each) for name, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list | tuple) else value


def warn_of_idle(found: Mapping[str, Any]) -> None:
    """Warns of each setting of that mapping that changes nothing in somebody's app, and says where it belongs."""
    for names, place in _THEIRS.items():
        section: Any = found
        for name in names[:-1]:
            section = section.get(name)
        if isinstance(section, Mapping) and names[-1] in section:
            log.warning(
                "setting_without_effect",
                setting=f"{'.'.join(names)} in app.conf.code_worker",
                hint=f"the broker is your app's: set {place}",
            )


_OURS: Final = "code_worker."


class _KnowsOurs:
    """Mixed into an app's `Queues`: ours are there once they are named, and a worker that names none takes none."""

    def __missing__(self, name: str) -> Queue:
        if name in ALL_QUEUES:
            # Past the mapping's own items: Queues is a dict of queues,
            # and a worker of Celery 5.6 takes from all of these.
            self.__dict__.setdefault("asked_for", set()).add(name)
            return self._add(bound_queue(name))
        return super().__missing__(name)  # type: ignore[misc]  # of Celery's Queues

    @property
    def consume_from(self) -> Mapping[str, Queue]:
        """Returns what a worker takes from.

        In Celery 5.6 all that is known, which leaves out what was only asked for.
        """
        known: Any = self
        found = super().consume_from  # type: ignore[misc]  # of Celery's Queues
        if found is not known:
            return found  # type: ignore[no-any-return]
        asked_for = self.__dict__.get("asked_for", ())
        return {name: queue for name, queue in known.items() if name not in asked_for}

    def _add(self, queue: Queue) -> Queue:
        # Celery would bind one that is listed by its name alone to the default exchange, with what else goes there.
        if queue.name in ALL_QUEUES and not queue.exchange.name and queue.routing_key in (None, "", queue.name):
            queue.exchange, queue.routing_key = Exchange(queue.name, type="direct"), queue.name
        return super()._add(_typed(self, queue) if queue.name in ALL_QUEUES else queue)  # type: ignore[misc]  # Celery's


def _typed(queues: Any, queue: Queue) -> Queue:
    """A queue of the type that the app creates those with that are not listed."""
    if getattr(queues, "create_missing_queue_type", None) == "quorum":
        queue.queue_arguments = {"x-queue-type": "quorum", **(queue.queue_arguments or {})}
    return queue


def add_queues(app: Celery) -> None:
    """Has our queues found by their names, also where unknown names are refused; `task_queues` stays as it is."""
    amqp = app.amqp
    if not issubclass(amqp.queues_cls, _KnowsOurs):
        # A class of their own class: an app may have put one of its own there before us.
        amqp.queues_cls = type("Queues", (_KnowsOurs, amqp.queues_cls), {})
    if "queues" in vars(amqp) and not isinstance(amqp.queues, _KnowsOurs):
        # Somebody asked for them before we came; Celery 5.6 takes from all that is known unless something is chosen.
        if not hasattr(amqp.queues, "_default_consume_from") and amqp.queues._consume_from is None:
            amqp.queues._consume_from = dict(amqp.queues)
        for name in ALL_QUEUES:
            if name not in amqp.queues:
                amqp.queues.add(_typed(amqp.queues, bound_queue(name)))


def _assign(app: Celery, name: str, value: object) -> None:
    """Sets a value, also in Celery 5.6, where the name with the namespace of `config_from_object` is found first."""
    conf = app.conf
    conf[name] = value
    if conf.prefix and conf[name] is not value:
        key = f"{conf.prefix}{name}"
        conf[key.upper() if conf.prefix.isupper() else key.lower()] = value


def add_routes(app: Celery) -> list[str]:
    """Puts our routes before those that catch all; ones that name our tasks stay. Returns tasks without one."""
    theirs = app.conf.task_routes
    listed = list(theirs) if isinstance(theirs, list | tuple) else [theirs] if theirs else []
    patterns = {pattern for route in listed for pattern in _patterns(route)}
    if any(pattern.startswith(_OURS) and "*" in pattern for pattern in patterns):
        return []
    missing = {task: dict(route) for task, route in ROUTES.items() if task not in patterns}
    if not missing:
        return []
    if isinstance(theirs, Mapping) or not theirs:
        _assign(app, "task_routes", {**missing, **(theirs or {})})
    else:
        _assign(app, "task_routes", [missing, *listed])
    # A router that was made before does not know them.
    # `router` is a cached property of Celery's: taken out of the instance, it is made anew when it is next asked for.
    vars(app.amqp).pop("router", None)
    app.amqp.flush_routes()
    return list(missing)


def _patterns(route: object) -> Iterable[str]:
    """Returns what a route is for.

    Names and globs of a mapping or of its list of pairs; nobody can say it of a function.
    """
    if isinstance(route, Mapping):
        return [name for name in route if isinstance(name, str)]
    if isinstance(route, list | tuple):
        return [pair[0] for pair in route if isinstance(pair, list | tuple) and pair and isinstance(pair[0], str)]
    return []


def add_transport(app: Celery) -> list[str]:
    """Gives our transport to an app on Redis that sets none, and takes it from one that moved to another broker."""
    conf = app.conf
    ours = set(TRANSPORTS.values())
    if conf.broker_transport and conf.broker_transport not in ours:
        return []
    urls = [str(_first(url) or "") for url in (conf.broker_read_url, conf.broker_write_url)]
    schemes = {urlsplit(url).scheme for url in urls}
    wanted = TRANSPORTS.get(schemes.pop()) if len(schemes) == 1 else None
    if conf.broker_transport == wanted:
        return []
    _assign(app, "broker_transport", wanted)
    if wanted:
        _assign(app, "broker_use_ssl", conf.broker_use_ssl or tls_options(urls[0]))
    return ["broker_transport"]


def _first(url: object) -> object:
    """Of several brokers, of which one stands in for the other."""
    several = url if isinstance(url, list | tuple) else str(url or "").split(";")
    return next(iter(several), None)


def add_entries(app: Celery, entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Adds entries to the schedule of beat, as `add_periodic_task` does; those that were missing.

    Raises:
        ConfigurationError: an entry of the same name runs another task.
    """
    theirs = app.conf.beat_schedule
    missing = {name: dict(entry) for name, entry in entries.items() if name not in (theirs or {})}
    for name, entry in entries.items():
        if name not in missing and (task := theirs[name]["task"]) != entry["task"]:
            raise ConfigurationError(
                f"the entry {name!r} of beat_schedule in the app {app.main!r} runs {task!r} instead of "
                f"{entry['task']!r}: give it another name"
            )
    if not missing:
        return []
    if isinstance(theirs, MutableMapping):
        theirs.update(missing)
    else:
        _assign(app, "beat_schedule", {**(theirs or {}), **missing})
    return list(missing)


# Without `hello`, with which workers greet each other: it takes a list of revoked tasks from anyone who sends it, and
# what is revoked is acknowledged and never run.
_LOOKING: Final = frozenset(
    {
        *("active", "active_queues", "clock", "ping", "query_task", "registered"),
        *("reserved", "revoked", "scheduled", "stats"),
        # Monitors have workers send events with these two, and ask for a sign of life with the third.
        *("enable_events", "disable_events", "heartbeat"),
    }
)
_NEVER: Final = frozenset({"conf"})
"""It would show the broker's password: Celery hides that of `broker_url`, and not of `redbeat_redis_url`."""


class _LookingOnly(bootsteps.Step):
    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        # Celery has no setting for single commands. The registry is the process's: it
        # is changed when a worker is built, and no other kind of process reads it.
        for name in Panel.data.keys() - _LOOKING:
            del Panel.data[name]


class _WithoutPasswords(bootsteps.Step):
    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        for name in Panel.data.keys() & _NEVER:
            del Panel.data[name]


def limit_remote_control(app: Celery, settings: Settings) -> None:
    """Has workers of the app forget commands of remote control that the settings do not allow."""
    if settings.worker.remote_control != "off":
        app.steps["worker"].add(_LookingOnly if settings.worker.remote_control == "inspect" else _WithoutPasswords)
