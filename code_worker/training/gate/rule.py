"""Decides whether a candidate replaces the champion; a pure function of what both say of identical images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from math import sqrt
from typing import TYPE_CHECKING, Any, Final

from code_worker.data.datasets.examples import FAKE, REAL
from code_worker.errors import TrainingError
from code_worker.training.evaluation.metrics import figures, right
from code_worker.training.gate.evidence import OLD_FAKES, Evidence
from code_worker.training.gate.gate_inputs import GateInputs, ReleaseScores
from code_worker.training.gate.paired import proportion_limits
from code_worker.training.gate.safeguards import check_safeguards

if TYPE_CHECKING:
    from code_worker.settings import GateSettings

_KINDS: Final = {REAL: "real", FAKE: "fake"}


@dataclass(frozen=True, slots=True)
class GateDecision:
    """The decision: promote or not, the reasons, and every figure that was looked at, as plain JSON."""

    promote: bool
    reasons: tuple[str, ...]
    report: Mapping[str, Any] = field(default_factory=dict)


def decide(inputs: GateInputs, settings: GateSettings) -> GateDecision:
    """The gate's rule, in this order.

    1. Each class has at least `min_holdout` images in the hold-out.
    2. Of the images that look most like a class, at most `max_label_noise` are labelled otherwise. Labels of a new
       generator that nobody's encoder sees cannot be checked so; with 3 to 5 they can do no harm.
    3. No group is worse: of neither the reals nor the fakes of any generator, under any condition, at the champion's
       thresholds or at a policy in force, a loss above `max_regression` is proven. Exact McNemar tests and limits,
       the chance of one false alarm over all of them at most `error` (Tarone).
    4. Nothing large is lost unseen: for the reals, and for the fakes of all old generators, each weighted alike, a
       loss of `max_regression` is excluded. A release that loses so much on both passes with a chance of at most
       `error`.
    5. Something is gained: balanced accuracy on all images or on the new ones, or what is found of a new generator,
       under any condition, by an exact test at the level that is left to this champion's reign (`spending`). Without
       a champion the candidate must beat chance.
    6. It withstands the safeguards against wrong and malicious labels, see `safeguards.safeguarded`.

    Where the champion must go because it learned from what was erased, 4 and 5 are only reported.

    Raises:
        TrainingError: scores that are no numbers in [0, 1], so that no report can be computed.
    """
    # All problems, not the first: a person who reads them mends what can be mended at once.
    problems = [*_too_small(inputs), *_too_noisy(inputs, settings)]
    try:
        report = _report(inputs)
        unsafe, safeguards = check_safeguards(inputs, settings)
        compared, better, proven = _compared(inputs, settings)
    except ValueError as error:
        raise TrainingError(f"the report of {inputs.candidate.release} cannot be computed: {error}") from error
    problems += [*compared, *unsafe]
    # Only where nothing else is wrong: a harm is the better reason.
    if not better and not problems:
        problems.append("nothing gained: neither overall nor on what is new is it better beyond chance")
    if problems:
        problems += [
            f"the champion's encoder does not see {name}: only a retrain can change that" for name in inputs.unseen
        ]
    rest = {**proven, **safeguards}
    if compared and inputs.unrecorded:
        problems.append(
            f"what {inputs.champion.release if inputs.champion else ''} learned from is not recorded: if it is among "
            "these images, it knows them by heart and looks better than it is; that shows on images labelled since"
        )
    reasons = tuple(problems or [*better, *_unknown(rest)])
    rest |= {"promote": not problems, "reasons": list(reasons)}
    return GateDecision(not problems, reasons, {**report, **rest})


def _compared(inputs: GateInputs, settings: GateSettings) -> tuple[list[str], list[str], dict[str, Any]]:
    """Problems, gains, and the figures they rest on."""
    if inputs.champion is None:
        return [], _better_than_chance(inputs, settings), {"changes": []}
    found = Evidence(inputs, settings)
    problems = [f"worse on {change}" for change in found.harmed]
    if not inputs.owed:
        problems += [f"not shown to be as good on {loss}" for loss in found.losses if not loss.excluded]
    better = [f"better on {change}" for change in found.gained]
    if not better and inputs.owed:
        better = ["nothing gained, and worse on nothing: the champion learned from what was erased and must go"]
    return (
        problems,
        better,
        {
            "changes": [asdict(change) for change in (*found.gains, *found.groups)],
            "losses": [asdict(loss) | {"excluded": loss.excluded} for loss in found.losses],
            "levels": {"gain": found.gain_level, "harm": found.harm_level},
            "spending": inputs.spends(settings.error).to_dict(),
            "too_small": [{"group": one.group, "condition": one.condition, "n": one.n} for one in found.too_small],
            "absent": found.absent,
            "unrecorded": inputs.unrecorded,
            "more_images": 0 if inputs.more is None else len(inputs.more.labels),
        },
    )


def _unknown(proven: Mapping[str, Any]) -> Iterator[str]:
    """Yields what the comparison could not know, in the words of a person who promotes."""
    compared = {loss["group"] for loss in proven.get("losses", ())}
    if compared and OLD_FAKES not in compared:
        yield "not known: whether it is worse on generated images that the champion knows: none was compared"
    groups = dict.fromkeys(proven.get("absent", ()), 0)
    groups |= {one["group"]: one["n"] for one in proven.get("too_small", ())}
    if groups:
        named = ", ".join(f"{name} ({n})" for name, n in sorted(groups.items()))
        yield f"not known: whether it is worse on groups with too few images for any loss to show: {named}"
    losses = (proven.get("golden") or {}).get("losses", ())
    if few := [one["figure"].split("_")[0] for one in losses if one.get("detectable", 1) is None]:
        yield (
            f"not known: whether it is worse on the golden set, which has too few {' and '.join(few)} images for any "
            "loss to show"
        )


def _too_small(inputs: GateInputs) -> Iterator[str]:
    for label, name in _KINDS.items():
        count = int((inputs.labels == label).sum())
        if count < max(1, inputs.min_holdout):
            yield f"hold-out too small: {count} {name} images, {max(1, inputs.min_holdout)} are needed"


def _too_noisy(inputs: GateInputs, settings: GateSettings) -> Iterator[str]:
    for noise in inputs.noise:
        if noise.share is not None and noise.share > settings.max_label_noise:
            other = _KINDS[1 - noise.looks]
            yield (
                f"labels of {other} images are not to be trusted: of the {noise.images} among {noise.among} "
                f"that look most {_KINDS[noise.looks]}, {noise.share:.0%} are labelled {other}; "
                f"{settings.max_label_noise:.0%} are allowed"
            )


def _better_than_chance(inputs: GateInputs, settings: GateSettings) -> list[str]:
    """Balanced accuracy of the candidate alone, its lower limit joined from those of the classes."""
    own = inputs.candidate
    clean = next(iter(own.scores))
    correct = right(inputs.labels, own.deciding(clean), own.threshold)
    mean, missing = 0.0, 0.0
    for label in _KINDS:
        of_class = correct[inputs.labels == label]
        share = float(of_class.mean()) if len(of_class) else 0.0
        # One-sided Clopper-Pearson limits of two independent samples.
        low, _ = proportion_limits(share * len(of_class), len(of_class), settings.error)
        # Distances to the limits joined as variances are (Zou & Donner 2008), each class with half the weight.
        mean, missing = mean + share / 2, missing + (share - low) ** 2 / 4
    lowest = mean - sqrt(missing)
    if lowest <= 0.5:
        return []
    return [f"better than chance: balanced accuracy at least {lowest:.3f}, and there is no champion"]


def _report(inputs: GateInputs) -> dict[str, Any]:
    opinions = {"candidate": inputs.candidate, "champion": inputs.champion}
    return {
        "images": {name: int((inputs.labels == label).sum()) for label, name in _KINDS.items()},
        "new": int(inputs.new.sum()),
        "noise": [asdict(noise) for noise in inputs.noise],
        "unseen": list(inputs.unseen),
        "heads": {
            name: _heads(inputs, opinion) | {"release": opinion.release, "head": opinion.head}
            for name, opinion in opinions.items()
            if opinion is not None
        },
    }


def _heads(inputs: GateInputs, opinion: ReleaseScores) -> dict[str, Any]:
    return {
        condition: {
            head: figures(inputs.labels, scores, threshold=opinion.threshold) for head, scores in by_head.items()
        }
        for condition, by_head in opinion.scores.items()
    }
