"""Heartbeats, roles, paused sources, dead letters, plugins."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pytest

from code_worker.errors import StoreError
from code_worker.store import workers
from code_worker.store.engine import Store
from code_worker.store.models import SourcePauseRow, db_now_plus, time_plus
from code_worker.store.sql import table_of
from code_worker.store.workers import SourcePause


@dataclass
class Installed:
    name: str
    version: str | None
    distribution: str | None = None
    hooks: tuple[str, ...] = ("code_worker_register_heads",)


def take(store: Store, owner: str, *, ttl_s: float = 30.0) -> bool:
    return store.run(lambda session: workers.take_lease(session, "sweeper", owner, ttl_s))


def test_a_worker_is_alive_as_it_last_said(store: Store) -> None:
    store.run(lambda session: workers.beat(session, "me", version="1.0"))
    (first,) = store.run(lambda session: workers.alive(session, within_s=60))
    store.run(lambda session: workers.beat(session, "me", version="1.0", release="r1", info={"device": "cpu"}))
    (worker,) = store.run(lambda session: workers.alive(session, within_s=60))
    assert (worker.owner, worker.host, worker.pid) == ("me", socket.gethostname(), os.getpid())
    assert (worker.release, worker.info) == ("r1", {"device": "cpu"})
    assert worker.started_at == first.started_at <= worker.seen_at
    assert store.run(lambda session: workers.alive(session, within_s=-1)) == []
    store.run(lambda session: workers.gone(session, "me"))
    assert store.run(lambda session: workers.alive(session, within_s=60)) == []


def test_a_role_has_one_player_until_its_lease_lapses(store: Store) -> None:
    assert take(store, "a")
    assert take(store, "a")
    assert not take(store, "b")
    assert take(store, "a", ttl_s=-1)
    assert take(store, "b")
    assert not take(store, "a")


def test_a_role_can_be_given_back_by_its_player_alone(store: Store) -> None:
    take(store, "a")
    store.run(lambda session: workers.drop_lease(session, "sweeper", "b"))
    assert not take(store, "b")
    store.run(lambda session: workers.drop_lease(session, "sweeper", "a"))
    assert take(store, "b")


def test_of_many_at_once_one_gets_the_role(store: Store) -> None:
    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(lambda number: take(store, f"w{number}"), range(12))) == 1


def test_a_source_rests_until_its_time_and_keeps_the_start_of_its_trouble(store: Store) -> None:
    def pause(seconds: float, detail: str) -> None:
        store.run(lambda session: workers.pause_source(session, "s3://b", seconds=seconds, detail=detail))

    pause(60, "ExpiredToken\0")
    before = store.run(workers.paused_sources)["s3://b"]
    assert before.detail == "ExpiredToken\ufffd"
    pause(600, "AccessDenied")
    after = store.run(workers.paused_sources)["s3://b"]
    assert (after.since, after.detail) == (before.since, "AccessDenied")
    assert after.until > before.until
    pause(-1, "lapsed")
    assert store.run(workers.paused_sources) == {}
    lately = store.run(lambda session: workers.paused_sources(session, lately=True))
    assert lately["s3://b"].left_s < 0
    pause(60, "again")
    assert store.run(lambda session: workers.resume_source(session, "s3://b")) is None, "its pause is not over"
    assert store.run(workers.paused_sources).keys() == {"s3://b"}
    pause(-1, "lapsed")
    assert store.run(lambda session: workers.resume_source(session, "s3://b")) == before.since
    assert store.run(lambda session: workers.paused_sources(session, lately=True)) == {}


def test_a_trouble_may_have_begun_before_it_was_noted(store: Store) -> None:
    pause = partial(workers.pause_source, source="s3://b", seconds=30, detail="", began_s=50)
    began = store.run(pause)
    paused = store.run(workers.paused_sources)["s3://b"]
    assert paused.since == began == store.run(pause)
    assert (paused.until - began).total_seconds() == pytest.approx(80, abs=2)


@pytest.mark.parametrize(("lapsed_s", "same"), [(60, True), (3600, False)])
def test_a_pause_soon_after_the_last_is_the_same_trouble(store: Store, lapsed_s: float, same: bool) -> None:
    def pause(seconds: float) -> SourcePause:
        store.run(lambda session: workers.pause_source(session, "s3://b", seconds=seconds, detail=""))
        return store.run(workers.paused_sources)["s3://b"]

    table = table_of(SourcePauseRow)
    pause(60)
    earlier = {"since": time_plus(table.c.since, -7200), "until": db_now_plus(-lapsed_s)}
    store.run(lambda session: session.execute(table.update().values(earlier)))
    again = pause(60)
    assert ((again.until - again.since).total_seconds() > 7000) is same


def test_a_pause_grows_with_the_trouble(store: Store) -> None:
    def pause() -> float:
        growing = partial(workers.pause_source, source="s3://b", seconds=30, longest_s=900, detail="")
        store.run(growing)
        return store.run(workers.paused_sources)["s3://b"].left_s

    def trouble_began(seconds_ago: float) -> None:
        table = table_of(SourcePauseRow)
        earlier = {"since": db_now_plus(-seconds_ago), "until": db_now_plus(-1)}
        store.run(lambda session: session.execute(table.update().values(earlier)))

    assert pause() == pytest.approx(30, abs=2)
    for lasted, expected in ((10, 30), (200, 200), (7200, 900)):
        trouble_began(lasted)
        assert pause() == pytest.approx(expected, abs=2)


def test_unreadable_messages_are_kept_cut_to_size(store: Store) -> None:
    ids = [
        store.run(
            lambda session, number=number: workers.dead_letter(
                session, task="code_worker.moderate", body=f"{number}\0" + "x" * 100_000, error="unknown version"
            )
        )
        for number in range(3)
    ]
    letters = store.run(lambda session: workers.list_dead_letters(session, limit=2))
    assert [letter.id for letter in letters] == ids[:0:-1]
    assert letters[0].body.startswith("2\ufffdxx")
    assert len(letters[0].body) == 64 * 1024
    rest = store.run(lambda session: workers.list_dead_letters(session, after=letters[-1].id))
    assert [letter.id for letter in rest] == ids[:1]
    with pytest.raises(StoreError, match="no id"):
        store.run(lambda session: workers.list_dead_letters(session, after="what"))


def test_neither_message_nor_error_keeps_a_credential(store: Store) -> None:
    url = "https://b/k?X-Amz-Signature=abc"
    store.run(lambda session: workers.dead_letter(session, task="t", body=url, error=f"cannot decode {url!r}"))
    (letter,) = store.run(workers.list_dead_letters)
    assert "abc" not in letter.body + letter.error
    assert "X-Amz-Signature=***" in letter.error


def test_plugins_are_remembered_by_host_and_version(store: Store) -> None:
    def saw(*plugins: Installed, host: str | None = None) -> None:
        store.run(lambda session: workers.saw_plugins(session, plugins, host=host))

    saw(Installed("heads", "1.0", "code-worker"), Installed("single_file", None))
    saw(Installed("heads", "1.0", "code-worker", hooks=("code_worker_select_head",)))
    saw(Installed("heads", "1.1", "code-worker"), host="elsewhere")
    found = store.run(workers.plugins_seen)
    assert {(plugin.host, plugin.name, plugin.version) for plugin in found} == {
        (socket.gethostname(), "heads", "1.0"),
        (socket.gethostname(), "single_file", ""),
        ("elsewhere", "heads", "1.1"),
    }
    (heads,) = [plugin for plugin in found if plugin.version == "1.0"]
    assert heads.hooks == ["code_worker_select_head"]
    assert heads.first_seen <= heads.last_seen
