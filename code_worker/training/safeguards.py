"""What a candidate must withstand beside being better: few or doubtful hands, a golden set, an unexpected shift."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from code_worker.training.drift import MIN_CANARIES, Drift, drift
from code_worker.training.metrics import figures

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.settings import GateSettings
    from code_worker.training.opinions import GateInputs, Opinion

__all__ = ["GoldenOpinions", "safeguarded"]

_CLASSES: Final = ("real_accuracy", "fake_accuracy")
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
    - On the golden set the area under the ROC curve falls by at most `max_golden_loss` and no class loses more
      accuracy than `max_regression`, as measured.
    - Of the images of the hold-out that are not new and that the champion judges rightly, at least 200 of them, the
      candidate says the same of `min_agreement` at least, unless chance explains the difference (95 % Wilson
      interval), and the population stability index of the scores of all that are not new is at most `max_psi`. A
      person may think otherwise and promote the candidate by hand.

    Raises:
        ValueError: scores that are none.
    """
    shift = _shift(inputs)
    golden = _golden_figures(inputs.golden)
    problems = [
        *_few_hands(inputs),
        *_doubtful(inputs, settings),
        *_worse_on_golden(golden, settings),
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


def _golden_figures(golden: GoldenOpinions | None) -> dict[str, Any] | None:
    if golden is None:
        return None
    names = ("n", "auroc", "tpr_at_1pct_fpr", *_CLASSES)
    sides = {"candidate": golden.candidate, "champion": golden.champion}
    return {"digest": golden.digest} | {
        name: {key: value for key, value in _figures_of(golden.labels, side).items() if key in names}
        for name, side in sides.items()
        if side is not None
    }


def _figures_of(labels: NDArray[np.int8], side: Opinion) -> dict[str, float | None]:
    return figures(labels, side.deciding(next(iter(side.scores))), threshold=side.threshold)


def _worse_on_golden(golden: dict[str, Any] | None, settings: GateSettings) -> Iterator[str]:
    if golden is None or "champion" not in golden:
        return
    bounds = {"auroc": settings.max_golden_loss, **dict.fromkeys(_CLASSES, settings.max_regression)}
    for name, allowed in bounds.items():
        before, after = golden["champion"][name], golden["candidate"][name]
        # Sums of floats: what was lost on paper is not lost by the last bit.
        if before is not None and after is not None and before - after > allowed + 1e-9:
            yield (
                f"worse on the golden set: {name.replace('_', ' ')} {before:.3f} → {after:.3f}; "
                f"{allowed:g} may be lost"
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
