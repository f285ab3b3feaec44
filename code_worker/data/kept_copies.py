"""The project's own copies of labelled images, by content hash: a directory or a prefix in S3."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from code_worker.blobs import translated
from code_worker.blobs.local import LocalBlobs
from code_worker.blobs.s3 import S3Blobs
from code_worker.errors import DatasetError, StorageError

if TYPE_CHECKING:
    from code_worker.blobs import Blobs
    from code_worker.settings import S3Settings, Settings

_HASH: Final = re.compile(r"[0-9a-f]{64}")


class KeptImages(Protocol):
    """Keeps files under the sha256 of their bytes; safe to share between threads."""

    def put(self, data: bytes) -> str:
        """Keeps a copy and returns its sha256; it is there whole or not at all, and keeping it again changes nothing.

        Raises:
            StorageError: it cannot be written.
        """

    def read(self, sha256: str) -> bytes:
        """The bytes, compared with their hash.

        Raises:
            DatasetError: no copy is kept, or it is damaged.
            StorageError: the storage cannot be read.
        """

    def exists(self, sha256: str) -> bool:
        """Returns whether a copy is kept.

        Raises:
            StorageError: the storage cannot be read.
        """

    def path(self, sha256: str) -> Path:
        """A local file with the copy, compared with its hash, not to be changed.

        Raises:
            DatasetError, StorageError: as `read`.
        """

    def drop(self, sha256: str) -> bool:
        """Deletes the copy, every version and cached one of it; whether there was any. Again, it changes nothing.

        Raises:
            StorageError: it cannot be deleted.
        """


def open_kept(settings: Settings) -> KeptImages:
    """The dataset storage that the settings name; nothing is contacted yet.

    Raises:
        ConfigurationError: an `s3://` address without a bucket.
    """
    address = settings.resolved_datasets
    if address.startswith("s3:"):
        return S3Kept(address, settings.s3, cache=settings.data_path / "cache" / "dataset")
    return LocalKept(Path(address))


class _Kept:
    """The common part of directory and S3: files `ab/cd/<sha256>`."""

    def __init__(self, blobs: Blobs) -> None:
        self.blobs = blobs

    def put(self, data: bytes) -> str:
        """See `KeptImages.put`; a copy that was damaged is replaced."""
        sha256 = hashlib.sha256(data).hexdigest()
        with translated(f"cannot keep a copy in {self.blobs.address}", StorageError):
            self.blobs.put(_name(sha256), data)
        return sha256

    def read(self, sha256: str) -> bytes:
        """See `KeptImages.read`."""
        with translated(f"cannot read a copy in {self.blobs.address}", StorageError):
            data = self.blobs.get(_name(sha256))
        if data is None:
            raise DatasetError(f"no copy of image {sha256} is kept in {self.blobs.address}")
        if hashlib.sha256(data).hexdigest() != sha256:
            where = f"{self.blobs.address}/{_name(sha256)}"
            raise DatasetError(
                f"{where} is damaged: its bytes are not those it is named after; label the image again"
            )
        return data

    def exists(self, sha256: str) -> bool:
        """See `KeptImages.exists`."""
        with translated(f"cannot read a copy in {self.blobs.address}", StorageError):
            return self.blobs.size(_name(sha256)) is not None

    def drop(self, sha256: str) -> bool:
        """See `KeptImages.drop`."""
        with translated(f"cannot delete a copy in {self.blobs.address}", StorageError):
            return self.blobs.delete(_name(sha256))


class LocalKept(_Kept):
    """Copies below `root`, readable by their owner alone."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._files = LocalBlobs(root, private=True)
        super().__init__(self._files)

    def put(self, data: bytes) -> str:
        """See `KeptImages.put`; a copy that is there is not written again."""
        sha256 = hashlib.sha256(data).hexdigest()
        with translated(f"cannot keep a copy in {self.root}", StorageError):
            # Its bytes and not its presence: a copy that rotted is written again.
            if self._files.get(_name(sha256)) == data:
                return sha256
        return super().put(data)

    def path(self, sha256: str) -> Path:
        """See `KeptImages.path`: the kept file itself."""
        self.read(sha256)
        return self.place(sha256)

    def drop(self, sha256: str) -> bool:
        """See `KeptImages.drop`; what a writer left half written is dropped too, if it is these bytes."""
        with translated(f"cannot delete a copy in {self.root}", StorageError):
            for path in self._files.unfinished():
                with contextlib.suppress(FileNotFoundError):
                    if hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
                        path.unlink()
        return super().drop(sha256)

    def held(self) -> Iterator[str]:
        """Content hashes of every copy."""
        return (name[-64:] for name in self._files.names() if _HASH.fullmatch(name[-64:]))

    def place(self, sha256: str) -> Path:
        """Returns where the copy lies if there is one; not compared with its hash."""
        return self._files.path(_name(sha256))


class S3Kept(_Kept):
    """Copies below an `s3://bucket/prefix`; `path` fetches each once into a cache."""

    def __init__(self, address: str, settings: S3Settings, *, cache: Path) -> None:
        super().__init__(S3Blobs(address, settings, "datasets"))
        self.cache = LocalKept(cache)

    def path(self, sha256: str) -> Path:
        """See `KeptImages.path`; a cached copy that was damaged is fetched again."""
        try:
            return self.cache.path(sha256)
        except DatasetError:
            self.cache.put(self.read(sha256))
        return self.cache.path(sha256)

    def drop(self, sha256: str) -> bool:
        """See `KeptImages.drop`: the cached copy last, since until then it could be fetched again."""
        kept = super().drop(sha256)
        return self.cache.drop(sha256) or kept


def _name(sha256: str) -> str:
    if not _HASH.fullmatch(sha256):
        raise DatasetError(f"{sha256[:80]!r} is no content hash: 64 lower-case hexadecimal digits")
    return f"{sha256[:2]}/{sha256[2:4]}/{sha256}"
