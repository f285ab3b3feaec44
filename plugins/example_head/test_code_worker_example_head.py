"""The example head keeps the rules, and its distance is the one it says it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from code_worker_example_head import MahalanobisHead, code_worker_select_head

from code_worker import Job
from code_worker.errors import ArtifactError
from code_worker.testing import assert_head_conforms, sample_embeddings

EMBEDDINGS, LABELS = sample_embeddings(2000)
REAL = EMBEDDINGS[LABELS == 0]
NOUGHTS = np.zeros(len(REAL), dtype=np.int8)


@pytest.mark.numeric
def test_the_head_conforms() -> None:
    assert_head_conforms(MahalanobisHead)


@pytest.mark.numeric
def test_the_distance_is_that_of_mahalanobis() -> None:
    head = MahalanobisHead({"shrinkage": 0.3}).fit(REAL, NOUGHTS)
    learnt = np.delete(REAL.astype(np.float64), np.s_[4::5], axis=0)
    covariance = np.cov(learnt, rowvar=False)
    shrunk = 0.7 * covariance + 0.3 * np.trace(covariance) / 192 * np.eye(192)
    away = EMBEDDINGS[7] - learnt.mean(axis=0)
    assert head.distance(EMBEDDINGS[7:8])[0] == pytest.approx(np.sqrt(away @ np.linalg.solve(shrunk, away)))


def test_the_border_leaves_out_the_share_of_real_images_that_was_asked_for() -> None:
    head = MahalanobisHead({"outliers": 0.25}).fit(REAL, NOUGHTS)
    assert (head.score(REAL[4::5]) >= 0.5).mean() == pytest.approx(0.25, abs=0.01)
    others, labels = sample_embeddings(4000, seed=1)
    assert (head.score(others[labels == 0]) >= 0.5).mean() == pytest.approx(0.25, abs=0.1)


def test_what_cannot_be_learnt_from_is_refused() -> None:
    with pytest.raises(ValueError, match="label 0"):
        MahalanobisHead().fit(EMBEDDINGS, LABELS)
    with pytest.raises(ValueError, match="do not differ"):
        MahalanobisHead().fit(np.ones((5, 192), dtype=np.float32), np.zeros(5, dtype=np.int8))


def test_arrays_of_another_shape_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "head.npz", mean=np.zeros(3), whitening=np.eye(3), border=np.float64(1))
    with pytest.raises(ArtifactError, match=r"mean must be finite float64 of shape \(192,\)"):
        MahalanobisHead.load(tmp_path)


def test_a_second_opinion_is_given_where_the_release_has_the_head() -> None:
    asked = Job("1", "a.jpg", metadata={"second_opinion": True})
    assert code_worker_select_head(asked, ["linear", "mahalanobis"]) == "mahalanobis"
    assert code_worker_select_head(asked, ["linear"]) is None
    assert code_worker_select_head(Job("2", "a.jpg"), ["linear", "mahalanobis"]) is None
