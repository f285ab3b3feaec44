from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from code_worker.errors import ConfigurationError
from code_worker.plugins import load_plugins
from code_worker.releases.loading import LoadedRelease, load_release
from code_worker.releases.reference_scores import seeded_crops
from code_worker.releases.verify import flips_at_most, verify
from code_worker.settings import Settings
from code_worker.types import EMBEDDING_TOLERANCE


@pytest.fixture(scope="module")
def loaded(toy_release_dir: Path) -> LoadedRelease:
    return load_release(toy_release_dir, load_plugins(Settings()))


class Restless:
    """A head whose answers change from call to call."""

    def __init__(self) -> None:
        self.calls = 0

    def score(self, embeddings: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        self.calls += 1
        return np.full(len(embeddings), 0.25 + self.calls / 100, np.float32)


class Alternating(Restless):
    """A head that changes sides with every call."""

    def score(self, embeddings: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        self.calls += 1
        return np.full(len(embeddings), self.calls % 2, np.float32)


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_what_a_worker_does_on_a_cpu_flips_no_label(loaded: LoadedRelease, engine: str) -> None:
    heard: list[int] = []
    report = verify(loaded, engine=engine, device="cpu", images=20, on_images=heard.append)
    assert report.passed
    assert sum(heard) == report.images == 20
    assert 0 < report.embedding_error <= EMBEDDING_TOLERANCE
    assert set(report.heads) == {"linear", "knn", "svm"}
    assert all(head.flips == 0 and head.deterministic for head in report.heads.values())
    assert report.engine == engine
    assert report.kernels.partition(" ")[0] == {"torch": "plain", "openvino": "OpenVINO"}[engine]
    assert report.files == len(loaded.manifest.files)
    assert report.to_dict()["passed"] is True


def test_a_restless_head_fails(loaded: LoadedRelease) -> None:
    report = verify(replace(loaded, heads={"restless": Restless()}), device="cpu", images=2)  # type: ignore[dict-item]  # a head in all that counts here
    assert not report.heads["restless"].deterministic
    assert report.heads["restless"].flips == 0
    assert not report.passed


def test_flipped_labels_fail_and_are_counted(loaded: LoadedRelease) -> None:
    report = verify(replace(loaded, heads={"alternating": Alternating()}), device="cpu", images=2)  # type: ignore[dict-item]  # as above
    assert report.heads["alternating"].flips == 2
    assert report.heads["alternating"].flips_per_10000 == 10_000
    assert report.heads["alternating"].score_error == 1
    assert not report.passed


@pytest.mark.parametrize(
    ("flips", "images"), [(0, 1), (0, 256), (1, 256), (3, 10_000), (0, 30_000), (40, 41), (9, 9)]
)
def test_what_a_number_of_crops_proves_is_the_limit_of_clopper_and_pearson(flips: int, images: int) -> None:
    expected = binomtest(flips, images, alternative="less").proportion_ci(0.95, "exact").high
    assert flips_at_most(flips, images) == pytest.approx(expected, rel=1e-5)


def test_without_a_flip_three_in_n_are_not_exceeded(loaded: LoadedRelease) -> None:
    assert all(flips_at_most(0, images) <= 3 / images for images in (3, 8, 256, 10_000, 30_000))
    assert flips_at_most(0, 30_000) < 1 / 10_000 < flips_at_most(0, 29_000)
    report = verify(loaded, engine="torch", device="cpu", images=3)
    assert report.heads["linear"].at_most_per_10000 == pytest.approx(10_000 * (1 - 0.05 ** (1 / 3)), rel=1e-5)


def test_no_images_are_refused(loaded: LoadedRelease) -> None:
    with pytest.raises(ConfigurationError, match="at least one"):
        verify(loaded, images=0)


def test_crops_are_the_same_for_the_same_seed_however_they_are_cut() -> None:
    whole = seeded_crops(6, seed=3)
    np.testing.assert_array_equal(whole, np.concatenate([seeded_crops(4, 3), seeded_crops(2, 3, first=4)]))
    assert not np.array_equal(whole, seeded_crops(6, seed=4))


def test_photograph_like_crops_have_the_spectrum_of_photographs() -> None:
    grey = seeded_crops(3, seed=1).mean(axis=-1)
    power = np.abs(np.fft.fft2(grey - grey.mean(axis=(1, 2), keepdims=True))) ** 2
    low, high = power[:, 1:8, 1:8].mean(axis=(1, 2)), power[:, 80:112, 80:112].mean(axis=(1, 2))
    assert (low > 30 * high).all()
