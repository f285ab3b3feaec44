"""Objects are read over the S3 protocol from allowed buckets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest

from code_worker.errors import ImageRejectedError, SourceCredentialsError
from code_worker.images.listing import NO_IMAGE, OTHER_KIND, PREFIX_BYTES, LeftOut
from code_worker.images.s3 import Location, S3Source, parse_location
from code_worker.images.source import Sources, images_under
from code_worker.settings import LimitSettings, S3Settings, Settings
from code_worker.types import Fetched, RejectReason
from tests.fault_s3 import FaultServer, whole
from tests.faults.rows import Seen, row
from tests.servers import S3Server

MakeSources = Callable[..., Sources]


@pytest.fixture
def make_sources(s3_server: S3Server) -> Iterator[MakeSources]:
    made: list[Sources] = []

    def make(*buckets: str, max_bytes: int = 10_000, **changes: Any) -> Sources:
        settings = {
            "endpoint_url": s3_server.url,
            "region": "us-east-1",
            "access_key_id": s3_server.access_key_id,
            "secret_access_key": s3_server.secret_access_key,
            "path_style": True,
            "buckets": buckets,
        }
        sources = Sources(
            Settings(s3=S3Settings(**settings | changes), limits=LimitSettings(max_bytes=max_bytes))  # type: ignore[arg-type]
        )
        made.append(sources)
        return sources

    yield make
    for sources in made:
        sources.close()


@pytest.fixture
def bucket(s3_server: S3Server) -> Iterator[str]:
    """A versioned bucket of the test's own."""
    name = f"b-{uuid4().hex}"
    client = s3_server.client()
    client.create_bucket(Bucket=name)
    client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    yield name
    client.close()


def put(server: S3Server, bucket: str, key: str, body: bytes, **options: Any) -> dict[str, Any]:
    client = server.client()
    try:
        return dict(client.put_object(Bucket=bucket, Key=key, Body=body, **options))
    finally:
        client.close()


def refusal(sources: Sources, uri: str) -> RejectReason:
    with pytest.raises(ImageRejectedError) as caught:
        sources.fetch(uri)
    return caught.value.reason


@row("F23", injection="an object replaced after its version was enqueued", expected="the bytes of that version")
def test_an_object_comes_with_its_etag_and_version(
    s3_server: S3Server, bucket: str, make_sources: MakeSources, seen: Seen
) -> None:
    first = put(s3_server, bucket, "a.jpg", b"first")
    second = put(s3_server, bucket, "a.jpg", b"second")
    sources = make_sources(bucket)
    assert sources.fetch(f"s3://{bucket}/a.jpg") == Fetched(b"second", second["ETag"].strip('"'), second["VersionId"])
    old = sources.fetch(f"s3://{bucket}/a.jpg?versionId={first['VersionId']}")
    assert (old.data, old.version_id) == (b"first", first["VersionId"])
    seen(read=old.data.decode(), lies_there=sources.fetch(f"s3://{bucket}/a.jpg").data.decode())


@pytest.mark.parametrize(
    "key",
    ["with space.jpg", "ünïcode/漢字.png", "a?b=c#d%41+e&f.jpg", "q?versionId=7", "//double//slash", "x" * 1024],
)
def test_a_key_is_taken_as_it_is(s3_server: S3Server, bucket: str, make_sources: MakeSources, key: str) -> None:
    put(s3_server, bucket, key, b"odd")
    sources = make_sources(bucket)
    listed = list(sources.list(f"s3://{bucket}"))
    assert listed == [f"s3://{bucket}/{key}" + ("?versionId=" if "versionId" in key else "")]
    assert sources.fetch(listed[0]).data == b"odd"


@pytest.mark.parametrize(
    ("uri", "location"),
    [
        ("s3://b/k", Location("b", "k")),
        ("s3://b/k?versionId=abc.DEF_1", Location("b", "k", "abc.DEF_1")),
        ("s3://b/k?versionId=null", Location("b", "k", "null")),
        ("s3://b/k?versionId=", Location("b", "k")),
        ("s3://b/k?versionId=1?versionId=", Location("b", "k?versionId=1")),
        ("s3://b/k?versionId=1?versionId=2", Location("b", "k?versionId=1", "2")),
        ("s3://b/k?versionId=1&x=2", Location("b", "k?versionId=1&x=2")),
        ("s3://b/line\nbreak%20#?.jpg\n", Location("b", "line\nbreak%20#?.jpg\n")),
    ],
)
def test_only_a_trailing_version_is_special(uri: str, location: Location) -> None:
    assert parse_location(uri) == location


@pytest.mark.parametrize(
    "uri",
    [
        "s3://",
        "s3:///key",
        "s3:bucket/key",
        "s3://b/../x",
        "s3://b/a/../../x",
        "s3://b/./x",
        "s3://b/..",
        "s3://b/\ud800",
    ],
)
def test_what_is_no_object_of_a_bucket_is_not_allowed(uri: str, make_sources: MakeSources) -> None:
    assert refusal(make_sources("b"), uri) is RejectReason.SOURCE_NOT_ALLOWED


@pytest.mark.parametrize(
    ("entries", "uri", "allowed"),
    [
        ((), "s3://one/a", False),
        (("one",), "s3://one/a", True),
        (("one",), "s3://one-more/a", False),
        (("one",), "s3://One/a", False),
        (("one/up",), "s3://one/up/a", True),
        (("one/up/",), "s3://one/up/a", True),
        (("one/up",), "s3://one/upper/a", False),
        (("one/up",), "s3://one/a", False),
        (("one/up", "two"), "s3://two/a", True),
        (("one",), "s3://one", False),
        (("one",), "s3://one/", False),
    ],
)
def test_an_object_outside_the_list_is_refused_without_a_request(
    entries: tuple[str, ...], uri: str, allowed: bool
) -> None:
    # Nothing listens there: a request would end as a TransientError.
    source = S3Source(
        S3Settings(endpoint_url="http://127.0.0.1:9", buckets=entries, access_key_id="a"),  # type: ignore[arg-type]
        max_bytes=1,
        connections=1,
    )
    expected = SourceCredentialsError if allowed else ImageRejectedError  # half a pair of keys, once a client is due
    with pytest.raises(expected) as caught:
        source.fetch(uri)
    if not allowed:
        assert caught.value.reason is RejectReason.SOURCE_NOT_ALLOWED  # type: ignore[attr-defined]


def test_missing_keys_and_versions_are_not_found(s3_server: S3Server, bucket: str, make_sources: MakeSources) -> None:
    put(s3_server, bucket, "a", b"x")
    client = s3_server.client()
    put(s3_server, bucket, "gone", b"x")
    client.delete_object(Bucket=bucket, Key="gone")
    client.close()
    sources = make_sources(bucket)
    for uri in (f"s3://{bucket}/absent", f"s3://{bucket}/gone", f"s3://{bucket}/a?versionId=0000000000"):
        assert refusal(sources, uri) is RejectReason.NOT_FOUND


def test_an_archived_object_is_archived(s3_server: S3Server, bucket: str, make_sources: MakeSources) -> None:
    put(s3_server, bucket, "cold", b"x", StorageClass="GLACIER")
    assert refusal(make_sources(bucket), f"s3://{bucket}/cold") is RejectReason.ARCHIVED


def test_an_object_over_the_limit_is_too_large(s3_server: S3Server, bucket: str, make_sources: MakeSources) -> None:
    put(s3_server, bucket, "full", bytes(10_000))
    put(s3_server, bucket, "over", bytes(10_001))
    sources = make_sources(bucket)
    assert len(sources.fetch(f"s3://{bucket}/full").data) == 10_000
    assert refusal(sources, f"s3://{bucket}/over") is RejectReason.TOO_LARGE_BYTES


def test_the_first_bytes_of_an_object_are_read_whatever_its_size(
    s3_server: S3Server, bucket: str, make_sources: MakeSources
) -> None:
    for key, body in (("large", b"abc" * 1000), ("short", b"ab"), ("empty", b"")):
        put(s3_server, bucket, key, body)
    sources = make_sources(bucket, max_bytes=100)
    found = {key: sources.peek(f"s3://{bucket}/{key}", 4) for key in ("large", "short", "empty")}
    assert found == {"large": b"abca", "short": b"ab", "empty": b""}
    for uri, reason in (
        (f"s3://{bucket}/none", RejectReason.NOT_FOUND),
        ("s3://no/a", RejectReason.SOURCE_NOT_ALLOWED),
    ):
        with pytest.raises(ImageRejectedError) as caught:
            sources.peek(uri, 4)
        assert caught.value.reason is reason


def test_threads_share_one_client(s3_server: S3Server, bucket: str, make_sources: MakeSources) -> None:
    for n in range(20):
        put(s3_server, bucket, f"{n:02}", b"%d" % n)
    sources = make_sources(bucket)
    barrier = threading.Barrier(8)

    def fetch(n: int) -> bytes:
        if n < 8:
            barrier.wait(120)  # all eight ask for the client at once
        return sources.fetch(f"s3://{bucket}/{n:02}").data

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(fetch, range(20))) == [b"%d" % n for n in range(20)]


def test_sources_can_be_used_again_after_close(s3_server: S3Server, bucket: str, make_sources: MakeSources) -> None:
    put(s3_server, bucket, "a", b"x")
    sources = make_sources(bucket)
    for _ in range(2):
        assert sources.fetch(f"s3://{bucket}/a").data == b"x"
        sources.close()


def test_listing_leaves_out_directories_and_what_is_not_allowed(
    s3_server: S3Server, bucket: str, make_sources: MakeSources
) -> None:
    for key in ("up/b.jpg", "up/a/", "up/a/1.jpg", "up/", "upper.jpg", "other.jpg"):
        put(s3_server, bucket, key, b"")
    everything = make_sources(bucket)
    below = [f"s3://{bucket}/up/a/1.jpg", f"s3://{bucket}/up/b.jpg"]
    assert list(everything.list(f"s3://{bucket}/up/")) == below
    assert list(everything.list(f"s3://{bucket}/up")) == [*below, f"s3://{bucket}/upper.jpg"]
    assert len(list(everything.list(f"s3://{bucket}"))) == 4
    assert list(make_sources(f"{bucket}/up").list(f"s3://{bucket}/up")) == below


def test_listing_outside_the_list_is_refused_at_once(bucket: str, make_sources: MakeSources) -> None:
    sources = make_sources(f"{bucket}/up")
    for prefix in (f"s3://{bucket}", f"s3://{bucket}/u", f"s3://{bucket}/up/../x", "s3://elsewhere/"):
        with pytest.raises(ImageRejectedError) as caught:
            sources.list(prefix)
        assert caught.value.reason is RejectReason.SOURCE_NOT_ALLOWED


def test_a_missing_bucket_blames_no_object(make_sources: MakeSources) -> None:
    sources = make_sources("no-such-bucket")
    for ask in (lambda: sources.fetch("s3://no-such-bucket/a"), lambda: list(sources.list("s3://no-such-bucket/a"))):
        with pytest.raises(SourceCredentialsError, match="no such bucket") as caught:
            ask()
        assert caught.value.source == "s3://no-such-bucket"


@pytest.mark.parametrize(
    "changes",
    [
        {"access_key_id": None, "secret_access_key": None},
        {"secret_access_key": None},
        {"region": "no such region"},
    ],
)
def test_settings_that_cannot_work_pause_the_source(make_sources: MakeSources, changes: dict[str, Any]) -> None:
    with pytest.raises(SourceCredentialsError) as caught:
        make_sources("bucket", **changes).fetch("s3://bucket/a")
    assert caught.value.source == "s3://bucket"


def test_objects_that_cannot_be_images_by_name_or_size_take_no_request(make_sources: MakeSources) -> None:
    sizes = {
        "in/a.JPG": 0,
        "in/b": 17,
        "in/c.img": 5000,
        "in/d": 16,
        "in/e.json": 5000,
        "in/f.TXT": 5000,
        "in/g.jpg.zip": 5000,
        "in/h.png.xml": 5000,
        "in/.hidden": 5000,
        "in/empty": 0,
    }
    entries = "".join(f"<Contents><Key>{key}</Key><Size>{size}</Size></Contents>" for key, size in sizes.items())
    answer = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()
    left_out = LeftOut()
    with FaultServer(whole(answer), whole(b"\x89PNG\r\n\x1a\n" + bytes(100))) as server:
        sources = make_sources("b", endpoint_url=server.url)
        found = list(images_under(sources, "s3://b/in/", left_out))
    assert found == ["s3://b/in/a.JPG", "s3://b/in/b", "s3://b/in/c.img"]
    assert sorted(one["path"] for one in server.requests[1:]) == ["/b/in/b", "/b/in/c.img"]
    assert {one["range"] for one in server.requests[1:]} == {f"bytes=0-{PREFIX_BYTES - 1}"}
    passed_over = {
        reason: sorted(name.removeprefix("s3://b/in/") for name in names) for reason, _, names in left_out.passed_over
    }
    assert passed_over == {
        "hidden": [".hidden"],
        NO_IMAGE: ["d", "empty"],
        OTHER_KIND: ["e.json", "f.TXT", "g.jpg.zip", "h.png.xml"],
    }
