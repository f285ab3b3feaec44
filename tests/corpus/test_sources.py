"""Nobody can be sent where images may not come from: not by a name, a link, a redirect or an odd address."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from code_worker.images.source import Sources
from code_worker.moderation.judge import Judge
from code_worker.moderation.policy import PolicyBook
from code_worker.moderation.pool import PriorityPool
from code_worker.moderation.scan import scan
from code_worker.settings import FileSettings, S3Settings, Settings
from tests import fault_s3 as fault
from tests.corpus.sources import FOREIGN_KEY, LONGEST_KEY, prepare, sources
from tests.corpus.table import expected
from tests.corpus.test_files import end_of
from tests.fault_s3 import FaultServer
from tests.moderation.doubles import runtime
from tests.servers import S3Server

BUCKET = "corpus-sources"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Host names that anybody looked up meanwhile."""
    hosts: list[str] = []
    look_up = socket.getaddrinfo

    def remember(host: Any, *arguments: Any, **options: Any) -> Any:
        hosts.append(str(host))
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", remember)
    return hosts


def test_each_source_ends_as_listed_and_nobody_is_visited(
    tmp_path: Path, s3_server: S3Server, asked: list[str]
) -> None:
    root = prepare(tmp_path)
    client = s3_server.client()
    client.create_bucket(Bucket=BUCKET)
    for key in ("a.jpg", FOREIGN_KEY, LONGEST_KEY):
        client.put_object(Bucket=BUCKET, Key=key, Body=(root / "a.jpg").read_bytes())
    asked.clear()
    s3 = S3Settings(
        endpoint_url=s3_server.url,
        region="us-east-1",
        access_key_id=s3_server.access_key_id,  # type: ignore[arg-type]  # pydantic makes it a secret
        secret_access_key=s3_server.secret_access_key,  # type: ignore[arg-type]  # as above
        path_style=True,
        buckets=(BUCKET, "bucket-that-was-deleted"),
    )
    settings = Settings(files=FileSettings(roots=(root,)), s3=s3)
    redirect = fault.error(302, "Found", Location="http://10.0.0.1/")
    with FaultServer(redirect) as web, PriorityPool(4) as pool:
        named = sources(root, BUCKET, web.url.removeprefix("http://"))
        judge = Judge(sources=Sources(settings), pool=pool, limits=settings.limits)
        verdicts = list(scan(named.values(), judge, runtime(), PolicyBook()))
        assert web.connections == 0
    assert set(named) == set(expected("source"))
    ends = {name: end_of(verdict) for name, verdict in zip(named, verdicts, strict=True)}
    assert not {name: end for name, end in ends.items() if end not in expected("source")[name]}
    assert set(asked) <= {"127.0.0.1"}
    assert all(len(verdict.detail) < 2000 for verdict in verdicts), "what was asked for is not repeated at length"
