"""Ways to run a worker that would lose or repeat jobs, refused before it takes any."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from kombu.exceptions import SerializerNotInstalled
from kombu.serialization import prepare_accept_content

from code_worker.broker import ALL_QUEUES, OWN_VISIBILITY, TRANSPORTS, check_visibility, driver_of
from code_worker.errors import ConfigurationError
from code_worker.logs import get_logger
from code_worker.machine import usable_cores
from code_worker.queues import QUEUES
from code_worker.worker.prefork import warn_of_prefork

if TYPE_CHECKING:
    from code_worker.settings import Settings

__all__ = ["check_content", "refuse_to_start", "refusing", "threads_of"]

log = get_logger(__name__)
_REMAP: Final = "REMAP_SIGTERM"
_KOMBUS_OWN_S: Final = 3600
_JSON: Final = "application/json"
_THEIR_VISIBILITY: Final = "broker_transport_options['visibility_timeout'] of the app"
_UNTESTED: Final = (
    "code_worker is built for and tested on Redis: on other brokers `doctor` and the sweeper know less of what waits "
    "and what was lost"
)
_NOT_OURS: Final = (
    "with kombu's own transport, which Sentinel, sockets and a broker_transport of yours imply, a worker may end "
    "when Redis restarts: let a supervisor start it again"
)
_PATCHED: Final = ("gevent", "eventlet")


@contextmanager
def refusing() -> Iterator[None]:
    """Ends the process with status 2 and one line for a configuration that cannot be worked with.

    Celery swallows what a receiver of its signals raises, but not SystemExit.
    """
    try:
        yield
    except ConfigurationError as error:
        log.critical("configuration_error", error=str(error))
        raise SystemExit(2) from error


def refuse_to_start(worker: Any, check: Callable[[], object], settings: Callable[[], Settings]) -> bool:
    """Ends the process with status 2 when a Celery worker of our queues is set up in a way that cannot be trusted.

    A worker of others' queues is none of our business: then it returns False.
    """
    taken = frozenset(worker.app.amqp.queues.consume_from) & frozenset(ALL_QUEUES)
    if not taken:
        return False
    with refusing():
        check()
        _check_pool(worker)
        _check_visibility(worker.app, settings())
    _warn_of_broker(worker.app)
    if "prefork" in _pool_of(worker) and taken & frozenset(QUEUES):
        warn_of_prefork(_children_of(worker), worker.app.conf.worker_max_memory_per_child)
    return True


def check_content(app: Any) -> None:
    """Refuses an app whose workers would not read our messages, which are JSON.

    Raises:
        ConfigurationError: its `accept_content` lists no JSON, or something that is not installed.
    """
    try:
        accepted = prepare_accept_content(app.conf.accept_content)
    except SerializerNotInstalled as error:
        raise ConfigurationError(f"accept_content of the app {app.main!r}: {error}") from error
    if accepted is not None and _JSON not in accepted:
        raise ConfigurationError(
            f"the app {app.main!r} accepts {', '.join(sorted(accepted)) or 'nothing'} and no JSON: its workers would "
            "refuse each message of ours; add 'json' to its accept_content"
        )


def threads_of(worker: Any) -> int:
    """Tasks that one process of a Celery worker runs at the same time, at most."""
    if "thread" not in _pool_of(worker):
        return 1
    most = worker.options.get("autoscale")
    if isinstance(most, str):
        most = most.split(",")
    return max(_children_of(worker), int(most[0]) if most else 0)


def _pool_of(worker: Any) -> str:
    # A name still, or what it stands for.
    return str(worker.pool_cls if isinstance(worker.pool_cls, str) else getattr(worker.pool_cls, "__module__", ""))


def _children_of(worker: Any) -> int:
    # "auto" is settled after this; then it is as many as there are cores.
    return worker.concurrency if isinstance(worker.concurrency, int) else usable_cores()


def _check_pool(worker: Any) -> None:
    pool = _pool_of(worker)
    if "solo" in pool and (remapped := os.environ.get(_REMAP)):
        raise ConfigurationError(
            f"{_REMAP}={remapped} with the pool solo: the signal breaks into the task that runs, which is then "
            f"acknowledged and lost; unset {_REMAP} or use --pool threads"
        )
    if patched := next((name for name in _PATCHED if name in pool), None):
        raise ConfigurationError(
            f"the pool {patched} runs all tasks on one thread, which a batch holds for as long as it computes: no "
            "lease is renewed meanwhile and no other task runs; use --pool threads for workers of our queues"
        )


def _check_visibility(app: Any, settings: Settings) -> None:
    """Of Redis always; of another broker, such as SQS, where it is set; AMQP has none and ignores it."""
    options, driver = app.conf.broker_transport_options or {}, driver_of(app)
    if driver == "redis" or ("visibility_timeout" in options and driver != "amqp"):
        theirs = options.get("visibility_timeout", _KOMBUS_OWN_S)
        own = theirs == settings.broker.visibility_timeout_s
        check_visibility(float(theirs), settings, setting=OWN_VISIBILITY if own else _THEIR_VISIBILITY)


def _warn_of_broker(app: Any) -> None:
    """Once: of a broker that nobody tried us on, and of one that is not reached by our transport."""
    if (driver := driver_of(app)) != "redis":
        log.warning("broker_untested", driver=driver, hint=_UNTESTED)
    elif app.conf.broker_transport not in TRANSPORTS.values():
        log.warning("broker_without_our_transport", hint=_NOT_OURS)
