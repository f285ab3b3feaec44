"""Images by URL: where they may come from, how much, and for how long, against a server of this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from code_worker.data.datasets.urls import UrlSource, is_public
from code_worker.errors import ImageRejectedError, TransientError
from code_worker.types import RejectReason

MAX_BYTES = 100_000


class Answers(BaseHTTPRequestHandler):
    """One behaviour per path."""

    stop = threading.Event()

    def do_GET(self) -> None:
        match self.path.strip("/").split("/"):
            case ["status", code]:
                self.send_response(int(code))
                self.send_header("Content-Length", "0")
                self.end_headers()
            case ["to", *rest]:
                self.send_response(302)
                self.send_header("Location", "/".join(rest).replace("%PORT", str(self.server.server_address[1])))
                self.send_header("Content-Length", "0")
                self.end_headers()
            case ["loop"]:
                self.send_response(301)
                self.send_header("Location", "/loop")
                self.end_headers()
            case ["large"]:
                self._body(bytes(MAX_BYTES + 1))
            case ["short"]:
                self._body(b"half", length=8)
            case ["drip"]:
                self.send_response(200)
                self.end_headers()
                while not self.stop.wait(0.02):
                    self.wfile.write(b"x")
                    self.wfile.flush()
            case _:
                self._body(self.requestline.encode())

    def _body(self, data: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length or len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            return  # the reader has left, as it should

    def log_message(self, *arguments: object) -> None:
        """Tests are silent."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    Answers.stop.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{made.server_address[1]}"
        Answers.stop.set()
        made.shutdown()
        thread.join()


def source(timeout_s: float = 120.0) -> UrlSource:
    """May read from this one address of this machine and no other."""
    return UrlSource(max_bytes=MAX_BYTES, timeout_s=timeout_s, is_allowed=lambda address: address == "127.0.0.1")


def refused(url: str, timeout_s: float = 120.0) -> RejectReason:
    with pytest.raises((ImageRejectedError, TransientError)) as caught:
        source(timeout_s).fetch(url)
    return caught.value.reason


def test_an_image_is_read_behind_its_redirects_and_odd_characters(server: str) -> None:
    assert source().fetch(f"{server}/a b%20c/ü.jpg?q=1 2#part") == b"GET /a%20b%20c/%C3%BC.jpg?q=1%202 HTTP/1.1"
    assert source().fetch(f"{server}/to//there") == b"GET /there HTTP/1.1"


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost/", "http://127.0.0.1:1/", "http://[::1]/", "http://10.1.2.3/a.jpg", "http://192.168.0.1/",
        "http://169.254.169.254/latest/meta-data/", "http://0/", "http://2130706433/", "http://[::ffff:127.0.0.1]/",
        "http://100.64.0.1/", "https://172.16.0.1/",
    ],
)  # fmt: skip
def test_addresses_of_this_machine_and_of_private_networks_are_never_connected_to(url: str) -> None:
    with pytest.raises(ImageRejectedError, match="not on the public internet"):
        UrlSource(max_bytes=1000).fetch(url)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700:4700::1111", True), ("64:ff9b::808:808", True), ("127.0.0.1", False),
        ("::1", False), ("fe80::1%eth0", False), ("fd00::1", False), ("::ffff:10.0.0.1", False),
        ("64:ff9b::a00:1", False), ("2002:7f00:1::", False), ("2001:0:4136:e378:8000:63bf:3fff:fdd2", False),
        ("224.0.0.1", False), ("ff02::1", False), ("0.0.0.0", False), ("::", False), ("255.255.255.255", False),
    ],
)  # fmt: skip
def test_public_addresses_are_told_from_all_others(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_a_redirect_to_an_address_that_is_not_allowed_is_not_followed(server: str) -> None:
    assert refused(f"{server}/to/http://127.0.0.2:%PORT/x") is RejectReason.SOURCE_NOT_ALLOWED
    assert refused(f"{server}/to/file:///etc/passwd") is RejectReason.SOURCE_NOT_ALLOWED
    assert refused(f"{server}/loop") is RejectReason.NOT_FOUND


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.org/a", "file:///etc/passwd", "a.jpg", "", "http://", "data:,x", "http://[::1",
        "http://127.0.0.1:x/", "http://127.0.0.1:99999/",
    ],
)  # fmt: skip
def test_other_schemes_and_what_is_no_url_are_refused(url: str) -> None:
    assert refused(url) is RejectReason.SOURCE_NOT_ALLOWED


@pytest.mark.parametrize("host", ["x" * 70 + ".example", "a..b", "%00"])
def test_a_host_that_cannot_be_one_fails(host: str) -> None:
    assert refused(f"http://{host}/") is RejectReason.FETCH_FAILED


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("status/404", RejectReason.NOT_FOUND),
        ("status/410", RejectReason.NOT_FOUND),
        ("status/403", RejectReason.ACCESS_DENIED),
        ("status/503", RejectReason.FETCH_FAILED),
        ("status/204", RejectReason.FETCH_FAILED),
        ("large", RejectReason.TOO_LARGE_BYTES),
        ("short", RejectReason.FETCH_FAILED),
    ],
)
def test_answers_that_are_no_whole_image_are_refused(server: str, path: str, reason: RejectReason) -> None:
    assert refused(f"{server}/{path}") is reason


def test_a_server_that_drips_is_left_when_time_is_up(server: str) -> None:
    assert refused(f"{server}/drip", timeout_s=0.3) is RejectReason.FETCH_TIMEOUT


def test_a_host_that_is_away_may_be_tried_again() -> None:
    assert refused("http://127.0.0.1:9/a.jpg") is RejectReason.FETCH_FAILED
