"""The client that an application's own tests use: the same calls and checks as the real one, and no server."""

from __future__ import annotations

import inspect
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import code_worker as cw
from code_worker import client as real
from code_worker.errors import CodeWorkerError, DatasetError, IdConflictError, UnknownHeadError
from code_worker.plugins import load_plugins
from code_worker.releases.registry import open_registry
from code_worker.settings import Settings
from code_worker.store.engine import Store
from code_worker.testing import FakeClient, fake_client
from code_worker.types import Label, Outcome, RejectReason
from tests.servers import free_port
from tests.test_imports import HEAVY, modules_after

PUBLIC = [name for name in vars(real.Client) if not name.startswith("_")]


@pytest.mark.parametrize("name", PUBLIC)
def test_signatures_are_those_of_the_real_client(name: str) -> None:
    theirs, ours = (inspect.signature(getattr(each, name)) for each in (real.Client, FakeClient))
    assert ours == theirs


def test_an_application_enqueues_and_gets_the_verdicts_that_the_test_says() -> None:
    with fake_client({"s3://b/a.jpg": "fake", "s3://b/gone.jpg": RejectReason.NOT_FOUND}) as client:
        first = cw.enqueue("s3://b/a.jpg", tenant="acme", metadata={"post": 1}, priority=9)
        gone, later = cw.enqueue_many(["s3://b/gone.jpg", {"uri": "s3://b/later.jpg", "key": "k"}])
        assert [job.uri for job in client.jobs.values()] == ["s3://b/a.jpg", "s3://b/gone.jpg", "s3://b/later.jpg"]
        assert client.jobs[first].metadata == {"post": 1}
        found = cw.verdict(first)
        assert found is not None
        assert (found.outcome, found.label, found.tenant) == (Outcome.JUDGED, Label.FAKE, "acme")
        assert getattr(cw.verdict(gone), "reason", None) is RejectReason.NOT_FOUND
        assert cw.verdict(later) is None
        client.decide(later, "uncertain", score=0.4)
        second = client.decide(later, "real")
        assert (second.revision, cw.verdict(later)) == (1, second)
        assert cw.label(first, "fake", generator="sd3", by="ann").new
        assert not cw.label(first, "fake", generator="sd3", by="ann").new
        assert client.labels[0].uri == "s3://b/a.jpg"


def test_a_function_that_was_imported_before_or_within_is_the_real_one_afterwards(
    sqlite_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(
        data_dir=tmp_path, database_url=sqlite_store.url, broker_url=f"redis://127.0.0.1:{free_port()}/0"
    )
    with closing(real.Client(settings)) as one:
        monkeypatch.setattr(real, "_default", lambda: one)
        before = real.enqueue
        with fake_client() as client:
            from code_worker import enqueue as within  # as a module does that a test imports first

            ids = [before("s3://b/1"), within("s3://b/2")]
            assert list(client.jobs) == ids
        assert cw.enqueue is before
        assert {before("s3://b/3"), within("s3://b/4")}.isdisjoint(client.jobs)
        assert one.verdict(ids[0]) is None


def test_a_head_that_the_champion_lacks_is_refused_in_the_same_words(
    sqlite_store: Store, tmp_path: Path, toy_release_dir: Path
) -> None:
    settings = Settings(data_dir=tmp_path, database_url=sqlite_store.url, broker_url="redis://127.0.0.1:1/0")
    registry = open_registry(settings, store=sqlite_store, plugins=load_plugins(settings))
    registry.promote(registry.add(toy_release_dir), by="test")
    said = []
    with closing(real.Client(settings)) as one:
        for client in (one, FakeClient(heads=["svm", "knn", "linear"])):
            with pytest.raises(UnknownHeadError) as single:
                client.enqueue("s3://b/a", head="typo")
            with pytest.raises(ValueError, match="item 0:") as many:
                client.enqueue_many([{"uri": "s3://b/a", "head": "typo"}])
            said.append((str(single.value), str(many.value)))
    assert said[0] == said[1]
    assert FakeClient().enqueue("s3://b/a", head="any")


BAD: list[dict[str, Any]] = [
    *({"uri": ""}, {"uri": "a\0"}, {"uri": "s3://user:secret@b/k"}, {"uri": "a", "priority": 10}, {"uri": 3}),
    *({"uri": "a", "metadata": [1]}, {"uri": "a", "metadata": {"x": float("nan")}}, {"uri": "a", "tenant": ""}),
]


@pytest.mark.parametrize("fields", BAD)
def test_what_the_real_client_refuses_this_one_refuses_in_the_same_words(
    fields: dict[str, Any], sqlite_store: Store, tmp_path: Path
) -> None:
    settings = Settings(data_dir=tmp_path, database_url=sqlite_store.url, broker_url="redis://127.0.0.1:1/0")
    said = []
    with closing(real.Client(settings)) as one:
        for client in (one, FakeClient()):
            with pytest.raises(ValueError, match="not accepted") as single:
                client.enqueue(**fields)
            with pytest.raises(ValueError, match="item 1:") as many:
                client.enqueue_many(["s3://b/fine", fields])
            said.append((str(single.value), str(many.value)))
    assert said[0] == said[1]


def test_keys_jobs_and_labels_are_checked_too() -> None:
    client = FakeClient()
    assert client.enqueue("s3://b/a", key="k", tenant="t") == client.enqueue("s3://b/a", key="k", tenant="t")
    assert len(client.jobs) == 1
    with pytest.raises(IdConflictError, match="'k'"):
        client.enqueue("s3://b/other", key="k", tenant="t")
    with pytest.raises(ValueError, match="unknown field 'colour'"):
        client.enqueue_many([{"uri": "a", "colour": "red"}])
    with pytest.raises(ValueError, match="real or fake"):
        client.label("s3://b/a", "maybe")
    with pytest.raises(DatasetError):
        client.label("01234567-89ab-7def-8123-456789abcdef", "real")
    with pytest.raises(ValueError, match="from 0 to 1"):
        client.decide(next(iter(client.jobs)), "real", score=2)
    assert issubclass(DatasetError, CodeWorkerError)


def test_it_loads_neither_broker_nor_database_nor_model() -> None:
    code = (
        "import code_worker as cw\n"
        "from code_worker.testing import fake_client\n"
        "with fake_client({'s3://b/a': 'real'}) as client:\n"
        "    assert cw.verdict(cw.enqueue('s3://b/a')).label == 'real'\n"
    )
    assert modules_after(code).isdisjoint({*HEAVY, "sqlalchemy", "alembic", "celery", "kombu", "redis"})


def test_a_verdict_that_is_none_is_refused_before_the_test_begins() -> None:
    with pytest.raises(ValueError, match=r"s3://b/a\.jpg: 'fakee' is no verdict: one of .*fake.*, or a RejectReason"):
        fake_client({"s3://b/a.jpg": "fakee"}).__enter__()
    with fake_client({"s3://b/a.jpg": "fake"}) as client, pytest.raises(ValueError, match="'fakee' is no verdict"):
        client.decide(cw.enqueue("s3://b/a.jpg"), "fakee")
