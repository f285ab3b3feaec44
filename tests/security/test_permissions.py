"""The data directory: private whatever makes it first, and `doctor` says when it is not any more."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from code_worker.data.kept_copies import open_kept
from code_worker.doctor import examine
from code_worker.doctor.check import Status
from code_worker.releases.artifacts import open_artifacts
from code_worker.settings import Settings
from code_worker.stack.embedded import EmbeddedBroker
from code_worker.store import migrate
from code_worker.store.engine import open_store
from code_worker.system.files import make_private
from code_worker.training.run_context import RunDirectory
from tests.release_parts import write_plain_release


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    """The most careless umask there is: what is private is so by our own doing."""
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def open_database(settings: Settings) -> None:
    with closing(open_store(settings.resolved_database_url)) as store:
        migrate.upgrade(store)


def keep_release(settings: Settings) -> None:
    directory = settings.data_path.parent.parent / "release"
    write_plain_release(directory)
    open_artifacts(settings).put(directory)


def begin_run(settings: Settings) -> None:
    with RunDirectory(settings.data_path / "runs", "0198c5a2-7f31-7abc-9def-0123456789ab").open(
        lambda: None, wait_s=1
    ):
        pass


MAKERS: dict[str, Callable[[Settings], object]] = {
    "database": open_database,
    "kept image": lambda settings: open_kept(settings).put(b"an image"),
    "embedded broker": lambda settings: EmbeddedBroker(settings.data_path).prepare(),
    "release": keep_release,
    "training run": begin_run,
}


@pytest.mark.parametrize("first", MAKERS)
def test_whatever_comes_first_makes_it_private(tmp_path: Path, first: str) -> None:
    settings = Settings(data_dir=tmp_path / "above" / "data")
    MAKERS[first](settings)
    assert {path: mode(path) for path in (settings.data_path, settings.data_path.parent)} == {
        settings.data_path: 0o700,
        settings.data_path.parent: 0o700,
    }


def test_files_with_secrets_are_their_owners(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    open_database(settings)
    sha256 = open_kept(settings).put(b"an image")
    broker = EmbeddedBroker(settings.data_path)
    broker.prepare()
    broker.publish()
    secret = [
        *settings.data_path.glob("code_worker.db*"),
        settings.data_path / "broker" / "valkey.conf",
        settings.data_path / "broker" / "address",
        settings.data_path / "run" / "broker.url",
        next(Path(settings.resolved_datasets).rglob(sha256)),
    ]
    assert {path.name: mode(path) for path in secret if mode(path) != 0o600} == {}


def test_doctor_names_what_is_open_to_others(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    open_database(settings)

    def found() -> list[tuple[Status, str]]:
        checks = examine(["data directory"], data_dir=settings.data_dir)
        return [(check.status, check.hint) for check in checks if check.name == "data directory"]

    assert [status for status, _ in found()] == [Status.OK]
    database = settings.data_path / "code_worker.db"
    database.chmod(0o640)
    settings.data_path.chmod(0o755)
    assert found() == [
        (Status.WARN, f"chmod 700 {settings.data_path}"),
        (Status.WARN, f"chmod 600 {database}"),
    ]


def test_what_is_there_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir(mode=0o755)
    make_private(tmp_path / "there" / "new")
    make_private(tmp_path / "there" / "new")
    assert (mode(tmp_path / "there"), mode(tmp_path / "there" / "new")) == (0o755, 0o700)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        make_private(tmp_path / "file" / "below")
