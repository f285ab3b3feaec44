"""Embeddings for tests of heads: two overlapping clouds, and estimators fitted on them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import OneClassSVM


def clouds(rows: int, seed: int, distance: float = 1.0) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """`(rows, 192) float32` embeddings and `(rows,) int8` labels; generated ones lie `distance` further out."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(rows) % 2).astype(np.int8)
    centre = np.random.default_rng(0).normal(size=192)
    towards = np.random.default_rng(1).normal(size=192)
    rows_ = rng.normal(size=(rows, 192)) + centre + labels[:, None] * distance * towards
    return rows_.astype(np.float32), labels


def fitted_estimators(seed: int = 0) -> dict[str, object]:
    """The three published estimators, fitted as published, by head name."""
    embeddings, labels = clouds(400, seed, 0.2)
    linear = LogisticRegression(C=0.316, class_weight="balanced", max_iter=1500, random_state=0)
    knn = KNeighborsClassifier(n_neighbors=1, weights="uniform", metric="cosine", n_jobs=-1)
    svm = OneClassSVM(nu=0.1, kernel="poly", gamma="auto")
    return {
        "linear": linear.fit(embeddings, labels),
        "knn": knn.fit(embeddings, labels),
        "svm": svm.fit(embeddings[labels == 0]),
    }
