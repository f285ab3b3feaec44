"""Logistic regression, the published `linear` head."""

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
    refuse_other_forms,
    sided,
    two_classes,
)


class LinearHead(ArrayHead):
    """`score` is P(generated): the logistic function of a weighted sum, in float64."""

    class Options(Head.Options):
        """Published hyper-parameters of the fit."""

        C: float = Field(0.316, gt=0, description="Inverse strength of the L2 penalty.")
        class_weight: Literal["balanced"] | dict[int, float] | None = Field(
            "balanced", description="How much each class weighs; balanced: inversely to its size."
        )
        max_iter: int = Field(1500, ge=1, description="Most iterations of the solver.")

    kind: ClassVar = "linear"
    layout: ClassVar = {"coef": (("float64",), (EMBEDDING_DIM,)), "intercept": (("float64",), (1,))}
    options: Options

    _coef: NDArray[np.float64]
    _intercept: NDArray[np.float64]

    def fit(self, embeddings: NDArray[Any], labels: NDArray[Any]) -> Self:
        """Fits scikit-learn's `LogisticRegression` in float64 and keeps its arrays."""
        from sklearn.linear_model import LogisticRegression

        rows = checked_embeddings(embeddings).astype(np.float64)
        targets = two_classes(checked_labels(labels, len(rows)))
        # A fixed state: lbfgs draws nothing, but another solver that a later version defaults to might.
        model = LogisticRegression(
            C=self.options.C, class_weight=self.options.class_weight, max_iter=self.options.max_iter, random_state=0
        ).fit(rows, targets)
        return self.restore({"coef": model.coef_[0], "intercept": model.intercept_})

    def decision(self, embeddings: NDArray[Any]) -> NDArray[np.float64]:
        """Log-odds, `(n,) float64`, positive for generated.

        One dot product per row: a matrix product would round a row differently alone and in a batch.
        """
        refuse_other_forms(embeddings)
        with np.errstate(over="ignore", invalid="ignore"):
            decision = np.vecdot(embeddings.astype(np.float64, order="C"), self._coef) + self._intercept
        # A value that is not finite makes its row's dot product so: 192 times fewer numbers to look at.
        if not np.isfinite(decision).all():
            checked_embeddings(embeddings)
        return np.asarray(decision, dtype=np.float64)

    def score(self, embeddings: NDArray[Any]) -> NDArray[np.float32]:
        """P(generated); at least 0.5 exactly where the log-odds are above 0, as scikit-learn decides."""
        decision = self.decision(embeddings)
        # exp overflows beyond 709; float32 cannot tell such a score from 0 long before.
        odds_against = np.exp(np.minimum(-decision, 700.0))
        return sided(1.0 / (1.0 + odds_against), decision > 0)

    def state(self) -> Arrays:
        """Weights and intercept."""
        return {"coef": self._coef, "intercept": self._intercept}

    def restore(self, arrays: Arrays) -> Self:
        """Takes weights and intercept."""
        self._coef = np.ascontiguousarray(arrays["coef"], dtype=np.float64)
        self._intercept = np.ascontiguousarray(arrays["intercept"], dtype=np.float64)
        return self

    @classmethod
    def from_estimator(cls, estimator: EstimatorState) -> Self | None:
        """Imports a binary `LogisticRegression` with classes 0 (real) and 1 (generated)."""
        if estimator.class_name != "LogisticRegression":
            return None
        if number_array(estimator, "classes_", (None,)).tolist() != [0, 1]:
            raise ArtifactError("LogisticRegression must have the classes 0 (real) and 1 (generated)")
        # Its softmax over a score and the opposite one is the logistic function of twice the score.
        if estimator.params.get("multi_class") == "multinomial":
            raise ArtifactError("LogisticRegression with multi_class='multinomial' has another probability (softmax)")
        coef = number_array(estimator, "coef_", (1, EMBEDDING_DIM))
        intercept = number_array(estimator, "intercept_", (1,))
        return cls.with_options_of(estimator).restore({"coef": coef[0], "intercept": intercept})
