"""kombu's Redis transport, made to survive a Redis restart, with queues emptied in our order."""

from __future__ import annotations

from typing import Any

from kombu.transport import redis as kombu_redis
from kombu.utils.scheduling import round_robin_cycle
from redis.exceptions import ConnectionError as RedisConnectionError

from code_worker.queues import QUEUES

__all__ = ["QueuesInOrder", "RedisTransport"]


class _Channel(kombu_redis.Channel):  # type: ignore[misc]  # kombu ships no types
    """Channel that reports a lost connection as what it is.

    In kombu 5.7.0 a channel whose connection was collected after an error still answers late acknowledgements and
    `restore_unacked`; `_connparams` then fails with AttributeError ("'NoneType' object has no attribute 'hostname'"),
    which is not among the connection errors, so that the worker exits instead of reconnecting. Drop this class when
    kombu passes tests/worker/test_transport.py without it.
    """

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        if self.connection is None or self.connection.client is None:
            raise RedisConnectionError("the channel was detached from its connection")
        params: dict[str, Any] = super()._connparams(asynchronous)
        return params


class RedisTransport(kombu_redis.Transport):  # type: ignore[misc]  # kombu ships no types
    """Redis transport with the guarded channel."""

    Channel = _Channel


class QueuesInOrder(round_robin_cycle):  # type: ignore[misc]  # kombu ships no types
    """Live before normal before backfill, then whatever else this worker consumes, in turn.

    BRPOP takes from the first of its keys that holds a message, so the order of keys is the priority.
    """

    def consume(self, n: int) -> list[str]:
        """The `n` queues to ask next, most urgent first."""
        ours = [queue for queue in QUEUES if queue in self.items]
        return [*ours, *(queue for queue in self.items if queue not in QUEUES)][:n]
