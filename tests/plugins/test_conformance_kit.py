"""The conformance kit: passes heads that are right, and each check catches the head that breaks its rule."""

from __future__ import annotations

import json
import os
import pickle
import random
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from code_worker.errors import ArtifactError
from code_worker.heads import Head
from code_worker.plugins import load_plugins
from code_worker.settings import Settings
from code_worker.testing import assert_head_conforms, check_head
from code_worker.testing.conformance import FILE_CHECKS, OPTION_CHECKS
from code_worker.testing.score_checks import SCORE_CHECKS
from code_worker_heads.knn import NearestNeighbourHead
from code_worker_heads.svm import OneClassSvmHead


class Centroids(Head):
    """A head that is right; the classes below each break one rule of it."""

    centres: NDArray[np.float64]

    def fit(self, embeddings: Any, labels: Any) -> Self:
        self.centres = np.stack([embeddings[labels == label].mean(axis=0, dtype=np.float64) for label in (0, 1)])
        return self

    def raw(self, embeddings: Any) -> Any:
        if embeddings.ndim != 2 or embeddings.shape[1] != 192:
            raise ValueError("width")
        if not np.isfinite(embeddings).all():
            raise ValueError("not finite")
        to_real, to_fake = (np.linalg.norm(embeddings - centre, axis=1) for centre in self.centres)
        return to_real / (to_real + to_fake)

    def score(self, embeddings: Any) -> Any:
        return self.raw(embeddings).astype(np.float32)

    def save(self, directory: Path) -> None:
        (directory / "centres.json").write_text(json.dumps(self.centres.tolist()))

    @classmethod
    def load(cls, directory: Path, options: Mapping[str, Any] | None = None) -> Self:
        try:
            text = (directory / "centres.json").read_text()
        except OSError as error:
            raise ArtifactError(str(error)) from error
        head = cls(options)
        head.centres = np.array(json.loads(text))
        return head


class FitsNothing(Centroids):
    def fit(self, embeddings: Any, labels: Any) -> Self:
        raise KeyError("nothing")


class ReturnsNone(Centroids):
    def fit(self, embeddings: Any, labels: Any) -> Any:
        super().fit(embeddings, labels)


class OptionsOfItsOwn(Centroids):
    class Options(BaseModel):
        pass


class TakesAnyOption(Centroids):
    class Options(Head.Options):
        model_config = ConfigDict(extra="ignore")


class DropsOptions(Centroids):
    class Options(Head.Options):
        steepness: float = Field(1.0, gt=0)

    def score(self, embeddings: Any) -> Any:
        steep = self.raw(embeddings) ** self.options.steepness  # type: ignore[attr-defined]
        return (steep / (steep + (1 - self.raw(embeddings)) ** self.options.steepness)).astype(np.float32)  # type: ignore[attr-defined]

    @classmethod
    def load(cls, directory: Path, options: Mapping[str, Any] | None = None) -> Self:
        return super().load(directory)


class RaisesAlways(Centroids):
    def score(self, embeddings: Any) -> Any:
        raise KeyError("weights")


class ScoresNanAlways(Centroids):
    def score(self, embeddings: Any) -> Any:
        return np.full(len(embeddings), np.nan, np.float32)


class Float64(Centroids):
    def score(self, embeddings: Any) -> Any:
        return self.raw(embeddings)


class OutOfRange(Centroids):
    def score(self, embeddings: Any) -> Any:
        return super().score(embeddings) * np.float32(2)


class UpsideDown(Centroids):
    def score(self, embeddings: Any) -> Any:
        return 1 - super().score(embeddings)


class OffBorder(Centroids):
    def score(self, embeddings: Any) -> Any:
        return super().score(embeddings) / 4


class Dice(Centroids):
    def score(self, embeddings: Any) -> Any:
        return (super().score(embeddings) + np.float32(random.random() * 1e-3)).clip(0, 1)


class UnseededFit(Centroids):
    def fit(self, embeddings: Any, labels: Any) -> Self:
        super().fit(embeddings, labels)
        self.centres = self.centres + np.random.default_rng().normal(size=(2, 192))
        return self


class RanksTheBatch(Centroids):
    def score(self, embeddings: Any) -> Any:
        ranks = self.raw(embeddings).argsort().argsort()
        return (ranks / max(len(ranks) - 1, 1)).astype(np.float32)


class SoftNeighbours(Centroids):
    """Neighbours weighted by similarity, as anybody writes it: a matrix product in float32 rounds with the batch."""

    def fit(self, embeddings: Any, labels: Any) -> Self:
        super().fit(embeddings, labels)
        self.references = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        self.labels = labels.astype(np.float32)
        return self

    def score(self, embeddings: Any) -> Any:
        self.raw(embeddings)
        lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
        similar = (embeddings / np.where(lengths == 0, 1, lengths)) @ self.references.T
        nearest = np.argsort(-similar, axis=1)[:, :5]
        weights = np.exp(10 * np.take_along_axis(similar, nearest, axis=1))
        return ((weights * self.labels[nearest]).sum(axis=1) / weights.sum(axis=1)).clip(0, 1)


class TooTolerant(Centroids):
    tolerance = 0.01


class RoundsOnSave(Centroids):
    def save(self, directory: Path) -> None:
        (directory / "centres.json").write_text(json.dumps(self.centres.round(3).tolist()))


class SavesNothing(Centroids):
    def save(self, directory: Path) -> None:
        pass


class ForgetsToTranslate(Centroids):
    @classmethod
    def load(cls, directory: Path, options: Mapping[str, Any] | None = None) -> Self:
        (directory / "centres.json").read_text()
        return super().load(directory, options)


class Pickles(Centroids):
    def save(self, directory: Path) -> None:
        super().save(directory)
        (directory / "state.bin").write_bytes(pickle.dumps(self.centres))


class PicklesByName(Centroids):
    def save(self, directory: Path) -> None:
        super().save(directory)
        (directory / "state.joblib").write_text("anything")


class PicklesInArchive(Centroids):
    def save(self, directory: Path) -> None:
        super().save(directory)
        with zipfile.ZipFile(directory / "state.zip", "w") as archive:
            archive.writestr("data", pickle.dumps(1))


class SavesObjects(Centroids):
    def save(self, directory: Path) -> None:
        super().save(directory)
        np.savez(directory / "state.npz", state=np.array([{}, None], dtype=object))


class ScoresNan(Centroids):
    def raw(self, embeddings: Any) -> Any:
        return super().raw(np.nan_to_num(embeddings, posinf=0, neginf=0))


class ScoresAnyWidth(Centroids):
    def raw(self, embeddings: Any) -> Any:
        return super().raw(np.resize(embeddings, (len(embeddings), 192)))


class FailsOnNothing(Centroids):
    def score(self, embeddings: Any) -> Any:
        scores = super().score(embeddings)
        return scores if len(scores) else np.zeros((0, 1), dtype=np.float32)


class WritesInput(Centroids):
    def score(self, embeddings: Any) -> Any:
        scores = super().score(embeddings)
        if embeddings.flags.writeable:
            embeddings -= embeddings.mean()
        return scores


class EndsTheProcess(Centroids):
    def score(self, embeddings: Any) -> Any:
        raise SystemExit(0)


class KeepsStateOnSelf(Centroids):
    def score(self, embeddings: Any) -> Any:
        self.current = embeddings
        threading.Event().wait(1e-3)  # lets the other threads in
        return super().score(self.current)


class OffOnAnotherProcessor(Centroids):
    """Stands for one that sums in float32: the kit tells numpy's kernels by this variable."""

    by = 1e-5

    def score(self, embeddings: Any) -> Any:
        moved = np.float32(self.by if "NPY_DISABLE_CPU_FEATURES" in os.environ else 0)
        return np.minimum(super().score(embeddings) + moved, 1)


class RoundsOnAnotherProcessor(OffOnAnotherProcessor):
    by = 2.0**-22


BROKEN: dict[type[Head], str] = {
    FitsNothing: "fit",
    ReturnsNone: "fit",
    OptionsOfItsOwn: "creation",
    DropsOptions: "options-after-load",
    TakesAnyOption: "options",
    Float64: "shape-and-dtype",
    OutOfRange: "range",
    UpsideDown: "direction",
    OffBorder: "border",
    Dice: "determinism",
    UnseededFit: "determinism",
    RanksTheBatch: "batch-invariance",
    SoftNeighbours: "batch-invariance",
    TooTolerant: "tolerance",
    RoundsOnSave: "save-and-load",
    SavesNothing: "save-and-load",
    ForgetsToTranslate: "missing-files",
    Pickles: "no-pickles",
    PicklesByName: "no-pickles",
    PicklesInArchive: "no-pickles",
    SavesObjects: "no-pickles",
    ScoresNan: "nan-refusal",
    ScoresAnyWidth: "width-refusal",
    FailsOnNothing: "empty-batch",
    WritesInput: "input-untouched",
    KeepsStateOnSelf: "thread-safety",
    OffOnAnotherProcessor: "other-processor",
}


ALL = 3 + len(SCORE_CHECKS) + len(FILE_CHECKS) + len(OPTION_CHECKS)


@pytest.mark.numeric
def test_a_head_that_is_right_passes_every_check() -> None:
    results = check_head(Centroids)
    assert [str(result) for result in results] == [f"{result.name}: passed" for result in results]
    assert len(results) == ALL


@pytest.mark.numeric
@pytest.mark.parametrize("name", ["linear", "knn", "svm"])
def test_the_built_in_heads_conform(name: str) -> None:
    assert_head_conforms(load_plugins(Settings()).heads()[name])


def test_options_are_passed_on_to_the_head() -> None:
    assert_head_conforms(NearestNeighbourHead, {"n_neighbors": 4})
    assert_head_conforms(OneClassSvmHead, {"degree": 2, "nu": 0.05, "coef0": 1.0})
    assert "n_neighbors" in check_head(NearestNeighbourHead, {"n_neighbors": 0})[0].seen


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize("head_class", BROKEN, ids=lambda broken: broken.__name__)
def test_each_check_catches_the_head_that_breaks_its_rule(head_class: type[Head]) -> None:
    failed = {result.name: result for result in check_head(head_class) if not result.passed}
    found = failed[BROKEN[head_class]]
    assert found.expected
    assert found.seen
    assert found.fix
    with pytest.raises(
        AssertionError, match=f"checks failed\n(.*\n)*{BROKEN[head_class]}: expected .*; seen: .*; fix: "
    ):
        assert_head_conforms(head_class)


@pytest.fixture
def own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever numpy was told to do in this process, the kit tells the other one only."""
    monkeypatch.delenv("NPY_DISABLE_CPU_FEATURES", raising=False)


@pytest.mark.usefixtures("own_kernels")
def test_rounding_on_another_processor_is_warned_of() -> None:
    (warned,) = [result for result in check_head(RoundsOnAnotherProcessor) if result.warning]
    assert (warned.name, warned.passed) == ("other-processor", True)
    assert "scores up to 2.4e-07 apart" in warned.warning
    assert "declare a `tolerance`" in warned.warning
    with pytest.warns(UserWarning, match="other-processor: passed; warning: scores up to"):
        assert_head_conforms(RoundsOnAnotherProcessor)


@pytest.mark.usefixtures("own_kernels")
def test_a_head_that_no_other_process_can_import_is_warned_of() -> None:
    class Local(Centroids):
        pass

    (warned,) = [result for result in check_head(Local) if result.warning]
    assert warned.warning.startswith("not tried with the kernels of another processor: AttributeError: ")


def test_a_head_that_ends_the_process_fails_the_checks() -> None:
    failed = [result for result in check_head(EndsTheProcess) if not result.passed]
    assert any(result.seen.startswith("SystemExit: 0 (") for result in failed)


@pytest.mark.parametrize(
    ("head_class", "last"),
    [
        (FitsNothing, "fit"),
        (RaisesAlways, "shape-and-dtype"),
        (Float64, "shape-and-dtype"),
        (EndsTheProcess, "shape-and-dtype"),
        (ScoresNanAlways, "range"),
        (TooTolerant, "tolerance"),
    ],
)
def test_what_all_checks_rest_on_ends_them(head_class: type[Head], last: str) -> None:
    results = check_head(head_class)
    assert [result.name for result in results if not result.passed] == [last]
    assert results[-1].name == last
    assert len(results) + results[-1].left_out == ALL
    assert str(results[-1]).endswith(f"{results[-1].left_out} other checks rest on this one and were not run")


def test_a_one_class_head_that_writes_to_what_it_learns_from_is_caught() -> None:
    class Writes(Centroids):
        one_class = True

        def fit(self, embeddings: Any, labels: Any) -> Self:
            embeddings -= embeddings.mean()
            return self

    result = check_head(Writes)[-1]
    assert (result.name, "read-only" in result.seen) == ("fit", True)


def test_every_check_has_a_head_that_breaks_it() -> None:
    checks = (*SCORE_CHECKS, *FILE_CHECKS, *OPTION_CHECKS)
    names = {check.__name__.removeprefix("check_").replace("_", "-") for check in checks}
    assert names | {"creation", "fit", "other-processor"} == set(BROKEN.values())
