from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from code_worker.data.labelling import Labeller
from code_worker.plugins import load_plugins
from code_worker.releases.registry import open_registry
from code_worker.settings import Settings
from code_worker.store import policies
from code_worker.store.engine import Store
from code_worker.store.learning import image_groups
from code_worker.training.evaluation.calibration import recalibrate
from code_worker.training.snapshot import Member, Snapshot
from code_worker.worker.learning_watch import Learning
from tests.cli.conftest import Cli
from tests.cli.labelled_tree import write_tree
from tests.store.acts import slots
from tests.toy_release import write_toy_release
from tests.training.learning import learn

Promote = Callable[[], str]


@pytest.fixture(scope="module")
def shallow_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_release(tmp_path_factory.mktemp("shallow") / "release", depth=1)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty images, half of them real; two of each class are labelled wrongly."""
    return write_tree(tmp_path_factory.mktemp("labelled"), 60, flipped=2)


@pytest.fixture
def champion(sqlite_cli: Cli, sqlite_store: Store, shallow_release: Path, tmp_path: Path) -> str:
    settings = Settings(data_dir=tmp_path / "data")
    registry = open_registry(settings, store=sqlite_store, plugins=load_plugins(settings))
    release = registry.add(shallow_release)
    registry.promote(release, by="test")
    return release


def in_force(store: Store) -> list[policies.PolicyRow]:
    return store.run(policies.in_force, write=False)


def test_thresholds_are_put_in_force_with_what_they_were_drawn_by(
    sqlite_cli: Cli, sqlite_store: Store, champion: str, tree: Path
) -> None:
    ran = sqlite_cli("calibrate", str(tree), "--max-fpr", "0.05", "--tenant", "acme", "--note", "spring")
    assert ran.status == 0, ran.stderr
    (row,) = in_force(sqlite_store)
    assert (row.tenant, row.content_type, row.version, row.head, row.note) == ("acme", None, 1, "linear", "spring")
    assert "version 1 for tenant acme, every content type: workers take it over" in ran.stdout
    assert f"head linear of {champion} on 30 real and 30 fake images" in ran.stdout
    assert "toy" in ran.stderr
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert [line[:3] for line in lines if line[0] in {"before", "now"}] == [
        ["before", "0.5000", "0.5000"],
        ["now", f"{row.low:.4f}", f"{row.high:.4f}"],
    ]
    evidence = row.evidence
    assert evidence is not None
    assert (evidence["real"], evidence["fake"], evidence["release"]) == (30, 30, champion)
    assert len(evidence["digest"]) == 64
    assert evidence["achieved"]["fpr"]["value"] <= 0.05
    assert evidence["achieved"]["fnr"]["value"] <= 0.05
    assert row.low < row.high, "images that look like the other class lie in the band"


def test_a_dry_run_says_the_same_and_sets_nothing(
    sqlite_cli: Cli, sqlite_store: Store, champion: str, tree: Path
) -> None:
    ask = ("calibrate", str(tree), "--max-fpr", "0.1", "--head", "knn", "--json")
    (planned,) = sqlite_cli(*ask, "--dry-run").records
    assert (planned["set"], planned["policy"]) == (False, None)
    assert in_force(sqlite_store) == []
    (done,) = sqlite_cli(*ask).records
    (row,) = in_force(sqlite_store)
    assert (done["set"], done["policy"], done["head"]) == (True, row.id, "knn")
    assert (done["low"], done["high"], done["evidence"]) == (planned["low"], planned["high"], planned["evidence"])
    assert done["before"]["policy"] == "published"
    again = sqlite_cli(*ask[:-3], "--max-fpr", "0.2", "--json")
    assert again.records[0]["before"]["policy"] == row.id
    assert again.records[0]["head"] == "knn", "the head that judges there now"


def test_of_your_own_labels_only_the_hold_out_counts_unless_told_otherwise(
    sqlite_cli: Cli, sqlite_store: Store, champion: str, tree: Path, tmp_path: Path, another_champion: Promote
) -> None:
    settings = Settings(data_dir=tmp_path / "data", files={"roots": [tree]})  # type: ignore[arg-type]
    sqlite_store.run(lambda session: image_groups.begin_with(session, bytes(32)))
    with closing(Labeller(settings, sqlite_store)) as labeller:
        labelled = [
            labeller.label(str(path), "real" if "/real/" in str(path) else "fake", by="alice").sha256
            for path in sorted(tree.rglob("*.png"))
        ]
    places = sqlite_store.run(lambda session: image_groups.places(session, labelled), write=False)
    held = [sha256 for sha256, place in places.items() if place.split == "holdout"]
    assert 0 < len(held) < 60
    whole = sqlite_cli("calibrate", "--max-fpr", "0.05", "--all", "--json", "--dry-run").records[0]["evidence"]
    assert (whole["source"], whole["real"], whole["fake"]) == ("labels:", 30, 30)
    assert whole["left_out"] == {"learned": 0, "unusable": 0}
    (fair,) = sqlite_cli("calibrate", "--max-fpr", "0.4", "--json").records
    assert fair["evidence"]["real"] + fair["evidence"]["fake"] == len(held)
    assert fair["evidence"]["left_out"]["learned"] == 60 - len(held)
    from_files = sqlite_cli("calibrate", str(tree), "--max-fpr", "0.4", "--json", "--dry-run").records[0]["evidence"]
    assert from_files["digest"] == fair["evidence"]["digest"], "the same images under another name are left out too"
    refused = sqlite_cli("calibrate", "--max-fpr", "0.02")
    assert (refused.status, refused.stdout) == (1, "")
    assert "takes at least 49 real images" in refused.stderr
    assert f"{60 - len(held)} were left out, since a retrain may have learned from them" in refused.stderr
    another = another_champion()
    (anew,) = sqlite_cli("calibrate", "--after-promote", "--json").records
    assert anew["problem"] is None
    assert anew["evidence"]["digest"] == fair["evidence"]["digest"], "by the same images as then"
    learn(sqlite_store, Snapshot("latest", (Member(held[0], 0, None, None, new=True),)), another, base=None)
    (less,) = sqlite_cli("calibrate", "--max-fpr", "0.4", "--json", "--dry-run").records
    assert less["evidence"]["left_out"]["learned"] == 61 - len(held), "learned before retention moved it"


def test_copies_of_an_image_count_once(sqlite_cli: Cli, champion: str, tree: Path, tmp_path: Path) -> None:
    reals = sorted((tree / "real").rglob("*.png"))[:6]
    for copy in ("one", "two"):
        for path in reals:
            target = tmp_path / "copies" / "real" / f"{copy}-{path.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    ran = sqlite_cli("calibrate", str(tmp_path / "copies"), "--max-fpr", "0.1")
    assert ran.status == 1
    assert "takes at least 9 real images; there are 6" in ran.stderr


def test_another_release_than_the_champion_is_remarked_on(
    sqlite_cli: Cli, champion: str, tree: Path, tmp_path: Path
) -> None:
    other = write_toy_release(tmp_path / "other", seed=5, depth=1)
    ran = sqlite_cli("calibrate", str(tree), "--max-fpr", "0.1", "--release", str(other))
    assert ran.status == 0
    assert f"is not the champion: until it is, {champion} judges by its thresholds" in ran.stderr


@pytest.fixture
def another_champion(sqlite_store: Store, tmp_path: Path) -> Promote:
    """Promotes a release whose scores are others."""

    def promote() -> str:
        settings = Settings(data_dir=tmp_path / "data")
        registry = open_registry(settings, store=sqlite_store, plugins=load_plugins(settings))
        release = registry.add(write_toy_release(tmp_path / "other", seed=5, depth=1))
        registry.promote(release, by="test")
        return release

    return promote


def stale(store: Store, release: str) -> list[str | None]:
    return [row.tenant for row in store.run(lambda session: policies.stale(session, release), write=False)]


def test_after_a_promotion_thresholds_are_drawn_anew_as_they_were_then(
    sqlite_cli: Cli,
    sqlite_store: Store,
    champion: str,
    tree: Path,
    tmp_path: Path,
    another_champion: Promote,
) -> None:
    gone = write_tree(tmp_path / "gone", 60)
    for tenant, source, bound in (("acme", tree, "0.05"), ("knn", tree, "0.1"), ("lost", gone, "0.1")):
        more = ("--head", "knn") if tenant == "knn" else ("--max-fnr", "0.1")
        done = sqlite_cli("calibrate", str(source), "--max-fpr", bound, "--tenant", tenant, *more)
        assert done.status == 0, done.stderr
    shutil.rmtree(gone)
    assert sqlite_cli("policies", "set", "--tenant", "by hand", "--low", "0.3", "--high", "0.7").status == 0
    assert sqlite_cli("calibrate", "--after-promote").stdout == "no policy is stale\n"
    release = another_champion()
    assert stale(sqlite_store, release) == ["acme", "knn", "lost"]
    planned = sqlite_cli("calibrate", "--after-promote", "--dry-run", "--json")
    assert stale(sqlite_store, release) == ["acme", "knn", "lost"]
    done = sqlite_cli("calibrate", "--after-promote", "--json")
    assert done.status == planned.status == 1
    assert stale(sqlite_store, release) == ["lost"]
    told = {record["tenant"]: record for record in done.records}
    assert told["lost"]["policy"] is None
    assert "gone" in told["lost"]["problem"]
    rows = {row.tenant: row for row in in_force(sqlite_store)}
    for tenant, head, bounds in (("acme", "linear", (0.05, 0.1, True)), ("knn", "knn", (0.1, 0.05, False))):
        row, evidence = rows[tenant], rows[tenant].evidence or {}
        assert (row.version, row.head, row.release_id, evidence["source"]) == (2, head, release, str(tree))
        assert (evidence["max_fpr"], evidence["max_fnr"], evidence["strict_fnr"]) == bounds
        assert (told[tenant]["low"], told[tenant]["high"], told[tenant]["version"]) == (row.low, row.high, 2)
    assert (rows["by hand"].version, rows["lost"].version) == (1, 1)
    promoted = sqlite_cli("releases", "promote", champion)
    assert "2 policies were calibrated on another release: `code-worker calibrate --after-promote`" in promoted.stderr


def test_a_trainer_draws_them_anew_once_after_each_promotion(
    sqlite_cli: Cli,
    sqlite_store: Store,
    champion: str,
    tree: Path,
    tmp_path: Path,
    another_champion: Promote,
) -> None:
    assert sqlite_cli("calibrate", str(tree), "--max-fpr", "0.05").status == 0
    release = another_champion()
    settings = Settings(data_dir=tmp_path / "data", schedule={"calibrate": True})  # type: ignore[arg-type]
    learning = Learning(settings, sqlite_store, threading.Event())
    for _ in range(2):
        learning.watch()
    (row,) = in_force(sqlite_store)
    assert (row.version, row.release_id) == (2, release)
    assert row.created_by.startswith("schedule: calibrate after the promotion of 20")
    (slot,) = slots(sqlite_store)
    assert (slot.name, slot.outcome) == ("calibrate", "1 drawn anew")


def test_what_somebody_set_meanwhile_is_not_undone(
    sqlite_cli: Cli,
    sqlite_store: Store,
    champion: str,
    tree: Path,
    tmp_path: Path,
    another_champion: Promote,
) -> None:
    assert sqlite_cli("calibrate", str(tree), "--max-fpr", "0.05").status == 0
    another_champion()
    settings = Settings(data_dir=tmp_path / "data")
    registry = open_registry(settings, store=sqlite_store, plugins=load_plugins(settings))

    def meanwhile(_scope: str) -> None:
        sqlite_store.run(lambda session: policies.put(session, low=0.3, high=0.7, by="ann"))

    (told,) = recalibrate(settings, sqlite_store, registry, by="bob", listen=meanwhile)
    assert "somebody put version 2 meanwhile" in told.problem
    assert [(row.version, row.created_by) for row in in_force(sqlite_store)] == [(2, "ann")]


@pytest.mark.parametrize("words", [("labels:",), ("--max-fpr", "0.1"), ("--tenant", "acme"), ("--all",)])
def test_after_a_promotion_nothing_else_is_said(sqlite_cli: Cli, champion: str, words: tuple[str, ...]) -> None:
    refused = sqlite_cli("calibrate", "--after-promote", *words)
    assert refused.status == 2
    assert "does as each policy was calibrated" in refused.stderr


def test_without_a_database_a_dry_run_works_and_nothing_else(
    bare_cli: Cli, shallow_release: Path, tree: Path
) -> None:
    ask = ("calibrate", str(tree), "--max-fpr", "0.1", "--release", str(shallow_release))
    assert bare_cli(*ask, "--dry-run", "--json").records[0]["set"] is False
    refused = bare_cli(*ask)
    assert (refused.status, refused.stdout) == (2, "")
    assert "try --dry-run" in refused.stderr


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--max-fpr", "0"),
        ("--max-fpr", "1"),
        ("--max-fpr", "0.1", "--max-fnr", "nan"),
        ("--max-fpr", "0.1", "--tenant", ""),
        ("--max-fpr", "0.1", "--head", "crystal-ball"),
    ],
)
def test_wrong_use_sets_nothing(
    sqlite_cli: Cli, sqlite_store: Store, champion: str, tree: Path, words: tuple[str, ...]
) -> None:
    ran = sqlite_cli("calibrate", str(tree), *words)
    assert (ran.status, ran.stdout) == (2, "")
    assert "Traceback" not in ran.stderr
    assert in_force(sqlite_store) == []


def test_too_few_fakes_are_refused_only_where_their_bound_was_asked_for(
    sqlite_cli: Cli, champion: str, tmp_path: Path
) -> None:
    small = write_tree(tmp_path / "small", 24)
    ran = sqlite_cli("calibrate", str(small), "--max-fpr", "0.1", "--dry-run")
    assert ran.status == 0
    assert "takes at least 19 generated images; there are 12" in ran.stdout
    assert "nothing was set" in ran.stdout
    assert sqlite_cli("policies", "set", "--low", "0.2", "--high", "0.9", "--head", "linear").status == 0
    (kept,) = sqlite_cli("calibrate", str(small), "--max-fpr", "0.1", "--json").records
    assert (kept["low"], kept["before"]["low"]) == (min(0.2, kept["high"]), 0.2)
    other = sqlite_cli("calibrate", str(small), "--max-fpr", "0.1", "--head", "knn")
    assert (other.status, "takes at least 19 generated images" in other.stderr) == (1, True), "linear's border"
    assert sqlite_cli("calibrate", str(small), "--max-fpr", "0.1", "--max-fnr", "0.05").status == 1


def test_without_labels_the_reason_is_one_line(sqlite_cli: Cli, champion: str) -> None:
    ran = sqlite_cli("calibrate", "--max-fpr", "0.1")
    assert (ran.status, ran.stdout) == (1, "")
    assert "labels: holds no usable image" in ran.stderr
