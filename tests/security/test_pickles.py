"""One planted pickle, offered to every loader there is: its file never appears, and the refusal has a type."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from code_worker.data.datasets.open import open_examples
from code_worker.data.label_files.label_import import read_rows
from code_worker.data.label_files.label_rows import Words
from code_worker.encoder.weights import read_weights
from code_worker.errors import (
    ArtifactError,
    CodeWorkerError,
    ConfigurationError,
    DatasetError,
    ImageRejectedError,
    IntegrityError,
    StoreError,
    TrainingError,
    UnsafeArtifactError,
)
from code_worker.images.decode import decode
from code_worker.plugins import InstalledPlugin, Plugins
from code_worker.releases.artifacts import LocalArtifacts
from code_worker.releases.importing import ImportOptions, build_release, read_estimator
from code_worker.releases.integrity import describe_files
from code_worker.releases.loading import load_head, load_release
from code_worker.releases.manifest import (
    MANIFEST_NAME,
    HeadEntry,
    Manifest,
    encoder_digest,
    head_digest,
    read_manifest,
    write_manifest,
)
from code_worker.releases.registry import Registry
from code_worker.settings import LimitSettings, RoleSettings, Settings
from code_worker.store.engine import Store
from code_worker.store.learning import snapshots
from code_worker.training.fitting.job import read_items, read_job
from code_worker.training.fitting.trainer import read_checkpoint, resume_state


class _Plant:
    """Whatever unpickles it makes a directory."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "the pickle was run"


@pytest.fixture(params=[2, 5], ids=["protocol 2", "protocol 5"])
def planted(request: pytest.FixtureRequest, trace: Path) -> bytes:
    return pickle.dumps(_Plant(trace), protocol=request.param)


@pytest.fixture
def archived(trace: Path) -> bytes:
    """The same in the archive that `torch.save` writes."""
    written = io.BytesIO()
    torch.save({"state_dict": _Plant(trace)}, written)
    return written.getvalue()


def written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def rehashed(directory: Path) -> None:
    """Makes the manifest fit the files again, as whoever planted one would."""
    old, _ = read_manifest(directory)
    files = describe_files(directory, leave_out={MANIFEST_NAME})
    plain: dict[str, Any] = {**old.model_dump(), "files": files}
    plain["encoder"]["sha256"] = encoder_digest(old.encoder.files, files, old.preprocessing)
    for name, head in old.heads.items():
        plain["heads"][name]["sha256"] = head_digest(head.files, files, head.options)
    write_manifest(directory, Manifest.model_validate(plain))


def names_in(release: Path) -> list[str]:
    return sorted(read_manifest(release)[0].files)


def test_the_plant_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(_Plant(tmp_path / "executed")))
    assert (tmp_path / "executed").is_dir()


def test_hot_loading_refuses_each_file_by_its_hash(
    release: Path, plugins: Plugins, planted: bytes, sqlite_store: Store, tmp_path: Path
) -> None:
    registry = Registry(sqlite_store, LocalArtifacts(tmp_path / "kept"), plugins, RoleSettings())
    id_ = registry.add(release)
    for name in names_in(release):
        path = tmp_path / "kept" / id_ / name
        good = path.read_bytes()
        path.write_bytes(planted)
        with pytest.raises(IntegrityError, match=f"changed: {name}"):
            registry.load(id_)
        path.write_bytes(good)
    assert registry.load(id_).id == id_


def test_a_release_whose_hashes_fit_the_plant_does_not_load_either(
    release: Path, plugins: Plugins, planted: bytes, tmp_path: Path
) -> None:
    for number, name in enumerate(names_in(release)):
        directory = Path(shutil.copytree(release, tmp_path / str(number)))
        written(directory / name, planted)
        rehashed(directory)
        with pytest.raises(ArtifactError) as refused:
            load_release(directory, plugins)
        assert not isinstance(refused.value, IntegrityError), name


def test_a_manifest_that_is_a_pickle_is_no_manifest(copy: Path, plugins: Plugins, planted: bytes) -> None:
    written(copy / MANIFEST_NAME, planted)
    for load in (read_manifest, lambda directory: load_release(directory, plugins)):
        with pytest.raises(ArtifactError, match="not a JSON manifest"):
            load(copy)


@pytest.mark.parametrize("name", ["linear_tot_classifier_epoch-32.sav", "head.joblib", "head.pkl"])
def test_importing_published_heads(plugins: Plugins, planted: bytes, tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "published" / "sklearn" / name, planted)
    with pytest.raises(UnsafeArtifactError, match="mkdir"):
        read_estimator(path)
    with pytest.raises(UnsafeArtifactError, match="mkdir"):
        build_release(str(tmp_path / "published"), plugins, tmp_path / "made")
    with pytest.raises(UnsafeArtifactError, match="mkdir"):
        build_release(str(tmp_path / "published"), plugins, tmp_path / "made", ImportOptions(heads_dir=path.parent))


@pytest.mark.parametrize("form", ["bare", "archive"])
def test_importing_checkpoints(plugins: Plugins, planted: bytes, archived: bytes, tmp_path: Path, form: str) -> None:
    data = planted if form == "bare" else archived
    with pytest.raises(UnsafeArtifactError, match="mkdir"):
        build_release(str(written(tmp_path / "model.pth", data)), plugins, tmp_path / "made")
    published = written(tmp_path / "published" / "pytorch_model.bin", data).parent
    (published / "config.json").write_text(json.dumps({"hidden_size": 192}))
    with pytest.raises(ArtifactError):
        build_release(str(published), plugins, tmp_path / "made")
    written(published / "model.safetensors", data)
    with pytest.raises(ArtifactError):
        build_release(str(published), plugins, tmp_path / "made")


def test_importing_from_a_hub(
    plugins: Plugins, planted: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--team--bad"
    written(repository / "refs" / "main", commit.encode())
    written(repository / "snapshots" / commit / "sklearn" / "linear_tot.sav", planted)
    written(repository / "snapshots" / commit / "pytorch_model.bin", planted)
    written(repository / "snapshots" / commit / "model.safetensors", planted)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UnsafeArtifactError, match="mkdir"):
        build_release("hf:team/bad", plugins, tmp_path / "made")


def every_head(plugins: Plugins) -> dict[str, tuple[Plugins, str]]:
    import code_worker_example_head  # a plugin of its own
    import code_worker_faiss

    others = Plugins()
    for module in (code_worker_example_head, code_worker_faiss):
        others.add(InstalledPlugin(module.__name__, "0", module.__name__), module)
    return {name: (found, name) for found in (plugins, others) for name in found.heads()}


def test_every_head_that_comes_with_the_project(plugins: Plugins, planted: bytes, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((64, 192)).astype(np.float32)
    labels = (np.arange(64) % 2).astype(np.int8)
    heads = every_head(plugins)
    assert {"linear", "knn", "svm", "knn-faiss"} < set(heads)
    for name, (offered, plugin_head) in heads.items():
        head_class = offered.head_class(plugin_head)
        rows = labels == 0 if head_class.one_class else labels >= 0
        directory = tmp_path / name / "heads" / name
        directory.mkdir(parents=True)
        head = head_class().fit(embeddings[rows], labels[rows])
        head.save(directory)
        options = head.options.model_dump(mode="json")
        files = tuple(sorted(path.name for path in directory.iterdir()))
        entry = HeadEntry(
            plugin_head=plugin_head,
            target="x:y",
            distribution="x",
            distribution_version="0",
            options=options,
            sha256="0" * 64,
            files=files,
        )
        load_head(tmp_path / name, name, entry, offered)
        for file in files:
            good = (directory / file).read_bytes()
            written(directory / file, planted)
            with pytest.raises(ArtifactError):
                load_head(tmp_path / name, name, entry, offered)
            written(directory / file, good)


def test_checkpoints_of_a_training(planted: bytes, archived: bytes, tmp_path: Path) -> None:
    for number, data in enumerate((planted, archived)):
        path = written(tmp_path / "checkpoints" / f"step-{number:09}.pt", data)
        with pytest.raises(TrainingError, match="no checkpoint"):
            read_checkpoint(path)
    assert resume_state(tmp_path / "checkpoints") is None


def offers(planted: bytes, tmp_path: Path) -> dict[str, tuple[Callable[[], object], type[CodeWorkerError]]]:
    """Everything else that reads a file or a column, and what it must answer."""
    path = written(tmp_path / "planted", planted)
    encoder = written(tmp_path / "encoder" / "model.safetensors", planted).parent
    written(encoder / "config.json", planted)
    job = written(tmp_path / "job" / "job.json", planted).parent
    return {
        "weights": (lambda: read_weights(tmp_path), ArtifactError),
        "snapshot": (lambda: snapshots.unpack(planted), StoreError),
        "image": (lambda: decode(planted, LimitSettings()), ImageRejectedError),
        "training job": (lambda: read_job(job), TrainingError),
        "training items": (lambda: read_items(path), TrainingError),
        "label file": (lambda: list(read_rows(path, Words(()))), DatasetError),
    }


@pytest.mark.parametrize("what", ["weights", "snapshot", "image", "training job", "training items", "label file"])
def test_whatever_else_is_read(planted: bytes, tmp_path: Path, what: str) -> None:
    load, error = offers(planted, tmp_path)[what]
    with pytest.raises(error):
        load()


@pytest.mark.parametrize("name", ["data.tar", "data.parquet", "data.jsonl", "data.csv"])
def test_data_sets_that_are_pickles(planted: bytes, tmp_path: Path, name: str) -> None:
    written(tmp_path / name, planted)
    with pytest.raises((DatasetError, ConfigurationError)):
        list(open_examples(str(tmp_path / name), settings=Settings(data_dir=tmp_path), skipped=[]))


def test_members_of_a_shard_that_are_pickles(planted: bytes, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for suffix in ("pyd", "pickle", "pkl", "pth", "npy", "npz", "json", "cls", "real.jpg"):
            info = tarfile.TarInfo(f"0001.{suffix}")
            info.size = len(planted)
            tar.addfile(info, io.BytesIO(planted))
    skipped: list[Any] = []
    settings = Settings(data_dir=tmp_path)
    found = []
    try:
        found = [
            decode(example.read(), settings.limits)
            for example in open_examples(str(tmp_path / "shard.tar"), settings=settings, skipped=skipped)
        ]
    except (DatasetError, ImageRejectedError) as error:
        skipped.append(error)
    assert (found, bool(skipped)) == ([], True)
