"""The project's own copies of labelled images, by content hash: a directory or a prefix in S3."""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from code_worker.errors import DatasetError, StorageError
from code_worker.object_store import S3Prefix, object_versions, storage_errors
from code_worker.system.files import flush, make_private, whole_file

if TYPE_CHECKING:
    from code_worker.settings import S3Settings, Settings

_HASH: Final = re.compile(r"[0-9a-f]{64}")
_INCOMPLETE: Final = ".incomplete"
_ABANDONED_AFTER_S: Final = 24 * 3600.0
_MISSING: Final = frozenset({"404", "NoSuchKey", "NotFound"})


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


class LocalKept:
    """Copies as files `ab/cd/<sha256>` below `root`, readable by their owner alone."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._swept = False

    def put(self, data: bytes) -> str:
        """See `KeptImages.put`; a copy that was damaged is replaced."""
        sha256 = hashlib.sha256(data).hexdigest()
        target = self.place(sha256)
        with _translated(f"cannot keep a copy in {self.root}"):
            if not _holds(target, data):
                self._sweep()
                for directory in (self.root, target.parent.parent, target.parent, self.root / _INCOMPLETE):
                    make_private(directory)
                self._write(target, data)
        return sha256

    def _write(self, target: Path, data: bytes) -> None:
        with whole_file(target, private=True, beside=self.root / _INCOMPLETE) as partial:
            partial.write_bytes(data)

    def _sweep(self) -> None:
        """Once per process: what a writer that died left half written."""
        if self._swept:
            return
        self._swept = True
        for path in (self.root / _INCOMPLETE).glob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - _ABANDONED_AFTER_S:
                    path.unlink()

    def read(self, sha256: str) -> bytes:
        """See `KeptImages.read`."""
        path = self.place(sha256)
        with _translated(f"cannot read a copy in {self.root}"):
            try:
                return _compared(path.read_bytes(), sha256, str(path))
            except FileNotFoundError:
                raise _gone(sha256, str(self.root)) from None

    def exists(self, sha256: str) -> bool:
        """See `KeptImages.exists`."""
        with _translated(f"cannot read {self.root}"):
            return self.place(sha256).is_file()

    def path(self, sha256: str) -> Path:
        """See `KeptImages.path`: the kept file itself."""
        self.read(sha256)
        return self.place(sha256)

    def drop(self, sha256: str) -> bool:
        """See `KeptImages.drop`; what a writer left half written is dropped too, if it is these bytes."""
        target = self.place(sha256)
        with _translated(f"cannot delete a copy in {self.root}"):
            for path in (self.root / _INCOMPLETE).glob("*"):
                with contextlib.suppress(FileNotFoundError):
                    if hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
                        path.unlink()
            try:
                target.unlink()
            except FileNotFoundError:
                return False
            flush(target.parent)
        return True

    def held(self) -> Iterator[str]:
        """Content hashes of every copy."""
        return (path.name for path in self.root.glob("??/??/*") if _HASH.fullmatch(path.name))

    def place(self, sha256: str) -> Path:
        """Returns where the copy lies if there is one; not compared with its hash."""
        return self.root / _name(sha256)


class S3Kept(S3Prefix):
    """Copies as objects `ab/cd/<sha256>` below an `s3://bucket/prefix`; `path` fetches each once into a cache.

    The allow-list of image buckets does not apply here; the address comes from the settings alone.
    """

    def __init__(self, address: str, settings: S3Settings, *, cache: Path) -> None:
        super().__init__(address, settings, "datasets")
        self.cache = LocalKept(cache)

    def put(self, data: bytes) -> str:
        """See `KeptImages.put`."""
        sha256 = hashlib.sha256(data).hexdigest()
        with _translated(f"cannot keep a copy in {self.address}"):
            self._client.put_object(Bucket=self._bucket, Key=self._key(sha256), Body=data)
        return sha256

    def read(self, sha256: str) -> bytes:
        """See `KeptImages.read`."""
        key = self._key(sha256)
        with _translated(f"cannot read a copy in {self.address}"):
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=key)
            except self._client.exceptions.NoSuchKey:
                raise _gone(sha256, self.address) from None
            with contextlib.closing(answer["Body"]) as body:
                return _compared(bytes(body.read()), sha256, f"s3://{self._bucket}/{key}")

    def exists(self, sha256: str) -> bool:
        """See `KeptImages.exists`."""
        key = self._key(sha256)
        with _translated(f"cannot read {self.address}"):
            try:
                self._client.head_object(Bucket=self._bucket, Key=key)
            except self._client.exceptions.ClientError as error:
                # A HEAD has no body, so no code either: some servers say 404, some NotFound.
                if str(error.response.get("Error", {}).get("Code")) in _MISSING:
                    return False
                raise
        return True

    def path(self, sha256: str) -> Path:
        """See `KeptImages.path`; a cached copy that was damaged is fetched again."""
        try:
            return self.cache.path(sha256)
        except DatasetError:
            self.cache.put(self.read(sha256))
        return self.cache.path(sha256)

    def drop(self, sha256: str) -> bool:
        """See `KeptImages.drop`; of a bucket that keeps versions all of them go."""
        key = self._key(sha256)
        cached = self.cache.drop(sha256)
        with _translated(f"cannot delete a copy in {self.address}"):
            versions = object_versions(self._client, self._bucket, key)
            found = [one for one in versions or () if one["Key"] == key]
            for version in found or [{"Key": key}]:
                self._client.delete_object(Bucket=self._bucket, **version)
        return bool(found) or cached

    def _key(self, sha256: str) -> str:
        return f"{self._prefix}{_name(sha256)}"


def _name(sha256: str) -> str:
    if not _HASH.fullmatch(sha256):
        raise DatasetError(f"{sha256[:80]!r} is no content hash: 64 lower-case hexadecimal digits")
    return f"{sha256[:2]}/{sha256[2:4]}/{sha256}"


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
    except FileNotFoundError:
        return False


def _compared(data: bytes, sha256: str, where: str) -> bytes:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DatasetError(f"{where} is damaged: its bytes are not those it is named after; label the image again")
    return data


def _gone(sha256: str, where: str) -> DatasetError:
    return DatasetError(f"no copy of image {sha256} is kept in {where}")


@contextlib.contextmanager
def _translated(doing: str) -> Iterator[None]:
    """Turns the operating system's and the S3 client's errors into ours."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{doing}: {error.strerror or error}") from error
    except storage_errors() as error:
        raise StorageError(f"{doing}: {error}") from error
