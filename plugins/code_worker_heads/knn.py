"""Nearest neighbours by cosine distance, the published `knn` head."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from code_worker.errors import ArtifactError
from code_worker.heads import EstimatorState, Head
from code_worker.types import EMBEDDING_DIM
from code_worker_heads.saved import (
    ArrayHead,
    Arrays,
    checked_embeddings,
    checked_labels,
    number_array,
    sided,
    two_classes,
)
from code_worker_heads.search import CosineIndex, NeighbourIndex, unit_rows


class NearestNeighbourHead(ArrayHead):
    """The majority among the nearest references decides; a tied vote is real, as scikit-learn's smallest class.

    With one neighbour the score is `d_real / (d_real + d_fake)`, the distances to the nearest reference of each
    class: 0.5 where both are as near, 1 on a generated reference. With more it is the share of generated neighbours.
    """

    class Options(Head.Options):
        """Published hyper-parameters."""

        n_neighbors: int = Field(1, ge=1, description="References that vote.")
        weights: Literal["uniform"] = Field("uniform", description="Every vote counts the same.")
        metric: Literal["cosine"] = Field("cosine", description="Distance between embeddings.")

    kind: ClassVar = "knn"
    layout: ClassVar = {
        "references": (("float32", "float64"), (None, EMBEDDING_DIM)),
        "labels": (("int8",), (None,)),
    }
    options: Options

    _references: NDArray[Any]
    _labels: NDArray[np.int8]
    _classes: tuple[tuple[NDArray[np.intp], NeighbourIndex], ...]

    def fit(self, embeddings: NDArray[Any], labels: NDArray[Any]) -> Self:
        """Keeps the embeddings as references; nothing else is learnt."""
        references = checked_embeddings(embeddings).copy()
        found = two_classes(checked_labels(labels, len(references)))
        if len(references) < self.options.n_neighbors:
            raise ValueError(
                f"{self.options.n_neighbors} neighbours cannot be found among {len(references)} references"
            )
        return self.restore({"references": references, "labels": found})

    def score(self, embeddings: NDArray[Any]) -> NDArray[np.float32]:
        """At least 0.5 exactly where most of the nearest references are generated."""
        queries = unit_rows(checked_embeddings(embeddings))
        (d_real, at_real), (d_fake, at_fake) = (
            self._nearest_of_class(queries, positions, index) for positions, index in self._classes
        )
        k = self.options.n_neighbors
        # (n, 2k) → (n, k): by distance, ties by position among all references, as scikit-learn's brute force has it.
        order = np.lexsort((np.hstack((at_real, at_fake)), np.hstack((d_real, d_fake))), axis=1)[:, :k]
        # Columns from there on are of generated references.
        votes = (order >= d_real.shape[1]).sum(axis=1)
        generated = 2 * votes > k
        if k > 1:
            return sided(votes / k, generated)
        # 0 where a query equals a reference of both classes: as near to both, 0.5.
        total = d_real[:, 0] + d_fake[:, 0]
        return sided(np.divide(d_real[:, 0], total, out=np.full(len(total), 0.5), where=total > 0), generated)

    def _nearest_of_class(
        self, queries: NDArray[np.float64], positions: NDArray[np.intp], index: NeighbourIndex
    ) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        distances, found = index.nearest(queries, min(self.options.n_neighbors, len(index)))
        return distances, positions[found]

    def state(self) -> Arrays:
        """References and their labels."""
        return {"references": self._references, "labels": self._labels}

    def restore(self, arrays: Arrays) -> Self:
        """Takes references and labels, and indexes each class by itself."""
        references, labels = np.ascontiguousarray(arrays["references"]), arrays["labels"].astype(np.int8)
        if labels.shape != (len(references),) or set(np.unique(labels)) != {0, 1}:
            raise ArtifactError("each reference needs a label, 0 or 1, and both must occur")
        if len(references) < self.options.n_neighbors:
            raise ArtifactError(f"{self.options.n_neighbors} neighbours with only {len(references)} references")
        # The search keeps float32: infinities there would be nearest to everything or nothing.
        if np.abs(references).max() > np.finfo(np.float32).max:
            raise ArtifactError("a reference lies beyond the range of float32")
        self._references, self._labels = references, labels
        positions = (np.flatnonzero(labels == 0), np.flatnonzero(labels == 1))
        self._classes = tuple((where, CosineIndex(references[where])) for where in positions)
        return self

    @classmethod
    def from_estimator(cls, estimator: EstimatorState) -> Self | None:
        """Imports a `KNeighborsClassifier` with cosine distance, equal votes and the classes 0 and 1."""
        if estimator.class_name != "KNeighborsClassifier":
            return None
        params = estimator.params
        if params.get("effective_metric_", params.get("metric")) != "cosine" or params.get(
            "effective_metric_params_"
        ):
            raise ArtifactError(f"KNeighborsClassifier must have metric='cosine', not {params.get('metric')!r}")
        if params.get("outputs_2d_") is not False:
            raise ArtifactError("KNeighborsClassifier must predict one label, not several")
        if number_array(estimator, "classes_", (None,)).tolist() != [0, 1]:
            raise ArtifactError("KNeighborsClassifier must have the classes 0 (real) and 1 (generated)")
        references = number_array(estimator, "_fit_X", (None, EMBEDDING_DIM))
        if references.dtype not in (np.float32, np.float64):
            raise ArtifactError(f"KNeighborsClassifier must hold floating-point references, not {references.dtype}")
        labels = number_array(estimator, "_y", (len(references),))
        if not np.isin(labels, (0, 1)).all():
            raise ArtifactError("KNeighborsClassifier holds labels other than 0 and 1")
        return cls.with_options_of(estimator).restore({"references": references, "labels": labels})
