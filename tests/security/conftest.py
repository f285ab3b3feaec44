"""The command line, as the tests of its commands have it, and a small release to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from code_worker.plugins import Plugins, load_plugins
from code_worker.settings import Settings
from tests.cli.conftest import bare_cli, cli, sqlite_cli
from tests.toy_release import write_toy_release

__all__ = ["bare_cli", "cli", "sqlite_cli"]


@pytest.fixture(scope="session")
def plugins() -> Plugins:
    return load_plugins(Settings())


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_release(tmp_path_factory.mktemp("release") / "release", depth=1, images=8)


@pytest.fixture
def copy(release: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(release, tmp_path / "copy"))
