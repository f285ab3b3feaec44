"""Images by somebody else's URL: public hosts only, bounded in bytes and in time, no matter what redirects say."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from types import TracebackType
from typing import Final, Self
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from code_worker.errors import ImageRejectedError, TransientError
from code_worker.types import RejectReason

_NAT64: Final = IPv6Network("64:ff9b::/96")
_PORTS: Final = {"http": 80, "https": 443}
_CHUNK_BYTES: Final = 1 << 16
_MOST_REDIRECTS: Final = 5
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_GONE: Final = frozenset({404, 410})
_REFUSED: Final = frozenset({401, 402, 403, 451})
_HEADERS: Final = {"Accept-Encoding": "identity", "Connection": "close", "User-Agent": "code_worker"}


def is_public(address: str) -> bool:
    """Returns whether an IP address is of the open internet.

    Not this machine's, a private network's, a cloud's inner one.
    """
    parsed = ip_address(address.partition("%")[0])
    if isinstance(parsed, IPv6Address):
        # Some IPv6 addresses are ways of writing an IPv4 one.
        if parsed.sixtofour is not None or parsed.teredo is not None:
            return False
        if parsed in _NAT64:
            return is_public(str(IPv4Address(int(parsed) & 0xFFFFFFFF)))
        if parsed.ipv4_mapped is not None:
            return is_public(str(parsed.ipv4_mapped))
    return parsed.is_global and not parsed.is_multicast


class UrlSource:
    """Fetches `http` and `https` URLs that a data set lists; safe to share between threads.

    A host's addresses are resolved and checked, and one of those checked is connected to, so that its name cannot
    lead elsewhere in between. Redirects take the same way. Proxies of the environment are not used.
    """

    def __init__(
        self, *, max_bytes: int, timeout_s: float = 10.0, is_allowed: Callable[[str], bool] = is_public
    ) -> None:
        """Sets the bounds.

        Args:
            max_bytes: Largest image, enforced while it streams in.
            timeout_s: Wall-clock time for one image, redirects included; only the resolver has limits of its own.
            is_allowed: Says of an IP address whether it may be connected to.
        """
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._is_allowed = is_allowed

    def fetch(self, url: str) -> bytes:
        """Reads one image.

        Raises:
            ImageRejectedError: no such scheme, an address that is not public, not found, refused or too large.
            TransientError: the host is away, late or failed.
        """
        host = _parsed(url).hostname
        with _Line(self._timeout_s, self._is_allowed) as line:
            try:
                with _followed(url, line) as response:
                    return self._read(response, line)
            # ValueError: a host that no name server can be asked for.
            except (OSError, HTTPException, ValueError) as error:
                late = line.is_late or isinstance(error, TimeoutError)
                reason = RejectReason.FETCH_TIMEOUT if late else RejectReason.FETCH_FAILED
                raise TransientError(reason, f"{host}: {type(error).__name__}") from error

    def _read(self, response: HTTPResponse, line: _Line) -> bytes:
        # Read before the body, since it counts down.
        promised = response.length
        data = bytearray()
        while chunk := response.read(_CHUNK_BYTES):
            data += chunk
            if len(data) > self._max_bytes:
                raise ImageRejectedError(RejectReason.TOO_LARGE_BYTES, f"it is over {self._max_bytes} bytes")
        if line.is_late:
            raise TimeoutError  # what was cut looks like an end
        if promised is not None and len(data) < promised:
            raise ConnectionError("the body was cut short")
        return bytes(data)


@contextmanager
def _followed(url: str, line: _Line) -> Iterator[HTTPResponse]:
    """The answer to a request, behind its redirects."""
    for _ in range(_MOST_REDIRECTS + 1):
        parts = urlsplit(url)
        if parts.scheme not in _PORTS or parts.hostname is None:
            raise ImageRejectedError(
                RejectReason.SOURCE_NOT_ALLOWED, "an image's URL begins with http:// or https://"
            )
        with closing(_Connection(parts, line)) as connection:
            connection.request("GET", _target(parts), headers=_HEADERS)
            with closing(connection.getresponse()) as response:
                if response.status not in _REDIRECTS:
                    _check_status(response.status, str(parts.hostname))
                    yield response
                    return
                url = urljoin(url, response.getheader("Location", ""))
    raise ImageRejectedError(RejectReason.NOT_FOUND, f"over {_MOST_REDIRECTS} redirects")


def _parsed(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        is_web = parts.scheme in _PORTS and parts.hostname is not None and parts.port != 0
    except ValueError:  # brackets that do not match, a port that is none
        is_web = False
    if not is_web:
        raise ImageRejectedError(RejectReason.SOURCE_NOT_ALLOWED, "an image's URL begins with http:// or https://")
    return parts


def _target(parts: SplitResult) -> str:
    query = f"?{parts.query}" if parts.query else ""
    # What is encoded stays so; what a request line cannot hold is encoded.
    return quote(f"{parts.path or '/'}{query}", safe="/?%:@!$&'()*+,;=~-._[]|")


def _check_status(status: int, host: str) -> None:
    if status == 200:
        return
    if status in _GONE:
        raise ImageRejectedError(RejectReason.NOT_FOUND, f"{host} answered {status}")
    if status in _REFUSED:
        raise ImageRejectedError(RejectReason.ACCESS_DENIED, f"{host} answered {status}")
    raise TransientError(RejectReason.FETCH_FAILED, f"{host} answered {status}")


class _Connection(HTTPConnection):
    """A connection to an address that was checked, with TLS where the URL says so."""

    def __init__(self, parts: SplitResult, line: _Line) -> None:
        self._tls = parts.scheme == "https"
        self._line = line
        super().__init__(parts.hostname or "", parts.port or _PORTS[parts.scheme])

    # urllib3 has no public place to choose the address of a connection, and no limit on the whole of an answer: both
    # of its bounds, and what checks redirects, would stay ours.
    def connect(self) -> None:
        plain = self._line.connect(self.host, self.port)
        if not self._tls:
            self.sock = plain
            return
        context = ssl.create_default_context()
        secure = context.wrap_socket(plain, server_hostname=self.host, do_handshake_on_connect=False)
        self.sock = self._line.watch(secure)
        secure.do_handshake()


class _Line:
    """Opens the sockets of one fetch, and cuts them when its time is up.

    Timeouts of sockets count from one packet to the next; a server that drips would hold its reader for ever.
    """

    def __init__(self, timeout_s: float, is_allowed: Callable[[str], bool]) -> None:
        self._deadline = time.monotonic() + timeout_s
        self._is_allowed = is_allowed
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(timeout_s, self._cut)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()

    @property
    def is_late(self) -> bool:
        return time.monotonic() >= self._deadline

    def connect(self, host: str, port: int) -> socket.socket:
        """A socket to one of the host's addresses, all of which must be allowed."""
        # All of them: of a name with a public and an inner address, any may be connected to next time.
        addresses = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        if not all(map(self._is_allowed, addresses)):
            raise ImageRejectedError(RejectReason.SOURCE_NOT_ALLOWED, f"{host} is not on the public internet")
        failure: OSError = ConnectionError(f"{host} has no address")
        for address in dict.fromkeys(addresses):
            left_s = self._deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            try:
                return self.watch(socket.create_connection((address, port), timeout=left_s))
            except OSError as error:
                failure = error
        raise failure

    def watch(self, opened: socket.socket) -> socket.socket:
        """Makes this the socket that is cut."""
        self._socket = opened
        if self.is_late:
            opened.close()
            raise TimeoutError
        return opened

    def _cut(self) -> None:
        if (opened := self._socket) is not None:
            with suppress(OSError):
                # Wakes a thread that reads from it, as closing it would not.
                opened.shutdown(socket.SHUT_RDWR)
