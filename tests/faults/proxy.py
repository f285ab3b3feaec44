"""A TCP proxy on loopback whose network fails as told: what old connections carry vanishes, is reset, or crawls."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

__all__ = ["TcpProxy"]

_CHUNK = 16 * 1024
_LINGER_NEVER = struct.pack("ii", 1, 0)


@dataclass(eq=False)
class _Link:
    """A client's connection and the one made for it to the server; each has a thread that reads it."""

    client: socket.socket
    server: socket.socket
    swallow: threading.Event = field(default_factory=threading.Event)
    cut_at_answer: bool = False
    resetting: bool = False
    readers: int = 2

    def end(self, *, reset: bool = False) -> None:
        """Wakes both readers; the last of them closes, since a close while one reads sends nothing yet."""
        self.resetting = self.resetting or reset
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                if self.resetting:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NEVER)
                end.shutdown(socket.SHUT_RD if self.resetting else socket.SHUT_RDWR)

    def close(self) -> None:
        self.client.close()
        self.server.close()


class TcpProxy:
    """Passes everything on to a port or a Unix socket of this machine until it is told otherwise."""

    def __init__(self, target: int | Path) -> None:
        self.connections = 0
        self.cut = threading.Event()
        self._target = target
        self._markers: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._links: set[_Link] = set()
        self._lock = threading.Lock()
        self._bytes_per_s: float | None = None
        self._refusing = False
        self.port = int(self._listener.getsockname()[1])

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        # Closing alone does not end an accept that waits.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for link in self._open():
            link.end()

    def black_hole(self) -> int:
        """Connections that are open stay so, but carry nothing any more; new ones are whole. Returns how many."""
        links = self._open()
        for link in links:
            link.swallow.set()
        return len(links)

    def reset(self) -> int:
        """Ends the connections that are open with RST; returns how many."""
        links = self._open()
        for link in links:
            link.end(reset=True)
        return len(links)

    def throttle(self, bytes_per_s: float | None) -> None:
        """Slows every connection down to this; None: as fast as it goes."""
        self._bytes_per_s = bytes_per_s

    def refuse(self, refusing: bool = True) -> None:
        """New connections are closed at once; those that are open stay."""
        self._refusing = refusing

    def cut_at_answer_to(self, *markers: bytes) -> None:
        """Passes on what holds the markers, in this order; at the answer to the last it cuts that connection.

        No new one comes about then. The server has done what it was asked, and whoever asked does not know.
        """
        self.cut.clear()
        self._markers = list(markers)

    def _open(self) -> list[_Link]:
        with self._lock:
            return list(self._links)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            try:
                if self._refusing:
                    raise ConnectionRefusedError
                link = _Link(client, self._connect())
            except OSError:
                client.close()
                continue
            link.server.settimeout(None)
            with self._lock:
                self._links.add(link)
            for here, there in ((link.client, link.server), (link.server, link.client)):
                threading.Thread(target=self._carry, args=(link, here, there), daemon=True).start()

    def _connect(self) -> socket.socket:
        if isinstance(self._target, int):
            return socket.create_connection(("127.0.0.1", self._target), timeout=120)
        made = socket.socket(socket.AF_UNIX)
        made.connect(str(self._target))
        return made

    def _cuts(self, link: _Link, here: socket.socket, data: bytes) -> bool:
        """Whether this is the answer at which to cut; notes the question that it will be the answer to."""
        if here is link.server:
            return link.cut_at_answer
        if self._markers and self._markers[0] in data:
            del self._markers[0]
            link.cut_at_answer = not self._markers
        return False

    def _carry(self, link: _Link, here: socket.socket, there: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := here.recv(_CHUNK):
                if link.swallow.is_set():
                    continue
                if self._cuts(link, here, data):
                    self.refuse()
                    self.cut.set()
                    break
                there.sendall(data)
                if self._bytes_per_s:
                    time.sleep(len(data) / self._bytes_per_s)
        if not link.swallow.is_set():
            link.end()
        with self._lock:
            link.readers -= 1
            last = not link.readers
            if last:
                self._links.discard(link)
        if last:
            link.close()
