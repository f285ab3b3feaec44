"""Publishes messages: each names jobs whose rows are in SQL already."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import uuid4

from celery import Celery
from kombu.entity import Exchange, Queue
from kombu.exceptions import KombuError, OperationalError
from kombu.transport import virtual
from redis.exceptions import RedisError

from code_worker.broker import celery_config
from code_worker.errors import BrokerUnavailableError
from code_worker.logs import get_logger
from code_worker.wire import MODERATE, QUEUES, jobs_message

if TYPE_CHECKING:
    from code_worker.settings import Settings

log = get_logger(__name__)
_MARK = "code_worker.mark"
_BYSTANDERS = "code_worker.bystanders"
_PERSISTENT = 2
_MOST_HELD = 5000
_BYSTANDERS_KEPT_S = 3600.0


def bound_queue(name: str) -> Queue:
    """A queue of ours: bound to a direct exchange of its own by its name, so that nobody else's messages reach it."""
    return Queue(name, Exchange(name, type="direct"), routing_key=name)


class _DirectRouter:
    """A router that leaves a message where it was sent, no matter what an app's own routes catch."""

    def route(self, options: dict[str, Any], *_: object, **__: object) -> dict[str, Any]:
        """The options as they are."""
        return options


class Publisher:
    """Publishes messages that name jobs; safe to share between threads."""

    _installed: ClassVar[Celery | None] = None

    def __init__(self, app: Celery, *, own: bool = False) -> None:
        self._app = app
        self._own = own

    @classmethod
    def adopt(cls, app: Celery) -> None:
        """Makes `for_producer` publish through this app from now on: our tasks are installed in it."""
        cls._installed = app

    @classmethod
    def for_producer(cls, settings: Settings) -> Publisher:
        """A publisher for a producer: through the app that we are installed in, else by an app of our own.

        Raises:
            ConfigurationError: no broker is configured.
        """
        if cls._installed is not None:
            return cls(cls._installed)
        # Not the current app: in a process of somebody's that would take the place of theirs.
        app = Celery("code_worker.client", set_as_current=False, changes={})
        app.config_from_object(celery_config(settings))
        return cls(app, own=True)

    def publish(self, queue: str, job_ids: Sequence[str]) -> None:
        """Publishes one message that lists the jobs.

        Raises:
            BrokerUnavailableError: the broker did not take it in time.
        """
        # What monitors show of the arguments; Celery's own text of them takes longer than all else here.
        self._send(MODERATE, queue, args=(jobs_message(job_ids),), argsrepr=f"({len(job_ids)} jobs)")
        log.debug("jobs_published", jobs=job_ids)

    def call(
        self, task: str, queue: str, *, arguments: Mapping[str, Any] | None = None, expires_s: float | None = None
    ) -> None:
        """Asks for one of our other tasks; after `expires_s` nobody runs it any more.

        Raises:
            BrokerUnavailableError: the broker did not take it in time.
        """
        self._send(task, queue, kwargs=dict(arguments or {}), expires=expires_s)

    def _send(self, task: str, queue: str, **message: Any) -> None:
        """Publishes to a queue of ours, by its own exchange; routes and defaults of the app change nothing of it."""
        try:
            self._app.send_task(
                task,
                queue=self._queue(queue),
                router=_DirectRouter(),
                ignore_result=True,
                serializer="json",
                delivery_mode=_PERSISTENT,
                priority=0,
                **message,
            )
        except self._refusals() as error:
            raise BrokerUnavailableError(f"broker did not take the message: {error}") from error

    def depth(self, queue: str) -> int:
        """Messages that wait in a queue, those that a worker holds left out; a new queue is empty.

        Raises:
            BrokerUnavailableError: the broker did not answer in time.
        """
        with self._channel() as channel:
            # Not passively: kombu looks for the key without its prefix then, and calls every queue unknown.
            return int(self._queue(queue)(channel).queue_declare().message_count)

    def _queue(self, name: str) -> Queue:
        """A queue of ours by its own exchange, declared as an app's workers declare it.

        Its type, priorities and other arguments are the app's: RabbitMQ refuses a queue that is declared otherwise.
        """
        if self._own:
            return bound_queue(name)
        try:
            queue = copy.copy(self._app.amqp.queues[name])
        except KeyError:
            return bound_queue(name)
        queue.exchange, queue.routing_key = Exchange(name, type="direct"), name
        return queue

    def unbind(self, exchange: str, queues: Iterable[str]) -> list[str]:
        """Takes queues from an exchange that they are bound to in Redis, and returns which were.

        Raises:
            BrokerUnavailableError: see `depth`.
        """
        with self._channel() as channel:
            if not _is_redis(channel):
                return []
            # kombu on Redis keeps bindings in a set per exchange, which outlive the configuration that made them.
            bound = [binding for binding in channel.get_table(exchange) if binding[-1] in set(queues)]
            for key in (channel.keyprefix_queue, getattr(channel, "keyprefix_binding_permanent", None)):
                if key and bound:
                    channel.client.srem(key % (exchange,), *(channel.sep.join(binding) for binding in bound))
            return sorted({binding[-1] for binding in bound})

    def marked(self) -> bool:
        """Returns whether the broker still holds the mark of an earlier `mark`.

        A broker that is not Redis is trusted to.

        The mark lies beside the messages and is lost with them: a Redis that came back empty has none.

        Raises:
            BrokerUnavailableError: see `depth`.
        """
        with self._channel() as channel:
            if not _is_redis(channel):
                return True
            # A hash, because kombu puts its key prefix before the keys of HGET and HSET, but not of GET.
            return channel.client.hget(_MARK, "set") is not None

    def mark(self) -> None:
        """Leaves the mark.

        Raises:
            BrokerUnavailableError: see `depth`.
        """
        with self._channel() as channel:
            if _is_redis(channel):
                channel.client.hset(_MARK, "set", "1")

    def identity(self, *, make: bool = False) -> str | None:
        """A random name that lies beside the messages: who sees the same one has the same server and key prefix.

        None where none lies, unless it is to be made, and on a broker that is not Redis.

        Raises:
            BrokerUnavailableError: see `depth`.
        """
        with self._channel() as channel:
            if not _is_redis(channel):
                return None
            if make and channel.client.hget(_MARK, "id") is None:
                channel.client.hset(_MARK, "id", uuid4().hex)
            found: bytes | None = channel.client.hget(_MARK, "id")
            return None if found is None else found.decode()

    def note_bystander(self, name: str, *, gone: bool = False) -> None:
        """Notes beside the messages that a worker has our tasks and takes none of our queues, or that it ended.

        Raises:
            BrokerUnavailableError: see `depth`.
        """
        with self._channel() as channel:
            if not _is_redis(channel):
                return
            if gone:
                channel.client.hdel(_BYSTANDERS, name)
            else:
                # By this machine's clock, and read by those of others: minutes matter here, not seconds.
                channel.client.hset(_BYSTANDERS, name, str(time.time()))
                _bystanders(channel)

    def bystanders(self, *, within_s: float) -> list[str]:
        """Workers that were noted so lately.

        Raises:
            BrokerUnavailableError: see `depth`.
        """
        with self._channel() as channel:
            if not _is_redis(channel):
                return []
            return sorted(name for name, age_s in _bystanders(channel).items() if age_s < within_s)

    def held(self, job_ids: Iterable[str]) -> set[str]:
        """Those of the jobs that are named by a message which a worker took and has not acknowledged, or may be.

        All may be where nobody can know: on a broker that is not Redis, and beyond thousands of such messages.

        Raises:
            BrokerUnavailableError: see `depth`.
        """
        wanted, found = set(job_ids), set[str]()
        with self._channel() as channel:
            if not _is_redis(channel):
                return wanted
            # kombu puts no prefix before the key of HSCAN.
            kept = channel.client.hscan_iter(f"{channel.global_keyprefix}{channel.unacked_key}", count=500)
            for number, (_, message) in enumerate(kept):
                # Beyond that the look takes longer than it is worth: without it nothing is called lost.
                if number == _MOST_HELD:
                    return wanted
                found |= wanted.intersection(_named_in(channel, message))
        return found

    @contextmanager
    def _channel(self) -> Iterator[Any]:
        try:
            with self._app.connection_for_read() as connection:
                # Twice at most: who asks for a queue's depth can do without, and must not hang.
                connection.ensure_connection(max_retries=1, interval_start=0.1)
                yield connection.default_channel
        except self._refusals() as error:
            raise BrokerUnavailableError(f"broker did not answer: {error}") from error

    def _refusals(self) -> tuple[type[Exception], ...]:
        """Errors of a broker that does not answer, or refuses: RabbitMQ does a queue that others declared otherwise.

        Those of channels come from kombu's driver as they are.
        """
        connection = self._app.connection_for_write()
        return (OperationalError, RedisError, ConnectionError, TimeoutError, *connection.channel_errors)

    def close(self) -> None:
        """Closes the connections, unless they are those of somebody's app."""
        if self._own:
            self._app.close()


def _bystanders(channel: Any) -> dict[str, float]:
    """Workers that were noted, with how many seconds ago; those that were killed long ago are forgotten."""
    # kombu puts no prefix before the key of HGETALL.
    noted = channel.client.hgetall(f"{channel.global_keyprefix}{_BYSTANDERS}")
    ages = {name.decode(): time.time() - float(at) for name, at in noted.items()}
    # As far ahead as behind: a clock that was wrong for a while leaves none for good.
    if gone := [name for name, age_s in ages.items() if abs(age_s) > _BYSTANDERS_KEPT_S]:
        channel.client.hdel(_BYSTANDERS, *gone)
    return {name: age_s for name, age_s in ages.items() if name not in gone}


def _named_in(channel: Any, kept: bytes) -> list[str]:
    """Jobs of an unacknowledged message as kombu keeps it; none where it is somebody else's, or cannot be read."""
    try:
        # The form in which kombu keeps them (`QoS.append`): payload, exchange, routing key.
        payload, _, routing_key = json.loads(kept)
        if routing_key not in QUEUES:
            return []
        (arguments, *_) = virtual.Message(payload, channel=channel, accept={"application/json"}).payload
        jobs = arguments[0]["jobs"]
    except (ValueError, TypeError, LookupError, KombuError):
        return []
    return [job for job in jobs if isinstance(job, str)] if isinstance(jobs, list) else []


def _is_redis(channel: Any) -> bool:
    return getattr(channel.connection, "driver_type", None) == "redis"
