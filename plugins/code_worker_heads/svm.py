"""One-class SVM with a polynomial kernel, the published `svm` head."""

from __future__ import annotations

from typing import Any, ClassVar, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from code_worker.errors import ArtifactError
from code_worker.heads import EstimatorState, Head
from code_worker.types import EMBEDDING_DIM
from code_worker_heads.saved import ArrayHead, Arrays, checked_embeddings, checked_labels, number_array, sided

_MAX_DEGREE: Final = 16
_PRODUCT_ENTRIES: Final = 2**20
"""Inner products held at once (8 MiB)."""
_KERNEL_ENTRIES: Final = 2**14
"""Of which so many (128 KiB) are raised to their power at once, while they are still in the cache."""
_ROUNDING: Final = 1e-10
"""Far above float64's rounding of a decision, relative to the size of its terms."""


class OneClassSvmHead(ArrayHead):
    """Learns where real images lie; what lies outside is called generated.

    The decision is `Σ αᵢ (γ x·xᵢ + c)^degree − ρ`; a decision of 0 or less means outlier, as in libsvm. The score is
    `(1 − t / (1 + |t|)) / 2` with `t = decision / |ρ|`: 0.5 on the border, falling as the decision rises, and never
    flat, since it tends to 0 and 1 only as 1/|t|. ρ is the model's own unit: `t = −1` where the kernel sum is 0.
    """

    class Options(Head.Options):
        """Published hyper-parameters of the fit."""

        kernel: Literal["poly"] = Field("poly", description="Only the polynomial kernel is represented.")
        nu: float = Field(0.1, gt=0, le=1, description="Bound on the share of real images left outside.")
        degree: int = Field(3, ge=1, le=_MAX_DEGREE, description="Degree of the polynomial.")
        gamma: Literal["auto", "scale"] | float = Field(
            "auto", description="Factor of the inner product; auto: 1/192."
        )
        coef0: float = Field(0.0, description="Constant term of the polynomial.")

    one_class: ClassVar = True
    kind: ClassVar = "svm"
    layout: ClassVar = {
        "support_vectors": (("float64",), (None, EMBEDDING_DIM)),
        "dual_coef": (("float64",), (None,)),
        "kernel": (("float64",), (4,)),
    }
    options: Options

    _vectors: NDArray[np.float64]
    _alpha: NDArray[np.float64]
    _kernel: NDArray[np.float64]
    _longest: float
    _weight: float

    def fit(self, embeddings: NDArray[Any], labels: NDArray[Any]) -> Self:
        """Fits scikit-learn's `OneClassSVM` on real images and keeps its arrays.

        Raises:
            ValueError: a label other than 0, fewer than 2 rows, or values that are not finite.
        """
        from sklearn.svm import OneClassSVM

        rows = checked_embeddings(embeddings).astype(np.float64)
        if checked_labels(labels, len(rows)).any():
            raise ValueError("the one-class SVM is fitted on real images only: every label must be 0")
        if len(rows) < 2:
            raise ValueError("the one-class SVM needs at least 2 real images")
        chosen = self.options
        model = OneClassSVM(
            kernel="poly", nu=chosen.nu, degree=chosen.degree, gamma=chosen.gamma, coef0=chosen.coef0
        ).fit(rows)
        kernel = np.array([model._gamma, chosen.coef0, chosen.degree, -model.intercept_[0]])  # noqa: SLF001 - resolved gamma
        return self.restore(
            {"support_vectors": model.support_vectors_, "dual_coef": model.dual_coef_[0], "kernel": kernel}
        )

    def decision(self, embeddings: NDArray[Any]) -> NDArray[np.float64]:
        """Signed distance to the border, `(n,) float64`, positive inside (real), as scikit-learn's.

        Rows so near the border that rounding could move them across it are computed one by one: a matrix product
        rounds a row differently alone and in a batch.

        Raises:
            ValueError: embeddings that are not finite, of another width, or so long that the kernel overflows.
        """
        rows = checked_embeddings(embeddings).astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            decision = self._decision(rows)
        if not np.isfinite(decision).all():
            raise ValueError("embeddings are so long that the polynomial kernel overflows")
        return decision

    def _decision(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        # (step, vectors) at a time, however many rows come.
        step = max(1, _PRODUCT_ENTRIES // len(self._vectors))
        decision = np.empty(len(rows))
        for start in range(0, len(rows), step):
            products = rows[start : start + step] @ self._vectors.T
            decision[start : start + step] = self._sum_kernel(products)
        gamma, constant, degree, rho = self._kernel
        # Cauchy-Schwarz bounds each kernel value: (n,), of size of the largest term of the sum.
        reach = (abs(gamma) * self._longest * np.sqrt(np.vecdot(rows, rows)) + abs(constant)) ** degree
        near = np.abs(decision) <= _ROUNDING * (self._weight * reach + abs(rho))
        for row in np.flatnonzero(near):
            decision[row] = self._sum_kernel(np.vecdot(rows[row], self._vectors)[None])[0]
        return decision

    def _sum_kernel(self, products: NDArray[np.float64]) -> NDArray[np.float64]:
        """Decision from the inner products `(n, vectors)`; overwrites them."""
        step = max(1, _KERNEL_ENTRIES // products.shape[1])
        sums = [self._sum_powers(products[start : start + step]) for start in range(0, len(products), step)]
        return np.asarray(np.concatenate(sums) - self._kernel[3], dtype=np.float64)

    def _sum_powers(self, products: NDArray[np.float64]) -> NDArray[np.float64]:
        gamma, constant, degree, _ = self._kernel
        products *= gamma
        if constant:
            products += constant
        # numpy's power calls pow(); squaring and multiplying is ten times faster and what libsvm does.
        power = products.copy() if int(degree) % 2 else np.ones_like(products)
        remaining = int(degree) // 2
        while remaining:
            products *= products
            if remaining % 2:
                power *= products
            remaining //= 2
        return np.asarray(np.vecdot(power, self._alpha))

    def score(self, embeddings: NDArray[Any]) -> NDArray[np.float32]:
        """Graded by the decision in units of ρ; at least 0.5 exactly where the decision is 0 or less."""
        decision = self.decision(embeddings)
        # A model without an offset has no unit of its own.
        unit = abs(self._kernel[3]) or 1.0
        graded = decision / (unit + np.abs(decision))
        return sided((1.0 - graded) / 2.0, decision <= 0)

    def state(self) -> Arrays:
        """Support vectors, their weights, and gamma, constant, degree, rho."""
        return {"support_vectors": self._vectors, "dual_coef": self._alpha, "kernel": self._kernel}

    def restore(self, arrays: Arrays) -> Self:
        """Takes support vectors, their weights, and gamma, constant, degree, rho."""
        vectors, alpha, kernel = (
            np.ascontiguousarray(arrays[name], dtype=np.float64)
            for name in ("support_vectors", "dual_coef", "kernel")
        )
        if len(vectors) != len(alpha) or len(vectors) == 0:
            raise ArtifactError(f"{len(vectors)} support vectors with {len(alpha)} weights")
        if not (float(kernel[2]).is_integer() and 1 <= kernel[2] <= _MAX_DEGREE):
            raise ArtifactError(f"degree of the polynomial must be 1 to {_MAX_DEGREE}, not {kernel[2]}")
        self._vectors, self._alpha, self._kernel = vectors, alpha, kernel
        with np.errstate(over="ignore"):
            self._longest = float(np.sqrt(np.vecdot(vectors, vectors).max()))
            self._weight = float(np.abs(alpha).sum())
        return self

    @classmethod
    def from_estimator(cls, estimator: EstimatorState) -> Self | None:
        """Imports a `OneClassSVM` with a polynomial kernel."""
        if estimator.class_name != "OneClassSVM":
            return None
        params = estimator.params
        if params.get("kernel") != "poly" or params.get("_sparse") is not False:
            raise ArtifactError(f"OneClassSVM must be dense with kernel='poly', not {params.get('kernel')!r}")
        kernel = [params.get("_gamma"), params.get("coef0"), params.get("degree")]
        numbers = [float(number) for number in kernel if isinstance(number, (int, float))]
        if len(numbers) != len(kernel):
            raise ArtifactError("OneClassSVM lacks gamma, coef0 or degree: was it fitted?")
        vectors = number_array(estimator, "support_vectors_", (None, EMBEDDING_DIM))
        alpha = number_array(estimator, "dual_coef_", (1, len(vectors)))
        numbers.append(-number_array(estimator, "intercept_", (1,))[0])
        if not np.isfinite(numbers).all():
            raise ArtifactError("OneClassSVM has a kernel setting that is not finite")
        arrays = {"support_vectors": vectors, "dual_coef": alpha[0], "kernel": np.array(numbers)}
        return cls.with_options_of(estimator).restore(arrays)
