"""Sources of images, chosen by the scheme of the URI."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

from code_worker.errors import ImageRejectedError, TransientError
from code_worker.images.listing import (
    NO_IMAGE,
    OTHER_KIND,
    PREFIX_BYTES,
    has_image_suffix,
    is_hidden,
    looks_like_image,
    unjudged_format,
    why_no_image,
)
from code_worker.images.local_files import FileSource
from code_worker.types import Fetched, RejectReason

if TYPE_CHECKING:
    from code_worker.images.listing import LeftOut
    from code_worker.images.s3 import S3Source
    from code_worker.settings import Settings

_OTHER_SUFFIXES: Final = frozenset(
    {
        *(".txt", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".xml", ".yaml", ".yml", ".toml", ".md", ".log"),
        *(".html", ".htm", ".css", ".js", ".py", ".pdf", ".doc", ".docx", ".xls", ".xlsx", ".sql", ".md5", ".sha256"),
        *(".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".parquet", ".npy", ".npz", ".pt"),
        *(".safetensors", ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mp3", ".m4a", ".wav", ".flac", ".ogg"),
    }
)
_CONCURRENT_LOOKS: Final = 8


def _only_images(looked: Iterable[tuple[str, str | None]], left_out: LeftOut) -> Iterator[str]:
    for uri, reason in looked:
        if reason is None:
            yield uri
        else:
            left_out.pass_over(uri, reason)


def _possible_images(listed: Iterable[tuple[str, int | None]], place: str, left_out: LeftOut) -> Iterator[str]:
    """Yields what may be an image by what a list says of it.

    Anything that stays takes a request, unless its name says so.
    """
    start = place[: place.rindex("/") + 1]
    for uri, size in listed:
        if any(map(is_hidden, uri.removeprefix(start).split("/"))):
            left_out.pass_over(uri, "hidden")
        elif has_image_suffix(_object_key(uri)):
            yield uri
        elif size is not None and size < PREFIX_BYTES:
            left_out.pass_over(uri, NO_IMAGE)
        elif PurePosixPath(_object_key(uri)).suffix.lower() in _OTHER_SUFFIXES:
            left_out.pass_over(uri, OTHER_KIND)
        else:
            yield uri


def _object_key(uri: str) -> str:
    return uri.removesuffix("?versionId=")


def _look_ahead(
    look: Callable[[str], str | None], uris: Iterable[str], pool: ThreadPoolExecutor
) -> Iterator[tuple[str, str | None]]:
    """In the order of the list, though many objects are looked into at the same time."""
    pending: deque[tuple[str, Future[str | None]]] = deque()
    for uri in uris:
        pending.append((uri, pool.submit(look, uri)))
        if len(pending) > _CONCURRENT_LOOKS:
            first, found = pending.popleft()
            yield first, found.result()
    while pending:
        first, found = pending.popleft()
        yield first, found.result()


def images_under(sources: Sources, place: str, left_out: LeftOut, *, unjudged: bool = False) -> Iterator[str]:
    """Images under a directory or `s3://bucket/prefix/`, in the order of their names, listed as they are asked for.

    An image is what has the suffix of one, with any content, and what begins as one, under any name; but an
    object that is called as another kind of file is not looked into, since that takes a request. Hidden files and
    directories and `__MACOSX` are passed over, links to directories not followed.

    Args:
        sources: what lists and reads.
        place: a directory or prefix that it may read.
        left_out: takes everything else.
        unjudged: also images of formats that are not judged, to be rejected as such.

    Raises:
        ImageRejectedError, TransientError, SourceCredentialsError: as `Sources.list`.
    """
    look = partial(_why_not, sources, unjudged=unjudged)
    if not place.startswith("s3://"):
        listed = sources.list(place, left_out)
        yield from _only_images(((uri, look(uri)) for uri in listed), left_out)
        return
    possible = _possible_images(sources.sizes(place), place, left_out)
    with ThreadPoolExecutor(_CONCURRENT_LOOKS, thread_name_prefix="look") as pool:
        yield from _only_images(_look_ahead(look, possible, pool), left_out)


def _why_not(sources: Sources, uri: str, *, unjudged: bool) -> str | None:
    """Returns why a file is no image; None for one that is."""
    if has_image_suffix(_object_key(uri)):
        return None
    try:
        prefix = sources.peek(uri, PREFIX_BYTES)
    except (ImageRejectedError, TransientError):
        # Reading it says what is wrong; leaving it out would hide that.
        return None
    if looks_like_image(prefix) or (unjudged and unjudged_format(prefix) is not None):
        return None
    return why_no_image(prefix)


_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


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
        """Like `list`, of an `s3://bucket/prefix` alone.

        Each object with its size in bytes, where the server says it.

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
                # boto3 costs a third of a second: a process that reads local files only need not pay for it.
                from code_worker.images.s3 import S3Source

                self._s3 = S3Source(
                    self._settings.s3,
                    max_bytes=self._settings.limits.max_bytes,
                    connections=self._settings.worker.fetch_threads + 4,
                )
            return self._s3


def source_name(uri: str) -> str:
    """Returns what fails together: `s3://bucket`, `file`, or the scheme of a source that is not known."""
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
