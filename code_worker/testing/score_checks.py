"""Checks of how a head is fitted and how it scores."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from threadpoolctl import threadpool_limits

from code_worker.heads import MAX_TOLERANCE, Head, options_problem, tolerance_of
from code_worker.testing.trial import (
    HeadUnderTest,
    NotConformingError,
    NotTriedError,
    largest_difference,
    sample_embeddings,
    scores_elsewhere,
)
from code_worker.types import EMBEDDING_DIM, SCORE_ROUNDING

_BATCHES: Final = (7, 64, 1000)
_THREADS: Final = 2
"""More than one, no matter what the machine has: a product is then cut into as many parts."""
_FEW: Final = 64


def check_fit(subject: HeadUnderTest) -> None:
    """`fit` takes read-only (n, 192) float32 embeddings and (n,) int8 labels, learns, and returns self."""
    head = subject.fitted()
    if not isinstance(head, subject.head_class):
        raise NotConformingError(
            "fit returns the head itself", f"{type(head).__name__}", "end fit with `return self`"
        )
    subject.head = head


def check_options(subject: HeadUnderTest) -> None:
    """Options can be written to a manifest as JSON, and unknown ones are refused."""
    try:
        subject.head_class({**subject.options, "no_such_option": 1})
    except ValidationError:
        pass
    else:
        raise NotConformingError(
            "an unknown option is refused with a ValidationError",
            "it was taken without a word",
            "derive Options from Head.Options and do not loosen its model_config; let __init__ call Head.__init__",
        )
    written = json.loads(json.dumps(subject.head.options.model_dump(mode="json", warnings=False)))
    try:
        taken = subject.head_class(written).options
    except ValidationError as error:
        raise NotConformingError(
            "options that are taken back as they were written",
            options_problem(error),
            "give each field a default of its own type",
        ) from None
    if taken != subject.head.options:
        raise NotConformingError(
            "options are the same after a trip through JSON", str(written), "use fields that JSON can hold"
        )


def check_shape_and_dtype(subject: HeadUnderTest) -> None:
    """`score` returns one float32 per embedding."""
    scores: object = subject.head.score(subject.embeddings)
    seen = type(scores).__name__
    if isinstance(scores, np.ndarray):
        seen = f"shape {scores.shape} and dtype {scores.dtype}"
    if not isinstance(scores, np.ndarray) or scores.shape != (97,) or scores.dtype != np.float32:
        raise NotConformingError(
            "a numpy array of shape (97,) and dtype float32",
            seen,
            "end score with `.astype(np.float32)`, one per row",
        )


def check_range(subject: HeadUnderTest) -> None:
    """Scores lie in [0, 1], for embeddings far outside of the training data too."""
    hard = subject.fitted_to_hard_data()
    tried = [
        (subject.head, subject.embeddings * np.float32(factor), f"embeddings times {factor}")
        for factor in (1.0, 0.0, 30.0, -30.0)
    ]
    for head, embeddings, what in (*tried, (hard, subject.queries, "classes that overlap")):
        scores = head.score(embeddings)
        if wrong := np.count_nonzero(~np.isfinite(scores)):
            raise NotConformingError(
                "every score in [0, 1]",
                f"{wrong} of {len(scores)} scores are NaN or infinite for {what}",
                "look for a division by zero, a logarithm of 0 or an overflow in fit and score",
            )
        if not ((scores >= 0).all() and (scores <= 1).all()):
            raise NotConformingError(
                "every score in [0, 1]",
                f"{np.min(scores)} to {np.max(scores)} for {what}",
                "map the raw decision into [0, 1], for example with a logistic function",
            )


def check_direction(subject: HeadUnderTest) -> None:
    """Generated images score higher than real ones."""
    scores = subject.head.score(subject.embeddings)
    real, generated = scores[subject.labels == 0], scores[subject.labels == 1]
    # (g, 1) > (1, r) → (g, r): the share of ordered pairs, which is the area under the ROC curve (Mann and Whitney's
    # statistic over g · r) with ties counted as wrong.
    ordered = float((generated[:, None] > real[None, :]).mean())
    if ordered < 0.9:
        raise NotConformingError(
            "generated images score higher than real ones in at least 90 % of pairs",
            f"{ordered:.0%} of pairs",
            "flip the sign: a score is high when the image looks generated, and one-class heads see real images only",
        )


def check_border(subject: HeadUnderTest) -> None:
    """0.5 is the border: what the head would call generated scores at least 0.5."""
    # (97,) bool
    right = (subject.head.score(subject.embeddings) >= 0.5) == (subject.labels == 1)
    if right.mean() < 0.8:
        raise NotConformingError(
            "0.5 parts real from generated in at least 80 % of easy cases",
            f"{right.mean():.0%}",
            "shift the score so that the head's own decision border lies at 0.5",
        )


def check_determinism(subject: HeadUnderTest) -> None:
    """The same embeddings score the same, and fitting again on the same data gives the same head."""
    scores = subject.head.score(subject.embeddings)
    if not np.array_equal(scores, subject.head.score(subject.embeddings)):
        raise NotConformingError(
            "the same scores twice", "others the second time", "no randomness and no state in score"
        )
    difference = largest_difference(scores, subject.fitted().score(subject.embeddings))
    if difference > MAX_TOLERANCE:
        raise NotConformingError(
            "a head fitted again on the same data scores the same",
            f"a difference of {difference:.2g}",
            "seed every random choice in fit, and make the seed an option",
        )


def check_batch_invariance(subject: HeadUnderTest) -> None:
    """A row's score does not depend on the rows beside it, nor on how many threads multiply matrices.

    A verdict must not change with the batch. Tried where rounding shows: on classes that overlap, labels at random,
    ties, copies, and points between classes.
    """
    head = subject.fitted_to_hard_data()
    with threadpool_limits(1):
        # (1000,) float32, each row scored with nothing beside it: what all other ways are compared with
        alone = _in_batches(head, subject.queries, 1)
        for size in _BATCHES:
            _must_agree(subject, alone, _in_batches(head, subject.queries, size), f"in batches of {size}")
        _must_agree(subject, alone, head.score(subject.queries[::-1])[::-1], "in another order")
    with threadpool_limits(_THREADS):
        for size in (1, *_BATCHES):
            some = subject.queries[: max(size, _FEW)]
            how = f"in batches of {size} on {_THREADS} BLAS threads"
            _must_agree(subject, alone[: len(some)], _in_batches(head, some, size), how)


def _in_batches(head: Head, embeddings: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    return np.concatenate([head.score(embeddings[at : at + size]) for at in range(0, len(embeddings), size)])


def _must_agree(subject: HeadUnderTest, alone: NDArray[np.float32], other: NDArray[np.float32], how: str) -> None:
    apart, allowed = np.abs(alone - other), subject.tolerance
    over = np.count_nonzero(apart > allowed)
    # Beside the tolerance: a difference that rounding explains still may not turn one verdict into another.
    strayed = np.count_nonzero((alone >= 0.5) != (other >= 0.5))
    if over or strayed:
        raise NotConformingError(
            f"scores alone and {how} that are {f'within {allowed:g} of one another' if allowed else 'the same'} and "
            "on the same side of 0.5",
            f"{over} of {len(alone)} rows further apart, by up to {apart.max():.2g}, and {strayed} on the other side",
            "use no statistics of the batch in score; sum each row by itself (np.vecdot) in float64 and round at the "
            "end, or declare a `tolerance` and decide rows near 0.5 by themselves",
        )


def check_tolerance(subject: HeadUnderTest) -> None:
    """`tolerance` is a number from 0 to 1e-4."""
    try:
        tolerance_of(subject.head_class)
    except ValueError:
        raise NotConformingError(
            f"a tolerance from 0 to {MAX_TOLERANCE:g}",
            repr(subject.head_class.tolerance),
            "compute in float64, and declare no more than rounding can do",
        ) from None


def check_nan_refusal(subject: HeadUnderTest) -> None:
    """An embedding that is not finite is refused with ValueError, never scored."""
    for bad in (np.nan, np.inf, -np.inf):
        spoilt = subject.embeddings.copy()
        spoilt[3, 5] = bad
        _must_refuse(subject, spoilt, f"an embedding with {bad}", "begin score with a check of np.isfinite")


def check_width_refusal(subject: HeadUnderTest) -> None:
    """An embedding of another width is refused with ValueError."""
    fix = f"begin score with a check of shape (n, {EMBEDDING_DIM})"
    _must_refuse(subject, subject.embeddings[:, :-1], "embeddings 191 wide", fix)
    _must_refuse(subject, np.hstack([subject.embeddings, subject.embeddings]), "embeddings 384 wide", fix)
    _must_refuse(subject, subject.embeddings[0], "a single embedding without a batch axis", fix)


def _must_refuse(subject: HeadUnderTest, embeddings: NDArray[np.float32], what: str, fix: str) -> None:
    try:
        subject.head.score(embeddings)
    except ValueError:
        return
    except Exception as error:
        raise NotConformingError(f"ValueError for {what}", type(error).__name__, fix) from error
    raise NotConformingError(f"ValueError for {what}", "a score", fix)


def check_empty_batch(subject: HeadUnderTest) -> None:
    """An empty batch gives an empty array."""
    scores = subject.head.score(np.empty((0, EMBEDDING_DIM), dtype=np.float32))
    if scores.shape != (0,) or scores.dtype != np.float32:
        raise NotConformingError(
            "shape (0,) and dtype float32 for an empty batch",
            f"shape {scores.shape} and dtype {scores.dtype}",
            "return early, or use operations that allow no rows",
        )


def check_input_untouched(subject: HeadUnderTest) -> None:
    """`score` leaves its input as it was: other heads score the same array."""
    given = subject.embeddings.copy()
    subject.head.score(given)
    if not np.array_equal(given, subject.embeddings):
        raise NotConformingError(
            "the input is unchanged after score",
            "other values in it",
            "work on a copy: `x = x - mean`, not `x -= mean`",
        )


def check_thread_safety(subject: HeadUnderTest) -> None:
    """Many threads may score at once with one head."""
    batches = [sample_embeddings(40 + number, seed=number)[0] for number in range(24)]
    expected = [subject.head.score(batch) for batch in batches]
    # As in a worker on a CPU: threads of BLAS would wait for one another's cores.
    with threadpool_limits(1), ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            # Five rounds of 24 batches: a race shows by chance, so
            # one that passes here is unlikely and not ruled out.
            for before, after in zip(expected, pool.map(subject.head.score, batches), strict=True):
                if before.shape != after.shape or largest_difference(before, after) > subject.tolerance:
                    raise NotConformingError(
                        "the same scores from eight threads as from one",
                        "others",
                        "keep nothing on self while scoring; use local variables",
                    )


def check_other_processor(subject: HeadUnderTest) -> str:
    """A processor with other kernels gives the same scores; returns a warning where they round differently there."""
    head, directory = subject.fitted_to_hard_data(), subject.directory / "elsewhere"
    directory.mkdir()
    head.save(directory)
    with threadpool_limits(1):
        here = head.score(subject.queries)
    try:
        there = scores_elsewhere(subject.head_class, directory, head.options.model_dump(mode="json"), subject.queries)
    except NotTriedError as error:
        return f"not tried with the kernels of another processor: {error}"
    apart, strayed = largest_difference(here, there), np.count_nonzero((here >= 0.5) != (there >= 0.5))
    if apart <= subject.tolerance and not strayed:
        return ""
    seen = f"scores up to {apart:.2g} apart with the kernels of another processor"
    fix = "sum in float64 and round at the end, or declare a `tolerance`"
    if apart > max(subject.tolerance, SCORE_ROUNDING) or strayed:
        raise NotConformingError(
            f"scores within {max(subject.tolerance, SCORE_ROUNDING):g} on every processor, on the same side of 0.5",
            f"{seen}, {strayed} of {len(here)} on the other side",
            f"{fix}, and decide rows near 0.5 by themselves",
        )
    return f"{seen}: a release made here is loaded there with a warning (head_changed); {fix}"


BASIC_CHECKS: Final = (check_fit, check_tolerance, check_shape_and_dtype, check_range)
"""What all others rest on."""
SCORE_CHECKS: Final = (
    check_tolerance,
    check_shape_and_dtype,
    check_range,
    check_options,
    check_direction,
    check_border,
    check_determinism,
    check_batch_invariance,
    check_nan_refusal,
    check_width_refusal,
    check_empty_batch,
    check_input_untouched,
    check_thread_safety,
)
