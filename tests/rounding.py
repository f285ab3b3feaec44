"""Bounds on what rounding changes, from the standard model of floating-point arithmetic.

Every operation is exact but for a factor 1 + δ, |δ| ≤ u (Higham, Accuracy and Stability of Numerical Algorithms, 2nd
ed., 2002, §2.2). The bounds hold for every order of summation, so for every kernel, processor and number of threads;
a fused multiply-add only rounds less often. They are for the worst case: with random signs, errors of n operations
add up to about √n of one (Higham & Mary, SIAM J. Sci. Comput. 41, 2019).

Through the twelve blocks of an encoder such a bound multiplies the worst case of each and is of no use. There the
bound is the promise, `EMBEDDING_TOLERANCE`; the last functions say what it does to scores.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from code_worker.types import EMBEDDING_TOLERANCE
from code_worker_heads.linear import LinearHead
from code_worker_heads.svm import OneClassSvmHead

__all__ = [
    "DOUBLE",
    "SINGLE",
    "cosine_error",
    "decision_error",
    "gamma",
    "loss_error",
    "promised_decision",
    "promised_score",
    "score_error",
]

SINGLE, DOUBLE = 2.0**-24, 2.0**-53
"""Unit roundoffs u of float32 and float64."""
_SLOPE = 0.25
"""The logistic function's steepest."""


def gamma(roundings: int, unit: float) -> float:
    """γₙ = n·u / (1 − n·u): a product of n factors 1 + δ is within γₙ of 1 (Higham 2002, Lemma 3.1)."""
    return roundings * unit / (1 - roundings * unit)


def cosine_error(width: int, unit: float) -> float:
    """Bound of the error of the cosine of two vectors of `width` numbers.

    A dot product, two quotients and two lengths; a length is off by half of what its square is, for the root.
    """
    return gamma(2 * width + 5, unit)


def loss_error(batch: int, width: int, temperature: float, loss: float, unit: float) -> float:
    """Bound of the error of the contrastive loss of `batch` records of `width` numbers; `loss` is its value.

    A query's loss moves by at most what its positive's cosine over τ moves and by at most what the furthest
    negative's does; the sum of exponentials adds γ of the batch, and means and sums γ of the loss. `L_real` and
    `L_fake` are such means each.
    """
    query = 2 * (cosine_error(width, unit) + 4 * unit) / temperature + gamma(batch + 8, unit)
    return 2 * query + gamma(batch + 8, unit) * abs(loss)


def score_error(head: LinearHead, rows: NDArray[Any], unit: float) -> NDArray[np.float64]:
    """Bound `(n,)` of the error of P(generated) for rows `(n, 192)`.

    The log-odds are off by γ of their terms' absolute sum (Higham 2002, eq. 3.5); exponential, sum, quotient and the
    result's own rounding are allowed two units each, as no library is right to the last bit.
    """
    state = head.state()
    terms = np.abs(rows).astype(np.float64) @ np.abs(state["coef"]) + abs(state["intercept"][0])
    return np.asarray(_SLOPE * gamma(len(state["coef"]) + 1, unit) * terms + 8 * unit)


def decision_error(head: OneClassSvmHead, rows: NDArray[Any], unit: float) -> NDArray[np.float64]:
    """Bound `(n,)` of the error of `Σ αᵢ (γ x·vᵢ + c)^degree − ρ` for rows `(n, 192)`.

    Written out as monomials, none is rounded more often than degree · (192 + 3) times and once per support vector.
    """
    state = head.state()
    vectors, degree, rho = state["support_vectors"], int(state["kernel"][2]), abs(state["kernel"][3])
    roundings = degree * (vectors.shape[1] + 3) + len(vectors) + 1
    return np.asarray(gamma(roundings, unit) * (_largest(head, np.abs(rows)) + rho))


def promised_score(head: LinearHead) -> float:
    """How far P(generated) moves at most when no number of an embedding moves by more than the promise."""
    return float(_SLOPE * EMBEDDING_TOLERANCE * np.abs(head.state()["coef"]).sum() + SINGLE)


def promised_decision(head: OneClassSvmHead, rows: NDArray[Any]) -> NDArray[np.float64]:
    """How far decisions `(n,)` move at most when no number of the rows `(n, 192)` moves by more than the promise."""
    sizes = np.abs(rows)
    return np.asarray(_largest(head, sizes + EMBEDDING_TOLERANCE) - _largest(head, sizes))


def _largest(head: OneClassSvmHead, sizes: NDArray[Any]) -> NDArray[np.float64]:
    """`Σ |αᵢ| (|γ| |x|·|vᵢ| + |c|)^degree` for sizes |x| `(n, 192)`."""
    state = head.state()
    factor, constant, degree = np.abs(state["kernel"][:3])
    inner = factor * (sizes.astype(np.float64) @ np.abs(state["support_vectors"]).T) + constant
    return np.asarray(inner**degree @ np.abs(state["dual_coef"]))
