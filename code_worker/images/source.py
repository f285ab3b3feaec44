"""Where images come from: one door for all sources, chosen by the scheme of the URI."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from code_worker.errors import ImageRejectedError
from code_worker.images.files import FileSource
from code_worker.types import RejectReason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from code_worker.images.listing import LeftOut
    from code_worker.images.s3 import S3Source
    from code_worker.settings import Settings

__all__ = ["Fetched", "Sources", "source_name"]

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


@dataclass(frozen=True, slots=True)
class Fetched:
    """The bytes of one object and the source's own version of it, where it has one."""

    data: bytes
    etag: str | None = None
    version_id: str | None = None


class Sources:
    """Fetches and lists images of every known source; safe to share between threads.

    A plain path has no scheme; one with a colon before its first slash is written `./with:colon.jpg`.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._files = FileSource(settings.files, max_bytes=settings.limits.max_bytes)
        self._s3: S3Source | None = None
        self._lock = threading.Lock()

    def fetch(self, uri: str) -> Fetched:
        """Reads one image whole.

        Raises:
            ImageRejectedError: the source is not allowed, or the object is missing, too large and so on.
            TransientError: the source failed; another try may succeed.
            SourceCredentialsError: the source refuses everything as it is set up.
        """
        match _scheme(uri):
            case "file":
                return Fetched(self._files.fetch(uri))
            case "s3":
                return self._s3_source().fetch(uri)
        raise _not_allowed(uri)

    def peek(self, uri: str, size: int) -> bytes:
        """The first bytes of one file or object, at most so many; raises as `fetch`."""
        match _scheme(uri):
            case "file":
                return self._files.peek(uri, size)
            case "s3":
                return self._s3_source().peek(uri, size)
        raise _not_allowed(uri)

    def list(self, prefix: str, left_out: LeftOut | None = None) -> Iterator[str]:
        """URIs or paths of what lies under a directory or an `s3://bucket/prefix`, in the source's own order.

        All of it; with `left_out`, of a directory only what is not hidden and can be listed.

        Raises:
            ImageRejectedError, TransientError, SourceCredentialsError: as `fetch`, some only while iterating.
        """
        match _scheme(prefix):
            case "file":
                return self._files.list(prefix, left_out)
            case "s3":
                return self._s3_source().list(prefix)
        raise _not_allowed(prefix)

    def sizes(self, prefix: str) -> Iterator[tuple[str, int | None]]:
        """As `list`, of an `s3://bucket/prefix` alone; each object with its size in bytes, where the server says it.

        That costs no request beside those of the list.
        """
        if _scheme(prefix) != "s3":
            raise _not_allowed(prefix)
        return self._s3_source().sizes(prefix)

    def close(self) -> None:
        """Closes the connections that are kept open; a later call opens new ones."""
        with self._lock:
            source, self._s3 = self._s3, None
        if source is not None:
            source.close()

    def _s3_source(self) -> S3Source:
        with self._lock:
            if self._s3 is None:
                # boto3 costs a third of a second: whoever reads local files only need not pay for it.
                from code_worker.images.s3 import S3Source

                self._s3 = S3Source(
                    self._settings.s3,
                    max_bytes=self._settings.limits.max_bytes,
                    connections=self._settings.worker.fetch_threads + 4,
                )
            return self._s3


def source_name(uri: str) -> str:
    """What fails together: `s3://bucket`, `file`, or the scheme of a source that is not known."""
    scheme = _scheme(uri)
    return f"s3://{uri.removeprefix('s3://').partition('/')[0]}" if scheme == "s3" else scheme


def _scheme(uri: str) -> str:
    match = _SCHEME.match(uri)
    return match[1] if match else "file"


def _not_allowed(uri: str) -> ImageRejectedError:
    # The scheme alone: the rest may be megabytes of data: or carry a signature.
    return ImageRejectedError(
        RejectReason.SOURCE_NOT_ALLOWED, f"images are read from s3:// and file://, not from {_scheme(uri)[:40]!r}"
    )
