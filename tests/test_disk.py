"""Directories of users without a home or rights; files that are there whole or not at all; locks."""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from code_worker.errors import ConfigurationError
from code_worker.images.local_files import FileSource
from code_worker.plugins import load_plugins
from code_worker.roles import current_user
from code_worker.settings import FileSettings, Settings, load_settings
from code_worker.system.files import locked, whole_directory, whole_file
from tests.patience import LIMIT_S

_WITHOUT_CAPABILITIES = """
import ctypes, os, sys
if os.getuid() == 0:
    # root is kept out by modes, as others are, once it has given up its capabilities
    version_and_process = (ctypes.c_uint32 * 2)(0x20080522, 0)
    assert ctypes.CDLL(None).capset(version_and_process, (ctypes.c_uint32 * 6)()) == 0
sys.argv[0] = "code-worker"
from code_worker.cli.main import main
main()
"""


@pytest.fixture(params=["no variable", "an empty variable"])
def homeless(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user of whom no file knows, as in containers that run as any number."""

    def unknown(number: int) -> pwd.struct_passwd:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setenv("HOME", " ")
    if request.param == "no variable":
        monkeypatch.delenv("HOME")


@pytest.mark.usefixtures("homeless")
def test_without_a_home_each_path_in_it_is_named_with_its_setting(tmp_path: Path) -> None:
    home = Path("~/x")
    settings = Settings(artifacts="~/x", datasets="~/x", plugins_dir=home)
    for setting, use in (
        ("DATA_DIR", lambda: settings.data_path),
        ("DATA_DIR", lambda: settings.resolved_database_url),
        ("ARTIFACTS", lambda: settings.resolved_artifacts),
        ("DATASETS", lambda: settings.resolved_datasets),
        ("PLUGINS_DIR", lambda: load_plugins(settings)),
        ("FILES__ROOTS", lambda: FileSource(FileSettings(roots=(home,)), max_bytes=1)),
    ):
        with pytest.raises(
            ConfigurationError, match=f"this user has none: set CODE_WORKER_{setting} to an absolute path"
        ):
            use()
    assert load_settings(data_dir=tmp_path).data_path == tmp_path
    assert current_user() == f"uid {os.getuid()}"


@pytest.mark.parametrize("command", ["jobs list", "db upgrade", "worker"])
def test_a_user_without_rights_on_the_data_directory_gets_a_line(command: str, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    environment = os.environ | {"CODE_WORKER_DATA_DIR": str(closed)}
    program = [sys.executable, "-c", _WITHOUT_CAPABILITIES, *command.split()]
    ended = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    closed.chmod(0o700)
    assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
    (line,) = ended.stderr.splitlines()
    assert str(closed) in line
    assert "set CODE_WORKER_DATA_DIR" in line


def test_a_data_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    named = f"CODE_WORKER_DATA_DIR names {tmp_path}/file"
    with pytest.raises(ConfigurationError, match=f"^{named}, which is a file: name a directory$"):
        _ = Settings(data_dir=tmp_path / "file").data_path
    with pytest.raises(ConfigurationError, match=f"^{named}/a/b, and {tmp_path}/file is a file: name a directory$"):
        _ = Settings(data_dir=tmp_path / "file" / "a" / "b").data_path


@pytest.mark.parametrize("private", [False, True])
def test_a_file_takes_its_place_whole_or_not_at_all(private: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before", encoding="utf-8")
    with pytest.raises(UnicodeEncodeError), whole_file(path, private=private) as partial:
        partial.write_text("written" * 9_999 + "é", encoding="ascii")
    assert path.read_text(encoding="utf-8") == "before"
    with whole_file(path, private=private) as partial:
        partial.write_text("after", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "before"
    assert path.read_text(encoding="utf-8") == "after"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == (0o600 if private else 0o666 & ~umask)


def test_a_directory_takes_its_place_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "release"
    path.mkdir()
    (path / "before").touch()
    with pytest.raises(FileNotFoundError), whole_directory(path) as partial:
        (partial / "no directory" / "file").touch()
    assert [each.name for each in path.iterdir()] == ["before"]
    with whole_directory(path) as partial:
        (partial / "after").touch()
    assert [each.name for each in path.iterdir()] == ["after"]
    assert [each.name for each in tmp_path.iterdir()] == ["release"]


def test_one_process_holds_a_lock_and_its_end_frees_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("of a holder", encoding="utf-8")
    looks: list[str] = []
    with locked(path):
        with pytest.raises(BlockingIOError), locked(path):
            pass
        with pytest.raises(KeyboardInterrupt), locked(path, wait_s=LIMIT_S, check=lambda: _interrupt(looks)):
            pass
    assert looks == ["looked"]
    with locked(path):
        assert path.read_text(encoding="utf-8") == "of a holder"
    with pytest.raises(FileNotFoundError), locked(tmp_path / "other", create=False):
        pass


def _interrupt(looks: list[str]) -> None:
    looks.append("looked")
    raise KeyboardInterrupt
