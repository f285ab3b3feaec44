"""Artifact stores of releases: a directory or a prefix in S3; a release is there whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from code_worker.blobs import translated
from code_worker.blobs.local import LocalBlobs
from code_worker.blobs.s3 import S3Blobs
from code_worker.errors import ArtifactError, ArtifactStorageError, IntegrityError
from code_worker.releases.integrity import MAX_SIGNATURE_BYTES, SIGNATURE_NAME, OnBytes
from code_worker.releases.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, parse_manifest, release_id, verify_files
from code_worker.system.failpoints import failpoint
from code_worker.system.files import locked, make_private, whole_directory

if TYPE_CHECKING:
    from code_worker.blobs import Blobs
    from code_worker.settings import S3Settings, Settings

_RELEASE_ID = re.compile(r"r-[0-9a-f]{12}")


class ArtifactStore(Protocol):
    """Keeps release directories under their ids."""

    def put(self, directory: Path) -> str:
        """Stores a release directory and returns its location; storing the same one again changes nothing.

        Raises:
            IntegrityError: the directory is damaged, or its id is taken by a release with another manifest.
            ArtifactError: it cannot be written.
        """

    def fetch(self, release: str, on_bytes: OnBytes | None = None) -> Path:
        """A local directory with the release, every file compared with the manifest.

        Raises:
            ArtifactError: there is no such release, or it cannot be read.
            IntegrityError: it is damaged.
        """

    def manifest(self, release: str) -> bytes | None:
        """The release's manifest as it lies here, compared with nothing; None if there is no complete release.

        Raises:
            ArtifactError: it cannot be read.
        """

    def signature(self, release: str) -> bytes | None:
        """Returns what stands in the release's `manifest.sig`, or None.

        Raises:
            ArtifactError: it cannot be read.
        """

    def put_signature(self, release: str, content: bytes) -> None:
        """Puts a signature beside the manifest, in the place of another.

        Raises:
            ArtifactError: it cannot be written.
        """

    def exists(self, release: str) -> bool:
        """Returns whether a release of this id is kept here with every file at its size; no cached copy counts.

        Raises:
            ArtifactError: it cannot be looked for.
        """

    def list(self) -> list[str]:
        """Ids of the complete releases, sorted."""

    def drop(self, release: str) -> bool:
        """Deletes a release and its cached copy here; whether there was any. Again, it changes nothing.

        Raises:
            ArtifactError: it cannot be deleted.
        """


def open_artifacts(settings: Settings) -> ArtifactStore:
    """The artifact store that the settings name; nothing is contacted yet.

    Raises:
        ConfigurationError: an `s3://` address without a bucket.
    """
    address = settings.resolved_artifacts
    if address.startswith("s3:"):
        return S3Artifacts(address, settings.s3, cache=settings.data_path / "cache" / "releases")
    return LocalArtifacts(Path(address))


class _Artifacts:
    """The common part of directory and S3: files `<release>/<name>`, of which the manifest is the last."""

    def __init__(self, blobs: Blobs) -> None:
        self.blobs = blobs

    def manifest(self, release: str) -> bytes | None:
        """See `ArtifactStore.manifest`."""
        with translated(f"cannot read release {release} in {self.blobs.address}", ArtifactStorageError):
            return self._manifest(_checked_id(release))

    def _manifest(self, release: str) -> bytes | None:
        return self.blobs.get(f"{release}/{MANIFEST_NAME}", MAX_MANIFEST_BYTES + 1)

    def signature(self, release: str) -> bytes | None:
        """See `ArtifactStore.signature`."""
        with translated(f"cannot read the signature of {release} in {self.blobs.address}", ArtifactStorageError):
            return self.blobs.get(f"{_checked_id(release)}/{SIGNATURE_NAME}", MAX_SIGNATURE_BYTES)

    def put_signature(self, release: str, content: bytes) -> None:
        """See `ArtifactStore.put_signature`."""
        if self.manifest(release) is None:
            raise ArtifactError(f"release {release} is not in {self.blobs.address}")
        with translated(f"cannot write the signature of {release} to {self.blobs.address}", ArtifactStorageError):
            self.blobs.put(f"{_checked_id(release)}/{SIGNATURE_NAME}", content)

    def exists(self, release: str) -> bool:
        """See `ArtifactStore.exists`."""
        content = self.manifest(release)
        with translated(f"cannot read release {release} in {self.blobs.address}", ArtifactStorageError):
            return _is_complete(content, lambda name: self.blobs.size(f"{release}/{name}"))

    def list(self) -> list[str]:
        """See `ArtifactStore.list`."""
        with translated(f"cannot list {self.blobs.address}", ArtifactStorageError):
            found = [name.partition("/") for name in self.blobs.names("r-")]
        return sorted(
            release for release, _, name in found if name == MANIFEST_NAME and _RELEASE_ID.fullmatch(release)
        )

    def drop(self, release: str) -> bool:
        """See `ArtifactStore.drop`; the manifest goes first: half a release is none."""
        with translated(f"cannot delete release {release} in {self.blobs.address}", ArtifactStorageError):
            return self.blobs.delete(f"{_checked_id(release)}/", first=f"{release}/{MANIFEST_NAME}")


class LocalArtifacts(_Artifacts):
    """Releases as directories below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._files = LocalBlobs(root, private=False)
        super().__init__(self._files)

    def put(self, directory: Path) -> str:
        """See `ArtifactStore.put`; the copy is written beside its place, flushed, and renamed."""
        _, sha256 = verify_files(directory)
        release = release_id(sha256)
        target = self.root / release
        with translated(f"cannot write release {release} to {self.root}", ArtifactStorageError), self.locked(release):
            _refuse_other(self._manifest(release), sha256, str(target))
            if not self.is_whole(release):
                with self.replaced(release) as copy:
                    shutil.copytree(directory, copy, dirs_exist_ok=True)
                    failpoint("mid_upload")
        return str(target)

    def fetch(self, release: str, on_bytes: OnBytes | None = None) -> Path:
        """See `ArtifactStore.fetch`; the directory is the kept one."""
        directory = self.root / _checked_id(release)
        with translated(f"cannot read release {release} in {self.root}", ArtifactStorageError):
            if not directory.is_dir():
                raise ArtifactError(f"release {release} is not in {self.root}")
            _, sha256 = verify_files(directory, on_bytes)
        _expect_id(release, sha256, str(directory))
        return directory

    def put_signature(self, release: str, content: bytes) -> None:
        """See `ArtifactStore.put_signature`."""
        doing = f"cannot write the signature of {release} to {self.root}"
        with translated(doing, ArtifactStorageError), self.locked(_checked_id(release)):
            super().put_signature(release, content)

    def drop(self, release: str) -> bool:
        """See `ArtifactStore.drop`."""
        if not (self.root / _checked_id(release)).exists():
            return False
        doing = f"cannot delete release {release} in {self.root}"
        with translated(doing, ArtifactStorageError), self.locked(release):
            return super().drop(release)

    @contextlib.contextmanager
    def locked(self, release: str) -> Iterator[None]:
        """One process at a time changes a release; the lock goes with the process that holds it."""
        make_private(self.root.parent)
        # Other users of the machine may load from a directory of releases that is not in the data directory.
        self.root.mkdir(exist_ok=True)
        with locked(self.root / f".{release}.lock", wait_s=math.inf):
            yield

    @contextlib.contextmanager
    def replaced(self, release: str) -> Iterator[Path]:
        """An empty directory that takes the release's place when the block ends; see `whole_directory`."""
        with whole_directory(self.root / release, durable=True, beside=self._files.drafts()) as copy:
            yield copy
            # Last, so that nobody else looks into it before it is whole.
            copy.chmod(0o755)

    def is_whole(self, release: str) -> bool:
        """Returns whether every file of a release is here, with the bytes that the manifest recorded."""
        directory = self.root / release
        if not directory.is_dir():
            return False
        try:
            _, sha256 = verify_files(directory)
        except ArtifactError:
            return False
        return release_id(sha256) == release


class S3Artifacts(_Artifacts):
    """Releases as objects below an `s3://bucket/prefix`, fetched once into a local cache.

    The manifest is written last: a release whose upload was cut short does not exist.
    """

    def __init__(self, address: str, settings: S3Settings, *, cache: Path) -> None:
        self._objects = S3Blobs(address, settings, "artifacts")
        super().__init__(self._objects)
        self._cache = LocalArtifacts(cache)

    def put(self, directory: Path) -> str:
        """See `ArtifactStore.put`."""
        manifest, sha256 = verify_files(directory)
        release, address = release_id(sha256), self._objects.address
        with translated(f"cannot write release {release} to {address}", ArtifactStorageError):
            _refuse_other(self._manifest(release), sha256, f"{address}/{release}")
            # The manifest last: until it is there, nobody takes what is there for a release.
            for name in (*sorted(manifest.files), MANIFEST_NAME):
                if name == MANIFEST_NAME:
                    failpoint("mid_upload")
                self._objects.upload(f"{release}/{name}", directory / name)
        return f"{address}/{release}"

    def fetch(self, release: str, on_bytes: OnBytes | None = None) -> Path:
        """See `ArtifactStore.fetch`; a damaged or missing cached copy is replaced, one process at a time."""
        doing = f"cannot read release {_checked_id(release)} from {self._objects.address}"
        with translated(doing, ArtifactStorageError), self._cache.locked(release):
            # Under the lock: of processes that start at once, one downloads.
            if not self._cache.is_whole(release):
                self._download(release, on_bytes)
        return self._cache.root / release

    def _download(self, release: str, on_bytes: OnBytes | None) -> None:
        address = f"{self._objects.address}/{release}"
        content = self._manifest(release)
        if content is None:
            raise ArtifactError(f"release {release} is not in {self._objects.address}")
        manifest = parse_manifest(content, f"{address}/{MANIFEST_NAME}")
        with self._cache.replaced(release) as copy:
            (copy / MANIFEST_NAME).write_bytes(content)
            for name in sorted(manifest.files):
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                if not self._objects.download(f"{release}/{name}", copy / name, on_bytes):
                    raise IntegrityError(f"release {release} in {self._objects.address} lacks {name}")
            _, sha256 = verify_files(copy)
            _expect_id(release, sha256, address)

    def drop(self, release: str) -> bool:
        """See `ArtifactStore.drop`."""
        cached = self._cache.drop(release)
        return super().drop(release) or cached


def _is_complete(manifest: bytes | None, size_of: Callable[[str], int | None]) -> bool:
    if manifest is None:
        return False
    try:
        files = parse_manifest(manifest, MANIFEST_NAME).files
    except ArtifactError:
        return False
    return all(size_of(name) == entry.size for name, entry in files.items())


def _refuse_other(kept: bytes | None, sha256: str, where: str) -> None:
    """A manifest that merely rotted is replaced; another one under the same id is never touched."""
    found = hashlib.sha256(kept or b"").hexdigest()
    if found != sha256 and release_id(found) == release_id(sha256):
        raise IntegrityError(f"{where} holds another release under the same id")


def _expect_id(release: str, sha256: str, where: str) -> None:
    if release_id(sha256) != release:
        raise IntegrityError(f"{where}: the manifest is that of {release_id(sha256)}, not of {release}")


def _checked_id(release: str) -> str:
    if not _RELEASE_ID.fullmatch(release):
        raise ArtifactError(f"{release!r} is no release id; ids look like r-0123456789ab")
    return release
