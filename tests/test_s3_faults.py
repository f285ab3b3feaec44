"""Whatever a server does to a download, it ends in time with bytes or with the right disposition."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from code_worker.errors import ImageRejectedError, SourceCredentialsError, TransientError
from code_worker.images.s3 import S3Source, _Download, parse_location
from code_worker.settings import S3Settings
from code_worker.types import RejectReason
from tests import fault_s3 as fault
from tests.fault_s3 import BODY, Behaviour, FaultServer
from tests.faults.rows import Seen, row
from tests.patience import polls

URI = "s3://bucket/a.jpg"
KEYS = {"access_key_id": "canary-key-id", "secret_access_key": "canary-secret"}


@contextmanager
def source_of(server: FaultServer, *, max_bytes: int = 10**6, **changes: Any) -> Iterator[S3Source]:
    settings = {
        "endpoint_url": server.url,
        "region": "us-east-1",
        "path_style": True,
        "buckets": ("bucket",),
        "connect_timeout_s": 120.0,
        "read_timeout_s": 120.0,
        "object_timeout_s": 120.0,
        "max_attempts": 2,
    }
    source = S3Source(S3Settings(**settings | KEYS | changes), max_bytes=max_bytes, connections=2)
    yield source
    source.close()


def ending(*script: Behaviour, **changes: Any) -> tuple[ImageRejectedError | TransientError, FaultServer]:
    with (
        FaultServer(*script) as server,
        source_of(server, **changes) as source,
        pytest.raises((ImageRejectedError, TransientError)) as caught,
    ):
        source.fetch(URI)
    return caught.value, server


def test_a_whole_body_is_read_and_its_connection_kept() -> None:
    with FaultServer(fault.whole()) as server, source_of(server) as source:
        for _ in range(3):
            fetched = source.fetch(URI)
            assert (fetched.data, fetched.etag) == (BODY, "0123456789abcdef")
        assert server.connections == 1
        assert server.requests[0]["x-amz-checksum-mode"] == "ENABLED"


@row("F20", injection="a body cut short twice", expected="read at the third try, of the same object")
def test_a_body_cut_short_twice_is_read_at_the_third_try_and_pinned(seen: Seen) -> None:
    with (
        FaultServer(fault.cut_short, fault.cut_short, fault.whole(x_amz_version_id="v1")) as server,
        source_of(server) as source,
    ):
        assert source.fetch(URI).data == BODY
    assert [request.get("if-match") for request in server.requests] == [None, fault.ETAG, fault.ETAG]
    assert ["versionId=v1" in request["path"] for request in server.requests] == [False, True, True]
    seen(requests=len(server.requests))


@row("F20", injection="a body cut short for ever", expected="3 tries, then fetch_truncated, to be tried again later")
def test_a_body_cut_short_for_ever_is_fetch_truncated(seen: Seen) -> None:
    error, server = ending(fault.cut_short, body_attempts=3)
    assert type(error) is TransientError
    assert error.reason is RejectReason.FETCH_TRUNCATED
    assert len(server.requests) == 3
    seen(requests=len(server.requests), reason=error.reason)


@row("F19", injection="a connection reset in the body", expected="fetch_truncated, to be tried again later")
def test_a_connection_reset_in_the_body_is_fetch_truncated(seen: Seen) -> None:
    error, server = ending(fault.reset)
    assert type(error) is TransientError
    assert error.reason is RejectReason.FETCH_TRUNCATED
    seen(requests=len(server.requests), reason=error.reason)


@row("F23", injection="an object replaced between two tries of its body", expected="content_changed")
def test_an_object_replaced_between_two_tries_is_content_changed(seen: Seen) -> None:
    error, server = ending(fault.cut_short, fault.error(412, "PreconditionFailed"))
    assert type(error) is ImageRejectedError
    assert error.reason is RejectReason.CONTENT_CHANGED
    assert len(server.requests) == 2
    seen(requests=len(server.requests), reason=error.reason)


@row("F17", injection="503 twice, then the object", expected="read, at most 3 requests")
def test_two_answers_of_503_are_tried_again(seen: Seen) -> None:
    slow = fault.error(503, "SlowDown")
    with FaultServer(slow, slow, fault.whole()) as server, source_of(server, max_attempts=3) as source:
        assert source.fetch(URI).data == BODY
    assert len(server.requests) == 3
    seen(requests=len(server.requests))


def test_503_for_ever_is_fetch_failed() -> None:
    error, server = ending(fault.error(503, "SlowDown"))
    assert type(error) is TransientError
    assert error.reason is RejectReason.FETCH_FAILED
    assert len(server.requests) == 2


def test_a_page_of_a_proxy_is_fetch_failed() -> None:
    error, _ = ending(fault.page(502, "<html>Bad gateway</html>"))
    assert type(error) is TransientError
    assert error.reason is RejectReason.FETCH_FAILED


@row("F19", injection="a server that does not answer", expected="fetch_timeout, to be tried again later")
def test_a_server_that_does_not_answer_is_fetch_timeout(seen: Seen) -> None:
    error, server = ending(fault.hang, read_timeout_s=0.3)
    assert type(error) is TransientError
    assert error.reason is RejectReason.FETCH_TIMEOUT
    assert len(server.requests) == 2
    seen(requests=len(server.requests), reason=error.reason)


def test_a_server_that_stops_in_the_body_is_fetch_timeout() -> None:
    error, server = ending(fault.hang_in_body, read_timeout_s=0.3, body_attempts=2)
    assert type(error) is TransientError
    assert error.reason is RejectReason.FETCH_TIMEOUT
    assert len(server.requests) == 2


def fetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fetch"]


@row(
    "F19",
    injection="a server that drips for ever, {drip.__name__}; object_timeout_s 0.5 of the usual 30",
    expected="left at the wall-clock limit, fetch_timeout",
)
@pytest.mark.parametrize("drip", [fault.drip_body, fault.drip_header])
def test_a_dripping_server_is_left_when_time_is_up(drip: Behaviour, seen: Seen) -> None:
    began = time.monotonic()
    # The body would take 5,000 s at this pace and no single read is late: only the wall clock can end it.
    error, server = ending(drip, object_timeout_s=0.5)
    assert type(error) is TransientError
    assert error.reason is RejectReason.FETCH_TIMEOUT
    assert "not read within 0.5 s" in str(error)
    assert len(server.requests) <= 1
    seen(left_after_s=time.monotonic() - began, reason=error.reason)


def test_the_thread_of_a_dripping_body_ends_while_the_server_drips_on() -> None:
    # One of a test before may try again for a while, and meet a server that has its port now.
    earlier = set(fetch_threads())
    with FaultServer(fault.drip_body) as server, source_of(server, object_timeout_s=0.3) as source:
        with pytest.raises(TransientError):
            source.fetch(URI)
        for _ in polls(every_s=0.01):
            if earlier.issuperset(fetch_threads()):
                break
        assert earlier.issuperset(fetch_threads())
        assert len(server.requests) <= 1


def test_downloads_that_hang_do_not_collect_without_end() -> None:
    with FaultServer(fault.drip_header) as server, source_of(server, object_timeout_s=0.02) as source:
        for _ in range(8):
            with pytest.raises(TransientError, match=r"not read within"):
                source.fetch(URI)
        with pytest.raises(TransientError, match=r"too many downloads hang"):
            source.fetch(URI)


def test_an_endless_body_is_cut_at_the_size_limit() -> None:
    error, server = ending(fault.endless, max_bytes=100_000)
    assert type(error) is ImageRejectedError
    assert error.reason is RejectReason.TOO_LARGE_BYTES
    assert len(server.requests) == 1


def test_a_length_over_the_limit_is_refused_before_the_body_is_read() -> None:
    def announce(handler: Any) -> None:
        handler.head(200, {"Content-Length": str(10**12), "ETag": fault.ETAG})
        handler.wait(120)

    error, server = ending(announce)
    assert type(error) is ImageRejectedError
    assert error.reason is RejectReason.TOO_LARGE_BYTES
    assert len(server.requests) == 1


@row("F21", injection="a byte changed on the way, for ever", expected="checksum_mismatch, never a wrong verdict")
def test_a_body_that_differs_from_its_checksum_is_checksum_mismatch(seen: Seen) -> None:
    damaged = b"\xff" + BODY[1:]
    error, server = ending(fault.checksummed(damaged, of=BODY), body_attempts=2)
    assert type(error) is TransientError
    assert error.reason is RejectReason.CHECKSUM_MISMATCH
    assert len(server.requests) == 2
    seen(requests=len(server.requests), reason=error.reason)


def test_damage_on_the_way_is_cured_by_another_try() -> None:
    damaged = fault.checksummed(b"\xff" + BODY[1:], of=BODY)
    with FaultServer(damaged, fault.checksummed(BODY, of=BODY)) as server, source_of(server) as source:
        assert source.fetch(URI).data == BODY


def test_without_checksum_mode_none_is_asked_for_and_none_compared() -> None:
    damaged = b"\xff" + BODY[1:]
    with (
        FaultServer(fault.checksummed(damaged, of=BODY)) as server,
        source_of(server, checksum_mode=False) as source,
    ):
        assert source.fetch(URI).data == damaged
    assert "x-amz-checksum-mode" not in server.requests[0]


@row("F22", injection="the object itself is refused, as {reason}", expected="a terminal reason, exactly 1 request")
@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (fault.error(404, "NoSuchKey"), RejectReason.NOT_FOUND),
        (fault.error(403, "AccessDenied"), RejectReason.ACCESS_DENIED),
        (fault.page(403, "forbidden"), RejectReason.ACCESS_DENIED),
        (fault.error(403, "InvalidObjectState"), RejectReason.ARCHIVED),
        (fault.error(405, "MethodNotAllowed"), RejectReason.NOT_FOUND),
    ],
)
def test_what_the_object_itself_is_refused_for_is_asked_once(
    behaviour: Behaviour, reason: RejectReason, seen: Seen
) -> None:
    error, server = ending(behaviour)
    assert type(error) is ImageRejectedError
    assert error.reason is reason
    assert len(server.requests) == 1
    seen(requests=len(server.requests), reason=error.reason)


@row("F22", injection="what no object of the bucket can pass: {code}", expected="the source pauses, with a hint")
@pytest.mark.parametrize(
    ("code", "status", "hint"),
    [
        ("InvalidArgument", 400, "CODE_WORKER_S3__CHECKSUM_MODE=false"),
        ("NotImplemented", 501, "CODE_WORKER_S3__CHECKSUM_MODE=false"),
        ("NoSuchBucket", 404, "__PATH_STYLE"),
        ("InvalidBucketName", 400, "__PATH_STYLE"),
        ("IllegalLocationConstraintException", 400, "__REGION"),
    ],
)
def test_what_no_object_of_the_bucket_can_pass_blames_the_source(
    code: str, status: int, hint: str, seen: Seen
) -> None:
    error, server = ending(fault.error(status, code))
    assert isinstance(error, SourceCredentialsError)
    assert error.source == "s3://bucket"
    assert hint in error.detail
    seen(requests=len(server.requests), reason=error.reason)


@pytest.mark.parametrize(
    ("script", "blamed"),
    [
        ([fault.error(400, "InvalidArgument", argument_name="versionId")], "image"),
        ([fault.error(400, "InvalidArgument", argument_name="x-amz-checksum-mode")], "source"),
        ([fault.error(400, "InvalidArgument"), fault.whole()], "image"),
        ([fault.error(400, "InvalidArgument"), fault.error(404, "NoSuchKey")], "image"),
        ([fault.error(400, "InvalidArgument"), fault.error(400, "InvalidArgument")], "source"),
    ],
)
def test_a_version_that_cannot_be_is_told_from_a_request_that_nobody_may_make(
    script: list[Behaviour], blamed: str
) -> None:
    with FaultServer(*script) as server, source_of(server) as source:
        kind = ImageRejectedError if blamed == "image" else SourceCredentialsError
        with pytest.raises(kind) as raised:
            source.fetch(f"{URI}?versionId=odd")
    assert len(server.requests) == len(script)
    if blamed == "image":
        assert raised.value.reason is RejectReason.NOT_FOUND


def test_hurrying_a_download_whose_connection_is_gone_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with FaultServer(fault.whole()) as server, source_of(server) as source:
        client = source._shared_client(parse_location(URI))
        download = _Download(client, parse_location(URI), source._settings, 10**6, source._slots)
        download._body = client.get_object(Bucket="bucket", Key="a.jpg")["Body"]
        download._body.read()
        download._body.close()
        download._hurry()
    assert not caplog.records


def test_a_denial_says_that_the_object_may_be_missing() -> None:
    error, _ = ending(fault.error(403, "AccessDenied"))
    assert "or missing" in str(error)


@row(
    "F22",
    injection="{status} {code}: what no object of the bucket can pass",
    expected="the source pauses; no object is blamed",
)
@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "ExpiredToken"),
        (403, "InvalidAccessKeyId"),
        (403, "SignatureDoesNotMatch"),
        (403, "RequestTimeTooSkewed"),
        (400, "InvalidToken"),
        (301, "PermanentRedirect"),
        (400, "AuthorizationHeaderMalformed"),
    ],
)
def test_what_no_object_of_the_bucket_can_pass_pauses_the_source(status: int, code: str, seen: Seen) -> None:
    error, server = ending(fault.error(status, code))
    assert isinstance(error, SourceCredentialsError)
    assert error.source == "s3://bucket"
    assert code in str(error)
    seen(requests=len(server.requests), pauses=error.source)


def test_a_redirect_to_another_place_is_not_followed() -> None:
    with FaultServer(fault.whole()) as elsewhere:
        error, _ = ending(fault.error(301, "PermanentRedirect", Location=f"{elsewhere.url}/bucket/a.jpg"))
        assert isinstance(error, SourceCredentialsError)
        assert elsewhere.requests == []


def test_a_closed_port_is_fetch_failed() -> None:
    with FaultServer(fault.whole()) as server:
        pass
    with source_of(server) as source, pytest.raises(TransientError) as caught:
        source.fetch(URI)
    assert caught.value.reason is RejectReason.FETCH_FAILED


def test_listing_faults_are_translated_too() -> None:
    with FaultServer(fault.whole(b"<not XML")) as server, source_of(server) as source:
        with pytest.raises(TransientError) as caught:
            list(source.list("s3://bucket/"))
        assert caught.value.reason is RejectReason.FETCH_FAILED
    expired = fault.error(403, "ExpiredToken")
    with FaultServer(expired) as server, source_of(server) as source, pytest.raises(SourceCredentialsError):
        list(source.list("s3://bucket/"))


def _page(key: str, rest: str) -> Behaviour:
    return fault.whole(
        f"<ListBucketResult><Contents><Key>{key}</Key></Contents>{rest}</ListBucketResult>".encode(),
        Content_Type="application/xml",
    )


def test_listing_goes_on_to_the_last_page() -> None:
    first = _page("a.jpg", "<IsTruncated>true</IsTruncated><NextContinuationToken>go</NextContinuationToken>")
    with FaultServer(first, _page("b.jpg", "")) as server, source_of(server) as source:
        assert list(source.list("s3://bucket/")) == ["s3://bucket/a.jpg", "s3://bucket/b.jpg"]
    assert "continuation-token=go" in server.requests[1]["path"]


def test_errors_carry_no_secrets() -> None:
    quoting = fault.error(
        403, "SignatureDoesNotMatch", "X-Amz-Signature=canary-signature AWSAccessKeyId=canary-key-id"
    )
    odd_code = fault.error(400, "canary code?X-Amz-Signature=canary-signature")
    pasted = f"{URI}?X-Amz-Credential=canary-key-id&X-Amz-Signature=canary-signature"
    for script in (quoting, odd_code, fault.hang, fault.cut_short):
        with (
            FaultServer(script) as server,
            source_of(server, read_timeout_s=0.3) as source,
            pytest.raises(TransientError) as caught,
        ):
            source.fetch(pasted)
        assert URI in str(caught.value)
        assert "canary" not in "".join(traceback.format_exception(caught.value))
