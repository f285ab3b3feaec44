"""Celery's configuration: the same for producer and worker, each choice with its reason."""

from __future__ import annotations

import ssl
from typing import Any, Final
from urllib.parse import urlsplit

from code_worker.errors import ConfigurationError
from code_worker.logs import redact
from code_worker.settings import Settings
from code_worker.wire import MODERATE, NORMAL, QUEUES, REFIT, RETRAIN, SWEEP, SWEEP_QUEUE, TRAIN_QUEUE, WATCH

REDIS_TRANSPORT: Final = "code_worker.worker.kombu_redis:RedisTransport"
TRANSPORTS: Final = {"redis": REDIS_TRANSPORT, "rediss": "code_worker.worker.kombu_redis:TlsRedisTransport"}
"""Our transport by the scheme of a broker's URL."""
ALL_QUEUES: Final = (*QUEUES, SWEEP_QUEUE, TRAIN_QUEUE)
# What a worker takes that is told of none: training takes long, and has a worker of its own.
_DEFAULT_QUEUES: Final = (*QUEUES, SWEEP_QUEUE)
ROUTES: Final = {
    MODERATE: {"queue": NORMAL},
    SWEEP: {"queue": SWEEP_QUEUE},
    **{task: {"queue": TRAIN_QUEUE} for task in (RETRAIN, REFIT, WATCH)},
}
VISIBILITY_SETTING: Final = "CODE_WORKER_BROKER__VISIBILITY_TIMEOUT_S"
_OTHER_REDIS = frozenset({"redis+socket", "sentinel"})
_BATCHES_PER_VISIBILITY = 4
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1", None, ""})


def is_redis(url: str) -> bool:
    """Returns whether the URL names a Redis server reached by TCP or TLS."""
    return urlsplit(url).scheme in TRANSPORTS


def driver_of(app: Any) -> str:
    """The kind of an app's broker, in kombu's word: `redis` for one, several, behind Sentinel or at a socket, too."""
    with app.connection_for_read() as connection:
        return str(connection.get_transport_cls().driver_type)


def check_broker(settings: Settings) -> str:
    """The broker URL, after the checks that a process makes before it connects.

    Raises:
        ConfigurationError: a broker on another machine without password or TLS, and no word that this is meant.
    """
    url = settings.resolved_broker_url
    parts = urlsplit(url)
    if parts.scheme in _OTHER_REDIS:
        raise ConfigurationError(
            f"broker URLs that begin with {parts.scheme}:// would lose queue order, timeouts and the guard against "
            "restarts; use redis:// or rediss://"
        )
    remote = parts.hostname not in _LOCAL_HOSTS
    if (
        remote
        and is_redis(url)
        and not (parts.password or parts.scheme == "rediss" or settings.broker.allow_insecure)
    ):
        raise ConfigurationError(
            f"broker {parts.hostname} is not on this machine and has neither password nor TLS: anyone who reaches it "
            "can feed workers; use rediss:// or a password, or set CODE_WORKER_BROKER__ALLOW_INSECURE=true"
        )
    return url


def check_visibility(visibility_timeout_s: float, settings: Settings, *, setting: str = VISIBILITY_SETTING) -> None:
    """Refuses a visibility timeout within which a batch may still be under way; `setting` is where it was set.

    Raises:
        ConfigurationError: it is shorter than four of the longest silences that a batch is allowed.
    """
    least_s = _BATCHES_PER_VISIBILITY * settings.worker.batch_timeout_s
    if visibility_timeout_s < least_s:
        raise ConfigurationError(
            f"visibility timeout of {visibility_timeout_s:g} s: messages of batches still under way would be "
            f"delivered again; set {setting} to {least_s} or more (four times CODE_WORKER_WORKER__BATCH_TIMEOUT_S)"
        )


class _Masked(str):
    """A URL that shows no password where a configuration is printed, as `celery report` does."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(redact(str(self)))


def tls_options(url: str) -> dict[str, Any] | None:
    """Returns what makes kombu speak TLS to a `rediss://` server, with its certificate checked; None for other URLs.

    kombu derives TLS from the transport's name, which is ours and not `rediss`. `ssl_…` parameters of the URL win.
    """
    return {"ssl_cert_reqs": ssl.CERT_REQUIRED} if urlsplit(url).scheme == "rediss" else None


def transport_options(settings: Settings) -> dict[str, Any]:
    """Options of the Redis transport."""
    return {
        # Redis has no leases: a message unacknowledged for this long goes to another worker.
        "visibility_timeout": settings.broker.visibility_timeout_s,
        # Without these two, kombu looks for such messages only every hundred seconds.
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
        # At most so many at each look, so that a long list of them does not hold up the event loop.
        "unacked_restore_limit": 1000,
        # Without a socket timeout a half-open connection is never noticed.
        "socket_timeout": settings.broker.socket_timeout_s,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        # A connection that lay idle is asked before it is used: a
        # publisher finds a dead one before its message is in it.
        "health_check_interval": 5,
        "global_keyprefix": settings.broker.key_prefix or "",
        "queue_order_strategy": "code_worker.worker.kombu_redis:QueuesInOrder",
    }


# Late acknowledgement: after the commit, so that a worker that dies leaves its message; twice is harmless, since a
# claim is taken once. Prefetch 1: what a worker holds in reserve no other can take, and a live job waits behind it.
# Retries of a connection go on for ever, since an outage of hours must not end workers; those of publishing are few,
# since the row is safe in SQL and the sweeper publishes what a producer could not.
def celery_config(settings: Settings) -> dict[str, Any]:
    """Settings of an app of our own.

    Raises:
        ConfigurationError: no broker, or one that is open to the network.
    """
    url = check_broker(settings)
    config: dict[str, Any] = {
        "broker_url": url,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        # A Redis that is full answers with errors; without this the first one ends the worker.
        "broker_channel_error_retry": True,
        # JSON alone: a pickled message would be somebody else's code.
        "accept_content": ["json"],
        "task_serializer": "json",
        # Verdicts live in SQL; a result backend costs a third of the rate and grows.
        "task_ignore_result": True,
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "worker_prefetch_multiplier": 1,
        # Anyone who can publish to the control channel could shut workers down; it is also what half-opens first.
        "worker_enable_remote_control": settings.worker.remote_control != "off",
        "worker_send_task_events": settings.worker.remote_control != "off",
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "task_routes": dict(ROUTES),
        "task_queues": {name: _direct(name) for name in _DEFAULT_QUEUES},
        # The encoder is shared by threads; a process each would load it again.
        "worker_pool": "threads",
        "worker_concurrency": settings.worker.concurrency,
        "task_publish_retry_policy": {
            "max_retries": 2,
            "interval_start": 0.1,
            "interval_step": 0.4,
            "interval_max": 1,
        },
        "redbeat_key_prefix": f"{settings.broker.key_prefix or ''}redbeat:",
        # Ten of beat's loops: a slow one must not lose the lock, at which redbeat ends the process (redbeat#230).
        "redbeat_lock_timeout": 50,
        "beat_max_loop_interval": 5,
        "beat_schedule_filename": str(settings.data_path / "run" / "beat-schedule"),
    }
    return {**config, **_redis_config(url, settings)} if is_redis(url) else config


def _direct(queue: str) -> dict[str, str]:
    return {"exchange": queue, "exchange_type": "direct", "routing_key": queue}


def _redis_config(url: str, settings: Settings) -> dict[str, Any]:
    return {
        "broker_transport": TRANSPORTS[urlsplit(url).scheme],
        "broker_transport_options": transport_options(settings),
        "broker_use_ssl": tls_options(url),
        "beat_scheduler": "code_worker.stack.beat_process:KeptScheduler",
        "redbeat_redis_url": _Masked(url),
        "redbeat_redis_options": {"socket_timeout": settings.broker.socket_timeout_s, "socket_keepalive": True},
    }
