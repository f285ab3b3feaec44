"""Items that come in a message: each gets a row or is kept for a look, and an outage of the ledger loses none."""

from __future__ import annotations

import json
import random
import string
import threading
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import Reject
from sqlalchemy import event, text

from code_worker.client import Client
from code_worker.errors import StoreError, StoreUnavailableError
from code_worker.settings import Settings, WorkerSettings
from code_worker.store import jobs, workers
from code_worker.store.engine import Store, open_store
from code_worker.store.workers import DeadLetter
from code_worker.wire import MODERATE
from code_worker.worker import app_state as hosts
from code_worker.worker import tasks
from code_worker.worker.app_state import AppState
from code_worker.worker.intake import accept_items, take_message
from code_worker.worker.judging.node import Node
from code_worker.worker.judging.recorder import Recorder
from tests.servers import PostgresServer
from tests.store.acts import accept

GOOD = [{"uri": f"s3://b/{number}.jpg"} for number in range(3)]
# Nothing compresses it: an index row of PostgreSQL cannot hold it.
LONG = "".join(random.Random(7).choices(string.ascii_letters + string.digits, k=4000))


def _uris(store: Store) -> set[str]:
    return {job.uri for job in store.run(lambda session: jobs.list_jobs(session, limit=100))}


def _letters(store: Store) -> list[DeadLetter]:
    return store.run(workers.list_dead_letters)


BAD: dict[str, tuple[Any, str]] = {
    "text": ("s3://b/k", "must be an object"),
    "no uri": ({}, "uri: Field required"),
    "no text": ({"uri": 7}, "uri: Input should be a valid string"),
    "a long uri": ({"uri": "x" * 5000}, "at most 4096"),
    "a long tenant": ({"uri": "a", "tenant": LONG}, "tenant: String should have at most 200"),
    "a long head": ({"uri": "a", "head": LONG}, "head: String should have at most 200"),
    "a long key": ({"uri": "a", "key": LONG}, "key: String should have at most 200"),
    "a long content type": ({"uri": "a", "content_type": LONG}, "content_type: String should have at most 200"),
    "a NUL": ({"uri": "a", "tenant": "a\0"}, "tenant holds a NUL"),
    "20 MB of metadata": ({"uri": "a", "metadata": {"a": "x" * 20_000_000}}, "at most 16384 bytes"),
    "a list of metadata": ({"uri": "a", "metadata": []}, "metadata must be a JSON object"),
    "a priority of 10": ({"uri": "a", "priority": 10}, "less than or equal to 9"),
    "a true priority": ({"uri": "a", "priority": True}, "priority: Input should be a valid integer"),
    "a field too many": ({"uri": "a", "password": "p"}, "unknown field 'password'"),
    "a signed link": ({"uri": "https://h/k?Signature=abc"}, "carries a password or a signature"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_item_is_kept_for_a_look_and_its_neighbours_are_accepted(sqlite_store: Store, name: str) -> None:
    bad, reason = BAD[name]
    ids = accept_items(sqlite_store, [*GOOD[:2], bad, *GOOD[2:]], "message-1")
    assert len(ids) == 3
    assert _uris(sqlite_store) == {item["uri"] for item in GOOD}
    (letter,) = _letters(sqlite_store)
    assert reason in letter.error
    assert len(letter.error) < 300


@pytest.mark.parametrize("name", BAD)
def test_a_call_refuses_what_a_message_refuses(sqlite_store: Store, name: str, tmp_path: Any) -> None:
    bad, reason = BAD[name]
    client = Client(Settings(data_dir=tmp_path, database_url=sqlite_store.url, broker_url="redis://127.0.0.1:1/0"))
    if not isinstance(bad, str):
        with pytest.raises(ValueError, match="item 1: job not accepted") as raised:
            client.enqueue_many([GOOD[0], bad])
        assert reason in str(raised.value)
    client.close()


def test_a_second_delivery_brings_no_second_job(store: Store) -> None:
    items = [*GOOD, {"uri": "s3://b/keyed.jpg", "key": "k"}]
    assert accept_items(store, items, "message-1") == accept_items(store, items, "message-1")
    assert len(_uris(store)) == 4


def test_a_key_that_names_another_job_is_kept_for_a_look(store: Store) -> None:
    accept(store, jobs.NewJob("s3://b/other.jpg", key="k"))
    accept_items(store, [GOOD[0], {"uri": "s3://b/keyed.jpg", "key": "k"}], "message-1")
    (letter,) = _letters(store)
    assert letter.error.startswith("id_conflict: ")
    assert json.loads(letter.body) == {"items": [{"uri": "s3://b/keyed.jpg", "key": "k"}]}


def test_the_log_of_refused_messages_names_no_image_and_no_tenant(
    sqlite_store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    uri = "s3://b/passport-of-jane.jpg"
    accept(sqlite_store, jobs.NewJob("s3://b/other.jpg", tenant="acme", key=uri))
    conflict, field = {"uri": uri, "tenant": "acme", "key": uri}, {"uri": uri, uri: 1}
    accept_items(sqlite_store, [conflict, field], "message-1")
    assert take_message(sqlite_store, {"v": 1, uri: [field]}, "message-2") == []
    refused = [record.getMessage() for record in caplog.records if "message_refused" in record.getMessage()]
    kept = {letter.id: letter.error for letter in _letters(sqlite_store)}
    assert [uri in error for error in kept.values()] == [True] * 3, "who looks there is told"
    assert [kind for kind in ("id_conflict", "item", "message") for line in refused if f"kind={kind}" in line] == [
        *("id_conflict", "item", "message")
    ]
    assert all(any(letter in line for line in refused) for letter in kept)
    assert "passport" not in caplog.text
    assert "acme" not in caplog.text


def test_what_the_database_alone_refuses_is_kept_for_a_look(postgres_store: Store) -> None:
    index = text("CREATE INDEX theirs ON jobs (uri)")
    postgres_store.run(lambda session: session.execute(index).close())
    ids = accept_items(postgres_store, [*GOOD, {"uri": f"s3://b/{LONG}"}], "message-1")
    assert len(ids) == 3
    (letter,) = _letters(postgres_store)
    assert letter.error.startswith("the database cannot store this")


def test_an_error_that_nobody_foresaw_loses_no_item(sqlite_store: Store, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: object, __: object, statement: str, parameters: object, *___: object) -> None:
        if "INTO jobs" in statement and "1.jpg" in str(parameters):
            raise ZeroDivisionError("a bug")

    event.listen(sqlite_store.engine, "before_cursor_execute", fail)
    try:
        ids = accept_items(sqlite_store, GOOD, "message-1")
    finally:
        event.remove(sqlite_store.engine, "before_cursor_execute", fail)
    assert len(ids) == 2
    (letter,) = _letters(sqlite_store)
    assert letter.error == "ZeroDivisionError: a bug"
    assert "item_not_accepted" in caplog.text


def test_a_missing_right_blames_no_item(postgres_server: PostgresServer, postgres_store: Store) -> None:
    accept(postgres_store, "s3://b/before.jpg")
    postgres_server._sql("CREATE ROLE only_reads LOGIN")
    url = postgres_store.engine.url.set(username="only_reads")
    try:
        address = url.render_as_string(hide_password=False)
        with closing(open_store(address)) as other, pytest.raises(StoreError, match="may not do this"):
            accept_items(other, GOOD, "message-1")
    finally:
        postgres_server._sql("DROP ROLE only_reads")
    assert not _letters(postgres_store)


def test_a_database_that_only_reads_for_a_while_costs_a_message_nothing(
    postgres_server: PostgresServer, postgres_store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a failover: read-only, one message, switched back."""
    name = postgres_store.engine.url.database
    postgres_store.close()
    postgres_server._sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    with pytest.raises(StoreUnavailableError):
        accept_items(postgres_store, GOOD, "message-1")

    waiting = threading.Event()

    def switch_back() -> None:
        if not waiting.is_set():
            waiting.set()
            postgres_server._sql(f"ALTER DATABASE {name} SET default_transaction_read_only = off")

    ledger = Recorder(postgres_store, WorkerSettings(), "worker")
    bad = {"uri": "a", "tenant": LONG}
    ids = ledger.outlast(lambda: accept_items(postgres_store, [*GOOD, bad], "message-1"), switch_back)
    assert waiting.is_set(), "it was read-only at first"
    assert len(ids) == 3
    assert len(_letters(postgres_store)) == 1
    assert "store_unavailable" in caplog.text


def test_items_have_rows_and_their_message_goes_back_where_no_node_can_be_made(
    sqlite_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WithoutDevice(AppState):
        def node(self) -> Node:
            raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(tasks, "_REST_S", 0.0)
    settings = Settings(data_dir=tmp_path, database_url=sqlite_store.url)
    with (
        Celery("theirs", broker="memory://", set_as_current=False) as app,
        closing(WithoutDevice(app, lambda: settings)) as host,
    ):
        tasks.register_tasks(app, host)
        task = app.tasks[MODERATE]
        task.push_request(id="message-1")
        for _ in range(2):
            with pytest.raises(Reject, match="out of memory") as raised:
                task.run({"v": 1, "items": GOOD})
            assert raised.value.requeue
    assert _uris(sqlite_store) == {item["uri"] for item in GOOD}
    assert not _letters(sqlite_store)


def _deepest(text: str) -> Any:
    """What `text` holds with as many lists in each other as can just be read."""
    for depth in (100_000, 10_000, *range(2000, 0, -1)):
        with suppress(RecursionError):
            return json.loads(text % ("[" * depth + "]" * depth))
    raise AssertionError("no list can be read")


def test_a_refused_item_that_can_just_be_read_is_kept_with_its_neighbours(sqlite_store: Store) -> None:
    message = _deepest('{"items": [{"uri": "s3://b/bad.jpg", "bogus": %s}, {"uri": "s3://b/other.jpg", "color": 1}]}')
    accept_items(sqlite_store, message["items"], "message-1")
    bodies = [json.loads(letter.body)["items"][0]["uri"] for letter in _letters(sqlite_store)]
    assert sorted(bodies) == ["s3://b/bad.jpg", "s3://b/other.jpg"]


def test_what_came_off_a_queue_is_kept_once_the_database_is_back(
    sqlite_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "_KEEP_AGAIN_S", 0.01)
    tried = threading.Event()
    errors: list[Exception] = [RuntimeError("a bug"), StoreUnavailableError("away"), StoreUnavailableError("away")]

    class Away(AppState):
        def store(self) -> Store:
            if errors:
                raise errors.pop(0)
            tried.set()
            return super().store()

    settings = Settings(data_dir=tmp_path, database_url=sqlite_store.url)
    with (
        Celery("theirs", broker="memory://", set_as_current=False) as app,
        closing(Away(app, lambda: settings)) as host,
    ):
        for number in range(2):
            host.keep_unreadable(f"{{unreadable {number}", "JSONDecodeError")
        assert tried.wait(30)
    kept = sorted(json.loads(letter.body)["unreadable"] for letter in _letters(sqlite_store))
    assert kept == ["{unreadable 0", "{unreadable 1"]
