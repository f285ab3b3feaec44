from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import joblib
import numpy as np
import pytest
import torch
from sklearn.tree import DecisionTreeClassifier

from code_worker.encoder.published import load_checkpoint
from code_worker.encoder.torch_engine import Engine
from code_worker.encoder.weights import read_weights
from code_worker.errors import ArtifactError, ConfigurationError, IntegrityError, UnsafeArtifactError
from code_worker.plugins import Plugins, load_plugins
from code_worker.releases.artifacts import LocalArtifacts
from code_worker.releases.importing import ImportOptions, build_release
from code_worker.releases.integrity import hash_file
from code_worker.releases.loading import LoadedRelease, load_release
from code_worker.releases.manifest import read_manifest, verify_files, write_manifest
from code_worker.releases.registry import Registry
from code_worker.settings import RoleSettings, Settings
from code_worker.store.engine import Store
from code_worker.types import EMBEDDING_TOLERANCE
from code_worker_heads.search import unit_rows
from tests.parity import KNN_FILE, LINEAR_FILE, SVM_FILE, ParitySet
from tests.rounding import (
    DOUBLE,
    SINGLE,
    cosine_error,
    decision_error,
    promised_decision,
    promised_score,
    score_error,
)


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return load_plugins(Settings())


@pytest.fixture(scope="module")
def imported(parity_set: ParitySet, plugins: Plugins, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("imported") / "release"
    build_release(str(parity_set.directory), plugins, directory)
    return directory


@pytest.fixture(scope="module")
def loaded(imported: Path, plugins: Plugins) -> LoadedRelease:
    return load_release(imported, plugins)


@pytest.fixture
def published(parity_set: ParitySet, tmp_path: Path) -> Path:
    """A copy of the published directory that a test may spoil."""
    return Path(shutil.copytree(parity_set.directory, tmp_path / "published"))


@pytest.mark.numeric
def test_a_published_directory_judges_as_its_own_pipeline_does(loaded: LoadedRelease, parity_set: ParitySet) -> None:
    embeddings = Engine(loaded.weights, device="cpu").embed(parity_set.stacked_crops())
    assert np.abs(embeddings - parity_set.embeddings).max() <= EMBEDDING_TOLERANCE
    scores = {name: head.score(embeddings) for name, head in loaded.heads.items()}
    np.testing.assert_array_equal(scores["linear"] >= 0.5, parity_set.linear == 1)
    np.testing.assert_array_equal(scores["knn"] >= 0.5, parity_set.knn == 1)
    np.testing.assert_array_equal(scores["svm"] >= 0.5, parity_set.svm_raw == -1)
    linear, svm = (cast("Any", loaded.heads[name]) for name in ("linear", "svm"))
    apart = np.abs(scores["linear"] - parity_set.linear_p)
    assert (apart <= promised_score(linear) + score_error(linear, embeddings, SINGLE)).all()
    apart = np.abs(svm.decision(embeddings) - parity_set.svm_decision)
    assert (apart <= promised_decision(svm, embeddings) + 2 * decision_error(svm, embeddings, DOUBLE)).all()


@pytest.mark.numeric
def test_no_image_of_the_set_lies_so_near_a_border_that_rounding_decides(
    loaded: LoadedRelease, parity_set: ParitySet
) -> None:
    rows = parity_set.embeddings
    linear, knn, svm = (cast("Any", loaded.heads[name]) for name in ("linear", "knn", "svm"))
    # A logistic function's error over its steepest slope, 1/4, is that of the log-odds.
    assert (np.abs(linear.decision(rows)) > 4 * (promised_score(linear) + score_error(linear, rows, SINGLE))).all()
    assert (np.abs(svm.decision(rows)) > promised_decision(svm, rows) + 2 * decision_error(svm, rows, DOUBLE)).all()
    units, state = unit_rows(rows), knn.state()
    real, fake = (unit_rows(state["references"][state["labels"] == label]) for label in (0, 1))
    gap = (units @ real.T).max(axis=1) - (units @ fake.T).max(axis=1)
    # An embedding that moves by √192 · the promise turns by no more than that over its length.
    turned = np.sqrt(192) * EMBEDDING_TOLERANCE / np.linalg.norm(rows, axis=1)
    assert (np.abs(gap) > 2 * turned + 2 * cosine_error(192, SINGLE)).all()


def test_the_manifest_tells_source_heads_and_plugins(imported: Path, parity_set: ParitySet) -> None:
    manifest, _ = read_manifest(imported)
    assert sorted(manifest.heads) == ["knn", "linear", "svm"]
    assert manifest.default_head == "linear"
    assert manifest.heads["svm"].one_class
    assert not manifest.heads["linear"].one_class
    assert manifest.heads["linear"].distribution == "code-worker"
    assert manifest.heads["linear"].options["C"] == pytest.approx(0.316)
    assert manifest.source.files["model.safetensors"] == hash_file(parity_set.directory / "model.safetensors")
    assert manifest.source.files[f"sklearn/{SVM_FILE}"] == hash_file(parity_set.directory / "sklearn" / SVM_FILE)
    assert manifest.encoder.config["parameters"] == 5_524_416
    assert str(parity_set.directory.parent) not in manifest.to_bytes().decode()
    assert not manifest.toy


def test_nothing_in_a_release_is_a_pickle(imported: Path) -> None:
    suffixes = {path.suffix for path in imported.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors"}


def test_importing_twice_gives_the_same_files(
    imported: Path, parity_set: ParitySet, plugins: Plugins, tmp_path: Path
) -> None:
    build_release(str(parity_set.directory), plugins, tmp_path / "again")
    first, second = read_manifest(imported)[0], read_manifest(tmp_path / "again")[0]
    assert second.files == first.files
    assert second.encoder.sha256 == first.encoder.sha256


def test_a_release_directory_is_copied_as_it_is(imported: Path, plugins: Plugins, tmp_path: Path) -> None:
    sha256 = build_release(str(imported), plugins, tmp_path / "copy")
    assert verify_files(tmp_path / "copy")[1] == sha256 == read_manifest(imported)[1]
    with pytest.raises(ConfigurationError, match="finished release"):
        build_release(str(imported), plugins, tmp_path / "other", ImportOptions(notes="changed"))


def test_a_damaged_release_directory_is_not_imported(imported: Path, plugins: Plugins, tmp_path: Path) -> None:
    spoilt = Path(shutil.copytree(imported, tmp_path / "spoilt"))
    (spoilt / "encoder/config.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"changed: encoder/config\.json"):
        build_release(str(spoilt), plugins, tmp_path / "copy")


def test_a_timm_checkpoint_is_imported_with_heads_from_a_directory(
    parity_set: ParitySet, plugins: Plugins, tmp_path: Path
) -> None:
    state = load_checkpoint(parity_set.directory).state
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.pth.tar")
    heads = parity_set.directory / "sklearn"
    build_release(str(tmp_path / "last.pth.tar"), plugins, tmp_path / "release", ImportOptions(heads_dir=heads))
    manifest, _ = verify_files(tmp_path / "release")
    assert sorted(manifest.heads) == ["knn", "linear", "svm"]
    assert manifest.source.files["last.pth.tar"] == hash_file(tmp_path / "last.pth.tar")
    kept = read_weights(tmp_path / "release").state
    assert all(torch.equal(kept[name], tensor) for name, tensor in state.items())


def test_a_checkpoint_without_heads_makes_a_release_without_heads(
    parity_set: ParitySet, plugins: Plugins, tmp_path: Path
) -> None:
    torch.save(load_checkpoint(parity_set.directory).state, tmp_path / "encoder.pth")
    build_release(str(tmp_path / "encoder.pth"), plugins, tmp_path / "release")
    manifest, _ = read_manifest(tmp_path / "release")
    assert manifest.heads == {}
    assert manifest.default_head is None


def test_two_files_of_one_head_must_be_told_apart(published: Path, plugins: Plugins, tmp_path: Path) -> None:
    content = (published / "sklearn" / LINEAR_FILE).read_bytes()
    (published / "sklearn" / "linear_sdxl.sav").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"name linear_sdxl\.sav"):
        build_release(str(published), plugins, tmp_path / "refused")
    build_release(str(published), plugins, tmp_path / "r", ImportOptions(skip_unknown_heads=True))
    manifest, _ = read_manifest(tmp_path / "r")
    assert sorted(manifest.heads) == ["knn", "linear", "svm"]
    assert f"sklearn/{LINEAR_FILE}" in manifest.source.files


def test_a_head_file_that_nobody_takes_is_named(published: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=rf"{KNN_FILE}: no installed head takes a KNeighborsClassifier"):
        build_release(str(published), Plugins(), tmp_path / "r")


def test_a_head_that_calls_exit_over_a_file_is_named(published: Path, tmp_path: Path) -> None:
    (tmp_path / "quitting.py").write_text(
        "from code_worker import HeadSpec, hookimpl\n"
        "from code_worker_heads.linear import LinearHead\n"
        "class Quitting(LinearHead):\n"
        "    @classmethod\n"
        "    def from_estimator(cls, estimator):\n"
        "        raise SystemExit(3)\n"
        "@hookimpl\n"
        "def code_worker_register_heads():\n"
        "    return [HeadSpec('quitting', Quitting)]\n"
    )
    plugins = load_plugins(Settings(plugins_dir=tmp_path))
    with pytest.raises(ArtifactError, match="head 'quitting' failed over a KNeighborsClassifier: SystemExit: 3"):
        build_release(str(published), plugins, tmp_path / "r")


def test_a_head_per_generator_gets_the_name_it_is_given(published: Path, plugins: Plugins, tmp_path: Path) -> None:
    content = (published / "sklearn" / LINEAR_FILE).read_bytes()
    (published / "sklearn" / "linear_gen3.sav").write_bytes(content)
    options = ImportOptions(head_names={"linear_gen3.sav": "linear-sdxl"}, default_head="svm")
    build_release(str(published), plugins, tmp_path / "release", options)
    release = load_release(tmp_path / "release", plugins)
    assert sorted(release.heads) == ["knn", "linear", "linear-sdxl", "svm"]
    assert release.manifest.heads["linear-sdxl"].plugin_head == "linear"
    assert release.manifest.default_head == "svm"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"absent.sav": "linear"}, r"no head file is called absent\.sav"),
        ({LINEAR_FILE: "knn"}, "two head files would be called 'knn'"),
        ({LINEAR_FILE: "../up"}, r"head name '\.\./up'"),
    ],
)
def test_names_for_heads_that_cannot_be_given_are_refused(
    parity_set: ParitySet, plugins: Plugins, tmp_path: Path, names: dict[str, str], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        build_release(str(parity_set.directory), plugins, tmp_path / "r", ImportOptions(head_names=names))


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_head_file_is_refused_by_what_it_asked_for_and_nothing_runs(
    published: Path, plugins: Plugins, tmp_path: Path
) -> None:
    trace = tmp_path / "executed"
    (published / "sklearn" / KNN_FILE).write_bytes(pickle.dumps(_Touch(trace)))
    with pytest.raises(UnsafeArtifactError, match="mkdir"):
        build_release(str(published), plugins, tmp_path / "r")
    assert not trace.exists()


def test_an_estimator_outside_the_published_three_is_refused_or_left_out(
    published: Path, plugins: Plugins, tmp_path: Path
) -> None:
    joblib.dump(DecisionTreeClassifier().fit([[0.0], [1.0]], [0, 1]), published / "sklearn" / "tree.joblib")
    with pytest.raises(UnsafeArtifactError, match="DecisionTreeClassifier"):
        build_release(str(published), plugins, tmp_path / "refused")
    build_release(str(published), plugins, tmp_path / "r", ImportOptions(skip_unknown_heads=True))
    assert sorted(read_manifest(tmp_path / "r")[0].heads) == ["knn", "linear", "svm"]


def test_an_encoder_of_wrong_shape_is_refused(published: Path, plugins: Plugins, tmp_path: Path) -> None:
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps({**config, "intermediate_size": 512}))
    with pytest.raises(ArtifactError, match="intermediate"):
        build_release(str(published), plugins, tmp_path / "release")


def test_a_source_that_does_not_exist_says_what_a_source_is(plugins: Plugins, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="hf:owner/name"):
        build_release(str(tmp_path / "nowhere"), plugins, tmp_path / "release")


def test_a_heads_directory_that_does_not_exist_is_named(
    parity_set: ParitySet, plugins: Plugins, tmp_path: Path
) -> None:
    options = ImportOptions(heads_dir=tmp_path / "none")
    with pytest.raises(ConfigurationError, match="none is not a directory of head files"):
        build_release(str(parity_set.directory), plugins, tmp_path / "release", options)


def test_a_release_is_written_into_an_empty_directory_only(
    parity_set: ParitySet, plugins: Plugins, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ArtifactError, match="not empty"):
        build_release(str(parity_set.directory), plugins, tmp_path)


def test_what_was_imported_before_is_the_release_that_is_here(
    parity_set: ParitySet, plugins: Plugins, tmp_path: Path, sqlite_store: Store
) -> None:
    registry = Registry(sqlite_store, LocalArtifacts(tmp_path / "kept"), plugins, RoleSettings())
    (heads := tmp_path / "heads").mkdir()
    shutil.copy(parity_set.directory / "sklearn" / LINEAR_FILE, heads)
    options = ImportOptions(heads_dir=heads)
    build_release(str(parity_set.directory), plugins, tmp_path / "built", options)
    manifest = read_manifest(tmp_path / "built")[0]
    write_manifest(tmp_path / "built", manifest.model_copy(update={"created_at": datetime(2026, 1, 2, tzinfo=UTC)}))
    first = registry.add(tmp_path / "built")
    assert registry.import_(str(parity_set.directory), options) == first
    assert registry.import_(str(parity_set.directory), replace(options, notes="other")) != first
    assert len(registry.list()) == 2


@pytest.mark.parametrize("damage", ["gone", "a file is gone", "a file is damaged"])
def test_what_was_imported_before_and_is_whole_no_more_is_imported_anew(
    damage: str, parity_set: ParitySet, plugins: Plugins, tmp_path: Path, sqlite_store: Store
) -> None:
    kept = LocalArtifacts(tmp_path / "kept")
    registry = Registry(sqlite_store, kept, plugins, RoleSettings())
    (bare := tmp_path / "heads").mkdir()
    options = ImportOptions(heads_dir=bare)
    first = registry.import_(str(parity_set.directory), options)
    weights = kept.root / first / "encoder" / "model.safetensors"
    if damage == "gone":
        kept.drop(first)
    elif damage == "a file is gone":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-1])
    # Within the same second it is the very same release, and whole again.
    second = registry.import_(str(parity_set.directory), options)
    assert registry.load(second).id == second
