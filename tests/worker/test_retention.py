"""Retention as a worker runs it: in turns, in passes that end, copies included."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import Connection, Engine, QueuePool, event, text

from code_worker.data.erasure.erase import Eraser
from code_worker.data.kept_copies import LocalKept
from code_worker.settings import RetentionSettings, Settings, WorkerSettings
from code_worker.store import workers
from code_worker.store.engine import Store
from code_worker.store.erasure import receipts
from code_worker.store.erasure.scopes import Scope
from code_worker.store.ids import uuid7
from code_worker.store.learning import labels
from code_worker.worker.app import create_app, host_of
from code_worker.worker.retention import Retention
from tests.training.learning import label, pictures
from tests.worker.harness import wait_until

OLD = 0.05 / 86_400


def retention(store: Store, directory: Path, owner: str = "a", **ages: float | None) -> Retention:
    settings = Settings(data_dir=directory, retention=RetentionSettings(**{"interval_s": 0.1, **ages}))  # type: ignore[arg-type]
    return Retention(settings, store, owner)


def letters(store: Store) -> int:
    return len(store.run(workers.list_dead_letters, write=False))


def leave(store: Store, count: int) -> None:
    def write(session):  # type: ignore[no-untyped-def]  # SQLAlchemy's session
        for number in range(count):
            workers.dead_letter(session, task="t", body=str(number), error="e")

    store.run(write)
    time.sleep(0.12)


def test_one_process_at_a_time_deletes_all_that_is_old_batch_by_batch(sqlite_store: Store, tmp_path: Path) -> None:
    leave(sqlite_store, 7)
    mine = retention(sqlite_store, tmp_path, dead_letters_days=OLD, batch=2, interval_s=600)
    assert mine() == {"dead_letters": 7}
    leave(sqlite_store, 1)
    assert retention(sqlite_store, tmp_path, owner="b", dead_letters_days=OLD)() == {}, "it is another's turn"
    assert mine() == {"dead_letters": 1}


def test_a_pass_that_is_told_to_stop_or_out_of_time_leaves_the_rest_to_the_next(
    sqlite_store: Store, tmp_path: Path
) -> None:
    leave(sqlite_store, 3)
    hurried = retention(sqlite_store, tmp_path, dead_letters_days=OLD, batch=1, pass_s=1e-9)
    assert hurried() == {}
    stopped = retention(sqlite_store, tmp_path, dead_letters_days=OLD, batch=1)
    stopped.stop()
    assert stopped() == {}
    assert letters(sqlite_store) == 3


def test_nothing_of_record_has_an_age_unless_somebody_sets_one(sqlite_store: Store, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    label(settings, sqlite_store, pictures("real", 2), "real")
    time.sleep(0.12)
    short = dict.fromkeys(["embeddings_days", "shadow_days", "dead_letters_days", "curves_days", "slots_days"], OLD)
    assert retention(sqlite_store, tmp_path, **short)() == {}
    assert len(sqlite_store.run(lambda session: labels.list_labels(session, limit=9))) == 2


def test_a_pass_reads_no_receipt_that_is_closed(sqlite_store: Store, tmp_path: Path) -> None:
    ids = [uuid7().replace("-", "") for _ in range(300)]
    with sqlite_store.engine.begin() as connection:
        connection.execute(
            text(
                'INSERT INTO erasures (id, state, scope, "by", why, salt, counts, releases, runs, created_at, '
                "finished_at) VALUES (:id, 'done', 'job', 'o', '', '00', '{}', '{}', '[]', "
                " '2026-01-01', '2026-01-02')"
            ),
            [{"id": one} for one in ids],
        )
    (tmp_path / "runs" / "of-a-run").mkdir(parents=True)
    loaded: list[object] = []

    made = receipts.Receipt.__init__

    def receipt(self: receipts.Receipt, **columns: Any) -> None:
        loaded.append(columns)
        made(self, **columns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(receipts.Receipt, "__init__", receipt)
        retention(sqlite_store, tmp_path)()
        assert loaded == []
        assert len(sqlite_store.run(receipts.list_receipts)) == len(loaded) == 300


def test_copies_go_with_the_labels(sqlite_store: Store, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    hashes = label(settings, sqlite_store, pictures("real", 3), "real")
    with sqlite_store.engine.begin() as connection:
        # Ids begin with the time: these become those of 1991.
        connection.execute(text("drop trigger labels_immutable"))
        connection.execute(text("update labels set id = '00' || substr(id, 3)"))
    (late,) = label(settings, sqlite_store, pictures("real", 1, first=3), "real")
    kept = LocalKept(Path(settings.resolved_datasets))
    assert sorted(kept.held()) == sorted([*hashes, late])
    assert retention(sqlite_store, tmp_path, labels_days=1, batch=2)() == {"labels": 3}
    assert list(kept.held()) == [late]


def test_a_worker_does_it_in_the_background_until_it_ends(sqlite_store: Store, tmp_path: Path) -> None:
    leave(sqlite_store, 2)
    settings = Settings(
        data_dir=tmp_path,
        database_url=SecretStr(sqlite_store.url),
        broker_url=SecretStr("memory://"),
        retention=RetentionSettings(dead_letters_days=OLD, interval_s=0.1),
        worker=WorkerSettings(sweep_interval_s=3600),
    )
    host = host_of(create_app(settings))
    host.start_sweeping()
    try:
        wait_until(lambda: letters(sqlite_store) == 0, 120, "the worker deletes what is old")
    finally:
        host.stop_taking()
        host.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "retention"]


def test_a_worker_opens_as_many_connections_as_operations_says(sqlite_store: Store, tmp_path: Path) -> None:
    leave(sqlite_store, 2)
    settings = Settings(
        data_dir=tmp_path,
        database_url=SecretStr(sqlite_store.url),
        broker_url=SecretStr("memory://"),
        retention=RetentionSettings(dead_letters_days=OLD, interval_s=0.1),
    )
    pools = {sqlite_store.engine.pool}

    def note(connection: Connection) -> None:
        pools.add(connection.engine.pool)

    host = host_of(create_app(settings))
    event.listen(Engine, "engine_connect", note)
    try:
        host.node()
        host.start_sweeping()
        host.sweep()
        wait_until(lambda: letters(sqlite_store) == 0, 120, "retention was at work")
    finally:
        event.remove(Engine, "engine_connect", note)
        host.stop_taking()
        host.close()
    sizes = [pool.size() for pool in pools - {sqlite_store.engine.pool} if isinstance(pool, QueuePool)]
    # One for all parts of the process, and no pool grows beyond its size.
    assert sizes == [settings.worker.concurrency + settings.worker.fetch_threads + 6]


def test_what_a_dead_process_left_of_an_erasure_is_finished(
    sqlite_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(data_dir=tmp_path)
    (sha256,) = label(settings, sqlite_store, pictures("real", 1), "real")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Eraser, "_erase_letters", die)
    with pytest.raises(KeyboardInterrupt):
        Eraser(settings, sqlite_store).erase(Scope(sha256=sha256), by="olga")
    monkeypatch.undo()
    retention(sqlite_store, tmp_path)()
    (receipt,) = sqlite_store.run(receipts.list_receipts)
    assert receipt.state == "done"
    assert not LocalKept(Path(settings.resolved_datasets)).exists(sha256)


def test_each_machine_drops_what_its_own_directory_still_holds(sqlite_store: Store, tmp_path: Path) -> None:
    mine, shared = tmp_path / "other-machine", Settings(data_dir=tmp_path / "shared")
    run, gone = "0198c5a2-7f31-7abc-9def-0123456789ab", "0198c5a2-7f31-7abc-9def-0123456789ac"
    for name in (run, gone):
        (mine / "runs" / name / "job").mkdir(parents=True)
    cache = LocalKept(mine / "cache" / "dataset")
    stale, fresh = cache.put(b"erased elsewhere"), cache.put(b"just fetched")
    os.utime(cache.path(stale), (0, 0))
    (kept,) = label(shared, sqlite_store, pictures("real", 1), "real")
    os.utime(cache.path(cache.put(pictures("real", 1)[0])), (0, 0))
    (mine / "cache" / "releases" / "r-0123456789ab").mkdir(parents=True)

    def receive(session):  # type: ignore[no-untyped-def]  # SQLAlchemy's session
        receipts.begin(session, id=run, scope="job", target={}, by="olga", why="", salt="00")
        released = {"r-0123456789ab": {"how": "learned", "files": "deleted"}}
        receipts.note(session, run, releases=released, runs=[gone])
        receipts.finish(session, run, {})

    sqlite_store.run(receive)
    retention(sqlite_store, mine, owner="another")()
    assert [path.name for path in (mine / "runs").iterdir()] == [run]
    assert set(cache.held()) == {fresh, kept}
    assert not (mine / "cache" / "releases" / "r-0123456789ab").exists()
