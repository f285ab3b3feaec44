"""Ways to run a worker that would lose or repeat jobs: refused before it takes any, or warned of."""

from __future__ import annotations

import os
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from celery import signals
from kombu.exceptions import SerializerNotInstalled
from kombu.serialization import prepare_accept_content

from code_worker.broker import ALL_QUEUES, TRANSPORTS, VISIBILITY_SETTING, check_visibility, driver_of
from code_worker.errors import BrokerUnavailableError, ConfigurationError
from code_worker.logs import get_logger
from code_worker.publisher import Publisher
from code_worker.system.machine import usable_cores, usable_memory
from code_worker.wire import MODERATE, QUEUES
from code_worker.worker.background import Repeater

if TYPE_CHECKING:
    from celery import Celery

    from code_worker.settings import Settings

log = get_logger(__name__)
_MB: Final = 1e6


def warn_of_prefork(children: int, max_memory_kb: int | None) -> None:
    """Warns of as many encoders as children; the first message that one of them judged shows what each of them takes.

    Call it in the parent, before it forks. `max_memory_kb` is the app's `worker_max_memory_per_child`.
    """
    log.warning(
        "prefork_loads_per_child",
        children=children,
        worker_max_memory_per_child=max_memory_kb,
        hint="each child loads the encoder for itself, again whenever it is replaced; --pool threads loads it once",
    )
    signals.task_postrun.connect(partial(_measure, children, set()), weak=False)


def _measure(children: int, measured: set[int], sender: Any = None, **_: Any) -> None:
    if getattr(sender, "name", None) != MODERATE or os.getpid() in measured:
        return
    # A fork copies the set, with the parent's number at most in it: each child measures itself once.
    measured.add(os.getpid())
    each_mb = _peak_bytes() / _MB
    usable_mb = usable_memory() / _MB
    say = log.warning if each_mb * children > usable_mb else log.info
    say("prefork_child_memory", child_mb=round(each_mb), children=children, usable_mb=round(usable_mb))


def _peak_bytes() -> int:
    """The most that this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux kibibytes.
    return peak if sys.platform == "darwin" else peak * 1024


_REMAP: Final = "REMAP_SIGTERM"
# What kombu's Redis transport takes where nothing is set.
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
    # Celery's handler raises out of the task that runs on the main thread; a failed task's message is acknowledged.
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
        check_visibility(float(theirs), settings, setting=VISIBILITY_SETTING if own else _THEIR_VISIBILITY)


def _warn_of_broker(app: Any) -> None:
    """Once: of a broker that nobody tried us on, and of one that is not reached by our transport."""
    if (driver := driver_of(app)) != "redis":
        log.warning("broker_untested", driver=driver, hint=_UNTESTED)
    elif app.conf.broker_transport not in TRANSPORTS.values():
        log.warning("broker_without_our_transport", hint=_NOT_OURS)


_EVERY_S: Final = 60.0
_HINT: Final = f"jobs are judged by workers that name our queues: -P threads -Q {','.join(QUEUES)},code_worker.sweep"


class Bystander:
    """Says that this worker takes no jobs of ours, and warns once when such wait and do not become fewer.

    It asks the broker alone: a worker of others' queues may reach no database of ours.
    """

    def __init__(self, app: Celery, *, every_s: float = _EVERY_S) -> None:
        self._app = app
        self._publisher = Publisher(app)
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._waited: dict[str, int] = {}
        self._warned = self._noted = False
        self._repeater = Repeater("bystander", every_s, self.look)

    def start(self) -> None:
        """Says it, and looks from now on; other brokers than Redis are not asked."""
        log.info("queues_not_taken", queues=list(QUEUES), hint=_HINT)
        if driver_of(self._app) == "redis":
            self._repeater.start()

    def stop(self) -> None:
        """Looks no more."""
        self._repeater.stop()
        if self._noted:
            with suppress(BrokerUnavailableError):
                self._publisher.note_bystander(self._name, gone=True)

    def look(self) -> None:
        """One look at the queues; warns of those that hold no fewer messages than at the last."""
        try:
            # For `doctor`, which sees this worker nowhere else.
            self._publisher.note_bystander(self._name)
            self._noted = True
            if self._warned:
                return
            waiting = {queue: self._publisher.depth(queue) for queue in QUEUES}
        except BrokerUnavailableError:
            # Celery says that itself.
            return
        # Two looks, since a queue that is emptied slowly holds messages at both, but fewer.
        left = {queue: waiting[queue] for queue, before in self._waited.items() if waiting[queue] >= before > 0}
        self._waited = waiting
        if left:
            self._warned = True
            log.warning("jobs_not_taken", waiting=left, hint=_HINT)
