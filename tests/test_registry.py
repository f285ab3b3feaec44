from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from code_worker.errors import ArtifactError, IntegrityError, NoReleaseError, PluginError, StoreError
from code_worker.plugins import Plugins, load_plugins
from code_worker.releases.artifacts import LocalArtifacts
from code_worker.releases.building import ReleaseFacts, build_from_parts
from code_worker.releases.manifest import MANIFEST_NAME, Source, read_manifest, release_id, write_manifest
from code_worker.releases.registry import Registry
from code_worker.settings import RoleSettings, Settings
from code_worker.store import releases
from code_worker.store.engine import Store, open_store
from tests.faults.proxy import TcpProxy
from tests.faults.rows import Seen, row
from tests.fork_server import forking_python
from tests.release_parts import write_plain_release
from tests.toy_release import write_toy_release


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return load_plugins(Settings())


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three small releases that differ in their notes alone."""
    toy_release_dir = write_toy_release(tmp_path_factory.mktemp("small") / "release", depth=1, images=8)
    directories = []
    for number in range(3):
        directory = tmp_path_factory.mktemp("three") / "release"
        shutil.copytree(toy_release_dir, directory)
        manifest, _ = read_manifest(directory)
        write_manifest(directory, manifest.model_copy(update={"notes": f"number {number}"}))
        directories.append(directory)
    return directories


@pytest.fixture
def artifacts(tmp_path: Path) -> LocalArtifacts:
    return LocalArtifacts(tmp_path / "artifacts")


@pytest.fixture
def registry(store: Store, artifacts: LocalArtifacts, plugins: Plugins) -> Registry:
    return Registry(store, artifacts, plugins, RoleSettings())


def history(store: Store) -> list[tuple[str, str | None, str, str]]:
    moves = store.run(lambda session: releases.moves(session, "champion"), write=False)
    return [(move.release_id, move.previous_id, move.by, move.reason) for move in moves]


def test_an_imported_release_is_listed_shown_and_loaded(registry: Registry, toy_release_dir: Path) -> None:
    id_ = registry.import_(str(toy_release_dir))
    manifest, sha256 = read_manifest(toy_release_dir)
    assert id_ == release_id(sha256)
    shown = registry.show(id_)
    assert shown.heads == ("knn", "linear", "svm")
    assert shown.aliases == ()
    assert shown.info.manifest == manifest.model_dump(mode="json")
    assert shown.summary()["toy"] is True
    assert registry.list() == [shown]
    assert registry.load(id_).manifest_sha256 == sha256
    assert registry.champion() is None, "importing promotes nothing"


def test_importing_the_same_release_again_changes_nothing(registry: Registry, toy_release_dir: Path) -> None:
    first = registry.import_(str(toy_release_dir))
    before = registry.show(first)
    assert registry.import_(str(toy_release_dir)) == first
    assert registry.list() == [before]


def test_promote_and_rollback_move_the_champion_and_tell_who_and_why(
    registry: Registry, store: Store, three: list[Path]
) -> None:
    a, b, c = (registry.add(directory) for directory in three)
    assert registry.promote(a, by="ann", reason="first") is None
    assert registry.promote(b, by="bob", reason="better") == a
    assert registry.promote(c, by="bob") == b
    assert registry.champion() == c
    assert [row.aliases for row in map(registry.show, (a, b, c))] == [(), (), ("champion",)]
    assert registry.rollback(by="ann", reason="too strict") == b
    assert registry.rollback(by="ann") == a
    with pytest.raises(StoreError, match="nothing to roll back to"):
        registry.rollback(by="ann")
    assert registry.champion() == a
    assert history(store) == [
        (a, b, "ann", ""),
        (b, c, "ann", "too strict"),
        (c, b, "bob", ""),
        (b, a, "bob", "better"),
        (a, None, "ann", "first"),
    ]


def test_moves_whose_answers_are_lost_are_made_once_and_tell_what_was_before(
    lossy_postgres: tuple[TcpProxy, str],
    postgres_store: Store,
    artifacts: LocalArtifacts,
    plugins: Plugins,
    three: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proxy, url = lossy_postgres
    monkeypatch.setattr("code_worker.store.engine.time.sleep", lambda _: proxy.refuse(refusing=False))
    with closing(open_store(url)) as store:
        registry = Registry(store, artifacts, plugins, RoleSettings())
        a, b, c = (registry.add(directory) for directory in three)
        registry.promote(a, by="ann")

        def losing(act: Callable[[], str | None]) -> str | None:
            proxy.cut_at_answer_to(b"COMMIT")
            told = act()
            assert proxy.cut.is_set()
            return told

        assert losing(lambda: registry.promote(b, by="ann")) == a
        assert losing(lambda: registry.challenge(c, by="ann")) is None
        assert losing(lambda: registry.withdraw(by="ann")) == c
        assert losing(lambda: registry.rollback(by="ann")) == a
    assert history(postgres_store) == [(a, b, "ann", ""), (b, a, "ann", ""), (a, None, "ann", "")]


def test_what_is_retired_at_the_moment_of_its_promotion_is_not_promoted(
    registry: Registry, store: Store, three: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (registry.add(directory) for directory in three[:2])
    registry.promote(a, by="ann")

    def retire(point: str) -> None:
        if point == "before_promotion":
            assert store.run(lambda session: releases.retire(session, b, "erased"))

    monkeypatch.setattr("code_worker.releases.registry.failpoint", retire)
    with pytest.raises(StoreError, match=r"cannot be r-[0-9a-f]+: erased"):
        registry.promote(b, by="ann")
    assert registry.champion() == a


def test_promoting_the_champion_again_is_no_move(registry: Registry, store: Store, three: list[Path]) -> None:
    a = registry.add(three[0])
    registry.promote(a, by="ann")
    assert registry.promote(a, by="ann") == a
    assert len(history(store)) == 1


def test_a_challenger_is_watched_until_it_is_withdrawn_or_becomes_the_champion(
    registry: Registry, three: list[Path]
) -> None:
    a, b, c = (registry.add(directory) for directory in three)
    registry.promote(a, by="ann")
    assert registry.challenger() is None
    assert registry.challenge(b, by="ann", reason="looks better") is None
    assert registry.challenge(c, by="bob") == b
    assert registry.show(c).aliases == ("challenger",)
    assert registry.withdraw(by="ann") == c
    assert registry.withdraw(by="ann") is None
    assert (registry.champion(), registry.challenger()) == (a, None)
    registry.challenge(b, by="ann")
    registry.promote(c, by="ann")
    assert registry.challenger() == b, "another promotion leaves it"
    registry.promote(b, by="ann")
    assert registry.challenger() is None
    registry.challenge(c, by="ann")
    registry.rollback(by="ann")
    assert (registry.champion(), registry.challenger()) == (c, None), "a rollback to it ends it as well"


def test_the_champion_is_not_its_own_challenger(registry: Registry, three: list[Path]) -> None:
    a = registry.add(three[0])
    registry.promote(a, by="ann")
    with pytest.raises(StoreError, match="cannot be its own challenger"):
        registry.challenge(a, by="ann")
    assert registry.challenger() is None


def test_a_challenger_must_load(registry: Registry, artifacts: LocalArtifacts, three: list[Path]) -> None:
    a, b = (registry.add(directory) for directory in three[:2])
    registry.promote(a, by="ann")
    with (artifacts.root / b / "heads" / "linear" / "head.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(IntegrityError):
        registry.challenge(b, by="ann")
    assert registry.challenger() is None


def test_without_a_champion_there_is_nothing_to_roll_back(registry: Registry) -> None:
    with pytest.raises(StoreError, match="nothing to roll back to"):
        registry.rollback(by="ann")


def test_an_unknown_release_is_named(registry: Registry) -> None:
    acts: tuple[Callable[[], object], ...] = (
        lambda: registry.show("r-0123456789ab"),
        lambda: registry.load("r-0123456789ab"),
        lambda: registry.promote("r-0123456789ab", by="ann"),
    )
    for act in acts:
        with pytest.raises(NoReleaseError, match="r-0123456789ab"):
            act()


def _flip(directory: Path) -> None:
    path = directory / "encoder/model.safetensors"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def _lose(directory: Path) -> None:
    (directory / "heads/svm/head.safetensors").unlink()


def _lose_all(directory: Path) -> None:
    shutil.rmtree(directory)


@pytest.mark.parametrize("damage", [_flip, _lose, _lose_all])
def test_a_damaged_release_is_never_promoted_and_the_champion_stays(
    registry: Registry, artifacts: LocalArtifacts, three: list[Path], damage: Callable[[Path], None]
) -> None:
    a, b = registry.add(three[0]), registry.add(three[1])
    registry.promote(a, by="ann")
    damage(artifacts.root / b)
    with pytest.raises(ArtifactError, match=b):
        registry.promote(b, by="ann")
    assert registry.champion() == a
    registry.add(three[1])
    registry.promote(b, by="ann")
    assert registry.champion() == b, "adding it again mends it"


def test_a_rollback_to_a_damaged_release_is_refused_and_the_champion_stays(
    registry: Registry, artifacts: LocalArtifacts, three: list[Path]
) -> None:
    a, b = registry.add(three[0]), registry.add(three[1])
    registry.promote(a, by="ann")
    registry.promote(b, by="ann")
    _lose(artifacts.root / a)
    with pytest.raises(IntegrityError, match="missing: heads/svm"):
        registry.rollback(by="ann")
    assert registry.champion() == b


def test_files_that_fit_their_own_manifest_but_not_the_registered_one_are_refused(
    store: Store, artifacts: LocalArtifacts, plugins: Plugins, toy_release_dir: Path
) -> None:
    _, sha256 = read_manifest(toy_release_dir)
    artifacts.put(toy_release_dir)
    twin = sha256[:12] + "0" * 52
    store.run(
        lambda session: releases.add(
            session, id=release_id(sha256), manifest_sha256=twin, location="", manifest={}, source="", by="ann"
        )
    )
    with pytest.raises(IntegrityError, match="not the registered one"):
        Registry(store, artifacts, plugins, RoleSettings()).load(release_id(sha256))


def test_a_release_whose_files_are_no_model_is_not_promoted(registry: Registry, tmp_path: Path) -> None:
    write_plain_release(tmp_path / "plain")
    id_ = registry.add(tmp_path / "plain")
    with pytest.raises(ArtifactError, match="encoder config"):
        registry.promote(id_, by="ann")
    assert registry.champion() is None


def test_a_release_without_heads_is_not_promoted(registry: Registry, plugins: Plugins, tmp_path: Path) -> None:
    from code_worker.encoder.weights import random_weights

    facts = ReleaseFacts(source=Source(uri="test"))
    build_from_parts(tmp_path / "bare", random_weights(0, depth=1), {}, plugins, facts)
    with pytest.raises(ArtifactError, match="no head"):
        registry.promote(registry.add(tmp_path / "bare"), by="ann")


def test_a_release_whose_plugins_are_gone_is_not_promoted(
    store: Store, artifacts: LocalArtifacts, three: list[Path]
) -> None:
    registry = Registry(store, artifacts, Plugins(), RoleSettings())
    with pytest.raises(PluginError, match=r"of code-worker .* not installed"):
        registry.promote(registry.add(three[0]), by="ann")


def test_promotions_at_the_same_moment_leave_one_champion_and_an_unbroken_history(
    registry: Registry, store: Store, three: list[Path]
) -> None:
    ids = [registry.add(directory) for directory in three]
    threads = [threading.Thread(target=registry.promote, args=(id_,), kwargs={"by": id_}) for id_ in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    moves = history(store)
    assert registry.champion() == moves[0][0]
    assert {move[0] for move in moves} == set(ids)
    assert [move[1] for move in moves] == [*(move[0] for move in moves[1:]), None]


CRASH = """
import os, sys
from pathlib import Path
from code_worker.plugins import load_plugins
from code_worker.releases import artifacts, registry
from code_worker.system import files
from code_worker.settings import RoleSettings, Settings
from code_worker.store import releases
from code_worker.store.engine import open_store

url, root, release, point = sys.argv[1:]
die = lambda *_, **__: os._exit(9)
if point == "before the copy":
    artifacts.shutil.copytree = die
elif point == "during the copy":
    files.flush = die
elif point == "before the row":
    releases.add = die
elif point == "before the move":
    releases.move_alias = die
elif point == "in the transaction":
    move = releases.move_alias
    releases.move_alias = lambda *a, **k: (move(*a, **k), die())
plugins, roles = load_plugins(Settings()), RoleSettings()
found = registry.Registry(open_store(url), artifacts.LocalArtifacts(Path(root)), plugins, roles)
found.promote(found.add(Path(release)), by="crash")
die()
"""


@row(
    "F28",
    injection="the promoting process dies {point}",
    expected="one live release, whole; promoting again promotes once",
)
@pytest.mark.parametrize(
    ("kind", "point", "moved"),
    [
        ("sqlite", "before the copy", False),
        ("postgres", "during the copy", False),
        ("sqlite", "before the row", False),
        ("postgres", "before the move", False),
        ("sqlite", "in the transaction", False),
        ("postgres", "in the transaction", False),
        ("sqlite", "after the commit", True),
        ("postgres", "after the commit", True),
    ],
)
def test_a_crash_anywhere_in_a_promotion_leaves_one_whole_champion(
    request: pytest.FixtureRequest,
    artifacts: LocalArtifacts,
    plugins: Plugins,
    three: list[Path],
    kind: str,
    point: str,
    *,
    moved: bool,
    seen: Seen,
) -> None:
    store: Store = request.getfixturevalue(f"{kind}_store")
    registry = Registry(store, artifacts, plugins, RoleSettings())
    old, new = registry.add(three[0]), release_id(read_manifest(three[1])[1])
    registry.promote(old, by="ann")
    words = [forking_python(), "-c", CRASH, store.url, str(artifacts.root), str(three[1]), point]
    assert subprocess.run(words, check=False, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 9
    champion = registry.champion()
    assert champion == (new if moved else old)
    assert registry.load(champion).id == champion
    for listed in registry.list():
        assert (Path(listed.info.location) / MANIFEST_NAME).is_file(), "a row always leads to a release"
    registry.promote(registry.add(three[1]), by="ann")
    assert registry.champion() == new
    assert [move[0] for move in history(store)] == [new, old], "promoted once"
    seen(live_releases=1, whole=1, promotions=1)
