"""The doctor's look at buckets: it asks what a worker asks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from code_worker.doctor import examine
from code_worker.doctor.check import Check, Status
from tests import fault_s3 as fault
from tests.fault_s3 import Behaviour, FaultServer
from tests.servers import S3Server

Find = Callable[..., list[Check]]


@pytest.fixture
def find(tmp_path: Path) -> Find:
    return lambda **overrides: list(examine(["s3"], data_dir=tmp_path, **overrides))


def test_each_bucket_is_tried(find: Find, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CODE_WORKER_S3__BUCKETS", '["doctor-there", "doctor-gone"]')
    s3_server.client().create_bucket(Bucket="doctor-there")
    there, gone = find()
    assert there == Check("s3", Status.OK, "s3://doctor-there can be listed; it holds nothing to read")
    assert gone.status is Status.FAIL
    assert "s3://doctor-gone" in gone.message
    assert "the server has no such bucket" in gone.message
    s3_server.client().put_object(Bucket="doctor-there", Key="a.jpg", Body=b"no image, but bytes")
    assert find()[0] == Check("s3", Status.OK, "s3://doctor-there can be listed and read")


LISTED = b"""<?xml version="1.0"?><ListBucketResult><Name>b</Name><IsTruncated>false</IsTruncated>
<Contents><Key>a.jpg</Key><Size>3</Size></Contents></ListBucketResult>"""


@pytest.mark.parametrize(
    ("listing", "reading", "status", "text"),
    [
        (fault.whole(LISTED), fault.whole(b"abc"), Status.OK, "can be listed and read"),
        (
            fault.whole(LISTED),
            fault.error(400, "InvalidArgument"),
            Status.FAIL,
            "CODE_WORKER_S3__CHECKSUM_MODE=false",
        ),
        (fault.whole(LISTED), fault.error(403, "AccessDenied"), Status.FAIL, "may be listed, not read"),
        (fault.error(403, "AccessDenied"), fault.error(404, "NoSuchKey"), Status.WARN, "may not be listed"),
        (fault.error(403, "AccessDenied"), fault.error(403, "AccessDenied"), Status.WARN, "may not be listed"),
        (fault.error(403, "AccessDenied"), fault.error(501, "NotImplemented"), Status.FAIL, "NotImplemented"),
    ],
)
def test_a_bucket_is_asked_what_a_worker_asks(
    find: Find, listing: Behaviour, reading: Behaviour, status: Status, text: str
) -> None:
    with FaultServer(listing, reading) as server:
        settings = {"endpoint_url": server.url, "region": "us-east-1", "path_style": True, "buckets": ["b"]}
        (found,) = find(s3={**settings, "access_key_id": "key", "secret_access_key": "secret"})
    assert found.status is status
    assert text in found.message
    assert server.requests[1]["x-amz-checksum-mode"] == "ENABLED", "as a worker's request"
