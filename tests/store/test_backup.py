"""A copy of one moment while others write, and the way back to it."""

from __future__ import annotations

import sqlite3
import stat
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from code_worker.errors import ConfigurationError, StoreError, StoreUnavailableError
from code_worker.store import jobs, migrate
from code_worker.store.backup import backup, restore
from code_worker.store.engine import Store, open_store
from tests.store.acts import accept


def numbers(url: str) -> set[int]:
    """Which of the jobs `s3://b/0`, `s3://b/1` … a database holds."""
    with closing(open_store(url)) as store:
        migrate.require_current(store)
        found = store.run(lambda session: jobs.list_jobs(session, limit=100_000), write=False)
    return {int(job.uri.rpartition("/")[2]) for job in found}


@pytest.fixture
def writing(sqlite_store: Store) -> Callable[[], int]:
    """Accepts jobs one after the other in the background; calling it ends that and says how many there are."""
    stop, count = threading.Event(), [0]

    def write() -> None:
        while not stop.is_set():
            accept(sqlite_store, f"s3://b/{count[0]}")
            count[0] += 1

    thread = threading.Thread(target=write)
    thread.start()

    def end() -> int:
        stop.set()
        thread.join(120)
        return count[0]

    return end


def test_copies_taken_while_others_write_are_whole_and_of_one_moment(
    sqlite_store: Store, writing: Callable[[], int], tmp_path: Path
) -> None:
    sizes = []
    try:
        for number in range(5):
            target = tmp_path / "copies" / f"{number}.db"
            assert backup(sqlite_store.url, target) == target.stat().st_size
            sizes.append(len(numbers(f"sqlite:///{target}")))
            assert numbers(f"sqlite:///{target}") == set(range(sizes[-1])), "all up to a moment, and none after it"
    finally:
        total = writing()
    assert sizes == sorted(sizes)
    assert 0 < sizes[-1] <= total
    assert sizes[0] < total, "somebody wrote meanwhile"


def test_a_copy_is_one_private_file(sqlite_store: Store, tmp_path: Path) -> None:
    accept(sqlite_store, "s3://b/0")
    target = tmp_path / "copies" / "a.db"
    backup(sqlite_store.url, target)
    assert [path.name for path in target.parent.iterdir()] == ["a.db"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    with pytest.raises(ConfigurationError, match="there already"):
        backup(sqlite_store.url, target)


def test_what_is_restored_is_seen_by_who_has_the_database_open_and_the_present_is_kept_aside(
    sqlite_store: Store, tmp_path: Path
) -> None:
    accept(sqlite_store, "s3://b/0", "s3://b/1")
    backup(sqlite_store.url, tmp_path / "two.db")
    accept(sqlite_store, "s3://b/2")
    restore(sqlite_store.url, tmp_path / "two.db", tmp_path / "aside.db")
    assert len(sqlite_store.run(lambda session: jobs.list_jobs(session, limit=9))) == 2
    accept(sqlite_store, "s3://b/7")
    assert numbers(sqlite_store.url) == {0, 1, 7}
    assert numbers(f"sqlite:///{tmp_path / 'aside.db'}") == {0, 1, 2}
    assert numbers(f"sqlite:///{tmp_path / 'two.db'}") == {0, 1}


def test_a_database_that_is_gone_comes_back(sqlite_store: Store, tmp_path: Path) -> None:
    accept(sqlite_store, "s3://b/0")
    backup(sqlite_store.url, tmp_path / "one.db")
    url = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    restore(url, tmp_path / "one.db", tmp_path / "aside.db")
    assert numbers(url) == {0}
    assert not (tmp_path / "aside.db").exists()


@pytest.mark.parametrize("content", [b"", b"no database at all" * 100])
def test_what_is_no_copy_is_refused_and_changes_nothing(sqlite_store: Store, tmp_path: Path, content: bytes) -> None:
    accept(sqlite_store, "s3://b/0")
    (tmp_path / "bad.db").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"bad\.db is no database of code_worker: .*: name a copy"):
        restore(sqlite_store.url, tmp_path / "bad.db", tmp_path / "aside.db")
    assert numbers(sqlite_store.url) == {0}


def test_a_database_of_somebody_else_is_no_copy(sqlite_store: Store, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("CREATE TABLE songs (title)")
        other.commit()
    with pytest.raises(ConfigurationError, match=r"other\.db is no database of code_worker: .*: name a copy"):
        restore(sqlite_store.url, tmp_path / "other.db", tmp_path / "aside.db")
    assert not (tmp_path / "aside.db").exists()


def test_a_copy_that_was_damaged_is_refused(sqlite_store: Store, tmp_path: Path) -> None:
    accept(sqlite_store, *(f"s3://b/{number}" for number in range(500)))
    backup(sqlite_store.url, tmp_path / "a.db")
    content = bytearray((tmp_path / "a.db").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4096] = b"\xff" * 4096
    (tmp_path / "a.db").write_bytes(content)
    with pytest.raises(StoreError, match=r"a\.db"):
        restore(sqlite_store.url, tmp_path / "a.db", tmp_path / "aside.db")
    assert len(numbers(sqlite_store.url)) == 500


def test_postgresql_is_left_to_its_own_tools(tmp_path: Path) -> None:
    for work in (
        lambda url: backup(url, tmp_path / "a"),
        lambda url: restore(url, tmp_path / "a", tmp_path / "b"),
    ):
        with pytest.raises(ConfigurationError, match="for PostgreSQL use pg_"):
            work("postgresql+psycopg://user@host/name")
    with pytest.raises(StoreError, match="nothing to copy"):
        backup(f"sqlite:///{tmp_path / 'none.db'}", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_restore_gives_up_when_somebody_writes_all_the_time(
    sqlite_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite's own backup tries a locked database for ever."""
    accept(sqlite_store, "s3://b/0")
    backup(sqlite_store.url, tmp_path / "one.db")
    accept(sqlite_store, "s3://b/1")
    monkeypatch.setattr("code_worker.store.backup._PATIENCE_S", 0.2)
    with closing(sqlite3.connect(sqlite_store.url.removeprefix("sqlite:///"), isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailableError, match=r"writing to it for 0\.2 s: stop workers, trainer and beat"):
            restore(sqlite_store.url, tmp_path / "one.db", tmp_path / "aside.db")
        holder.execute("ROLLBACK")
    assert numbers(sqlite_store.url) == {0, 1}
    restore(sqlite_store.url, tmp_path / "one.db", tmp_path / "aside-2.db")
    assert numbers(sqlite_store.url) == {0}
