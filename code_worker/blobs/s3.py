"""Files below a prefix in S3, and the clients: one configuration for images, releases and kept copies."""

from __future__ import annotations

import errno
import threading
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal

from code_worker.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from botocore.model import OperationModel
    from mypy_boto3_s3 import S3Client

    from code_worker.settings import S3Settings

_Checksums = Literal["when_supported", "when_required"]
_CONNECTIONS: Final = 10
_STORAGE_READ_TIMEOUT_S: Final = 30.0
_WITHOUT_VERSIONS: Final = frozenset({"NotImplemented", "MethodNotAllowed"})
_MISSING: Final = frozenset({"404", "NoSuchKey", "NotFound"})
_DENIED: Final = frozenset({"403", "AccessDenied"})


def new_client(
    settings: S3Settings, bucket: str, *, connections: int = _CONNECTIONS, read_timeout_s: float | None = None
) -> S3Client:
    """A client as the settings say; nothing is contacted yet. Buckets of one answer to `is_anonymous` can share it.

    Args:
        settings: endpoint, keys, timeouts, and what the server understands.
        bucket: decides whether requests are signed.
        connections: kept open at most.
        read_timeout_s: limit between two chunks; unset: that of the settings.

    Raises:
        ConfigurationError: boto3 is not installed.
        BotoCoreError, ValueError: settings that cannot be used.
    """
    try:
        # Heavy, and needed for S3 alone.
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config
    except ImportError:
        raise ConfigurationError("storage in S3 needs boto3: pip install 'code-worker[worker]'") from None
    key, secret = settings.access_key_id, settings.secret_access_key
    # Stated both ways: by themselves boto3's uploads carry checksums in headers that B2 and R2 refuse.
    checksums: _Checksums = "when_supported" if settings.checksum_mode else "when_required"
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=settings.endpoint_url,
        region_name=settings.region,
        aws_access_key_id=key.get_secret_value() if key else None,
        aws_secret_access_key=secret.get_secret_value() if secret else None,
        config=Config(
            signature_version=UNSIGNED if is_anonymous(settings, bucket) else "s3v4",
            retries={"mode": "standard", "total_max_attempts": settings.max_attempts},
            connect_timeout=settings.connect_timeout_s,
            read_timeout=settings.read_timeout_s if read_timeout_s is None else read_timeout_s,
            max_pool_connections=connections,
            tcp_keepalive=True,
            s3={"addressing_style": "path" if settings.path_style else "auto"},
            request_checksum_calculation=checksums,
            response_checksum_validation=checksums,
        ),
    )
    client.meta.events.register("provide-client-params.s3", _RequesterPays(settings.requester_pays))
    return client


def storage_client(settings: S3Settings, bucket: str) -> S3Client:
    """A client for the project's own storage, whose files are large and not waited for by a live job.

    Raises:
        ConfigurationError: boto3 is not installed.
    """
    return new_client(settings, bucket, read_timeout_s=max(settings.read_timeout_s, _STORAGE_READ_TIMEOUT_S))


class S3Blobs:
    """See `Blobs`: objects below an `s3://bucket/prefix` of the project's own.

    The allow-list of image buckets does not apply here; the address comes from the settings alone.
    """

    def __init__(self, address: str, settings: S3Settings, setting: str) -> None:
        """Contacts nothing yet.

        Raises:
            ConfigurationError: the address names no bucket; it names the setting.
        """
        bucket, _, prefix = address.removeprefix("s3:").removeprefix("//").partition("/")
        if not bucket:
            raise ConfigurationError(f"{setting}: {address!r} names no bucket; write s3://bucket/prefix")
        self.address = address.rstrip("/")
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._settings = settings
        # Guards `_made`: boto3's sessions may not be used by two threads at a time, clients may.
        self._lock = threading.Lock()
        self._made: Any = None

    @property
    def client(self) -> Any:
        """The one client, made at first use."""
        with self._lock:
            if self._made is None:
                self._made = storage_client(self._settings, self._bucket)
            return self._made

    def put(self, name: str, data: bytes) -> None:
        """See `Blobs.put`: an object is there when all of it has arrived."""
        self.client.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=data)

    def upload(self, name: str, path: Path) -> None:
        """Writes a file of any size, in parts and several at a time; whole or not at all."""
        self.client.upload_file(str(path), self._bucket, self._prefix + name)

    def get(self, name: str, limit: int = -1) -> bytes | None:
        """See `Blobs.get`."""
        with self._none_if_missing():
            answer = self.client.get_object(Bucket=self._bucket, Key=self._prefix + name)
            with closing(answer["Body"]) as body:
                return bytes(body.read(None if limit < 0 else limit))
        return None

    def download(self, name: str, path: Path, on_bytes: Callable[[int], object] | None = None) -> bool:
        """Fetches a file of any size into `path`; False where there is no such file."""
        with self._none_if_missing():
            self.client.download_file(self._bucket, self._prefix + name, str(path), Callback=on_bytes)
            return True
        return False

    def size(self, name: str) -> int | None:
        """See `Blobs.size`."""
        with self._none_if_missing():
            return int(self.client.head_object(Bucket=self._bucket, Key=self._prefix + name)["ContentLength"])
        # A HEAD's 404 has no body that could tell a missing object from a missing bucket: a GET's has.
        found = self.get(name)
        return None if found is None else len(found)

    def names(self, prefix: str = "") -> Iterator[str]:
        """See `Blobs.names`."""
        pages = self.client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix):
            yield from (item["Key"].removeprefix(self._prefix) for item in page.get("Contents", ()))

    def delete(self, name: str, *, first: str = "") -> bool:
        """See `Blobs.delete`.

        Raises:
            PermissionError: see `object_versions`; nothing was deleted.
        """
        key = self._prefix + name
        found = [
            one
            for one in object_versions(self.client, self._bucket, key) or ()
            if name.endswith("/") or one["Key"] == key
        ]
        if not found and name.endswith("/"):
            # No versions are kept, or none of these: what is there counts.
            found = [{"Key": self._prefix + one} for one in self.names(name)]
        elif not found:
            return self._delete_one(name)
        for version in sorted(found, key=lambda one: one["Key"] != self._prefix + first):
            # One by one: DeleteObjects needs a checksum that some servers do not take.
            self.client.delete_object(Bucket=self._bucket, **version)
        return bool(found)

    def _delete_one(self, name: str) -> bool:
        """Deletes a file of which no versions are known; returns whether it was there, as far as may be asked."""
        try:
            there = self.size(name) is not None
        except self.client.exceptions.ClientError as error:
            # Who may not list a bucket is told so of an object that is missing, too: it may be deleted all the same.
            if _code_of(error) not in _DENIED:
                raise
            self.client.delete_object(Bucket=self._bucket, Key=self._prefix + name)
            return False
        if there:
            self.client.delete_object(Bucket=self._bucket, Key=self._prefix + name)
        return there

    @contextmanager
    def _none_if_missing(self) -> Iterator[None]:
        """Ends its block where the object is not there; a missing bucket is an error.

        A HEAD's answer has no body and so no code: for it botocore puts the status in the code's place.
        """
        try:
            yield
        except self.client.exceptions.ClientError as error:
            if _code_of(error) not in _MISSING:
                raise


def object_versions(client: Any, bucket: str, prefix: str) -> list[dict[str, str]] | None:
    """`Key` and `VersionId` of every version and delete marker below a prefix; None where none can be kept.

    That is so on a server that knows no versions, and in a bucket that never had them enabled.

    Raises:
        PermissionError: there may be versions, and they may not be listed: deleting the objects would leave them.
        ClientError: any other answer of the server.
    """
    try:
        pages = list(client.get_paginator("list_object_versions").paginate(Bucket=bucket, Prefix=prefix))
    except client.exceptions.ClientError as error:
        code = _code_of(error)
        if code in _WITHOUT_VERSIONS or (code in _DENIED and _never_versioned(client, bucket)):
            return None
        if code in _DENIED:
            raise PermissionError(
                errno.EACCES,
                f"versions in bucket {bucket} may not be listed: allow s3:ListBucketVersions and "
                "s3:DeleteObjectVersion, or s3:GetBucketVersioning where it keeps none",
            ) from error
        raise
    found = (one for page in pages for one in (*page.get("Versions", ()), *page.get("DeleteMarkers", ())))
    return [{"Key": one["Key"], "VersionId": one["VersionId"]} for one in found]


def _never_versioned(client: Any, bucket: str) -> bool:
    """Returns whether the bucket says that it never kept versions.

    One in which they are suspended has those of before.
    """
    try:
        return not client.get_bucket_versioning(Bucket=bucket).get("Status")
    except client.exceptions.ClientError:
        return False


def _code_of(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code"))


def is_anonymous(settings: S3Settings, bucket: str) -> bool:
    """Returns whether requests to this bucket go without a signature."""
    return bucket in _names(settings.anonymous)


def storage_errors() -> tuple[type[Exception], ...]:
    """Returns what a client raises; nothing where boto3 is not installed."""
    try:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return ()
    return (Boto3Error, BotoCoreError, ClientError)


class _RequesterPays:
    """Says in every request to a bucket whose reader pays that we do, in parts of an upload or a list as well."""

    def __init__(self, buckets: Iterable[str]) -> None:
        self._buckets = _names(buckets)

    def __call__(self, params: dict[str, Any], model: OperationModel, **_: object) -> None:
        shape = model.input_shape
        if params.get("Bucket") in self._buckets and shape is not None and "RequestPayer" in shape.members:
            params["RequestPayer"] = "requester"


def _names(buckets: Iterable[str]) -> frozenset[str]:
    return frozenset(entry.removeprefix("s3://").partition("/")[0] for entry in buckets)
