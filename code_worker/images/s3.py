"""S3 and what speaks its protocol as a source: allowed buckets only, bounded in bytes and in time."""

from __future__ import annotations

import re
import threading
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from botocore.compat import set_socket_timeout
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from code_worker.blobs.s3 import is_anonymous, new_client
from code_worker.errors import ImageRejectedError, TransientError
from code_worker.images.s3_errors import Fault, fault_of_code, fault_of_exception
from code_worker.system.machine import wait_for
from code_worker.types import Fetched, RejectReason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import GetObjectOutputTypeDef

    from code_worker.settings import S3Settings

_CHUNK_BYTES: Final = 1 << 18
_SCHEME: Final = "s3://"
_VERSION: Final = re.compile(r"\?versionId=([A-Za-z0-9._~+/=-]*)\Z")
_BOTO_ERRORS: Final = (BotoCoreError, ClientError, ResponseParserError, HTTPError)
_BODY_FAULTS: Final = frozenset({Fault.TRUNCATED, Fault.CHECKSUM, Fault.TIMEOUT, Fault.FAILED})
"""What reading a body again may cure; botocore tries only requests again, never bodies."""


@dataclass(frozen=True, slots=True)
class Location:
    """One object, in one version or the current one; or, as a prefix, several."""

    bucket: str
    key: str
    version_id: str | None = None

    def __str__(self) -> str:
        # What follows a question mark may be the signature of a link that somebody pasted.
        return f"{_SCHEME}{self.bucket}/{self.key.partition('?')[0]}"

    @property
    def source(self) -> str:
        """Returns what is paused when credentials fail."""
        return f"{_SCHEME}{self.bucket}"


def parse_location(uri: str) -> Location:
    """Reads `s3://bucket/key[?versionId=…]`.

    Everything after the bucket's slash is the key as it is, `?`, `#`, `%` and line breaks included; nothing is
    percent-decoded. Only a trailing `?versionId=` is special. An empty one means the current version, so that a key
    which itself ends like that can be written: `s3://bucket/odd?versionId=1?versionId=`.

    Raises:
        ImageRejectedError: not of this form, not UTF-8, or a key with a `.` or `..` segment, by which some servers
            would leave the allowed prefix.
    """
    bucket, _, key = uri.removeprefix(_SCHEME).partition("/")
    version_id = None
    if (match := _VERSION.search(key)) is not None:
        key, version_id = key[: match.start()], match[1] or None
    _check_form(uri, bucket, key)
    return Location(bucket, key, version_id)


def _check_form(uri: str, bucket: str, key: str) -> None:
    try:
        key.encode()
    except UnicodeEncodeError:
        key = ".."
    if not uri.startswith(_SCHEME) or not bucket or {".", ".."} & set(key.split("/")):
        raise ImageRejectedError(RejectReason.SOURCE_NOT_ALLOWED, "an S3 URI is s3://bucket/key, without . or ..")


class S3Source:
    """Reads objects of the allowed buckets over pooled clients that all threads share."""

    def __init__(self, settings: S3Settings, *, max_bytes: int, connections: int) -> None:
        self._settings = settings
        self._max_bytes = max_bytes
        self._connections = connections
        # Downloads that were given up end by themselves; a server that keeps them hanging must not collect threads.
        self._slots = threading.BoundedSemaphore(4 * connections)
        self._clients: dict[bool, S3Client] = {}
        """By whether requests go without a signature."""
        self._lock = threading.Lock()
        self._allowed = tuple(entry.removeprefix(_SCHEME).partition("/")[::2] for entry in settings.buckets)

    def fetch(self, uri: str) -> Fetched:
        """Reads one object whole, within `object_timeout_s` of wall-clock time.

        Raises:
            ImageRejectedError: not allowed (no request is made), missing, closed, archived, replaced, too large.
            TransientError: late, cut short, damaged on the way, or the server failed.
            SourceCredentialsError: credentials or settings do not work for this bucket.
        """
        return self._download(uri)

    def peek(self, uri: str, size: int) -> bytes:
        """The first bytes of one object, at most so many; raises as `fetch`."""
        return self._download(uri, first_bytes=size).data

    def _download(self, uri: str, *, first_bytes: int | None = None) -> Fetched:
        location = parse_location(uri)
        if not location.key or not self._allows(location):
            raise ImageRejectedError(RejectReason.SOURCE_NOT_ALLOWED, f"{location} is in no allowed bucket or prefix")
        client = self._shared_client(location)
        if not self._slots.acquire(blocking=False):
            raise TransientError(RejectReason.FETCH_TIMEOUT, f"{location}: too many downloads hang already")
        return _Download(
            client, location, self._settings, self._max_bytes, self._slots, first_bytes=first_bytes
        ).result()

    def list(self, prefix: str) -> Iterator[str]:
        """URIs of the objects under `s3://bucket/prefix`, in the order of their keys, without those that end in `/`.

        Raises:
            ImageRejectedError, TransientError, SourceCredentialsError: as `fetch`, the first at once.
        """
        return (uri for uri, _ in self.sizes(prefix))

    def sizes(self, prefix: str) -> Iterator[tuple[str, int | None]]:
        """Like `list`, each with the object's size in bytes, or None where the server does not say it."""
        bucket, _, start = prefix.removeprefix(_SCHEME).partition("/")
        _check_form(prefix, bucket, start)
        location = Location(bucket, start)
        if not self._allows(location):
            raise ImageRejectedError(RejectReason.SOURCE_NOT_ALLOWED, f"{location} is in no allowed bucket or prefix")
        return self._pages(self._shared_client(location), location)

    def close(self) -> None:
        """Closes pooled connections."""
        with self._lock:
            clients, self._clients = self._clients, {}
        for client in clients.values():
            client.close()

    def _pages(self, client: S3Client, prefix: Location) -> Iterator[tuple[str, int | None]]:
        pages = iter(client.get_paginator("list_objects_v2").paginate(Bucket=prefix.bucket, Prefix=prefix.key))
        while True:
            try:
                page = next(pages, None)
            except _BOTO_ERRORS as error:
                raise _translated(error, prefix) from None
            if page is None:
                return
            for entry in page.get("Contents", ()):
                key = entry["Key"]
                if not key.endswith("/") and self._allows(Location(prefix.bucket, key)):
                    # A key may end like a version; an empty version says that it does not.
                    yield (
                        f"{prefix.source}/{key}" + ("?versionId=" if _VERSION.search(key) else ""),
                        entry.get("Size"),
                    )

    def _allows(self, location: Location) -> bool:
        """Returns whether an entry covers it: `bucket`, or `bucket/prefix` up to a slash."""
        return any(
            location.bucket == bucket and (not prefix or f"{location.key}/".startswith(f"{prefix.rstrip('/')}/"))
            for bucket, prefix in self._allowed
        )

    def _shared_client(self, location: Location) -> S3Client:
        anonymous = is_anonymous(self._settings, location.bucket)
        with self._lock:
            if anonymous not in self._clients:
                try:
                    self._clients[anonymous] = new_client(
                        self._settings, location.bucket, connections=self._connections
                    )
                # ValueError: boto3's answer to an endpoint that is no URL.
                except (*_BOTO_ERRORS, ValueError) as error:
                    raise _translated(error, location) from None
            return self._clients[anonymous]


class _Download:
    """One object on its way, in a thread of its own.

    Timeouts of sockets count from one packet to the next: a server that drips, or a name server that hangs, would
    hold the caller for ever. So the caller waits for the thread, not for the network, and leaves when time is up;
    the thread ends with its next read. Time in which this process stood still is not the server's.
    """

    def __init__(
        self,
        client: S3Client,
        location: Location,
        settings: S3Settings,
        max_bytes: int,
        slots: threading.BoundedSemaphore,
        *,
        first_bytes: int | None = None,
    ) -> None:
        self._client = client
        self._location = location
        self._settings = settings
        self._max_bytes = max_bytes
        self._slots = slots
        self._first_bytes = first_bytes
        self._late = False
        self._done = threading.Event()
        self._body: StreamingBody | None = None
        self._fetched: Fetched | None = None
        self._error: BaseException | None = None

    def result(self) -> Fetched:
        """Starts the download and waits for it, at most until the deadline."""
        try:
            threading.Thread(target=self._run, name="fetch", daemon=True).start()
        except RuntimeError as error:
            self._slots.release()
            raise TransientError(
                RejectReason.FETCH_FAILED, f"{self._location}: no thread left to fetch with"
            ) from error
        wait_for(self._done, self._settings.object_timeout_s)
        if self._fetched is not None:
            return self._fetched
        if self._error is not None:
            raise self._error
        self._late = True
        self._hurry()
        raise self._lateness()

    def _run(self) -> None:
        try:
            self._fetched = self._fetch()
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._error = error
        finally:
            self._slots.release()
            self._done.set()

    def _fetch(self) -> Fetched:
        request: dict[str, Any] = {"Bucket": self._location.bucket, "Key": self._location.key}
        if self._location.version_id is not None:
            request["VersionId"] = self._location.version_id
        if self._first_bytes is not None:
            request["Range"] = f"bytes=0-{self._first_bytes - 1}"
        elif self._settings.checksum_mode:
            request["ChecksumMode"] = "ENABLED"
        for left in reversed(range(self._settings.body_attempts)):
            try:
                response = self._client.get_object(**request)
            except _BOTO_ERRORS as error:
                if self._first_bytes is not None and _is_out_of_range(error):
                    return Fetched(b"")  # an empty object has no first byte
                raise self._refusal(error, request) from None
            # Another try must give the rest of the same object, not of one that took its place.
            request |= _pin(response)
            try:
                data = self._read(response)
            except _BOTO_ERRORS as error:
                if not left or self._late or _fault(error) not in _BODY_FAULTS:
                    raise _translated(error, self._location) from None
            else:
                return Fetched(data, _plain(response.get("ETag")), response.get("VersionId"))
        raise AssertionError("body_attempts is at least 1")

    def _refusal(self, error: Exception, request: dict[str, Any]) -> ImageRejectedError | TransientError:
        """Our error; a version that cannot be is told from an argument that the server takes from nobody.

        Both are InvalidArgument. A server that does not say which one it means is asked without the version.
        """
        if not isinstance(error, ClientError) or not _is_argument(error) or "VersionId" not in request:
            return _translated(error, self._location)
        named = error.response["Error"].get("ArgumentName")
        if str(named).casefold() == "versionid" or (named is None and not self._is_refused_anyway(request)):
            return Fault.NOT_FOUND.error(self._location.source, str(self._location), "InvalidArgument (versionId)")
        return _translated(error, self._location)

    def _is_refused_anyway(self, request: dict[str, Any]) -> bool:
        try:
            answer = self._client.get_object(**{name: request[name] for name in request if name != "VersionId"})
        except _BOTO_ERRORS as error:
            return _is_argument(error)
        answer["Body"].close()
        return False

    def _read(self, response: GetObjectOutputTypeDef) -> bytes:
        chunks: list[bytes] = []
        total = 0
        with closing(response["Body"]) as body:
            if self._first_bytes is not None:
                self._body = body
                return body.read(self._first_bytes)
            self._check_size(response.get("ContentLength") or 0)
            self._body = body
            # The last, empty read is where botocore compares length and checksum.
            while chunk := body.read(_CHUNK_BYTES):
                chunks.append(chunk)
                total += len(chunk)
                self._check_size(total)
                if self._late:
                    raise self._lateness()
        return b"".join(chunks)

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise ImageRejectedError(
                RejectReason.TOO_LARGE_BYTES, f"{self._location} is over {self._max_bytes} bytes"
            )

    def _hurry(self) -> None:
        """Makes the next receive fail instead of waiting for its own timeout."""
        if (body := self._body) is not None:
            # The connection may be gone, or the body complete, at this very moment. The body's own method of that
            # name would then log an error, which it is not.
            with suppress(AttributeError, OSError, ValueError):
                set_socket_timeout(body._raw_stream, 0.001)  # type: ignore[attr-defined]  # noqa: SLF001 - botocore's own method logs an error

    def _lateness(self) -> TransientError:
        return TransientError(
            RejectReason.FETCH_TIMEOUT, f"{self._location}: not read within {self._settings.object_timeout_s:g} s"
        )


def _pin(response: GetObjectOutputTypeDef) -> dict[str, str]:
    pin = {"IfMatch": response.get("ETag"), "VersionId": response.get("VersionId")}
    return {name: value for name, value in pin.items() if value}


def _is_argument(error: Exception) -> bool:
    return isinstance(error, ClientError) and _code(error)[0] == "InvalidArgument"


def _is_out_of_range(error: Exception) -> bool:
    return isinstance(error, ClientError) and (_code(error)[0] == "InvalidRange" or _code(error)[1] == 416)


def _plain(etag: str | None) -> str | None:
    return etag.strip('"') if etag else None


def _fault(error: Exception) -> Fault:
    if isinstance(error, ClientError):
        return fault_of_code(*_code(error))
    return fault_of_exception(error)


def _code(error: ClientError) -> tuple[str, int | None]:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return str(error.response.get("Error", {}).get("Code", "")), status


def _translated(error: Exception, location: Location) -> ImageRejectedError | TransientError:
    """Our error for one of botocore's; its own text is left behind, it may quote addresses and signatures."""
    said = type(error).__name__
    if isinstance(error, ClientError):
        code, status = _code(error)
        # A server chooses its codes: only what looks like one is repeated.
        said = f"{code if re.fullmatch(r'[A-Za-z0-9.]{1,80}', code) else 'unreadable code'} ({status})"
    return _fault(error).error(location.source, str(location), said)
