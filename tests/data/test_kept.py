"""Copies of labelled images: whole or not at all, private, and compared with their hash when read."""

from __future__ import annotations

import hashlib
import os
import resource
import stat
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from botocore.awsrequest import AWSResponse

from code_worker.data.kept_copies import KeptImages, LocalKept, S3Kept, open_kept
from code_worker.errors import ConfigurationError, DatasetError, StorageError
from code_worker.settings import S3Settings, Settings
from tests.faults.rows import Seen, row
from tests.servers import S3Server, free_port

DATA = b"bytes of an image"
SHA = hashlib.sha256(DATA).hexdigest()
NAME = f"{SHA[:2]}/{SHA[2:4]}/{SHA}"


def s3_settings(url: str) -> S3Settings:
    return S3Settings(
        endpoint_url=url,
        region="us-east-1",
        access_key_id="test",
        secret_access_key="test",
        path_style=True,
        max_attempts=2,
        connect_timeout_s=60.0,
        read_timeout_s=60.0,
    )


class Storage:
    """A storage, and a way to reach behind it."""

    def __init__(self, kept: KeptImages, damage: Callable[[str, bytes | None], None]) -> None:
        self.kept = kept
        self.damage = damage
        """Overwrites (or with None removes) what lies under this name below the root."""


@pytest.fixture(params=["directory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "directory":
        root = tmp_path / "kept"
        return Storage(
            LocalKept(root),
            lambda name, data: (root / name).unlink() if data is None else (root / name).write_bytes(data) and None,
        )
    server: S3Server = request.getfixturevalue("s3_server")
    client, bucket = server.client(), f"kept-{uuid.uuid4().hex[:8]}"
    client.create_bucket(Bucket=bucket)

    def damage(name: str, data: bytes | None) -> None:
        if data is None:
            client.delete_object(Bucket=bucket, Key=f"some/prefix/{name}")
        else:
            client.put_object(Bucket=bucket, Key=f"some/prefix/{name}", Body=data)

    return Storage(S3Kept(f"s3://{bucket}/some/prefix/", s3_settings(server.url), cache=tmp_path / "cache"), damage)


def test_what_was_put_is_read_byte_for_byte(storage: Storage) -> None:
    assert not storage.kept.exists(SHA)
    assert storage.kept.put(DATA) == SHA
    assert storage.kept.exists(SHA)
    assert storage.kept.read(SHA) == DATA
    assert storage.kept.path(SHA).read_bytes() == DATA


def test_putting_it_again_changes_nothing(storage: Storage) -> None:
    assert storage.kept.put(DATA) == storage.kept.put(DATA) == SHA
    assert storage.kept.read(SHA) == DATA


def test_a_copy_that_rots_is_refused_and_put_mends_it(storage: Storage) -> None:
    storage.kept.put(DATA)
    storage.damage(NAME, b"bytes of an imagE")
    for get in (storage.kept.read, storage.kept.path):
        with pytest.raises(DatasetError, match=f"{SHA} is damaged"):
            get(SHA)
    storage.kept.put(DATA)
    assert storage.kept.read(SHA) == storage.kept.path(SHA).read_bytes() == DATA


def test_a_copy_that_vanished_is_named(storage: Storage) -> None:
    storage.kept.put(DATA)
    storage.damage(NAME, None)
    assert not storage.kept.exists(SHA)
    for get in (storage.kept.read, storage.kept.path):
        with pytest.raises(DatasetError, match=f"no copy of image {SHA} is kept in"):
            get(SHA)


@pytest.mark.parametrize("wrong", ["", "abc", "../../etc/passwd", "A" * 64, "a" * 64 + "\n"])
def test_what_is_no_content_hash_leads_nowhere(storage: Storage, wrong: str) -> None:
    for get in (storage.kept.read, storage.kept.path, storage.kept.exists):
        with pytest.raises(DatasetError, match="is no content hash"):
            get(wrong)


def test_threads_may_keep_the_same_image_at_once(storage: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: storage.kept.put(DATA), range(16))) == {SHA}
    assert storage.kept.read(SHA) == DATA


def test_only_its_owner_reads_a_kept_file(tmp_path: Path) -> None:
    root = tmp_path / "kept"
    LocalKept(root).put(DATA)
    made = [root, *root.rglob("*")]
    assert root / NAME in made
    assert not [path for path in made if stat.S_IMODE(path.stat().st_mode) & 0o077]


def test_a_writer_that_died_leaves_no_copy_and_its_rest_is_swept_later(tmp_path: Path) -> None:
    kept = LocalKept(tmp_path)
    kept.put(DATA)
    old, young = tmp_path / ".incomplete" / "old", tmp_path / ".incomplete" / "young"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 86_400,) * 2)
    LocalKept(tmp_path).put(b"another")
    assert (old.exists(), young.exists()) == (False, True)


def test_storage_that_cannot_be_written_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"a file, no directory")
    with pytest.raises(StorageError, match=r"cannot keep a copy in .*kept: (File exists|Not a directory)"):
        LocalKept(tmp_path / "kept").put(DATA)


@row("F34", injection="a kept copy outgrows RLIMIT_FSIZE", expected="a typed error, nothing half written")
def test_a_disk_that_fills_up_leaves_no_half_copy(tmp_path: Path, seen: Seen) -> None:
    kept = LocalKept(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The nearest to a full disk without one: no file of this process may grow beyond 1,000 bytes.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot keep a copy in .*: File too large"):
            kept.put(bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    seen(files_left=0)


def test_from_s3_a_file_is_fetched_once(s3_server: S3Server, tmp_path: Path) -> None:
    client, bucket = s3_server.client(), f"kept-{uuid.uuid4().hex[:8]}"
    client.create_bucket(Bucket=bucket)
    kept = S3Kept(f"s3://{bucket}", s3_settings(s3_server.url), cache=tmp_path / "cache")
    kept.put(DATA)
    first = kept.path(SHA)
    client.delete_object(Bucket=bucket, Key=NAME)
    assert kept.path(SHA) == first
    assert first.is_relative_to(tmp_path / "cache")
    kept.put(DATA)
    first.write_bytes(b"bytes of an imagE")
    assert kept.path(SHA).read_bytes() == DATA, "what rots in the cache is fetched again"


def test_a_bucket_that_is_missing_or_a_server_that_is_away_is_the_storages_fault(
    s3_server: S3Server, tmp_path: Path
) -> None:
    missing = S3Kept("s3://no-such-bucket-here/x", s3_settings(s3_server.url), cache=tmp_path)
    with pytest.raises(StorageError, match="NoSuchBucket"):
        missing.put(DATA)
    for look in (missing.read, missing.exists):
        with pytest.raises(StorageError, match="NoSuchBucket"):
            look(SHA)
    away = S3Kept("s3://b", s3_settings(f"http://127.0.0.1:{free_port()}"), cache=tmp_path)
    with pytest.raises(StorageError, match="Could not connect"):
        away.exists(SHA)


def test_the_settings_choose_the_storage(tmp_path: Path) -> None:
    local = open_kept(Settings(data_dir=tmp_path))
    assert isinstance(local, LocalKept)
    assert local.root == tmp_path / "dataset"
    remote = open_kept(Settings(data_dir=tmp_path, datasets="s3://bucket/labels"))
    assert isinstance(remote, S3Kept)
    assert remote.cache.root == tmp_path / "cache" / "dataset"
    with pytest.raises(ConfigurationError, match="names no bucket"):
        open_kept(Settings(data_dir=tmp_path, datasets="s3://"))


def test_a_copy_that_is_dropped_is_gone_with_its_cached_one(storage: Storage) -> None:
    storage.kept.put(DATA)
    other = storage.kept.put(b"another")
    storage.kept.path(SHA)
    assert storage.kept.drop(SHA)
    assert not storage.kept.exists(SHA)
    with pytest.raises(DatasetError, match="no copy"):
        storage.kept.path(SHA)
    assert not storage.kept.drop(SHA)
    assert storage.kept.read(other) == b"another"


def test_of_a_bucket_that_keeps_versions_every_version_is_dropped(s3_server: S3Server, tmp_path: Path) -> None:
    client, bucket = s3_server.client(), f"kept-{uuid.uuid4().hex[:8]}"
    client.create_bucket(Bucket=bucket)
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    kept = S3Kept(f"s3://{bucket}/kept", s3_settings(s3_server.url), cache=tmp_path / "cache")
    kept.put(DATA)
    client.delete_object(Bucket=bucket, Key=f"kept/{NAME}")
    kept.put(DATA)
    assert kept.drop(SHA)
    left = client.list_object_versions(Bucket=bucket)
    assert not left.get("Versions")
    assert not left.get("DeleteMarkers")


def denied(**_: object) -> tuple[AWSResponse, dict[str, object]]:
    """What a server answers to a user who may not do this."""
    error = {"Code": "AccessDenied", "Message": "Access Denied"}
    return AWSResponse("", 403, {}, None), {"Error": error, "ResponseMetadata": {"HTTPStatusCode": 403}}


@pytest.mark.parametrize("status", [None, "Enabled", "Suspended"])
def test_a_copy_is_not_called_dropped_where_versions_of_it_may_stay(
    s3_server: S3Server, tmp_path: Path, status: str | None
) -> None:
    client, bucket = s3_server.client(), f"kept-{uuid.uuid4().hex[:8]}"
    client.create_bucket(Bucket=bucket)
    kept = S3Kept(f"s3://{bucket}/kept", s3_settings(s3_server.url), cache=tmp_path / "cache")
    kept.blobs.client.meta.events.register("before-call.s3.ListObjectVersions", denied)
    if status is None:
        kept.put(DATA)
        kept.drop(SHA)
        assert not kept.exists(SHA)
        # Who may not ask whether the bucket keeps any is told so.
        kept.blobs.client.meta.events.register("before-call.s3.GetBucketVersioning", denied)
    else:
        client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": status})
    kept.put(DATA)
    with pytest.raises(StorageError, match="allow s3:ListBucketVersions and s3:DeleteObjectVersion") as raised:
        kept.drop(SHA)
    assert SHA not in str(raised.value), "what is logged names no image"
    assert kept.exists(SHA)


def test_a_server_that_knows_no_versions_keeps_none(s3_server: S3Server, tmp_path: Path) -> None:
    def unknown(**_: object) -> tuple[AWSResponse, dict[str, object]]:
        return AWSResponse("", 501, {}, None), {"Error": {"Code": "NotImplemented", "Message": ""}}

    client, bucket = s3_server.client(), f"kept-{uuid.uuid4().hex[:8]}"
    client.create_bucket(Bucket=bucket)
    kept = S3Kept(f"s3://{bucket}", s3_settings(s3_server.url), cache=tmp_path / "cache")
    kept.blobs.client.meta.events.register("before-call.s3.ListObjectVersions", unknown)
    kept.put(DATA)
    assert kept.drop(SHA)
    assert not kept.exists(SHA)
    assert not kept.drop(SHA), "there was none any more"


def test_who_may_not_list_a_bucket_without_versions_deletes_all_the_same(s3_server: S3Server, tmp_path: Path) -> None:
    """S3 answers a HEAD of a missing object with 403 to those who may not list: an erasure must still end."""
    client, bucket = s3_server.client(), f"kept-{uuid.uuid4().hex[:8]}"
    client.create_bucket(Bucket=bucket)
    kept = S3Kept(f"s3://{bucket}", s3_settings(s3_server.url), cache=tmp_path / "cache")
    for call in ("ListObjectVersions", "HeadObject"):
        kept.blobs.client.meta.events.register(f"before-call.s3.{call}", denied)
    kept.put(DATA)
    for _ in range(2):
        kept.drop(SHA)
        with pytest.raises(DatasetError, match="no copy"):
            kept.read(SHA)


def test_bytes_that_a_dead_writer_left_go_with_the_copy(tmp_path: Path) -> None:
    kept = LocalKept(tmp_path)
    kept.put(DATA)
    (tmp_path / ".incomplete" / ".left.1.partial").write_bytes(DATA)
    (tmp_path / ".incomplete" / ".other.2.partial").write_bytes(b"another's, being written")
    kept.drop(SHA)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".other.2.partial"]
