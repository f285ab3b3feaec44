"""Decides whether a candidate replaces the champion; a pure function of what both say of identical images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from code_worker.data.examples import FAKE, REAL
from code_worker.errors import TrainingError
from code_worker.training.metrics import Difference, Threshold, figures, intervals, paired_difference
from code_worker.training.noise import Noise
from code_worker.training.safeguards import GoldenOpinions, safeguarded
from code_worker.training.snapshot import UNNAMED
from code_worker.training.trust import Suspicion

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.settings import GateSettings

__all__ = ["GateDecision", "GateInputs", "Opinion", "decide"]

_KINDS: Final = {REAL: "real", FAKE: "fake"}


@dataclass(frozen=True, slots=True, eq=False)
class Opinion:
    """What one release says of the hold-out.

    Attributes:
        release: its id.
        head: the head that decides.
        threshold: where it decides.
        scores: condition (`clean` and transforms) → head → `(n,) float32`.
    """

    release: str
    head: str
    threshold: Threshold
    scores: Mapping[str, Mapping[str, NDArray[np.float32]]]

    def deciding(self, condition: str) -> NDArray[np.float32]:
        """Scores of the head that decides."""
        return self.scores[condition][self.head]


@dataclass(frozen=True, slots=True, eq=False)
class GateInputs:
    """The hold-out and two opinions of it.

    Attributes:
        labels: `(n,) int8`.
        generators: what made each fake, if known; None for reals.
        new: `(n,) bool`, labelled since the last champion that learned here.
        candidate: what wants to be promoted.
        champion: what judges now; None if nothing does.
        noise: wrong labels, the smaller estimate of the two releases' embeddings.
        unseen: new generators whose labels nobody could check: the champion's encoder does not tell them from reals.
        min_holdout: images of each class below which nothing is decided.
        labellers: who labelled what is new.
        min_labellers: how many these must be.
        suspicions: how much new labels disagree with their neighbours, by labeller.
        golden: the golden set, if there is one.
        owed: the champion must go, for it learned from what was erased; no worse than it is good enough.
    """

    labels: NDArray[np.int8]
    generators: tuple[str | None, ...]
    new: NDArray[np.bool_]
    candidate: Opinion
    champion: Opinion | None
    noise: tuple[Noise, ...] = ()
    unseen: tuple[str, ...] = ()
    min_holdout: int = 1
    labellers: tuple[str, ...] = ()
    min_labellers: int = 1
    suspicions: tuple[Suspicion, ...] = ()
    golden: GoldenOpinions | None = None
    owed: bool = False

    def groups(self) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        """The reals, and the fakes of each generator: nobody may pay for what others gain."""
        yield "real", self.labels == REAL
        names = np.array([generator or UNNAMED for generator in self.generators], dtype=object)
        for name in sorted({str(name) for name in names[self.labels == FAKE]}):
            yield name, (self.labels == FAKE) & (names == name)


@dataclass(frozen=True, slots=True)
class GateDecision:
    """Whether to promote, why or why not, and every figure that was looked at, as plain JSON."""

    promote: bool
    reasons: tuple[str, ...]
    report: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Change:
    """Candidate minus champion on one group under one condition."""

    condition: str
    group: str
    figure: str
    n: int
    champion: float
    candidate: float
    difference: Difference

    def __str__(self) -> str:
        return (
            f"{self.group}, {self.condition}: {self.figure.replace('_', ' ')} {self.champion:.3f} → "
            f"{self.candidate:.3f} on {self.n} images "
            f"({self.difference.value:+.3f}, 95 % interval {self.difference.low:+.3f} to {self.difference.high:+.3f})"
        )


def decide(inputs: GateInputs, settings: GateSettings) -> GateDecision:
    """The gate's rule, in this order.

    1. Each class has at least `min_holdout` images in the hold-out.
    2. Of the images that look most like a class, at most `max_label_noise` are labelled otherwise. Labels of a new
       generator that nobody's encoder sees cannot be checked so; with 3 and 4 they can do no harm.
    3. Neither the reals nor the fakes of any generator lose accuracy under any condition: none beyond the 95 %
       interval of the paired bootstrap, none by more than `max_regression` as measured, where the group is so large
       that two images weigh no more than that.
    4. Something is gained: the 95 % interval of the difference in balanced accuracy lies above 0, on all images or on
       the new ones, under any condition. Without a champion the candidate must beat chance. Nothing need be gained
       where the champion must go because it learned from what was erased.
    5. It withstands the safeguards against wrong and malicious labels, see `safeguards.safeguarded`.

    Raises:
        TrainingError: scores that are no numbers in [0, 1], so that no report can be computed.
    """
    problems = [*_too_small(inputs), *_too_noisy(inputs, settings)]
    try:
        losses = _changes(inputs, settings, inputs.groups(), "accuracy")
        gains = _changes(inputs, settings, _wholes(inputs), "balanced_accuracy")
        report = _report(inputs, losses, gains)
        better = _gained(inputs, gains, settings)
        unsafe, safeguards = safeguarded(inputs, settings)
    except ValueError as error:
        raise TrainingError(f"the report of {inputs.candidate.release} cannot be computed: {error}") from error
    problems += [f"worse on {change}" for change in losses if _lost(change, settings)]
    problems += unsafe
    if not better and inputs.owed:
        better = ["nothing, and worse on nothing: the champion learned from what was erased and must go"]
    if not better and not problems:
        problems.append("nothing gained: neither overall nor on the new images is it better beyond chance")
    if problems:
        problems += [
            f"the champion's encoder does not see {name}: only a retrain can change that" for name in inputs.unseen
        ]
    reasons = tuple(problems or [f"better on {reason}" for reason in better])
    return GateDecision(
        not problems, reasons, {**report, **safeguards, "promote": not problems, "reasons": list(reasons)}
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


def _wholes(inputs: GateInputs) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    yield "all images", np.ones(len(inputs.labels), dtype=np.bool_)
    if inputs.new.any() and not inputs.new.all():
        yield "new images", inputs.new


def _changes(
    inputs: GateInputs, settings: GateSettings, groups: Iterator[tuple[str, NDArray[np.bool_]]], figure: str
) -> list[_Change]:
    if inputs.champion is None:
        return []
    compared = _Compared(inputs.labels, inputs.champion, inputs.candidate, settings.bootstrap)
    found = [
        compared.change(condition, group, members, figure)
        for group, members in groups
        for condition in inputs.candidate.scores
    ]
    return [change for change in found if change is not None]


@dataclass(frozen=True, slots=True, eq=False)
class _Compared:
    """Two opinions of the same images."""

    labels: NDArray[np.int8]
    champion: Opinion
    candidate: Opinion
    resamples: int

    def change(self, condition: str, group: str, members: NDArray[np.bool_], figure: str) -> _Change | None:
        """Of one group; a group of one class has no balanced accuracy, its accuracy is what there is."""
        labels = self.labels[members]
        old, new = (side.deciding(condition)[members] for side in (self.champion, self.candidate))
        differences = paired_difference(
            labels,
            old,
            new,
            threshold_a=self.champion.threshold,
            threshold_b=self.candidate.threshold,
            resamples=self.resamples,
        )
        known = figure if differences[figure] is not None else "accuracy"
        if (difference := differences[known]) is None:
            return None
        before = figures(labels, old, threshold=self.champion.threshold)[known] or 0.0
        after = figures(labels, new, threshold=self.candidate.threshold)[known] or 0.0
        return _Change(condition, group, known, len(labels), before, after, difference)


def _lost(change: _Change, settings: GateSettings) -> bool:
    beyond_chance = change.difference.high < 0
    large_enough = change.n * settings.max_regression >= 2
    return beyond_chance or (large_enough and change.difference.value < -settings.max_regression)


def _gained(inputs: GateInputs, gains: list[_Change], settings: GateSettings) -> list[str]:
    if inputs.champion is not None:
        return [str(change) for change in gains if change.difference.low > 0]
    own = inputs.candidate
    clean = next(iter(own.scores))
    found = intervals(
        inputs.labels,
        own.deciding(clean),
        threshold=own.threshold,
        names=["balanced_accuracy"],
        resamples=settings.bootstrap,
    )["balanced_accuracy"]
    if found is None or found[0] <= 0.5:
        return []
    return [f"chance: balanced accuracy at least {found[0]:.3f}, and there is no champion"]


def _report(inputs: GateInputs, losses: list[_Change], gains: list[_Change]) -> dict[str, Any]:
    opinions = {"candidate": inputs.candidate, "champion": inputs.champion}
    return {
        "images": {name: int((inputs.labels == label).sum()) for label, name in _KINDS.items()},
        "new": int(inputs.new.sum()),
        "noise": [asdict(noise) for noise in inputs.noise],
        "unseen": list(inputs.unseen),
        "changes": [asdict(change) for change in (*gains, *losses)],
        "heads": {
            name: _heads(inputs, opinion) | {"release": opinion.release, "head": opinion.head}
            for name, opinion in opinions.items()
            if opinion is not None
        },
    }


def _heads(inputs: GateInputs, opinion: Opinion) -> dict[str, Any]:
    return {
        condition: {
            head: figures(inputs.labels, scores, threshold=opinion.threshold) for head, scores in by_head.items()
        }
        for condition, by_head in opinion.scores.items()
    }
