"""Enqueueing: accepted is committed, whether or not the broker is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import redis

from code_worker.client import Client
from code_worker.errors import IdConflictError, StoreError, UnknownHeadError
from code_worker.settings import Settings
from code_worker.store import jobs, releases
from code_worker.store.engine import Store
from code_worker.types import JobState
from code_worker.wire import BACKFILL, LIVE, MAX_JOBS_PER_MESSAGE, NORMAL
from tests.servers import RedisServer, free_port


@pytest.fixture
def make_client(tmp_path: Path, store: Store) -> Iterator[Callable[..., Client]]:
    made: list[Client] = []

    def make(broker_url: str | None) -> Client:
        client = Client(Settings(data_dir=tmp_path / "data", database_url=store.url, broker_url=broker_url))
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()


def test_bulk_is_accepted_in_order_and_published_as_lists(
    make_client: Callable[..., Client], redis_server: RedisServer
) -> None:
    client = make_client(redis_server.url)
    items: list[Any] = [f"s3://b/{number}" for number in range(150)]
    items += [{"uri": "s3://b/live", "priority": 9}, {"uri": "s3://b/bulk", "priority": 0}]
    ids = client.enqueue_many(items, tenant="acme")
    assert len(set(ids)) == 152
    infos = [
        client._store.run(lambda session, job=job: jobs.get(session, job)) for job in (ids[0], ids[149], ids[150])
    ]
    assert [(info.uri, info.tenant) for info in infos if info] == [
        ("s3://b/0", "acme"),
        ("s3://b/149", "acme"),
        ("s3://b/live", "acme"),
    ]
    with redis.Redis.from_url(redis_server.url) as server:
        lengths = {queue: server.llen(f"cw:{queue}") for queue in (LIVE, NORMAL, BACKFILL)}
        first = server.lindex(f"cw:{NORMAL}", -1)
    assert lengths == {LIVE: 1, NORMAL: 3, BACKFILL: 1}
    assert isinstance(first, bytes)
    assert b"s3://" not in first


def test_a_stream_reads_no_further_than_the_transaction_it_writes(
    make_client: Callable[..., Client], redis_server: RedisServer
) -> None:
    read = count()
    stream = make_client(redis_server.url).enqueue_stream(f"s3://b/{next(read)}" for _ in range(10_000))
    first, second = next(stream), next(stream)
    assert len(first) == len(second)
    assert next(read) == 2 * len(first)
    stream.close()


def test_whoever_leaves_a_stream_early_has_rung_for_all_that_it_got(
    make_client: Callable[..., Client], redis_server: RedisServer
) -> None:
    client = make_client(redis_server.url)
    stream = client.enqueue_stream(f"s3://b/{number}" for number in range(10_000))
    ids = [*next(stream), *next(stream)]
    stream.close()
    with redis.Redis.from_url(redis_server.url) as server:
        assert server.llen(f"cw:{NORMAL}") == len(ids) / MAX_JOBS_PER_MESSAGE
    published = [client._store.run(lambda session, job=job: jobs.get(session, job)) for job in (ids[0], ids[-1])]
    assert all(job and job.published_at for job in published)


def test_a_bad_item_in_a_stream_leaves_what_came_before_it_accepted_and_rung_for(
    make_client: Callable[..., Client], redis_server: RedisServer
) -> None:
    client = make_client(redis_server.url)
    stream = client.enqueue_stream([*(f"s3://b/{number}" for number in range(3000)), ""])
    with pytest.raises(ValueError, match="item 3000: job not accepted: uri"):
        list(stream)
    assert client._store.run(jobs.counts)[JobState.ACCEPTED] == 2048
    last = client._store.run(lambda session: jobs.list_jobs(session, limit=1))[0]
    assert last.published_at is not None


def test_a_broker_that_is_away_leaves_the_job_to_the_sweeper(make_client: Callable[..., Client]) -> None:
    client = make_client(f"redis://127.0.0.1:{free_port()}/0")
    job = client.enqueue("s3://b/k")
    info = client._store.run(lambda session: jobs.get(session, job))
    assert info is not None
    assert info.state == "accepted"
    assert info.published_at is None
    assert client.verdict(job) is None


def test_no_broker_configured_is_no_loss(make_client: Callable[..., Client]) -> None:
    client = make_client(None)
    job = client.enqueue("s3://b/k")
    assert client._store.run(lambda session: jobs.get(session, job)) is not None


def test_a_key_makes_two_calls_one_job(make_client: Callable[..., Client], redis_server: RedisServer) -> None:
    client = make_client(redis_server.url)
    first = client.enqueue("s3://b/k", key="post-1", tenant="acme", metadata={"a": 1})
    assert client.enqueue("s3://b/k", key="post-1", tenant="acme", metadata={"a": 1}) == first
    assert client.enqueue("s3://b/k", key="post-1", tenant="other", metadata={"a": 1}) != first
    with pytest.raises(IdConflictError, match="post-1"):
        client.enqueue("s3://b/another", key="post-1", tenant="acme")


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ({"uri": ""}, "uri: String should have at least 1"),
        ({"uri": "x" * 5000}, "uri: String should have at most 4096"),
        ({"uri": 7}, "uri: Input should be a valid string"),
        ({"uri": "a", "priority": 10}, "less than or equal to 9"),
        ({"uri": "a", "priority": "9"}, "priority: Input should be a valid integer"),
        ({"uri": "a", "priority": True}, "priority: Input should be a valid integer"),
        ({"uri": "a", "head": ""}, "head: String should have at least 1"),
        ({"uri": "a", "tenant": "x" * 201}, "tenant: String should have at most 200"),
        ({"uri": "a", "metadata": ["x"]}, "metadata must be a JSON object"),
        ({"uri": "a", "metadata": {"x": "y" * 20_000}}, "metadata must be"),
        ({"uri": "a", "colour": "red"}, "unknown field 'colour'"),
    ],
)
def test_arguments_out_of_range_are_refused(make_client: Callable[..., Client], item: Any, text: str) -> None:
    client = make_client(None)
    with pytest.raises(ValueError, match=text):
        client.enqueue_many([item])


def test_a_database_without_tables_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="code-worker db upgrade"):
        Client(Settings(data_dir=tmp_path))


def test_a_job_that_does_not_exist_has_no_verdict(make_client: Callable[..., Client]) -> None:
    client = make_client(None)
    assert client.verdict("01890000-0000-7000-8000-000000000000") is None
    assert client.verdict("not-an-id") is None


def champion(store: Store, release: str, heads: list[str]) -> None:
    manifest = {"heads": {name: {} for name in heads}}
    fields: Any = {"manifest_sha256": release * 8, "location": "", "manifest": manifest, "source": "", "by": "a test"}
    store.run(lambda session: releases.add(session, id=release, **fields))
    store.run(lambda session: releases.move_alias(session, releases.CHAMPION, release, by="a test", reason=""))


def test_a_head_that_the_champion_lacks_is_refused_where_it_is_asked_for(
    make_client: Callable[..., Client], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("code_worker.client._HEADS_FOR_S", 0.0)
    client = make_client(None)
    client.enqueue("s3://b/a.jpg", head="typo")  # nobody knows yet
    champion(store, "r-one", ["knn", "linear"])
    assert client.enqueue("s3://b/a.jpg", head="knn")
    assert client.enqueue("s3://b/a.jpg")
    with pytest.raises(UnknownHeadError, match="unknown head 'typo'; known: knn, linear"):
        client.enqueue("s3://b/a.jpg", head="typo")
    with pytest.raises(ValueError, match="item 1: unknown head 'svm'; known: knn, linear"):
        client.enqueue_many(["s3://b/a.jpg", {"uri": "s3://b/b.jpg", "head": "svm"}], head="linear")
    champion(store, "r-two", ["svm"])
    assert client.enqueue("s3://b/a.jpg", head="svm")
    with pytest.raises(UnknownHeadError):
        client.enqueue("s3://b/a.jpg", head="knn")


def test_a_key_finds_its_job_again_after_a_promotion_that_dropped_the_head(
    make_client: Callable[..., Client], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("code_worker.client._HEADS_FOR_S", 0.0)
    client = make_client(None)
    champion(store, "r-one", ["knn", "linear"])
    asked: Any = {"uri": "s3://b/a.jpg", "head": "knn", "key": "post-1"}
    job = client.enqueue(**asked)
    champion(store, "r-two", ["linear"])
    assert client.enqueue(**asked) == job
    assert client.enqueue_many([asked, {**asked, "head": "linear", "key": "post-2"}])[0] == job
    with pytest.raises(IdConflictError):
        client.enqueue(**{**asked, "uri": "s3://b/b.jpg"})
    with pytest.raises(UnknownHeadError):
        client.enqueue(**{**asked, "tenant": "acme"})
    with pytest.raises(ValueError, match="item 1: unknown head 'knn'; known: linear"):
        client.enqueue_many([asked, {**asked, "key": "post-3"}])


def test_a_head_that_came_with_a_promotion_is_known_at_once(make_client: Callable[..., Client], store: Store) -> None:
    client = make_client(None)
    champion(store, "r-one", ["knn"])
    assert client.enqueue("s3://b/a.jpg", head="knn")
    champion(store, "r-two", ["knn", "svm"])
    assert client.enqueue("s3://b/a.jpg", head="svm")
    with pytest.raises(UnknownHeadError, match="known: knn, svm"):
        client.enqueue("s3://b/a.jpg", head="typo")
