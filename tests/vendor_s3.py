"""A small object store with the manners of vendors other than AWS: what it does not know, it refuses."""

from __future__ import annotations

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

_CHECKSUMS = ("x-amz-checksum-", "x-amz-sdk-checksum", "x-amz-trailer")
Vendor = Literal["aws", "b2", "r2"]


class VendorS3:
    """Keeps objects in memory; `requests` holds method, path and headers (in lower case) of what came in.

    `b2` answers 400 to any header of checksums, `r2` 501 to those of a PUT and to its trailers, `aws` takes them all.
    """

    def __init__(self, vendor: Vendor) -> None:
        self.vendor = vendor
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        owner = self

        class Handler(_Handler):
            store = owner

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def headers(self, method: str, bucket: str) -> list[dict[str, str]]:
        """Of the requests to a bucket."""
        return [sent for verb, path, sent in self.requests if verb == method and path.startswith(f"/{bucket}")]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *ending: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: VendorS3

    def do_GET(self) -> None:
        if self._takes(b""):
            path, query = self._asked()
            if "list-type" in query:
                self._answer(200, _listed(self.store.objects, path.strip("/"), query.get("prefix", [""])[0]))
            elif path not in self.store.objects:
                self._refuse(
                    501 if "versions" in query else 404, "NotImplemented" if "versions" in query else "NoSuchKey"
                )
            else:
                data = self.store.objects[path]
                self._answer(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()[:32]}"')

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        data = self._body()
        if self._takes(data):
            self.store.objects[self._asked()[0]] = data
            self._answer(200, ETag='"put"')

    def do_DELETE(self) -> None:
        if self._takes(b""):
            self.store.objects.pop(self._asked()[0], None)
            self._answer(204)

    def _asked(self) -> tuple[str, dict[str, list[str]]]:
        parts = urlsplit(self.path)
        return unquote(parts.path), parse_qs(parts.query, keep_blank_values=True)

    def _takes(self, body: bytes) -> bool:
        sent = {name.lower(): value for name, value in self.headers.items()}
        self.store.requests.append((self.command, self.path, sent))
        checksums = [name for name in sent if name.startswith(_CHECKSUMS)]
        if self.store.vendor == "b2" and checksums:
            self._refuse(400, "InvalidArgument")
            return False
        if self.store.vendor == "r2" and self.command == "PUT" and (checksums or "content-encoding" in sent):
            self._refuse(501, "NotImplemented")
            return False
        return True

    def _body(self) -> bytes:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return data
        whole, at = b"", 0
        while size := int(data[at : (end := data.index(b"\r\n", at))].partition(b";")[0], 16):
            whole += data[end + 2 : end + 2 + size]
            at = end + 2 + size + 2
        return whole

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, f"<Error><Code>{code}</Code><Message>told to refuse</Message></Error>".encode())

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *ignored: object) -> None:
        pass


def _listed(objects: dict[str, bytes], bucket: str, prefix: str) -> bytes:
    keys = sorted(name.removeprefix(f"/{bucket}/") for name in objects if name.startswith(f"/{bucket}/{prefix}"))
    entries = "".join(f"<Contents><Key>{quote(key)}</Key></Contents>" for key in keys)
    return f"<ListBucketResult><EncodingType>url</EncodingType>{entries}</ListBucketResult>".encode()
