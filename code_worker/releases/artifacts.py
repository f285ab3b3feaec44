"""Artifact stores of releases: a directory or a prefix in S3; a release is there whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from code_worker.errors import ArtifactError, ArtifactStorageError, IntegrityError
from code_worker.object_store import S3Prefix, object_versions, storage_errors
from code_worker.releases.directories import locked, replace_by, working_directory
from code_worker.releases.integrity import MAX_SIGNATURE_BYTES, SIGNATURE_NAME, OnBytes
from code_worker.releases.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, parse_manifest, release_id, verify_files
from code_worker.system.failpoints import failpoint
from code_worker.system.files import whole_file

if TYPE_CHECKING:
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


class LocalArtifacts:
    """Releases as directories below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, directory: Path) -> str:
        """See `ArtifactStore.put`; the copy is written beside its place, flushed, and renamed."""
        _, sha256 = verify_files(directory)
        release = release_id(sha256)
        target = self.root / release
        with _translated(f"cannot write release {release} to {self.root}"), locked(self.root, release):
            _refuse_other(_kept_manifest(target), sha256, str(target))
            if not _is_whole(target, release):
                with working_directory(self.root) as copy:
                    shutil.copytree(directory, copy, dirs_exist_ok=True)
                    failpoint("mid_upload")
                    replace_by(target, copy)
        return str(target)

    def fetch(self, release: str, on_bytes: OnBytes | None = None) -> Path:
        """See `ArtifactStore.fetch`; the directory is the kept one."""
        directory = self.root / _checked_id(release)
        with _translated(f"cannot read release {release} in {self.root}"):
            if not directory.is_dir():
                raise ArtifactError(f"release {release} is not in {self.root}")
            _, sha256 = verify_files(directory, on_bytes)
        _expect_id(release, sha256, str(directory))
        return directory

    def manifest(self, release: str) -> bytes | None:
        """See `ArtifactStore.manifest`."""
        with _translated(f"cannot read release {release} in {self.root}"):
            return _kept_manifest(self.root / _checked_id(release))

    def signature(self, release: str) -> bytes | None:
        """See `ArtifactStore.signature`."""
        path = self.root / _checked_id(release) / SIGNATURE_NAME
        with _translated(f"cannot read the signature of {release}"):
            try:
                with path.open("rb") as file:
                    return file.read(MAX_SIGNATURE_BYTES)
            except FileNotFoundError:
                return None

    def put_signature(self, release: str, content: bytes) -> None:
        """See `ArtifactStore.put_signature`."""
        path = self.root / _checked_id(release) / SIGNATURE_NAME
        with (
            _translated(f"cannot write the signature of {release}"),
            locked(self.root, release),
            whole_file(path, beside=self.root) as partial,
        ):
            partial.write_bytes(content)

    def exists(self, release: str) -> bool:
        """See `ArtifactStore.exists`."""
        directory = self.root / _checked_id(release)

        def size_of(name: str) -> int | None:
            path = directory / name
            return path.stat().st_size if path.is_file() else None

        return _is_complete(self.manifest(release), size_of)

    def list(self) -> list[str]:
        """See `ArtifactStore.list`."""
        found = (path.parent.name for path in self.root.glob(f"r-*/{MANIFEST_NAME}"))
        return sorted(name for name in found if _RELEASE_ID.fullmatch(name))

    def drop(self, release: str) -> bool:
        """See `ArtifactStore.drop`."""
        target = self.root / _checked_id(release)
        with _translated(f"cannot delete release {release} in {self.root}"):
            if not target.exists():
                return False
            with locked(self.root, release):
                # The manifest first: half a release is none.
                (target / MANIFEST_NAME).unlink(missing_ok=True)
                shutil.rmtree(target)
        return True


class S3Artifacts(S3Prefix):
    """Releases as objects below an `s3://bucket/prefix`, fetched once into a local cache.

    The manifest is written last: a release whose upload was cut short does not exist.
    The allow-list of image buckets does not apply here; the address comes from the settings alone.
    """

    def __init__(self, address: str, settings: S3Settings, *, cache: Path) -> None:
        super().__init__(address, settings, "artifacts")
        self.cache = cache

    def _key(self, release: str, name: str) -> str:
        return f"{self._prefix}{release}/{name}"

    def put(self, directory: Path) -> str:
        """See `ArtifactStore.put`."""
        manifest, sha256 = verify_files(directory)
        release = release_id(sha256)
        with _translated(f"cannot write release {release} to {self.address}"):
            _refuse_other(self._manifest_bytes(release), sha256, f"{self.address}/{release}")
            for name in (*sorted(manifest.files), MANIFEST_NAME):
                if name == MANIFEST_NAME:
                    failpoint("mid_upload")
                self._client.upload_file(str(directory / name), self._bucket, self._key(release, name))
        return f"{self.address}/{release}"

    def fetch(self, release: str, on_bytes: OnBytes | None = None) -> Path:
        """See `ArtifactStore.fetch`; a damaged or missing cached copy is replaced, one process at a time."""
        target = self.cache / _checked_id(release)
        with _translated(f"cannot read release {release} from {self.address}"), locked(self.cache, release):
            if not _is_whole(target, release):
                self._download(release, target, on_bytes)
        return target

    def _download(self, release: str, target: Path, on_bytes: OnBytes | None) -> None:
        content = self._manifest_bytes(release)
        if content is None:
            raise ArtifactError(f"release {release} is not in {self.address}")
        manifest = parse_manifest(content, f"{self.address}/{release}/{MANIFEST_NAME}")
        with working_directory(self.cache) as copy:
            (copy / MANIFEST_NAME).write_bytes(content)
            for name in sorted(manifest.files):
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                self._download_file(release, name, copy / name, on_bytes)
            _, sha256 = verify_files(copy)
            _expect_id(release, sha256, f"{self.address}/{release}")
            replace_by(target, copy)

    def _download_file(self, release: str, name: str, target: Path, on_bytes: OnBytes | None) -> None:
        try:
            self._client.download_file(self._bucket, self._key(release, name), str(target), Callback=on_bytes)
        except self._client.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                raise IntegrityError(f"release {release} in {self.address} lacks {name}") from error
            raise

    def _manifest_bytes(self, release: str) -> bytes | None:
        return self._bytes(release, MANIFEST_NAME, MAX_MANIFEST_BYTES + 1)

    def _bytes(self, release: str, name: str, limit: int) -> bytes | None:
        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key(release, name))
            with contextlib.closing(answer["Body"]) as body:
                return bytes(body.read(limit))
        except self._client.exceptions.NoSuchKey:
            return None

    def manifest(self, release: str) -> bytes | None:
        """See `ArtifactStore.manifest`."""
        with _translated(f"cannot read release {release} from {self.address}"):
            return self._manifest_bytes(_checked_id(release))

    def signature(self, release: str) -> bytes | None:
        """See `ArtifactStore.signature`."""
        with _translated(f"cannot read the signature of {release}"):
            return self._bytes(_checked_id(release), SIGNATURE_NAME, MAX_SIGNATURE_BYTES)

    def put_signature(self, release: str, content: bytes) -> None:
        """See `ArtifactStore.put_signature`."""
        with _translated(f"cannot write the signature of {release}"):
            key = self._key(_checked_id(release), SIGNATURE_NAME)
            self._client.put_object(Bucket=self._bucket, Key=key, Body=content)

    def exists(self, release: str) -> bool:
        """See `ArtifactStore.exists`."""
        content = self.manifest(release)
        with _translated(f"cannot read {self.address}"):
            return _is_complete(content, lambda name: self._size(release, name))

    def _size(self, release: str, name: str) -> int | None:
        try:
            return int(self._client.head_object(Bucket=self._bucket, Key=self._key(release, name))["ContentLength"])
        except self._client.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                return None
            raise

    def list(self) -> list[str]:
        """See `ArtifactStore.list`."""
        found = []
        with _translated(f"cannot list {self.address}"):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=f"{self._prefix}r-"):
                keys = (item["Key"].removeprefix(self._prefix) for item in page.get("Contents", ()))
                found += [key.partition("/")[0] for key in keys if key.partition("/")[2] == MANIFEST_NAME]
        return sorted(found)

    def drop(self, release: str) -> bool:
        """See `ArtifactStore.drop`; of a bucket that keeps versions all of them go."""
        cached = LocalArtifacts(self.cache).drop(release)
        prefix = self._key(_checked_id(release), "")
        with _translated(f"cannot delete release {release} in {self.address}"):
            found = object_versions(self._client, self._bucket, prefix)
            if found is None:
                pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix)
                found = [{"Key": item["Key"]} for page in pages for item in page.get("Contents", ())]
            # The manifest first: half a release is none.
            for version in sorted(found, key=lambda one: not one["Key"].endswith(f"/{MANIFEST_NAME}")):
                self._client.delete_object(Bucket=self._bucket, **version)
        return bool(found) or cached


@contextlib.contextmanager
def _translated(doing: str) -> Iterator[None]:
    """Turns the operating system's and the S3 client's errors into ours."""
    try:
        yield
    except OSError as error:
        raise ArtifactStorageError(f"{doing}: {error}") from error
    except storage_errors() as error:
        raise ArtifactStorageError(f"{doing}: {error}") from error


def _is_complete(manifest: bytes | None, size_of: Callable[[str], int | None]) -> bool:
    if manifest is None:
        return False
    try:
        files = parse_manifest(manifest, MANIFEST_NAME).files
    except ArtifactError:
        return False
    return all(size_of(name) == entry.size for name, entry in files.items())


def _is_whole(directory: Path, release: str) -> bool:
    if not directory.is_dir():
        return False
    try:
        _, sha256 = verify_files(directory)
    except ArtifactError:
        return False
    return release_id(sha256) == release


def _refuse_other(kept: bytes | None, sha256: str, where: str) -> None:
    """A manifest that merely rotted is replaced; another one under the same id is never touched."""
    found = hashlib.sha256(kept or b"").hexdigest()
    if found != sha256 and release_id(found) == release_id(sha256):
        raise IntegrityError(f"{where} holds another release under the same id")


def _kept_manifest(directory: Path) -> bytes | None:
    try:
        return (directory / MANIFEST_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _expect_id(release: str, sha256: str, where: str) -> None:
    if release_id(sha256) != release:
        raise IntegrityError(f"{where}: the manifest is that of {release_id(sha256)}, not of {release}")


def _checked_id(release: str) -> str:
    if not _RELEASE_ID.fullmatch(release):
        raise ArtifactError(f"{release!r} is no release id; ids look like r-0123456789ab")
    return release
