"""The project's own files, by name: below a directory or below a prefix in S3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from code_worker.errors import CodeWorkerError


class Blobs(Protocol):
    """Keeps files under names with slashes; safe to share between threads.

    Another kind of store is another class with these methods. All raise OSError or one of `s3.storage_errors` when
    the store cannot be reached; `translated` makes it an error of ours.
    """

    @property
    def address(self) -> str:
        """Their place, for messages."""

    def put(self, name: str, data: bytes) -> None:
        """Writes a file whole or not at all, in the place of another."""

    def get(self, name: str, limit: int = -1) -> bytes | None:
        """Returns its bytes, at most `limit` of them; None where there is no such file."""

    def size(self, name: str) -> int | None:
        """Returns its size in bytes; None where there is no such file."""

    def names(self, prefix: str = "") -> Iterator[str]:
        """Names of all whole files that begin so, in no order."""

    def delete(self, name: str, *, first: str = "") -> bool:
        """Deletes a file with all its versions, or of a name that ends with a slash all below it.

        Args:
            name: of the file or the directory.
            first: the file to begin with: without it the others stand for nothing.

        Returns:
            Whether there was any; again, it changes nothing.
        """


@contextmanager
def translated(doing: str, error: type[CodeWorkerError]) -> Iterator[None]:
    """Turns what the operating system and the S3 client raise into an error of ours.

    The text has no path: names of kept copies are hashes of images, which no log may name.
    """
    from code_worker.blobs.s3 import storage_errors

    try:
        yield
    except OSError as raised:
        raise error(f"{doing}: {raised.strerror or raised}") from raised
    except storage_errors() as raised:
        raise error(f"{doing}: {raised}") from raised
