from __future__ import annotations

import json
import re
from pathlib import Path

import click
import numpy as np
import pytest

from code_worker.cli.deployment.validate import PRESETS
from code_worker.cli.deployment.validation_report import say_learned
from code_worker.plugins import load_plugins
from code_worker.releases.building import build_toy_release
from code_worker.releases.registry import open_registry
from code_worker.settings import Settings
from code_worker.store.engine import Session, Store
from code_worker.store.models import ImageGroupRow, KeptImageRow
from code_worker.store.sql import table_of
from code_worker.training.evaluation import robustness
from code_worker.training.learner import Learner
from code_worker.training.snapshot import load
from tests.cli.conftest import Cli
from tests.cli.labelled_tree import write_tree
from tests.toy_release import toy_crops, write_toy_release
from tests.training.labelled_noise import noise_files
from tests.training.learning import build_champion, label_world, learning_settings, promote_champion

QUICK = ("--bootstrap", "20")


@pytest.fixture(scope="module")
def shallow_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_release(tmp_path_factory.mktemp("shallow") / "release", depth=1)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images, one of each class labelled wrongly, a broken one, and one that nothing labels."""
    directory = write_tree(tmp_path_factory.mktemp("labelled"), 20, flipped=1)
    (directory / "fake" / "enlarger" / "broken.png").write_bytes(b"no image at all, and long enough")
    (directory / "stray.png").write_bytes(b"who knows")
    return directory


@pytest.fixture
def validate(bare_cli: Cli, shallow_release: Path) -> Cli:
    """A command line without a database, and a release's directory in `TOY`."""
    bare_cli.env["TOY"] = str(shallow_release)
    return bare_cli


def test_the_presets_are_those_that_there_are() -> None:
    assert set(PRESETS) == set(robustness.PRESETS)


def test_tables_say_how_good_the_release_is_and_what_was_skipped(validate: Cli, tree: Path) -> None:
    ran = validate("validate", str(tree), "--release", validate.env["TOY"], *QUICK)
    assert ran.status == 0
    assert ", a toy on " in ran.stdout
    assert "is a toy" in ran.stderr
    assert "10 real, 10 fake" in ran.stdout
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert [line[:4] for line in lines if line[:1] == ["all"]] == [["all", "20", "10", "10"]] * 3
    assert ["generator", "doubler", "15", "10", "5"] in [line[:5] for line in lines]
    assert ["collection", "camera", "10", "10", "0"] in [line[:5] for line in lines]
    assert "clean_enlarger: 90.0  80.0  86.67" in ran.stdout
    assert "stray.png" in ran.stderr
    assert "broken.png: unsupported_format" in ran.stderr
    assert "2 skipped" in ran.stderr


def test_json_is_the_content_of_the_file(validate: Cli, tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "reports" / "today"
    ran = validate(
        *("validate", str(tree), "--release", validate.env["TOY"], *QUICK),
        *("--json", "--head", "linear", "--out", str(out)),
    )
    (printed,) = ran.records
    assert printed == json.loads((out / "metrics.json").read_text())
    assert (printed["format"], printed["release"]["toy"], printed["plan"]["conditions"]) == (1, True, ["clean"])
    assert {row["head"] for row in printed["results"]} == {"linear"}
    assert printed["bounds"]["missed"] == []
    assert len(printed["skipped"]) == 2
    page = (out / "report.html").read_text()
    assert "<h1>" in page
    assert "data:image/jpeg;base64," in page
    assert sorted(path.name for path in out.iterdir()) == ["metrics.json", "report.html"]


def test_a_page_without_thumbnails_shows_no_image(validate: Cli, tree: Path, tmp_path: Path) -> None:
    ask = ("validate", str(tree), "--release", validate.env["TOY"], *QUICK, "--head", "knn", "--no-thumbnails")
    validate(*ask, "--out", str(tmp_path))
    assert "data:image" not in (tmp_path / "report.html").read_text()


def test_bounds_set_the_exit_status_and_each_that_is_missed_is_printed(validate: Cli, tree: Path) -> None:
    ask = ("validate", str(tree), "--release", validate.env["TOY"], "--head", "linear", *QUICK)
    assert validate(*ask, "--min-balanced-accuracy", "0.9", "--max-fpr", "0.1").status == 0
    ran = validate(*ask, "--min-balanced-accuracy", "0.95", "--max-fpr", "0.01")
    assert ran.status == 1
    assert "missed: balanced accuracy under clean, head linear is 0.9000, below 0.95" in ran.stderr
    assert "missed: false alarms under clean, head linear are 0.1000 of real images, above 0.01" in ran.stderr


def test_a_release_is_held_against_another_on_the_same_images(validate: Cli, tree: Path, tmp_path: Path) -> None:
    crops, labels = toy_crops(8)
    worse = tmp_path / "worse"
    build_toy_release(worse, crops, (1 - labels).astype(np.int8), load_plugins(Settings()), heads=["linear"], depth=1)
    ask = ("validate", str(tree), "--head", "linear", *QUICK)
    same = validate(*ask, "--release", validate.env["TOY"], "--against", validate.env["TOY"], "--max-regression", "0")
    assert same.status == 0
    assert re.search(r"\+0\.0 \[-(\d+\.\d) \+\1\]", same.stdout), "so few images exclude no difference either way"
    bound = ("--max-regression", "0.02", "--json")
    ran = validate(*ask, "--release", str(worse), "--against", validate.env["TOY"], *bound)
    assert ran.status == 1
    (report,) = ran.records
    missed = report["bounds"]["missed"]
    assert [line.partition(" loses")[0] for line in missed] == [
        "real images",
        "generator doubler",
        "generator enlarger",
    ]
    assert all("2 may be lost" in line and f"missed: {line}" in ran.stderr for line in missed)
    groups = {one["name"]: one["difference"] for one in report["compared"]["groups"]}
    assert groups["doubler"]["fake_accuracy"]["value"] < -0.5
    absent = validate(
        *("validate", str(tree), *QUICK, "--release", validate.env["TOY"], "--head", "knn", "--head", "linear"),
        *("--against", str(worse), "--max-regression", "1"),
    )
    assert absent.status == 1
    assert "has no head knn to compare with" in absent.stderr


def test_a_preset_adds_its_conditions(validate: Cli, tree: Path) -> None:
    ask = ("validate", str(tree), "--release", validate.env["TOY"], "--head", "linear", "--bootstrap", "0", "--json")
    (report,) = validate(*ask, "--preset", "delivery", "--preset", "d3", "--limit", "8").records
    assert report["plan"]["conditions"] == ["clean", "768px_q60", "512px_q40", "no_augm", "augm"]
    assert report["data"]["images"] <= 8


def test_the_test_tree_of_d3_gives_the_eight_pairs_of_the_published_script(validate: Cli, tmp_path: Path) -> None:
    made = noise_files(20, 5)
    reals, fakes = ([data for data, label in made if label == kind] for kind in (0, 1))
    for variant in ("no_augm", "augm"):
        for place, kind in enumerate(("real", "gen_0", "gen_1", "gen_2", "gen_3")):
            for number in range(2):
                # Of two images that gen_2 made before its augmentation, one looks like a real one.
                odd = (variant, kind, number) == ("augm", "gen_2", 1)
                data = reals[9] if odd else (fakes if place else reals)[2 * (place % 4) + number]
                path = tmp_path / variant / kind / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
    ask = ("validate", str(tmp_path), "--release", validate.env["TOY"], "--head", "linear", "--bootstrap", "0")
    lines = validate(*ask).stdout.splitlines()
    begin = lines.index("linear at 0.5, in the published form (real fake all)")
    assert lines[begin + 1 : begin + 9] == [
        "augm_gen0_and_real: 100.0  100.0  100.0",
        "augm_gen_1: 100.0  100.0  100.0",
        "augm_gen_2: 100.0  50.0  75.0",
        "augm_gen_3: 100.0  100.0  100.0",
        "no_augm_gen0_and_real: 100.0  100.0  100.0",
        "no_augm_gen_1: 100.0  100.0  100.0",
        "no_augm_gen_2: 100.0  100.0  100.0",
        "no_augm_gen_3: 100.0  100.0  100.0",
    ]
    (clean,) = validate(*ask, "--preset", "clean", "--json").records
    assert clean["plan"]["conditions"] == ["clean"]


def test_the_champion_and_the_policy_in_force_are_measured(
    sqlite_cli: Cli, sqlite_store: Store, shallow_release: Path, tree: Path, tmp_path: Path
) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    registry = open_registry(settings, store=sqlite_store, plugins=load_plugins(settings))
    release = registry.add(shallow_release)
    registry.promote(release, by="test")
    sqlite_cli("policies", "set", "--tenant", "acme", "--head", "knn", "--low", "0.1", "--high", "0.9")
    ask = ("validate", str(tree), "--json", "--bootstrap", "0", "--head", "linear", "--head", "knn")
    (general,) = sqlite_cli(*ask).records
    assert general["release"]["id"] == release
    assert general["plan"]["thresholds"]["deployed"]["policy"] == "published"
    ran = sqlite_cli(*ask[:-4], "--tenant", "acme", "--max-fpr", "0")
    (acme,) = ran.records
    assert (acme["plan"]["thresholds"]["deployed"]["low"], acme["plan"]["thresholds"]["deployed"]["high"]) == (
        0.1,
        0.9,
    )
    assert "head knn" in ran.stderr, "bounds hold for the head that judges for this tenant"
    assert sqlite_cli(*ask).records[0]["results"] == general["results"], "from the embeddings kept before"


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("SOURCE", "--max-regression", "0.1"),
        ("SOURCE", "--min-balanced-accuracy", "1.5"),
        ("SOURCE", "--max-fpr", "nan"),
        ("SOURCE", "--preset", "instagram"),
        ("SOURCE", "--head", "crystal-ball"),
        ("SOURCE", "--release", "r-nowhere"),
    ],
)
def test_wrong_use_ends_with_status_2(validate: Cli, tree: Path, words: tuple[str, ...]) -> None:
    release = () if "--release" in words else ("--release", validate.env["TOY"])
    ran = validate("validate", *(str(tree) if word == "SOURCE" else word for word in words), *release)
    assert (ran.status, ran.stdout) == (2, "")
    assert "Traceback" not in ran.stderr


def test_data_that_cannot_be_used_end_with_status_1_and_one_line(validate: Cli, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").write_bytes(b"no image at all, and long enough")
    ran = validate("validate", str(tmp_path), "--release", validate.env["TOY"])
    assert (ran.status, ran.stdout) == (1, "")
    assert "none of 1 images can be used: 1 × unsupported_format" in ran.stderr.splitlines()[-1]
    missing = validate("validate", str(tmp_path / "nowhere"), "--release", validate.env["TOY"])
    assert (missing.status, missing.stdout) == (1, "")
    assert "nowhere" in missing.stderr


def test_a_directory_that_cannot_be_written_is_refused_before_the_work(
    validate: Cli, tree: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    ran = validate("validate", str(tree), "--release", validate.env["TOY"], "--out", str(tmp_path / "file"))
    assert ran.status == 2
    assert "--out" in ran.stderr


@pytest.fixture(scope="module")
def champion_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_champion(tmp_path_factory.mktemp("champion") / "release")


def test_of_your_own_images_those_that_a_release_learned_from_do_not_count(
    sqlite_cli: Cli, sqlite_store: Store, champion_dir: Path, tmp_path: Path
) -> None:
    sqlite_cli.env["CODE_WORKER_DEVICE"] = "cpu"
    settings = learning_settings(Path(sqlite_cli.env["CODE_WORKER_DATA_DIR"]))
    champion = promote_champion(settings, sqlite_store, champion_dir)
    label_world(settings, sqlite_store, real=30, old=20, new=20)
    ask = ("--head", "linear", "--bootstrap", "0")
    ran = sqlite_cli("validate", "labels:", *ask)
    assert f"nothing here says what {champion} learned from" in ran.stderr
    assert "left out" not in ran.stdout
    run = Learner(settings, sqlite_store).learn("refit", by="alice", force=True)
    assert run is not None
    assert run.snapshot_id is not None
    taken = sqlite_store.run(lambda session: load(session, str(run.snapshot_id)), write=False)
    fair = ("validate", "labels:", "--release", str(run.candidate), *ask)
    (report,) = sqlite_cli(*fair, "--json").records
    assert report["data"]["images"] == len(taken.holdout)
    assert report["data"]["learned"] == {"left_out": len(taken.training_share), "unknown": [champion]}
    (few,) = sqlite_cli(*fair, "--limit", "5", "--json").records
    assert few["data"]["images"] == 5, "the limit is on what counts"
    ran = sqlite_cli("validate", "labels:", *ask, "--release", champion, "--against", str(run.candidate))
    assert f"{len(taken.training_share)} images left out: a release" in ran.stdout
    ran = sqlite_cli("validate", "holdout:", *ask, "--release", str(run.candidate), "--out", str(tmp_path / "out"))
    assert "left out" not in ran.stdout + ran.stderr
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"nothing here says what {champion} learned from" in page
    _move(sqlite_store, [one.sha256 for one in taken.train[:2]], "holdout")
    ran = sqlite_cli("validate", "holdout:", *ask, "--release", str(run.candidate))
    assert "2 images left out: a release, or one that it was trained from, learned from them" in ran.stderr
    _move(sqlite_store, [one.sha256 for one in taken.holdout], "train")
    ran = sqlite_cli("validate", "holdout:", *ask, "--release", str(run.candidate))
    assert ran.status == 1
    assert f"{run.candidate} learned from all of it: 2 images" in ran.stderr


def _move(store: Store, hashes: list[str], split: str) -> None:
    """Moves images into another part, as no way through the code does."""
    groups, kept = table_of(ImageGroupRow), table_of(KeptImageRow)

    def write(session: Session) -> None:
        session.execute(groups.insert().values(id=split, split=split))
        session.execute(kept.update().where(kept.c.sha256.in_(hashes)).values(group_id=split))

    store.run(write)


def test_what_nobody_knows_is_said_in_red(capsys: pytest.CaptureFixture[str]) -> None:
    data = {"source": "labels:", "learned": {"left_out": 3, "unknown": ["r-1"]}}
    with click.Context(click.Command("validate"), color=True).scope():
        say_learned(data)
    said, warned = capsys.readouterr()
    assert said == "3 images left out: a release, or one that it was trained from, learned from them\n"
    assert warned.startswith("\x1b[31mnothing here says what r-1 learned from")
