"""Releases that learned from what is erased: those made at that moment, put back, or left by a process that died."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from code_worker.data.erasure.erase import Eraser
from code_worker.data.erasure.references import Unlearning, drop_forgotten
from code_worker.data.kept_copies import open_kept
from code_worker.errors import ArtifactError, NoReleaseError, RunLostError
from code_worker.plugins import load_plugins
from code_worker.releases.artifacts import LocalArtifacts, open_artifacts
from code_worker.releases.building import ReleaseFacts, build_from_parts
from code_worker.releases.manifest import Source
from code_worker.releases.registry import Registry
from code_worker.settings import Settings
from code_worker.store import releases
from code_worker.store.engine import Session, Store
from code_worker.store.erasure import receipts
from code_worker.store.erasure.receipts import Receipt
from code_worker.store.erasure.scopes import Scope
from code_worker.store.ids import uuid7
from code_worker.store.learning import runs, snapshots
from code_worker.store.learning.runs import Run
from code_worker.store.leases import RoleLease
from code_worker.training.refit import Origin
from code_worker.training.run_context import RunContext, RunDirectory, RunLease, RunServices
from code_worker.worker.retention import Retention
from tests.training.learning import NEW, learning_settings, registry_of, tiny_weights

SHA = "c" * 64


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return learning_settings(tmp_path / "data")


def build(directory: Path, source: str) -> Path:
    """A release of an encoder alone."""
    facts = ReleaseFacts(source=Source(uri=source), toy=True)
    build_from_parts(directory, tiny_weights(), {}, load_plugins(Settings()), facts)
    return directory


@pytest.fixture
def built(tmp_path: Path) -> Path:
    return build(tmp_path / "built", "a test")


class Interrupted(LocalArtifacts):
    """Something else happens once a release is stored."""

    def __init__(self, root: Path, meanwhile: Callable[[str], object]) -> None:
        super().__init__(root)
        self.meanwhile = meanwhile

    def put(self, directory: Path) -> str:
        location = super().put(directory)
        self.meanwhile(Path(location).name)
        return location


def registry_with(artifacts: LocalArtifacts, store: Store, settings: Settings) -> Registry:
    return Registry(store, artifacts, load_plugins(settings), settings.roles)


def receipt_of(store: Store) -> Receipt:
    (receipt,) = store.run(receipts.list_receipts)
    return receipt


def learns_from(session: Session, sha256: str) -> Run:
    """A run under way that learns from an image."""
    snapshot, member = uuid7(), {"sha256": sha256, "label": 1, "generator": NEW, "collection": None, "split": "train"}
    packed = snapshots.pack([member])
    snapshots.add(session, id=snapshot, digest="d", rule="newest", counts={}, members=packed)
    run = runs.start(session, id=uuid7(), kind="refit", by="a", owner="a:1", config={}, base_release="r-0")
    assert run is not None
    runs.note(session, run.lease, snapshot_id=snapshot)
    return replace(run, snapshot_id=snapshot)


def add_candidate(settings: Settings, store: Store, run: Run, meanwhile: Callable[[str], object]) -> str:
    """As a run does with what it has built."""
    artifacts = Interrupted(settings.data_path / "releases", meanwhile)
    parts = RunServices(
        settings, store, registry_with(artifacts, store, settings), load_plugins(settings), open_kept(settings)
    )
    held = RunLease(store, run.lease, lease_s=60.0, stop=threading.Event())
    place = RunDirectory(settings.data_path / "runs", run.id)
    place.path.mkdir(parents=True)
    build(place.candidate, str(Origin(run.kind, run.id, run.base_release, str(run.snapshot_id))))
    return RunContext(parts, run, held, place, lambda *_: None).add_candidate()


@pytest.mark.parametrize("dies", [False, True])
def test_a_release_stored_while_its_run_is_ended_by_an_erasure_is_deleted_and_never_registered(
    sqlite_store: Store, settings: Settings, *, dies: bool
) -> None:
    run = sqlite_store.run(lambda session: learns_from(session, SHA))
    stored: list[str] = []

    def erase(release: str) -> None:
        stored.append(release)
        Eraser(settings, sqlite_store, wait_s=0).erase(Scope(sha256=SHA), by="olga")
        if dies:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt if dies else RunLostError):
        add_candidate(settings, sqlite_store, run, erase)
    assert open_artifacts(settings).list() == []
    with pytest.raises(NoReleaseError):
        registry_of(settings, sqlite_store).promote(stored[0], by="olga")
    receipt = receipt_of(sqlite_store)
    assert (receipt.state, receipt.runs, receipt.releases) == ("done", [run.id], {})


def test_a_release_that_is_stored_stays_for_the_process_that_took_its_run_over(
    sqlite_store: Store, settings: Settings
) -> None:
    run = sqlite_store.run(lambda session: learns_from(session, SHA))

    def take_over(_: str) -> None:
        assert sqlite_store.run(lambda session: runs.take_over(session, owner="b:1", lapse_s=-1)) is not None

    with pytest.raises(RunLostError):
        add_candidate(settings, sqlite_store, run, take_over)
    assert len(open_artifacts(settings).list()) == 1
    assert sqlite_store.run(releases.list_releases) == []


def register(session: Session, name: str, source: str) -> None:
    releases.add(session, id=name, manifest_sha256="e" * 64, location="", manifest={}, source=source, by="a")


def test_every_release_that_a_run_registers_before_an_erasure_ends_it_is_on_the_receipt(store: Store) -> None:
    run = store.run(lambda session: learns_from(session, SHA))
    made: list[str] = []

    class Meddled(RoleLease):
        """The run makes one more release before each step of the erasure, for as long as it is under way."""

        def write(self, work):  # type: ignore[no-untyped-def]  # as its parent's
            name = f"r-{len(made) + 1}"

            def note(session: Session) -> None:
                runs.note(session, run.lease, candidate=name)
                register(session, name, f"refit of r-0 on snapshot {run.snapshot_id}")

            try:
                store.run(note)
            except RunLostError:
                return super().write(work)
            made.append(name)
            return super().write(work)

    erasure_id = uuid7()
    store.run(
        lambda session: receipts.begin(
            session, id=erasure_id, scope="image", target={"sha256": SHA}, by="a", why="", salt="00"
        )
    )
    with Meddled(store, "erasure", "me", doing="erasing", wait_s=0) as turn:
        Unlearning(store, turn).forget(receipt_of(store), {SHA})
    ended = store.run(lambda session: runs.get(session, run.id))
    assert ended is not None
    assert ended.state == "failed"
    assert made
    assert set(receipt_of(store).releases) == set(made)


def test_a_release_of_a_run_that_noted_it_nowhere_is_known_by_what_it_says_of_its_making(sqlite_store: Store) -> None:
    run = sqlite_store.run(lambda session: learns_from(session, SHA))

    def by_hand(session: Session) -> None:
        register(session, "r-1", f"refit of r-0 on snapshot {run.snapshot_id}")
        register(session, "r-2", f"retrain of r-1 on snapshot {uuid7()}")
        register(session, "r-3", f"refit of r-0 on snapshot {uuid7()}")
        register(session, "r-4", "aimagelab/CoDE")

    sqlite_store.run(by_hand)
    turn = RoleLease(sqlite_store, "erasure", "me", doing="erasing", wait_s=0)
    assert Unlearning(sqlite_store, turn).made_from({SHA}) == {"r-1": "learned", "r-2": "descends"}


def retire(store: Store, release: str) -> None:
    assert store.run(lambda session: releases.retire(session, release, "its files were deleted: it learned"))


def test_a_release_whose_files_an_erasure_deleted_is_not_added_again(
    sqlite_store: Store, settings: Settings, built: Path
) -> None:
    artifacts = LocalArtifacts(settings.data_path / "releases")
    registry = registry_with(artifacts, sqlite_store, settings)
    release = registry.add(built)
    retire(sqlite_store, release)
    artifacts.drop(release)
    with pytest.raises(ArtifactError, match="cannot be added again: its files were deleted"):
        registry.add(built)
    assert artifacts.list() == []


def test_a_release_that_an_erasure_retires_while_it_is_added_again_does_not_stay(
    sqlite_store: Store, settings: Settings, built: Path
) -> None:
    root = settings.data_path / "releases"
    registry_with(LocalArtifacts(root), sqlite_store, settings).add(built)
    artifacts = Interrupted(root, lambda release: retire(sqlite_store, release))
    with pytest.raises(ArtifactError, match="cannot be added again"):
        registry_with(artifacts, sqlite_store, settings).add(built)
    assert artifacts.list() == []


def test_files_of_a_deleted_release_that_somebody_copies_back_are_deleted_again(
    sqlite_store: Store, settings: Settings, built: Path
) -> None:
    artifacts = LocalArtifacts(settings.data_path / "releases")
    gone = Path(artifacts.put(built)).name
    erasure_id, facts = uuid7(), {gone: {"how": "learned", "files": "deleted"}}

    def note(session: Session) -> None:
        receipts.begin(session, id=erasure_id, scope="image", target={}, by="a", why="", salt="00")
        receipts.note(session, erasure_id, releases=facts)

    assert drop_forgotten(sqlite_store, artifacts) == 0, "no erasure speaks of it"
    sqlite_store.run(note)
    assert drop_forgotten(sqlite_store, artifacts) == 1
    assert artifacts.list() == []
    artifacts.put(built)
    Eraser(settings, sqlite_store).settle()
    assert artifacts.list() == [], "at once by the next erasure on any machine"
    artifacts.put(built)
    Retention(settings, sqlite_store, "me")()
    assert artifacts.list() == [], "else by a pass of retention"
