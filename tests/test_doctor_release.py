"""The doctor's look at the champion: it says what whoever loads the release says."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from code_worker.doctor import examine
from code_worker.doctor.check import Check, Status
from code_worker.encoder.weights import random_weights
from code_worker.errors import CodeWorkerError
from code_worker.plugins import load_plugins
from code_worker.releases.building import ReleaseFacts, build_from_parts
from code_worker.releases.manifest import Source
from code_worker.releases.registry import open_registry
from code_worker.settings import Settings, load_settings
from code_worker.store.engine import Store, open_store

Find = Callable[..., list[Check]]

HALF = """
import numpy as np
from code_worker import Head, HeadSpec, hookimpl

class HalfHead(Head):
    def fit(self, embeddings, labels):
        return self
    def score(self, embeddings):
        return np.full(len(embeddings), 0.5, np.float32)
    def save(self, directory):
        (directory / "half.txt").write_text("0.5")
    @classmethod
    def load(cls, directory, options=None):
        return cls(options)

@hookimpl
def code_worker_register_heads():
    return [HeadSpec("half", HalfHead)]
"""


@pytest.fixture
def settings(tmp_path: Path, migrated_sqlite: Path) -> Settings:
    """Of a migrated database and a directory for plugins."""
    for name in ("data", "plugins"):
        (tmp_path / name).mkdir(mode=0o700)
    shutil.copy(migrated_sqlite, tmp_path / "data" / "code_worker.db")
    return load_settings(data_dir=tmp_path / "data", plugins_dir=tmp_path / "plugins")


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    with closing(open_store(settings.resolved_database_url)) as opened:
        yield opened


@pytest.fixture
def find(tmp_path: Path) -> Find:
    """The findings about the release."""
    here = {"data_dir": tmp_path / "data", "plugins_dir": tmp_path / "plugins"}
    return lambda **overrides: list(examine(["release"], **{**here, **overrides}))


@pytest.fixture
def half(settings: Settings, store: Store, tmp_path: Path) -> Path:
    """The file of the plugin whose head the champion has."""
    path = tmp_path / "plugins" / "half.py"
    path.write_text(HALF)
    plugins = load_plugins(settings)
    weights, facts = random_weights(0, depth=1), ReleaseFacts(source=Source(uri="test"))
    build_from_parts(tmp_path / "half", weights, {"half": plugins.head_class("half")()}, plugins, facts)
    registry = open_registry(settings, store=store, plugins=plugins)
    registry.promote(registry.add(tmp_path / "half"), by="test", reason="test")
    return path


def _refusal(settings: Settings, store: Store) -> tuple[str, str]:
    """The champion, and what whoever loads it says."""
    registry = open_registry(settings, store=store, plugins=load_plugins(settings))
    champion = registry.champion() or ""
    with pytest.raises(CodeWorkerError) as caught:
        registry.load(champion)
    return champion, str(caught.value)


def test_a_champion_whose_plugin_changed_is_a_fault_as_for_who_loads_it(
    find: Find, half: Path, settings: Settings, store: Store
) -> None:
    (well,) = find()
    assert well.status is Status.OK
    half.write_text(HALF.replace("0.5, np", "0.75, np"))
    (found,) = find()
    champion, refusal = _refusal(settings, store)
    assert "does not score as it did" in refusal
    assert (found.status, found.message) == (Status.FAIL, f"champion {champion} cannot judge here: {refusal}")
    (warned,) = find(changed_heads="warn")
    assert warned.status is Status.WARN
    assert "does not score as it did" in warned.message


def test_a_champion_whose_plugin_is_gone_is_a_fault_as_for_who_loads_it(
    find: Find, half: Path, settings: Settings, store: Store
) -> None:
    half.unlink()
    (found,) = find()
    champion, refusal = _refusal(settings, store)
    assert "needs the plugin head 'half'" in refusal
    assert (found.status, found.message) == (Status.FAIL, f"champion {champion} cannot judge here: {refusal}")
