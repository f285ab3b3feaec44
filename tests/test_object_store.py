"""Object stores of every vendor are read and written with one configuration."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from code_worker.blobs.s3 import S3Blobs
from code_worker.data.kept_copies import S3Kept
from code_worker.errors import ArtifactError, StorageError
from code_worker.images.s3 import S3Source
from code_worker.releases.artifacts import S3Artifacts
from code_worker.releases.manifest import read_manifest, release_id
from code_worker.settings import S3Settings
from tests.release_parts import write_plain_release
from tests.vendor_s3 import VendorS3

DATA = b"bytes of an image"


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[VendorS3]:
    with VendorS3(request.param) as running:
        yield running


def settings(server: VendorS3, **changes: Any) -> S3Settings:
    plain: dict[str, Any] = {
        "endpoint_url": server.url,
        "region": "us-east-1",
        "access_key_id": SecretStr("id"),
        "secret_access_key": SecretStr("secret"),
        "path_style": True,
        "max_attempts": 1,
        "connect_timeout_s": 60.0,
        "read_timeout_s": 60.0,
        "object_timeout_s": 120.0,
    }
    return S3Settings(**plain | changes)


@pytest.fixture
def release(tmp_path: Path) -> Path:
    write_plain_release(tmp_path / "made")
    return tmp_path / "made"


vendors = pytest.mark.parametrize("server", ["aws", "b2", "r2"], indirect=True)
strict = pytest.mark.parametrize("server", ["b2", "r2"], indirect=True)


@vendors
def test_releases_are_written_and_read_without_checksums(server: VendorS3, release: Path, tmp_path: Path) -> None:
    store = S3Artifacts("s3://models/a", settings(server, checksum_mode=False), cache=tmp_path / "cache")
    id_ = release_id(read_manifest(release)[1])
    assert store.put(release) == f"s3://models/a/{id_}"
    store.put_signature(id_, b"signed")
    assert (store.list(), store.exists(id_), store.signature(id_)) == ([id_], True, b"signed")
    assert read_manifest(store.fetch(id_)) == read_manifest(release)
    assert store.drop(id_)
    assert server.objects == {}
    assert not [name for _, _, sent in server.requests for name in sent if "checksum" in name or "trailer" in name]


@vendors
def test_copies_of_images_are_written_and_read_without_checksums(server: VendorS3, tmp_path: Path) -> None:
    kept = S3Kept("s3://kept/a", settings(server, checksum_mode=False), cache=tmp_path / "cache")
    sha256 = kept.put(DATA)
    assert (kept.exists(sha256), kept.read(sha256), kept.path(sha256).read_bytes()) == (True, DATA, DATA)
    kept.drop(sha256)
    assert not kept.exists(sha256)


@vendors
def test_images_are_read_without_checksums(server: VendorS3) -> None:
    server.objects["/uploads/a.jpg"] = DATA
    source = S3Source(settings(server, checksum_mode=False, buckets=("uploads",)), max_bytes=1000, connections=2)
    with closing(source):
        assert source.fetch("s3://uploads/a.jpg").data == DATA
        assert list(source.list("s3://uploads/")) == ["s3://uploads/a.jpg"]


@strict
def test_a_server_that_refuses_checksums_is_written_to_only_without(
    server: VendorS3, release: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="cannot write release"):
        S3Artifacts("s3://models", settings(server), cache=tmp_path / "cache").put(release)
    with pytest.raises(StorageError, match="cannot keep a copy"):
        S3Kept("s3://kept", settings(server), cache=tmp_path / "cache").put(DATA)
    assert server.objects == {}


@pytest.mark.parametrize("server", ["aws"], indirect=True)
def test_checksums_are_sent_and_asked_for_unless_told(server: VendorS3, tmp_path: Path) -> None:
    kept = S3Kept("s3://kept", settings(server), cache=tmp_path / "cache")
    kept.read(kept.put(DATA))
    (put,), (got,) = server.headers("PUT", "kept"), server.headers("GET", "kept")
    assert put["x-amz-sdk-checksum-algorithm"] == "CRC32"
    assert got["x-amz-checksum-mode"] == "ENABLED"


@pytest.mark.parametrize("server", ["aws"], indirect=True)
def test_public_buckets_are_asked_without_a_signature_and_others_with_one(server: VendorS3, tmp_path: Path) -> None:
    for bucket in ("public", "ours"):
        server.objects[f"/{bucket}/a.jpg"] = DATA
    chosen = settings(server, buckets=("public", "ours"), anonymous=("s3://public",))
    with closing(S3Source(chosen, max_bytes=1000, connections=2)) as source:
        for bucket in ("public", "ours", "public"):
            assert source.fetch(f"s3://{bucket}/a.jpg").data == DATA
        assert list(source.list("s3://public/")) == ["s3://public/a.jpg"]
    assert not [sent for sent in server.headers("GET", "public") if "authorization" in sent]
    assert all("authorization" in sent for sent in server.headers("GET", "ours"))
    keyless = settings(server, anonymous=("models",), access_key_id=None, secret_access_key=None)
    assert S3Artifacts("s3://models", keyless, cache=tmp_path / "cache").list() == []


@pytest.mark.parametrize("server", ["aws"], indirect=True)
def test_where_the_reader_pays_every_request_says_that_we_do(server: VendorS3, tmp_path: Path) -> None:
    for bucket in ("dear", "free"):
        server.objects[f"/{bucket}/a.jpg"] = DATA
    chosen = settings(server, buckets=("dear", "free"), requester_pays=("dear",))
    with closing(S3Source(chosen, max_bytes=1000, connections=2)) as source:
        for bucket in ("dear", "free"):
            source.fetch(f"s3://{bucket}/a.jpg")
            list(source.list(f"s3://{bucket}/"))
    kept = S3Kept("s3://dear", chosen, cache=tmp_path / "cache")
    kept.exists(kept.put(DATA))
    for method, number in (("GET", 2), ("PUT", 1), ("HEAD", 1)):
        sent = server.headers(method, "dear")
        assert [one.get("x-amz-request-payer") for one in sent] == ["requester"] * number
    assert not [one for one in server.headers("GET", "free") if "x-amz-request-payer" in one]


def test_threads_that_begin_at_once_share_one_client() -> None:
    store = S3Blobs("s3://models", S3Settings(region="us-east-1"), "artifacts")
    begin = threading.Barrier(4)

    def client() -> object:
        begin.wait()
        return store.client

    with ThreadPoolExecutor(4) as threads:
        first, *others = (each.result() for each in [threads.submit(client) for _ in range(4)])
    assert all(each is first for each in others)
