"""An S3 endpoint that misbehaves as told, over real HTTP: one behaviour per request, the last one for ever."""

from __future__ import annotations

import base64
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

BODY = bytes(range(256)) * 400
ETAG = '"0123456789abcdef"'

Behaviour = Callable[["_Handler"], None]


class FaultServer:
    """`script` lists behaviours; `requests` holds the headers of what came in, and its path under `path`."""

    def __init__(self, *script: Behaviour) -> None:
        self.script = script
        self.requests: list[dict[str, str]] = []
        self.connections = 0
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        owner = self

        class Handler(_Handler):
            server_of_faults = owner

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def next_behaviour(self, request: Mapping[str, str]) -> Behaviour:
        with self._lock:
            self.requests.append(dict(request))
            return self.script[min(len(self.requests), len(self.script)) - 1]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *ending: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of_faults: FaultServer

    def setup(self) -> None:
        self.server_of_faults.connections += 1
        super().setup()

    def do_GET(self) -> None:
        request = {name.lower(): value for name, value in self.headers.items()} | {"path": self.path}
        self.server_of_faults.next_behaviour(request)(self)
        # Else a patient client would wait for the rest of half an answer when the test is over.
        self.close_connection |= self.server_of_faults.stopping.is_set()

    def log_message(self, *ignored: object) -> None:
        pass

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.flush()

    def wait(self, seconds: float) -> bool:
        """True once the test is over."""
        return self.server_of_faults.stopping.wait(seconds)


def whole(body: bytes = BODY, **headers: str) -> Behaviour:
    def behave(handler: _Handler) -> None:
        extra = {name.replace("_", "-"): value for name, value in headers.items()}
        handler.head(200, {"Content-Length": str(len(body)), "ETag": ETAG} | extra)
        handler.wfile.write(body)

    return behave


def checksummed(body: bytes, *, of: bytes) -> Behaviour:
    """A body whose checksum header was made from other bytes, or from its own."""
    checksum = base64.b64encode(struct.pack(">I", zlib.crc32(of))).decode()
    return whole(body, x_amz_checksum_crc32=checksum, x_amz_checksum_type="FULL_OBJECT")


def cut_short(handler: _Handler) -> None:
    handler.head(200, {"Content-Length": str(len(BODY)), "ETag": ETAG, "x-amz-version-id": "v1"})
    handler.wfile.write(BODY[:1000])
    handler.close_connection = True


def reset(handler: _Handler) -> None:
    """Half a body, then RST."""
    handler.head(200, {"Content-Length": str(len(BODY)), "ETag": ETAG})
    handler.wfile.write(BODY[:1000])
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    # The file objects hold the socket open; the RST goes out only when the last of them is closed.
    handler.rfile.close()
    handler.connection.close()
    handler.close_connection = True


def endless(handler: _Handler) -> None:
    """A chunked body that never says how long it is and never ends."""
    handler.head(200, {"Transfer-Encoding": "chunked", "ETag": ETAG})
    while not handler.wait(0):
        handler.wfile.write(b"1000\r\n" + bytes(0x1000) + b"\r\n")


def hang(handler: _Handler) -> None:
    handler.wait(120)


def hang_in_body(handler: _Handler) -> None:
    handler.head(200, {"Content-Length": str(len(BODY)), "ETag": ETAG})
    handler.wfile.write(BODY[:1000])
    handler.wfile.flush()
    handler.wait(120)


def drip_body(handler: _Handler) -> None:
    """A byte now and then, each well within the read timeout."""
    handler.head(200, {"Content-Length": str(len(BODY)), "ETag": ETAG})
    while not handler.wait(0.05):
        handler.wfile.write(b"x")
        handler.wfile.flush()


def drip_header(handler: _Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while not handler.wait(0.05):
        handler.wfile.write(b"x")
        handler.wfile.flush()


def error(
    status: int, code: str, message: str = "told to fail", argument_name: str = "", **headers: str
) -> Behaviour:
    argument = f"<ArgumentName>{argument_name}</ArgumentName>" if argument_name else ""
    text = f"<Error><Code>{code}</Code><Message>{message}</Message>{argument}</Error>"
    body = f'<?xml version="1.0"?>{text}'.encode()

    def behave(handler: _Handler) -> None:
        extra = {name.replace("_", "-"): value for name, value in headers.items()}
        handler.head(status, {"Content-Length": str(len(body)), "Content-Type": "application/xml"} | extra)
        handler.wfile.write(body)

    return behave


def page(status: int, text: str) -> Behaviour:
    """An answer of some proxy between us and S3."""

    def behave(handler: _Handler) -> None:
        handler.head(status, {"Content-Length": str(len(text)), "Content-Type": "text/html"})
        handler.wfile.write(text.encode())

    return behave
