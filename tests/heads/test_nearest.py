"""Nearest neighbours: exact to the last bit that float64 has, ties and zero vectors as scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_distances
from sklearn.neighbors import KNeighborsClassifier

from code_worker.releases.importing import read_estimator
from code_worker_heads import device, search
from code_worker_heads.knn import NearestNeighbourHead
from code_worker_heads.search import CosineIndex, unit_rows
from tests.heads.samples import clouds
from tests.rounding import DOUBLE, cosine_error

pytestmark = pytest.mark.numeric


def knn(references: Any, labels: Any, k: int = 1) -> NearestNeighbourHead:
    return NearestNeighbourHead({"n_neighbors": k}).fit(
        np.asarray(references, np.float32), np.asarray(labels, np.int8)
    )


def row(*values: float) -> Any:
    return np.array([[*values, *[0.0] * (192 - len(values))]], dtype=np.float32)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 10])
def test_the_vote_is_scikit_learns_for_every_number_of_neighbours(k: int) -> None:
    references, labels = clouds(3000, 0, 0.15)
    queries, _ = clouds(300, 1, 0.15)
    # In float64: in float32 rounding would decide between neighbours that are as near.
    expected = KNeighborsClassifier(k, metric="cosine").fit(references, labels).predict(queries.astype(np.float64))
    assert 0 < expected.sum() < 300
    np.testing.assert_array_equal(knn(references, labels, k).score(queries) >= 0.5, expected == 1)


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-6])
def test_distances_and_positions_are_those_of_a_full_search_in_float64(spread: float) -> None:
    # The narrower the cone, the more references lie within float32's rounding of the nearest.
    rng = np.random.default_rng(3)
    centre = rng.normal(size=192)
    references = (centre + spread * rng.normal(size=(5000, 192))).astype(np.float32)
    queries = unit_rows((centre + spread * rng.normal(size=(40, 192))).astype(np.float32))
    distances, positions = CosineIndex(references).nearest(queries, 3)
    full = np.stack([1.0 - np.vecdot(unit_rows(references), query) for query in queries]).clip(0, 2)
    expected = np.argsort(full, axis=1, kind="stable")[:, :3]
    np.testing.assert_array_equal(positions, expected)
    np.testing.assert_array_equal(distances, np.take_along_axis(full, expected, axis=1))
    others = cosine_distances(queries, references.astype(np.float64))
    np.testing.assert_allclose(full, others, atol=2 * cosine_error(192, DOUBLE), rtol=0)


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything goes the way that a GPU's references go; torch's own processor stands in for the GPU."""
    monkeypatch.setattr(search, "compute_device", lambda: "cpu:0")
    monkeypatch.setattr(search, "_LEAST_ON_A_DEVICE", 1)
    monkeypatch.setattr(device, "_BLOCK", 1000)


@pytest.mark.usefixtures("on_a_device")
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("spread", [1.0, 1e-6])
def test_a_device_finds_the_same_neighbours(spread: float, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    centre = rng.normal(size=192)
    references = (centre + spread * rng.normal(size=(3500, 192))).astype(np.float32)
    queries = unit_rows((centre + spread * rng.normal(size=(140, 192))).astype(np.float32))
    index = CosineIndex(references)
    found = index.nearest(queries, k)
    assert isinstance(index._search, device.DeviceSearch)
    monkeypatch.setattr(search, "compute_device", lambda: "cpu")
    for one, other in zip(found, index.nearest(queries, k), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("on_a_device")
def test_a_device_that_cannot_take_the_references_leaves_them_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(search, "compute_device", lambda: "cuda:99")
    references, labels = clouds(200, 0)
    head = knn(references, labels)
    assert (head.score(references) >= 0.5).tolist() == (labels == 1).tolist()
    assert caplog.text.count("references_stay_on_the_cpu") == 2  # once per class, not per batch
    head.score(references)
    assert caplog.text.count("references_stay_on_the_cpu") == 2


def test_a_difference_that_float32_cannot_see_still_decides() -> None:
    turn = 2e-5  # cosines differ by 2e-10; float32 has steps of 6e-8 there
    references = np.concatenate([row(1, 2 * turn), row(1, turn), row(-1)])
    assert knn(references, [0, 1, 0]).score(row(1))[0] >= 0.5
    assert knn(references, [1, 0, 1]).score(row(1))[0] < 0.5


def test_of_equal_references_the_first_decides() -> None:
    references = np.concatenate([row(0, 1), row(1, 1), row(1, 1), row(1, 0)])
    assert knn(references, [0, 1, 0, 0]).score(row(1, 1))[0] == 0.5
    assert knn(references, [1, 0, 1, 1]).score(row(1, 1))[0] == np.nextafter(np.float32(0.5), np.float32(0))
    doubled = np.concatenate([row(2, 2), row(1, 1)])
    assert knn(doubled, [1, 0]).score(row(3, 3))[0] == 0.5


@pytest.mark.parametrize("labels", [[0, 1, 1], [1, 0, 0]])
def test_zero_vectors_are_at_distance_one_from_everything_as_in_scikit_learn(labels: list[int]) -> None:
    references = np.concatenate([row(0), row(0, 1), row(-1, 0)])
    expected = KNeighborsClassifier(1, metric="cosine").fit(references, labels)
    for query in (row(0), row(1), row(-1, -1), row(0, 1)):
        assert (knn(references, labels).score(query)[0] >= 0.5) == (expected.predict(query)[0] == 1)


def test_an_even_vote_is_real_as_scikit_learns_smallest_class() -> None:
    references = np.concatenate([row(1, 0.1), row(1, -0.1), row(-1)])
    expected = KNeighborsClassifier(2, metric="cosine").fit(references, [1, 0, 1])
    assert expected.predict(row(1))[0] == 0
    assert knn(references, [1, 0, 1], 2).score(row(1))[0] < 0.5


def test_the_score_grades_by_the_distances_to_the_nearest_of_each_class() -> None:
    references = np.concatenate([row(1, 0), row(0, 1)])
    angles = np.linspace(0, np.pi / 2, 31)
    scores = knn(references, [0, 1]).score(np.concatenate([row(np.cos(a), np.sin(a)) for a in angles]))
    assert scores[0] == 0
    assert scores[-1] == 1
    assert (np.diff(scores) > 0).all()


def test_with_more_neighbours_than_one_class_has_the_rest_vote_too() -> None:
    references = np.concatenate([row(1), row(1, 0.1), row(0, 1), row(0.1, 1), row(-1)])
    labels = [1, 0, 0, 0, 0]
    expected = KNeighborsClassifier(3, metric="cosine").fit(references, labels)
    assert knn(references, labels, 3).score(row(1))[0] == pytest.approx(1 / 3)
    assert expected.predict(row(1))[0] == 0


def test_references_of_float64_are_kept_and_saved_as_they_are(tmp_path: Path) -> None:
    references, labels = clouds(50, 0)
    estimator = KNeighborsClassifier(1, metric="cosine").fit(references.astype(np.float64) + 1e-12, labels)
    joblib.dump(estimator, tmp_path / "head.sav")
    head = NearestNeighbourHead.from_estimator(read_estimator(tmp_path / "head.sav"))
    assert head is not None
    head.save(tmp_path)
    np.testing.assert_array_equal(NearestNeighbourHead.load(tmp_path).state()["references"], estimator._fit_X)


def test_saved_options_come_back_and_may_be_overridden(tmp_path: Path) -> None:
    head = knn(*clouds(20, 0), 3)
    head.save(tmp_path)
    assert NearestNeighbourHead.load(tmp_path).options.n_neighbors == 3
    assert NearestNeighbourHead.load(tmp_path, {"n_neighbors": 5}).options.n_neighbors == 5
