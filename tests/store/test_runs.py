"""Runs, their curves, snapshots and schedule slots: one at a time, written to by the one who holds it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from code_worker.errors import RunLostError, StoreError
from code_worker.store.engine import Store
from code_worker.store.ids import uuid7
from code_worker.store.learning import runs, snapshots
from code_worker.store.learning import runs as schedule
from code_worker.store.learning.runs import Run, RunMetrics
from tests.store.acts import slots

SLOT = datetime(2026, 11, 22, 3, 0, tzinfo=UTC)


def start(store: Store, *, owner: str = "a:1", run_id: str | None = None, kind: str = "refit") -> Run | None:
    chosen = run_id or uuid7()
    return store.run(
        lambda session: runs.start(
            session, id=chosen, kind=kind, by="alice", owner=owner, config={"epochs": 2}, base_release="r-1"
        )
    )


def begun(store: Store, **options: str) -> Run:
    run = start(store, **options)
    assert run is not None
    return run


def get(store: Store, run_id: str) -> Run:
    found = store.run(lambda session: runs.get(session, run_id), write=False)
    assert found is not None
    return found


def take_over(store: Store, owner: str, *, lapse_s: float = 0) -> Run | None:
    return store.run(lambda session: runs.take_over(session, owner=owner, lapse_s=lapse_s))


def finish(store: Store, run: Run, state: str = "rejected", **more: object) -> None:
    store.run(lambda session: runs.finish(session, run.lease, state, **more))  # type: ignore[arg-type]


def test_a_run_is_kept_as_it_began(store: Store) -> None:
    run = begun(store)
    assert (run.kind, run.state, run.by, run.owner, run.token, run.attempts) == (
        "refit",
        "running",
        "alice",
        "a:1",
        1,
        1,
    )
    assert (run.config, run.base_release, run.reasons, run.finished_at) == ({"epochs": 2}, "r-1", [], None)
    assert store.run(runs.running) == run
    assert store.run(lambda session: runs.get(session, "no id")) is None


def test_a_second_run_is_not_begun_while_one_is_running(store: Store) -> None:
    first = begun(store)
    assert start(store, kind="retrain") is None
    assert start(store, run_id=first.id) == first, "a transaction tried twice begins one run"
    finish(store, first)
    assert start(store) is not None


def test_of_many_at_once_one_run_is_begun(store: Store) -> None:
    with ThreadPoolExecutor(6) as pool:
        tried = list(pool.map(lambda number: start(store, owner=f"w:{number}"), range(12)))
    assert sum(run is not None for run in tried) == 1


def test_a_run_whose_process_is_silent_is_taken_over_and_lost_to_the_old_one(store: Store) -> None:
    old = begun(store)
    assert take_over(store, "b:1", lapse_s=60) is None, "it was heard of a moment ago"
    assert not store.run(lambda session: runs.lapsed(session, lapse_s=60))
    assert store.run(lambda session: runs.lapsed(session, lapse_s=0))
    new = take_over(store, "b:1")
    assert new is not None
    assert (new.id, new.owner, new.token, new.attempts) == (old.id, "b:1", 2, 2)
    assert take_over(store, "b:1") == new, "a transaction tried twice takes it once"
    writes = [
        lambda session: runs.hold(session, old.lease),
        lambda session: runs.note(session, old.lease, stage="training"),
        lambda session: runs.finish(session, old.lease, "promoted"),
        lambda session: runs.let_go(session, old.lease),
        lambda session: runs.add_metrics(session, old.lease, [RunMetrics(1, 10, {"loss": 1.0})]),
    ]
    for write in writes:
        with pytest.raises(RunLostError, match=f"run {old.id} is not this process's any more"):
            store.run(write)
    assert get(store, old.id).state == "running"
    store.run(lambda session: runs.hold(session, new.lease))


def test_of_many_at_once_one_takes_a_lapsed_run_over(store: Store) -> None:
    begun(store)
    store.run(lambda session: runs.release_owner(session, "a"))
    with ThreadPoolExecutor(6) as pool:
        taken = list(pool.map(lambda number: take_over(store, f"w:{number}", lapse_s=60), range(12)))
    assert sum(run is not None for run in taken) == 1


def test_what_a_run_does_is_noted_and_how_it_ended(store: Store) -> None:
    run = begun(store)
    store.run(lambda session: runs.note(session, run.lease, stage="refit", candidate="r-2"))
    finish(store, run, "rejected", reasons=["worse on sdxl\0"], report={"gate": {"promote": False}})
    ended = get(store, run.id)
    assert (ended.state, ended.stage, ended.candidate) == ("rejected", "refit", "r-2")
    assert ended.reasons == ["worse on sdxl\ufffd"]
    assert ended.report == {"gate": {"promote": False}}
    assert ended.finished_at is not None
    finish(store, run, "rejected")
    with pytest.raises(RunLostError):
        finish(store, run, "promoted")
    with pytest.raises(ValueError, match="'running' is no end"):
        finish(store, run, "running")


def test_a_run_that_is_let_go_is_free_at_once_and_the_attempt_does_not_count(store: Store) -> None:
    run = begun(store)
    for _ in range(2):
        store.run(lambda session: runs.let_go(session, run.lease))
    assert get(store, run.id).attempts == 0
    with pytest.raises(RunLostError):
        store.run(lambda session: runs.hold(session, run.lease))
    again = take_over(store, "b:1", lapse_s=3600)
    assert again is not None
    assert again.attempts == 1


def test_what_a_dead_process_held_is_free_at_once(store: Store) -> None:
    run = begun(store, owner="host:trainer_%:1:abc")
    assert not store.run(lambda session: runs.release_owner(session, "host:trainer_%"[:-1]))
    assert store.run(lambda session: runs.release_owner(session, "host:trainer_%:1"))
    taken = take_over(store, "b:1", lapse_s=3600)
    assert taken is not None
    assert taken.id == run.id


def test_a_step_that_is_measured_twice_is_one_point(store: Store) -> None:
    run = begun(store)
    for loss in (3.0, 2.0):
        store.run(
            lambda session, loss=loss: runs.add_metrics(
                session, run.lease, [RunMetrics(2, 20, {"loss": loss}), RunMetrics(1, 10, {"loss": 4.0})]
            )
        )
    assert store.run(lambda session: runs.metrics(session, run.id)) == [
        RunMetrics(1, 10, {"loss": 4.0}),
        RunMetrics(2, 20, {"loss": 3.0}),
    ]


def test_runs_are_listed_newest_first_in_pages(store: Store) -> None:
    ids = []
    for kind in ("refit", "retrain", "refit"):
        run = begun(store, kind=kind)
        finish(store, run, "failed" if kind == "retrain" else "rejected")
        ids.append(run.id)
    assert [run.id for run in store.run(runs.list_runs)] == ids[::-1]
    assert [run.id for run in store.run(lambda session: runs.list_runs(session, after=ids[2], limit=1))] == [ids[1]]
    assert [run.id for run in store.run(lambda session: runs.list_runs(session, kind="refit"))] == [ids[2], ids[0]]
    assert [run.id for run in store.run(lambda session: runs.list_runs(session, state="failed"))] == [ids[1]]
    with pytest.raises(StoreError, match="no id of a run"):
        store.run(lambda session: runs.list_runs(session, after="what"))


def snapshot(store: Store, rows: list[dict[str, object]]) -> str:
    chosen = uuid7()
    for _ in range(2):
        store.run(
            lambda session: snapshots.add(
                session, id=chosen, digest="d" * 64, rule="latest", counts={"train": 1}, members=snapshots.pack(rows)
            )
        )
    return chosen


def test_a_snapshot_comes_back_as_it_was_taken_and_cannot_be_changed(store: Store) -> None:
    rows: list[dict[str, object]] = [{"sha256": "1" * 64, "generator": "a\u2028b\nü"}, {"sha256": "2" * 64}]
    chosen = snapshot(store, rows)
    info = store.run(lambda session: snapshots.get(session, chosen))
    assert info is not None
    assert (info.digest, info.rule, info.counts) == ("d" * 64, "latest", {"train": 1})
    assert snapshots.unpack(store.run(lambda session: snapshots.members(session, chosen))) == rows
    assert snapshots.unpack(snapshots.pack([])) == []
    with pytest.raises(StoreError, match="immutable"):
        store.run(lambda session: session.execute(text("UPDATE snapshots SET rule = 'x'")))
    with pytest.raises(StoreError, match="no snapshot"):
        store.run(lambda session: snapshots.members(session, uuid7()))
    with pytest.raises(StoreError, match="cannot be read"):
        snapshots.unpack(b"damaged")


def test_a_release_goes_back_through_the_runs_that_made_it_to_where_nothing_is_recorded(store: Store) -> None:
    chosen = snapshot(store, [])

    def made(name: str, base: str | None, snapshot_id: str | None = chosen) -> str:
        run = begun(store)
        store.run(
            lambda session: runs.note(session, run.lease, snapshot_id=snapshot_id, candidate=name, base_release=base)
        )
        finish(store, run)
        return run.id

    def line(*names: str) -> dict[str, list[str]]:
        found = store.run(lambda session: runs.ancestry(session, names), write=False)
        return {release: [run.id for run in by] for release, by in found.items()}

    first, second = made("r-1", "r-imported"), made("r-2", "r-1")
    again, beside = made("r-2", "r-1"), made("r-3", "r-2")
    made("r-4", "r-3", None)
    whole = {"r-2": [again, second], "r-1": [first], "r-imported": []}
    assert list(line("r-2").items()) == list(whole.items()), "nearest first"
    assert line("r-3", "r-2") == {"r-3": [beside], **whole}
    assert line("r-1") == {"r-1": [first], "r-imported": []}, "what came after it is not in its line"
    assert line("r-4", "r-elsewhere") == {"r-4": [], "r-elsewhere": []}, "no snapshot says what it learned from"


def take(store: Store, run_id: str | None, *, slot: datetime = SLOT, name: str = "retrain") -> bool:
    return store.run(lambda session: schedule.take_slot(session, name, slot, run_id=run_id, outcome="started"))


def test_a_slot_is_taken_once(store: Store) -> None:
    first, second = uuid7(), uuid7()
    assert take(store, first)
    assert take(store, first), "a transaction tried twice takes it once"
    assert not take(store, second)
    assert take(store, second, name="refit")
    assert take(store, second, slot=SLOT + timedelta(days=7))
    with ThreadPoolExecutor(6) as pool:
        later = SLOT + timedelta(days=14)
        assert sum(pool.map(lambda _: take(store, uuid7(), slot=later), range(12))) == 1


def test_the_last_slots_of_a_schedule_are_known(store: Store) -> None:
    assert store.run(lambda session: schedule.last_slot(session, "retrain")) is None
    for days in (7, 0):
        take(store, uuid7(), slot=SLOT + timedelta(days=days))
    take(store, uuid7(), name="refit")
    newest = store.run(lambda session: schedule.last_slot(session, "retrain"))
    assert newest is not None
    assert (newest.slot, newest.outcome) == (SLOT + timedelta(days=7), "started")
    assert [slot.name for slot in slots(store)] == ["retrain", "refit", "retrain"]
