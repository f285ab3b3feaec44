"""The built-in heads: scores whose 0.5 is scikit-learn's own border, from plain arrays."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np
import pytest
from pydantic import ValidationError
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import OneClassSVM

from code_worker.errors import ArtifactError
from code_worker.heads import Head
from code_worker.releases.importing import read_estimator
from code_worker_heads.knn import NearestNeighbourHead
from code_worker_heads.linear import LinearHead
from code_worker_heads.saved import sided
from code_worker_heads.svm import OneClassSvmHead
from tests.heads.samples import clouds, fitted_estimators
from tests.rounding import DOUBLE, SINGLE, decision_error, score_error

if TYPE_CHECKING:
    from tests.parity import ParitySet

HEADS: dict[str, type[Head]] = {"linear": LinearHead, "knn": NearestNeighbourHead, "svm": OneClassSvmHead}
QUERIES, _ = clouds(600, 5, 0.2)
EXACT = QUERIES.astype(np.float64)
"""The same numbers: scikit-learn computes in the precision of its input, and float32's rounding would decide ties."""


def imported(head_class: type[Head], estimator: object, directory: Path) -> Any:
    joblib.dump(estimator, directory / "head.sav")
    return head_class.from_estimator(read_estimator(directory / "head.sav"))


def predicted_fake(estimator: Any, embeddings: Any) -> Any:
    predicted = estimator.predict(embeddings)
    return predicted == (-1 if isinstance(estimator, OneClassSVM) else 1)


@pytest.mark.numeric
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", HEADS)
def test_an_imported_head_decides_as_scikit_learn(name: str, seed: int, tmp_path: Path) -> None:
    estimator = fitted_estimators(seed)[name]
    head = imported(HEADS[name], estimator, tmp_path)
    fake = predicted_fake(estimator, EXACT)
    assert 20 < fake.sum() < 580
    np.testing.assert_array_equal(head.score(QUERIES) >= 0.5, fake)


@pytest.mark.numeric
@pytest.mark.parametrize("name", HEADS)
def test_a_head_fitted_here_decides_as_the_published_estimator_fitted_on_the_same(name: str) -> None:
    embeddings, labels = clouds(400, 0, 0.2)
    head = HEADS[name]()
    if head.one_class:
        embeddings, labels = embeddings[labels == 0], labels[labels == 0]
    agree = predicted_fake(fitted_estimators()[name], EXACT) == (head.fit(embeddings, labels).score(QUERIES) >= 0.5)
    assert agree.mean() > 0.995


@pytest.mark.numeric
def test_parity_with_the_published_pipeline(parity_set: ParitySet) -> None:
    from tests.parity import KNN_FILE, LINEAR_FILE, SVM_FILE

    files = parity_set.directory / "sklearn"
    linear = LinearHead.from_estimator(read_estimator(files / LINEAR_FILE))
    knn = NearestNeighbourHead.from_estimator(read_estimator(files / KNN_FILE))
    svm = OneClassSvmHead.from_estimator(read_estimator(files / SVM_FILE))
    assert linear is not None
    assert knn is not None
    assert svm is not None
    scores = linear.score(parity_set.embeddings)
    np.testing.assert_array_equal(scores >= 0.5, parity_set.linear == 1)
    assert (np.abs(scores - parity_set.linear_p) <= score_error(linear, parity_set.embeddings, SINGLE)).all()
    np.testing.assert_array_equal(knn.score(parity_set.embeddings) >= 0.5, parity_set.knn == 1)
    np.testing.assert_array_equal(svm.score(parity_set.embeddings) >= 0.5, parity_set.svm_raw == -1)
    apart = np.abs(svm.decision(parity_set.embeddings) - parity_set.svm_decision)
    assert (apart <= 2 * decision_error(svm, parity_set.embeddings, DOUBLE)).all()


@pytest.mark.numeric
def test_linear_score_is_the_probability_and_svm_decision_is_the_estimators(tmp_path: Path) -> None:
    estimators: dict[str, Any] = fitted_estimators()
    linear = imported(LinearHead, estimators["linear"], tmp_path)
    # In float64 both, of which the score is rounded to float32.
    probabilities = estimators["linear"].predict_proba(EXACT)[:, 1]
    np.testing.assert_allclose(linear.score(QUERIES), probabilities, atol=2 * SINGLE, rtol=0)
    svm = imported(OneClassSvmHead, estimators["svm"], tmp_path)
    apart = np.abs(svm.decision(QUERIES) - estimators["svm"].decision_function(QUERIES))
    assert (apart <= 2 * decision_error(svm, QUERIES, DOUBLE)).all()


@pytest.mark.numeric
@pytest.mark.parametrize("degree", [1, 2, 3, 4, 5, 7])
def test_every_degree_of_the_polynomial_is_exact(degree: int, tmp_path: Path) -> None:
    real, _ = clouds(150, 2)
    estimator = OneClassSVM(kernel="poly", degree=degree, gamma="scale", coef0=0.7, nu=0.2).fit(real)
    head = imported(OneClassSvmHead, estimator, tmp_path)
    apart = np.abs(head.decision(QUERIES) - estimator.decision_function(QUERIES))
    assert (apart <= 2 * decision_error(head, QUERIES, DOUBLE)).all()


@pytest.mark.numeric
@pytest.mark.parametrize("name", HEADS)
def test_a_row_scores_the_same_alone_and_in_any_batch(name: str, tmp_path: Path) -> None:
    head = imported(HEADS[name], fitted_estimators()[name], tmp_path)
    together = head.score(QUERIES)
    alone = np.concatenate([head.score(row[None]) for row in QUERIES])
    np.testing.assert_array_equal(together >= 0.5, alone >= 0.5)
    if name == "svm":  # computes matrix products; its score falls by 1/2 at most where the decision rises by ρ
        apart = decision_error(head, QUERIES, DOUBLE) / abs(head.state()["kernel"][3])
        assert (np.abs(together - alone) <= apart + 2 * SINGLE).all()
    else:
        np.testing.assert_array_equal(together, alone)


@pytest.mark.numeric
def test_rows_on_the_border_of_the_svm_fall_on_one_side_in_every_batch(tmp_path: Path) -> None:
    head: OneClassSvmHead = imported(OneClassSvmHead, fitted_estimators()["svm"], tmp_path)
    inside, outside = QUERIES[head.decision(QUERIES) > 0][0], QUERIES[head.decision(QUERIES) <= 0][0]
    inside, outside = inside.astype(np.float64), outside.astype(np.float64)
    for _ in range(80):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if head.decision(middle[None])[0] > 0 else (inside, middle)
    # All the neighbours in float64 of the point where the decision changes sign.
    border = inside + np.outer(np.linspace(-40, 40, 200), np.spacing(inside))
    together = head.score(border) >= 0.5
    assert 0 < together.sum() < 200
    np.testing.assert_array_equal(together, [head.score(row[None])[0] >= 0.5 for row in border])


def test_rounding_to_float32_never_changes_sides() -> None:
    nearly = np.array([0.5 - 1e-12, 0.5, 0.5 + 1e-12, 0.5 - 1e-12, 0.5, 0.5 + 1e-12])
    generated = np.array([False, False, False, True, True, True])
    np.testing.assert_array_equal(sided(nearly, generated) >= 0.5, generated)


@pytest.mark.numeric
def test_log_odds_of_exactly_zero_are_real_as_scikit_learn_says(tmp_path: Path) -> None:
    estimator = LogisticRegression().fit(*clouds(50, 0))
    estimator.coef_, estimator.intercept_ = np.zeros((1, 192)), np.zeros(1)
    head = imported(LinearHead, estimator, tmp_path)
    assert not estimator.predict(QUERIES[:1])[0]
    assert head.score(QUERIES[:1])[0] == np.nextafter(np.float32(0.5), np.float32(0))
    estimator.intercept_ = np.array([1e-15])
    assert estimator.predict(QUERIES[:1])[0] == 1
    assert imported(LinearHead, estimator, tmp_path).score(QUERIES[:1])[0] == 0.5


def test_a_decision_of_exactly_zero_is_an_outlier_as_libsvm_says(tmp_path: Path) -> None:
    estimator = OneClassSVM(kernel="poly", gamma="auto", nu=0.1).fit(clouds(50, 0)[0])
    estimator.intercept_ = estimator._intercept_ = np.zeros(1)
    nothing = np.zeros((1, 192), dtype=np.float32)
    assert estimator.predict(nothing)[0] == -1
    assert imported(OneClassSvmHead, estimator, tmp_path).score(nothing)[0] == 0.5


def test_extreme_scores_stay_in_range_and_keep_their_order() -> None:
    linear = LinearHead().restore({"coef": np.eye(1, 192)[0], "intercept": np.zeros(1)})
    rows = np.zeros((6, 192), dtype=np.float32)
    rows[:, 0] = [-3e38, -50, -1, 1, 50, 3e38]
    scores = linear.score(rows)
    assert (np.diff(scores) >= 0).all()
    assert scores.min() == 0
    assert scores.max() == 1
    svm = OneClassSvmHead().fit(clouds(60, 0)[0], np.zeros(60, dtype=np.int8))
    outwards = svm.score(-clouds(60, 0)[0][:1] * np.array([[1], [10], [100], [1000]], dtype=np.float32))
    assert (np.diff(outwards) > 0).all()


@pytest.mark.parametrize("name", HEADS)
def test_saving_twice_gives_the_same_bytes_and_other_files_are_refused(name: str, tmp_path: Path) -> None:
    head = imported(HEADS[name], fitted_estimators()[name], tmp_path)
    for directory in ("a", "b"):
        (tmp_path / directory).mkdir()
        head.save(tmp_path / directory)
    for file in ("head.json", "head.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    for other in HEADS.keys() - {name}:
        with pytest.raises(ArtifactError, match="not the description of"):
            HEADS[other].load(tmp_path / "a")
    (tmp_path / "b" / "head.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    with pytest.raises(ArtifactError, match=r"head\.safetensors cannot be read"):
        HEADS[name].load(tmp_path / "b")
    (tmp_path / "b" / "head.json").unlink()
    with pytest.raises(ArtifactError, match=r"head\.json cannot be read"):
        HEADS[name].load(tmp_path / "b")


def test_damaged_arrays_are_refused_with_their_name(tmp_path: Path) -> None:
    head = LinearHead().restore({"coef": np.full(192, np.nan), "intercept": np.zeros(1)})
    head.save(tmp_path)
    with pytest.raises(ArtifactError, match="'coef' holds values that are not finite"):
        LinearHead.load(tmp_path)
    LinearHead().restore({"coef": np.ones(7), "intercept": np.zeros(1)}).save(tmp_path)
    with pytest.raises(ArtifactError, match=r"'coef' must have shape \(192,\), not \(7,\)"):
        LinearHead.load(tmp_path)
    described = json.loads((tmp_path / "head.json").read_text())
    described["options"]["C"] = -1
    (tmp_path / "head.json").write_text(json.dumps(described))
    with pytest.raises(ArtifactError, match="wrong options"):
        LinearHead.load(tmp_path)


def _fitted(estimator: Any, **changed: object) -> Any:
    embeddings, labels = clouds(60, 0)
    estimator.fit(embeddings, labels)
    vars(estimator).update(changed)
    return estimator


NOT_REPRESENTABLE = [
    (LinearHead, _fitted(LogisticRegression(), classes_=np.array([1, 2])), "classes 0 .real. and 1"),
    (LinearHead, _fitted(LogisticRegression(), multi_class="multinomial"), "multinomial"),
    (LinearHead, _fitted(LogisticRegression(), coef_=np.ones((1, 7))), r"shape \(1, 192\), not \(1, 7\)"),
    (LinearHead, _fitted(LogisticRegression(), coef_=np.full((1, 192), np.inf)), "not finite"),
    (LinearHead, LogisticRegression(), "was it fitted"),
    (NearestNeighbourHead, _fitted(KNeighborsClassifier(1, metric="euclidean", algorithm="brute")), "cosine"),
    (NearestNeighbourHead, _fitted(KNeighborsClassifier(1, metric="cosine", weights="distance")), "weights"),
    (NearestNeighbourHead, _fitted(KNeighborsClassifier(1, metric="cosine"), n_neighbors=61), "61 neighbours"),
    (NearestNeighbourHead, _fitted(KNeighborsClassifier(1, metric="cosine"), outputs_2d_=True), "one label"),
    (
        NearestNeighbourHead,
        _fitted(KNeighborsClassifier(1, metric="cosine"), _y=np.full(60, 3)),
        "other than 0 and 1",
    ),
    (OneClassSvmHead, _fitted(OneClassSVM(kernel="rbf")), "poly"),
    (OneClassSvmHead, _fitted(OneClassSVM(kernel="poly"), degree=40), "degree"),
    (OneClassSvmHead, _fitted(OneClassSVM(kernel="poly"), _gamma=None), "lacks gamma"),
    (OneClassSvmHead, _fitted(OneClassSVM(kernel="poly"), dual_coef_=np.ones((1, 3))), "dual_coef_"),
]


@pytest.mark.parametrize(("head_class", "estimator", "message"), NOT_REPRESENTABLE)
def test_an_estimator_that_would_predict_otherwise_is_refused(
    head_class: type[Head], estimator: object, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=message):
        imported(head_class, estimator, tmp_path)


@pytest.mark.parametrize("name", HEADS)
def test_each_head_leaves_the_others_estimators_alone(name: str, tmp_path: Path) -> None:
    for other, estimator in fitted_estimators().items():
        assert (imported(HEADS[name], estimator, tmp_path) is None) == (other != name)


def test_fitting_refuses_what_cannot_be_learnt_from() -> None:
    embeddings, labels = clouds(20, 0)
    for head_class in (LinearHead, NearestNeighbourHead):
        with pytest.raises(ValueError, match="needs both real"):
            head_class().fit(embeddings, np.zeros(20, dtype=np.int8))
    with pytest.raises(ValueError, match="real images only"):
        OneClassSvmHead().fit(embeddings, labels)
    with pytest.raises(ValueError, match="labels must be 0"):
        LinearHead().fit(embeddings, labels + 2)
    with pytest.raises(ValueError, match=r"shape \(20,\)"):
        LinearHead().fit(embeddings, labels[:-1])
    with pytest.raises(ValueError, match="21 neighbours"):
        NearestNeighbourHead({"n_neighbors": 21}).fit(embeddings, labels)
    with pytest.raises(ValidationError, match="nu"):
        OneClassSvmHead({"nu": 0})


SCORING = """
import sys, numpy as np
from code_worker_heads.linear import LinearHead
import code_worker_heads.knn, code_worker_heads.svm
LinearHead().restore({'coef': np.ones(192), 'intercept': np.zeros(1)}).score(np.ones((3, 192), np.float32))
print({'sklearn', 'scipy', 'torch'} & set(sys.modules))
"""


def test_scoring_imports_no_scikit_learn() -> None:
    done = subprocess.run([sys.executable, "-c", SCORING], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_where_the_weight_is_nought_too(bad: float) -> None:
    linear = LinearHead().restore({"coef": np.eye(1, 192)[0], "intercept": np.zeros(1)})
    rows = np.zeros((3, 192), dtype=np.float32)
    rows[1, 100] = bad
    with pytest.raises(ValueError, match="must be finite"):
        linear.score(rows)
