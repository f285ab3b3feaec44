"""What a candidate must withstand beside being better: few or doubtful hands, a golden set, an unexpected shift."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from code_worker.data.examples import FAKE, REAL
from code_worker.training.drift import MIN_CANARIES, Drift, drift
from code_worker.training.metrics import figures, right
from code_worker.training.paired import auroc_limits, counted, detectable_loss, proven_loss

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.settings import GateSettings
    from code_worker.training.opinions import GateInputs, Opinion

__all__ = ["GoldenOpinions", "safeguarded"]

_CLASSES: Final = {"real_accuracy": REAL, "fake_accuracy": FAKE}
_NAMED: Final = 5


@dataclass(frozen=True, slots=True, eq=False)
class GoldenOpinions:
    """What both releases say of the golden set, as its images are.

    Attributes:
        digest: what pins it.
        labels: `(n,) int8`.
        candidate: what wants to be promoted.
        champion: what judges now; None if nothing does.
    """

    digest: str
    labels: NDArray[np.int8]
    candidate: Opinion
    champion: Opinion | None


def safeguarded(inputs: GateInputs, settings: GateSettings) -> tuple[list[str], dict[str, Any]]:
    """Reasons not to promote, and the figures they rest on.

    - Labellers of what is new are at least `min_labellers`.
    - No labeller's new labels disagree with their neighbours over `max_disagreement` times as much as old ones do.
    - On the golden set it is not proven that the area under the ROC curve falls by more than `max_golden_loss` or
      that a class loses more accuracy than `max_regression`: exact McNemar tests and limits, DeLong's limits for the
      area, the chance of one false alarm over all three at most `error`.
    - Of the images of the hold-out that are not new and that the champion judges rightly, at least 200 of them, the
      candidate says the same of `min_agreement` at least, unless chance explains the difference (95 % Wilson
      interval), and the population stability index of the scores of all that are not new is at most `max_psi`. A
      person may think otherwise and promote the candidate by hand.

    Raises:
        ValueError: scores that are none.
    """
    shift = _shift(inputs)
    golden = None if inputs.golden is None else _golden_report(inputs.golden, settings)
    problems = [
        *_few_hands(inputs),
        *_doubtful(inputs, settings),
        *_worse_on_golden(golden),
        *_shifted(inputs, shift, settings),
    ]
    report = {
        "labellers": list(inputs.labellers),
        "suspicions": [asdict(one) | {"ratio": one.ratio} for one in inputs.suspicions],
        "golden": golden,
        "drift": None if shift is None else asdict(shift),
    }
    return problems, report


def _few_hands(inputs: GateInputs) -> Iterator[str]:
    if inputs.labellers and len(inputs.labellers) < inputs.min_labellers:
        yield (
            f"what is new was labelled by {len(inputs.labellers)} ({', '.join(inputs.labellers)}): "
            f"{inputs.min_labellers} labellers are needed"
        )


def _doubtful(inputs: GateInputs, settings: GateSettings) -> Iterator[str]:
    doubtful = [one for one in inputs.suspicions if one.ratio > settings.max_disagreement]
    for one in doubtful[:_NAMED]:
        yield (
            f"labels of {one.by} are in quarantine: neighbours of their {one.images} new images disagree with "
            f"{one.share:.0%} of them, {one.ratio:.1f} times as much as with old ones; {settings.max_disagreement:g} "
            f"times is allowed (see `code-worker labels list --by {one.by}`; CODE_WORKER_LABELS__IGNORED leaves "
            "them out)"
        )


def _golden_report(golden: GoldenOpinions, settings: GateSettings) -> dict[str, Any]:
    names = ("n", "auroc", "tpr_at_1pct_fpr", *_CLASSES)
    sides = {"candidate": golden.candidate, "champion": golden.champion}
    known = {name: _figures_of(golden.labels, side) for name, side in sides.items() if side is not None}
    shown = {name: {key: one[key] for key in names} for name, one in known.items()}
    losses = [] if golden.champion is None else _golden_losses(golden, golden.champion, settings)
    return {"digest": golden.digest, **shown, "losses": losses}


def _golden_losses(golden: GoldenOpinions, champion: Opinion, settings: GateSettings) -> list[dict[str, Any]]:
    """Of each figure the loss that is proven, if one is, and the accuracy of a class that could have been proven."""
    # Bonferroni's share of three tests.
    level = settings.error / (1 + len(_CLASSES))
    scores = [side.deciding(next(iter(side.scores))) for side in (champion, golden.candidate)]
    limits = auroc_limits(golden.labels, scores[0], scores[1], level)
    area = {"figure": "auroc", "allowed": settings.max_golden_loss, "proven": max(0.0, -limits[1]) if limits else 0.0}
    old, new = (
        right(golden.labels, found, side.threshold)
        for found, side in zip(scores, (champion, golden.candidate), strict=True)
    )
    changes = new.astype(np.int8) - old
    margin = settings.max_regression
    found = [area]
    for name, kind in _CLASSES.items():
        of_class = counted(changes[golden.labels == kind])
        n = int((golden.labels == kind).sum())
        found.append(
            {
                "figure": name,
                "allowed": margin,
                "proven": proven_loss(of_class, n, level),
                "detectable": detectable_loss(n, level, margin),
            }
        )
    return found


def _figures_of(labels: NDArray[np.int8], side: Opinion) -> dict[str, float | None]:
    return figures(labels, side.deciding(next(iter(side.scores))), threshold=side.threshold)


def _worse_on_golden(golden: dict[str, Any] | None) -> Iterator[str]:
    for loss in golden["losses"] if golden else ():
        if loss["proven"] > loss["allowed"]:
            name = loss["figure"]
            before, after = golden["champion"][name], golden["candidate"][name]  # type: ignore[index]  # has losses
            yield (
                f"worse on the golden set: {name.replace('_', ' ')} {before:.3f} → {after:.3f}, a loss of "
                f"{loss['proven']:.3f} is proven; {loss['allowed']:g} may be lost"
            )


def _shift(inputs: GateInputs) -> Drift | None:
    if inputs.champion is None:
        return None
    old = ~inputs.new
    condition = next(iter(inputs.candidate.scores))
    return drift(
        inputs.labels[old],
        inputs.champion.deciding(condition)[old],
        inputs.candidate.deciding(condition)[old],
        champion_at=inputs.champion.threshold,
        candidate_at=inputs.candidate.threshold,
    )


def _shifted(inputs: GateInputs, shift: Drift | None, settings: GateSettings) -> Iterator[str]:
    if shift is None or shift.canaries < MIN_CANARIES:
        return
    by_hand = f"if that is as it should be, `code-worker releases promote {inputs.candidate.release}`"
    if settings.min_agreement is not None and shift.agreement_high < settings.min_agreement:
        yield (
            f"it says the same as the champion of only {shift.agreement:.1%} of {shift.canaries} old images that one "
            f"judges rightly; {settings.min_agreement:.0%} are expected: {by_hand}"
        )
    if settings.max_psi is not None and shift.psi > settings.max_psi:
        yield (
            f"scores of {shift.images} old images are spread otherwise (population stability index {shift.psi:.2f}; "
            f"{settings.max_psi:g} is allowed): {by_hand}"
        )
