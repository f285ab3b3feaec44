"""Poolers in transaction mode before PostgreSQL: one that we wrote, and PgBouncer too where it is installed."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Self

from sqlalchemy import URL, make_url

from tests.servers import free_port, wait_for_port

POOLERS: Final = ["pooler", *(["pgbouncer"] if shutil.which("pgbouncer") else [])]
_KNOWN: Final = frozenset(
    {
        "user",
        "database",
        "application_name",
        "client_encoding",
        "datestyle",
        "timezone",
        "standard_conforming_strings",
    }
)
_PLAIN, _CANCEL, _NEGOTIATED = 196608, 80877102, (80877103, 80877104)


def through(url: str, port: int, **parameters: str) -> str:
    """The same database, by way of a pooler on this port."""
    made = make_url(url)
    behind = URL.create(
        made.drivername, made.username or "postgres", None, "127.0.0.1", port, made.database, parameters
    )
    return behind.render_as_string(hide_password=False)


@contextlib.contextmanager
def pooler(kind: str, database: str) -> Iterator[int]:
    """Runs one in front of the server that a URL names; yields its port."""
    directory = Path(str(make_url(database).query["host"]))
    if kind == "pgbouncer":
        with _pgbouncer(directory) as port:
            yield port
    else:
        with TransactionPooler(directory) as running:
            yield running.port


@contextlib.contextmanager
def _pgbouncer(directory: Path) -> Iterator[int]:
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="code-worker-pgbouncer-") as place:
        path = Path(place)
        path.chmod(0o755)
        (path / "users.txt").write_text('"postgres" ""\n')
        (path / "pgbouncer.ini").write_text(
            f"[databases]\n* = host={directory}\n[pgbouncer]\npool_mode = transaction\nauth_type = trust\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nserver_round_robin = 1\n"
            f"default_pool_size = 4\nauth_file = {path / 'users.txt'}\n"
        )
        # It refuses to run as root, and becomes whom it is told to; the server's user can reach the server's socket.
        user = ["-u", directory.owner()] if os.geteuid() == 0 else []
        command = ["pgbouncer", "-q", *user, str(path / "pgbouncer.ini")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for_port(port, process)
            yield port
        finally:
            process.terminate()
            process.wait(30)


class TransactionPooler:
    """What PgBouncer does in transaction mode, on the wire: each transaction runs on the server connection that was
    idle longest, so never on the one of the transaction before; startup parameters that it cannot keep are refused.

    `handed` counts transactions. At least two server connections are open per database.
    """

    def __init__(self, directory: Path) -> None:
        self.handed = 0
        self._socket = next(directory.glob(".s.PGSQL.*[0-9]"))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._idle: dict[str, deque[_Server]] = {}
        self._lock = threading.Lock()
        self._clients: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for client in self._clients:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for idle in self._idle.values():
            for server in idle:
                server.socket.close()

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments, name="pooler", daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with self._lock:
            self._clients.add(client)
        with client, contextlib.suppress(OSError, EOFError):
            if (database := self._greet(client)) is not None:
                self._relay(client, database)
        with self._lock:
            self._clients.discard(client)

    def _greet(self, client: socket.socket) -> str | None:
        """Answers a startup packet; the database, or None where the client was refused."""
        code = _CANCEL
        while (code := struct.unpack("!I", (packet := _packet(client))[:4])[0]) in _NEGOTIATED:
            client.sendall(b"N")
        if code != _PLAIN:
            return None
        words = packet[4:].rstrip(b"\0").decode().split("\0")
        given = dict(zip(words[::2], words[1::2], strict=True))
        if unknown := next((name for name in given if name.lower() not in _KNOWN), None):
            text = f"unsupported startup parameter: {unknown}"
            client.sendall(_message(b"E", f"SFATAL\0C08P01\0M{text}\0\0".encode()))
            return None
        database = given.get("database", given["user"])
        server = self._take(database)
        client.sendall(_message(b"R", b"\0\0\0\0") + server.greeting + _message(b"Z", b"I"))
        self._put(database, server)
        return database

    def _take(self, database: str) -> _Server:
        with self._lock:
            idle = self._idle.setdefault(database, deque())
            self.handed += 1
            if len(idle) > 1:
                return idle.popleft()
        return _Server(self._socket, database)

    def _put(self, database: str, server: _Server) -> None:
        with self._lock:
            self._idle[database].append(server)

    def _relay(self, client: socket.socket, database: str) -> None:
        while True:
            kind, message = _next(client)
            if kind == b"X":
                return
            server = self._take(database)
            whole = False
            try:
                whole = self._transaction(client, server, kind, message)
            finally:
                if whole:
                    self._put(database, server)
                else:  # The client went in the middle of a transaction.
                    server.socket.close()
            if not whole:
                return

    def _transaction(self, client: socket.socket, server: _Server, kind: bytes, message: bytes) -> bool:
        """Passes messages on until the server is idle and owes no answer; False when the client left before."""
        owed = 0
        while True:
            if kind:
                owed += kind in {b"Q", b"S", b"F"}
                server.socket.sendall(message)
                kind = b""
            ready, _, _ = select.select([client, server.socket], [], [])
            if server.socket in ready:
                said, answer = _next(server.socket)
                client.sendall(answer)
                if said == b"Z":
                    owed -= 1
                    if owed == 0 and answer[5:6] == b"I":
                        return True
            elif client in ready:
                kind, message = _next(client)
                if kind == b"X":
                    return False


class _Server:
    """A connection to the server, past its greeting."""

    def __init__(self, path: Path, database: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        words = f"user\0postgres\0database\0{database}\0\0".encode()
        self.socket.sendall(struct.pack("!II", 8 + len(words), _PLAIN) + words)
        self.greeting = b""
        while (found := _next(self.socket))[0] != b"Z":
            if found[0] in {b"S", b"K"}:
                self.greeting += found[1]
            elif found[0] == b"E":
                raise OSError(found[1].decode(errors="replace"))


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!I", 4 + len(body)) + body


def _packet(end: socket.socket) -> bytes:
    return _exactly(end, struct.unpack("!I", _exactly(end, 4))[0] - 4)


def _next(end: socket.socket) -> tuple[bytes, bytes]:
    """A message's kind, and all of it."""
    head = _exactly(end, 5)
    return head[:1], head + _exactly(end, struct.unpack("!I", head[1:])[0] - 4)


def _exactly(end: socket.socket, number: int) -> bytes:
    found = b""
    while len(found) < number:
        if not (some := end.recv(number - len(found))):
            raise EOFError
        found += some
    return found
