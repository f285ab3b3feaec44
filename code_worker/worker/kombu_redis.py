"""kombu's Redis transport, made to survive a restart and strange messages, with queues emptied in our order."""

from __future__ import annotations

import json
import os
import select
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

from celery import Celery, bootsteps
from celery.worker.request import Request
from kombu.connection import Connection
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from kombu.utils.json import dumps
from kombu.utils.scheduling import round_robin_cycle
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from code_worker.broker import TRANSPORTS
from code_worker.logs import get_logger
from code_worker.system.machine import ServerClock, uptime_s
from code_worker.wire import QUEUES

log = get_logger(__name__)
# What kombu calls a transport in the URL of a connection: monitors choose by it how to ask the broker.
Connection.resolve_aliases.update({ours: scheme for scheme, ours in TRANSPORTS.items()})
UnreadableCallback = Callable[[str, str], object]
_SILENCE_LOOK_S = 5.0
_LOOK_AT_CLOCK_S = 60.0
_SILENCE_S = 10.0
"""How much later than it promised Redis may answer."""
_unreadable_callbacks: list[UnreadableCallback] = []
_listeners: list[Callable[[], None]] = []
# Pool threads append, the event loop takes: each in one atomic step. Bounded, since without a loop nobody takes.
_lost: deque[Any] = deque(maxlen=1000)


def on_unreadable(call: UnreadableCallback) -> None:
    """From now on this process calls `call(raw text, error)` with each message that is none."""
    _unreadable_callbacks[:] = [call]


def call_when_lost(tell: Callable[[], None]) -> None:
    """From now on `tell` is called whenever there is something new in `take_lost_channels`."""
    _listeners[:] = [tell]


def take_lost_channels() -> list[Any]:
    """Channels on which the broker did not take an acknowledgement since the last call.

    Celery logs that and goes on. But a worker whose every slot was full when Redis died asks for no message, so that
    nothing else tells it of the lost connection, and counts the message as unacknowledged for ever: it would never
    ask for one again.
    """
    return [_lost.popleft() for _ in range(len(_lost))]


@contextmanager
def _noting_loss(channel: Any) -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError):
        _lost.append(channel)
        # After the append: the loop that is woken must find it.
        for tell in _listeners:
            tell()
        raise


class _UnreadableError(Exception):
    """Raised for what came off a queue and is no message of Celery's; `doc` is its text."""

    def __init__(self, payload: object, error: object) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.doc = repr(payload)


class _Message(kombu_redis.Channel.Message):
    """A message that says at once whether it can be read, before anything remembers it as unacknowledged."""

    def __init__(self, payload: Any, channel: Any = None, **kwargs: Any) -> None:
        try:
            super().__init__(payload, channel=channel, **kwargs)
        except Exception as error:
            raise _UnreadableError(payload, error) from error
        if self.errors:
            raise _UnreadableError(payload, self.errors[0][1])

    def ack(self, multiple: bool = False) -> None:
        """Acknowledges; a broker that does not take it is told of, not only logged."""
        with _noting_loss(self.channel):
            super().ack(multiple)
        log.debug("message_acknowledged", message=self.headers.get("id"))

    def reject(self, requeue: bool = False) -> None:
        """Rejects; see `ack`."""
        with _noting_loss(self.channel):
            super().reject(requeue)

    def requeue(self) -> None:
        """Puts back; see `ack`."""
        with _noting_loss(self.channel):
            super().requeue()


class _QoS(kombu_redis.QoS):
    """Keeps account of unacknowledged messages by the clock of Redis.

    kombu takes this machine's: one an hour ahead would date its messages so that nobody restores them for an hour
    after it died, and would itself take everybody else's for abandoned.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clock = ServerClock()
        self._look_at_s = 0.0

    def append(self, message: Any, delivery_tag: str) -> None:
        """Overrides kombu's, with the time of Redis."""
        delivery = message.delivery_info
        # In kombu's own form (5.6 and 5.7), since kombu restores it;
        # `_raw` is the only place where the payload is as it came.
        kept = dumps([message._raw, delivery["exchange"], delivery["routing_key"]])
        now_s = self._now_s()
        with self.pipe_or_acquire() as pipe:
            # One MULTI, as kombu's: of index and message either alone would never be restored.
            pipe.zadd(self.unacked_index_key, {delivery_tag: now_s}).hset(self.unacked_key, delivery_tag, kept)
            pipe.execute()
        # Past the Redis class, which would write the entry a second time, with this machine's clock.
        virtual.QoS.append(self, message, delivery_tag)

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Overrides kombu's, which takes the timeout off this machine's time.

        What that is ahead goes into the timeout.
        """
        # kombu takes it off `time()`: what is added here makes the difference that of Redis's clock.
        self.visibility_timeout = self.channel.visibility_timeout + time.time() - self._now_s()
        super().restore_visible(*args, **kwargs)

    def _now_s(self) -> float:
        if uptime_s() >= self._look_at_s:
            # Between two looks `ServerClock` carries the time on, so
            # that this costs one command a minute and not one a message.
            with self.channel.conn_or_acquire() as client:
                seconds, micros = client.time()
            self._clock.agree(seconds + micros / 1e6)
            self._look_at_s = uptime_s() + _LOOK_AT_CLOCK_S
        return self._clock.now_s()


class _Channel(kombu_redis.Channel):
    """Channel that reports a lost connection as what it is.

    In kombu 5.7.0 a channel whose connection was collected after an error still answers late acknowledgements and
    `restore_unacked`; `_connparams` then fails with AttributeError ("'NoneType' object has no attribute 'hostname'"),
    which is not among the connection errors, so that the worker exits instead of reconnecting. Drop this class when
    kombu passes tests/faults/test_broker_deaths.py without it.
    """

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        if self.connection is None or self.connection.client is None:
            raise RedisConnectionError("the channel was detached from its connection")
        params: dict[str, Any] = super()._connparams(asynchronous)
        return params

    Message = _Message
    QoS = _QoS

    asked_at = 0.0
    """When the queues were asked last, of the monotonic clock."""

    def _brpop_start(self, timeout: float | None = None) -> None:
        self.asked_at = time.monotonic()
        super()._brpop_start(timeout)

    def _brpop_read(self, **options: Any) -> Any:
        """Overrides kombu's: what is no message is put aside, where kombu's error would end the worker."""
        try:
            return super()._brpop_read(**options)
        except (_UnreadableError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            # BRPOP has taken it out of Redis already: what is not handed on here is nowhere any more.
            text = str(getattr(error, "doc", "") or getattr(error, "object", ""))
            log.error("message_unreadable", error=str(error)[:500])
            for call in _unreadable_callbacks:
                call(text, str(error))
            # As after a message, so that kombu asks for the next; its Empty would say that all queues are.
            return True


class RedisTransport(kombu_redis.Transport):
    """Redis transport with the guarded channel, which on kombu 5.6 too gives up connections that fell silent."""

    Channel = _Channel

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Overrides kombu's; 5.7 looks after silent connections by itself."""
        super().register_with_event_loop(connection, loop)
        if not hasattr(self.cycle, "maybe_check_brpop_health"):
            loop.call_repeatedly(_SILENCE_LOOK_S, self.give_up_silent)

    def give_up_silent(self) -> None:
        """Raises where Redis owes an answer for too long: no socket timeout applies to kombu's event loop.

        Raises:
            redis.exceptions.ConnectionError: the connection is half open; Celery then makes a new one.
        """
        # kombu 5.6 has no public way to the connections that it
        # waits on; 5.7 makes its own look, and this is not called.
        for channel in list(self.cycle._channels):
            connection = channel._in_poll
            if not connection or not connection._sock:
                continue
            waited_s = time.monotonic() - channel.asked_at
            # An answer that lies unread, since the loop was busy or
            # the process stopped, is no silence: hence the select.
            overdue = waited_s > channel.brpop_timeout + _SILENCE_S
            if overdue and not select.select([connection._sock], [], [], 0)[0]:
                connection.disconnect()
                raise RedisConnectionError(f"the broker gave no answer for {waited_s:.0f} s")


class TlsRedisTransport(RedisTransport):
    """The same, by the name under which kombu knows a server that is spoken to in TLS."""


class QueuesInOrder(round_robin_cycle):
    """Live before normal before backfill, then anything else this worker consumes, in turn.

    BRPOP takes from the first of its keys that holds a message, so the order of keys is the priority.
    """

    def consume(self, n: int) -> list[str]:
        """The `n` queues to ask next, most urgent first."""
        ours = [queue for queue in QUEUES if queue in self.items]
        return [*ours, *(queue for queue in self.items if queue not in QUEUES)][:n]


class _Waker(bootsteps.StartStopStep):
    """A pipe that the consumer's event loop reads.

    A pool thread acknowledges a message while the loop sleeps, in Celery 5.6 for a second or more, and only the loop
    asks Redis for the next message: a free slot would stay empty, and a live job wait, for that long.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        """Lets the loop read the pipe; again after every reconnect."""
        if consumer.hub is not None:
            consumer.hub.add_reader(_pipe()[0], _drain, consumer)

    def stop(self, consumer: Any) -> None:
        """Lets the loop forget the pipe."""
        if consumer.hub is not None:
            consumer.hub.remove(_pipe()[0])

    shutdown = stop


@lru_cache(maxsize=1)
def _pipe() -> tuple[int, int]:
    """The process's one pipe; never closed, since its number might be a database's socket a moment later."""
    read_end, write_end = os.pipe()
    # Neither end may hold anybody up: the one is the event loop's, the other that of pool threads.
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)
    return read_end, write_end


def _drain(consumer: Any) -> None:
    with suppress(BlockingIOError):
        os.read(_pipe()[0], 4096)
    # A channel that was given up before is no news.
    consuming = getattr(consumer.task_consumer, "channel", None)
    if any(channel is consuming for channel in take_lost_channels()):
        # Raised in the event loop, where Celery takes it for a lost connection and connects anew.
        raise ConnectionResetError("the broker did not take an acknowledgement")


def _wake() -> None:
    # Full: it is awake anyway.
    with suppress(BlockingIOError):
        os.write(_pipe()[1], b"\0")


class WakingRequest(Request):
    """A request that wakes the loop once it is acknowledged or put back."""

    def acknowledge(self) -> None:
        """Acknowledges the message, then wakes the loop."""
        super().acknowledge()
        _wake()

    def reject(self, requeue: bool = False) -> None:
        """Rejects the message, then wakes the loop."""
        super().reject(requeue=requeue)
        _wake()


def add_waker(app: Celery) -> None:
    """Gives the app's workers the pipe; workers without an event loop do without."""
    call_when_lost(_wake)
    app.steps["consumer"].add(_Waker)
