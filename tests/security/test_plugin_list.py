"""Plugins are code: with a list, only what it names is imported, and who runs can be seen."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from code_worker.errors import PluginError
from code_worker.plugins import load_plugins
from code_worker.settings import Settings

MODULE = """
from pathlib import Path
Path(__file__).with_name("imported").touch()
"""


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution `Some_Stranger` with a plugin; returns what its import leaves behind."""
    (tmp_path / "some_stranger.py").write_text(MODULE)
    info = tmp_path / "Some_Stranger-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: Some_Stranger\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[code_worker]\nstranger = some_stranger\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "some_stranger", raising=False)
    return tmp_path / "imported"


def test_without_a_list_whatever_is_installed_is_loaded_and_named(stranger: Path) -> None:
    loaded = load_plugins(Settings())
    assert stranger.exists()
    assert "'stranger' of Some_Stranger 1.2" in map(str, loaded.installed())


def test_what_is_not_on_the_list_is_never_imported(stranger: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load_plugins(Settings(plugins_allowed=()))
    assert not stranger.exists()
    assert {plugin.distribution for plugin in loaded.installed()} == {"code-worker"}
    assert {"linear", "knn", "svm"} <= set(loaded.heads())
    assert "Some_Stranger" in caplog.text


@pytest.mark.parametrize("spelling", ["some-stranger", "Some_Stranger", "SOME.STRANGER"])
def test_a_distribution_is_named_as_indexes_name_it(stranger: Path, spelling: str) -> None:
    load_plugins(Settings(plugins_allowed=(spelling,)))
    assert stranger.exists()


def test_a_name_that_nothing_has_is_an_error_and_nothing_is_imported(stranger: Path) -> None:
    with pytest.raises(PluginError, match="names absent, of which no plugin is installed"):
        load_plugins(Settings(plugins_allowed=("some-stranger", "absent")))
    assert not stranger.exists()


def test_the_plugins_directory_is_allowed_by_its_own_setting(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from code_worker import hookimpl\n")
    loaded = load_plugins(Settings(plugins_dir=tmp_path, plugins_allowed=()))
    assert "mine" in {plugin.name for plugin in loaded.installed()}


def test_the_list_can_be_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODE_WORKER_PLUGINS_ALLOWED", '["code-worker-texture"]')
    assert Settings().plugins_allowed == ("code-worker-texture",)
