"""What is added to the configuration of an app that we are installed in: queues, routes, transport, beat entries.

Each can be added again at any time, and adds only what is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from kombu.entity import Exchange, Queue

from code_worker.broker import ALL_QUEUES, ROUTES, TRANSPORTS, tls_options
from code_worker.doorbell import bound_queue
from code_worker.errors import ConfigurationError

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["add_entries", "add_queues", "add_routes", "add_transport"]

_OURS: Final = "code_worker."


class _KnowsOurs:
    """Mixed into an app's `Queues`: ours are there once they are named, and a worker that names none takes none."""

    def __missing__(self, name: str) -> Queue:
        if name in ALL_QUEUES:
            self.__dict__.setdefault("asked_for", set()).add(name)
            return self._add(bound_queue(name))
        return super().__missing__(name)  # type: ignore[misc]  # of Celery's Queues

    @property
    def consume_from(self) -> Mapping[str, Queue]:
        """What a worker takes from: in Celery 5.6 all that is known, which leaves out what was only asked for."""
        known: Any = self
        found = super().consume_from  # type: ignore[misc]  # as above
        if found is not known:
            return found  # type: ignore[no-any-return]
        asked_for = self.__dict__.get("asked_for", ())
        return {name: queue for name, queue in known.items() if name not in asked_for}

    def _add(self, queue: Queue) -> Queue:
        # Celery would bind one that is listed by its name alone to the default exchange, with what else goes there.
        if queue.name in ALL_QUEUES and not queue.exchange.name and queue.routing_key in (None, "", queue.name):
            queue.exchange, queue.routing_key = Exchange(queue.name, type="direct"), queue.name
        return super()._add(_typed(self, queue) if queue.name in ALL_QUEUES else queue)  # type: ignore[misc]  # as above


def _typed(queues: Any, queue: Queue) -> Queue:
    """A queue of the type that the app creates those with that are not listed."""
    if getattr(queues, "create_missing_queue_type", None) == "quorum":
        queue.queue_arguments = {"x-queue-type": "quorum", **(queue.queue_arguments or {})}
    return queue


def add_queues(app: Celery) -> None:
    """Has our queues found by their names, also where unknown names are refused; `task_queues` stays as it is."""
    amqp = app.amqp
    if not issubclass(amqp.queues_cls, _KnowsOurs):
        amqp.queues_cls = type("Queues", (_KnowsOurs, amqp.queues_cls), {})
    if "queues" in vars(amqp) and not isinstance(amqp.queues, _KnowsOurs):
        # Somebody asked for them before we came; Celery 5.6 takes from all that is known unless something is chosen.
        if not hasattr(amqp.queues, "_default_consume_from") and amqp.queues._consume_from is None:  # noqa: SLF001 - see above
            amqp.queues._consume_from = dict(amqp.queues)  # noqa: SLF001 - see above
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
    """Puts our routes before whatever catches all; a route that names our tasks stays. The tasks that had none."""
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
    vars(app.amqp).pop("router", None)
    app.amqp.flush_routes()
    return list(missing)


def _patterns(route: object) -> Iterable[str]:
    """What a route is for: names and globs of a mapping or of its list of pairs; nobody can say it of a function."""
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
