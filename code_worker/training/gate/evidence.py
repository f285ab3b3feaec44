"""Evidence of a comparison: gains, harm to a group, and losses that it could not exclude."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np

from code_worker.data.datasets.examples import FAKE, REAL
from code_worker.training.evaluation.metrics import LEVEL, right
from code_worker.training.gate.gate_inputs import generator_names
from code_worker.training.gate.paired import (
    Difference,
    Stratum,
    better_p,
    counted,
    detectable_loss,
    difference_limits,
    effective_number,
    images_needed,
    joint_error,
    proven_loss,
    shared_correlation,
    signed_groups,
    tarone_level,
    worse_p,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.settings import GateSettings
    from code_worker.training.gate.gate_inputs import GateInputs, ReleaseScores


@dataclass(frozen=True, slots=True)
class Change:
    """Candidate minus champion on one group under one condition.

    Attributes:
        condition: as the images are, or after a transform; with the policy's name where one decided.
        group: `real`, a generator, or images of all kinds.
        figure: accuracy, or balanced_accuracy of images of both classes.
        n: images.
        champion: its figure.
        candidate: its figure.
        difference: of the two, with its 95 % interval.
        gains: images that only the candidate judges rightly; of images of both classes, groups that gained.
        losses: images that only the champion does, or groups that lost.
        p: of the one-sided exact test of what was asked: whether a group is worse, or all images are better.
        proven: of a group, the loss that is proven at the level of all these tests; 0 where none is.
        detectable: of a group, the loss of which more than is allowed would have been proven with a chance of 80 %,
            were as much gained besides as changed both ways; None where even the loss of all others would not.
    """

    condition: str
    group: str
    figure: str
    n: int
    champion: float
    candidate: float
    difference: Difference
    gains: int
    losses: int
    p: float
    proven: float = 0.0
    detectable: float | None = None

    def __str__(self) -> str:
        return (
            f"{self.group}, {self.condition}: {self.figure.replace('_', ' ')} {self.champion:.3f} → "
            f"{self.candidate:.3f} on {self.n} images ({self.difference.value:+.3f}, "
            f"95 % interval {self.difference.low:+.3f} to {self.difference.high:+.3f}, "
            f"{self.gains} gained, {self.losses} lost, p {self.p:.2g})"
        )


@dataclass(frozen=True, slots=True)
class Loss:
    """A possible loss of the reals, or of the old fakes of all generators.

    Attributes:
        condition: as the images are, or after a transform.
        group: `real` or `old fakes`.
        n: images.
        effective: independent ones of equal weight that would tell as much.
        value: mean change, each generator weighted alike.
        low: its lower limit.
        error: chance that a larger loss gives this limit.
        margin: loss that must be excluded.
        needed: images that would do if they changed as little; None if more than a million.
    """

    condition: str
    group: str
    n: int
    effective: float
    value: float
    low: float
    error: float
    margin: float
    needed: int | None

    @property
    def excluded(self) -> bool:
        """True if a loss of the margin is excluded."""
        return self.low > -self.margin

    def __str__(self) -> str:
        told = f"{self.n} images"
        if round(self.effective) < self.n:
            told += f", which tell as much as {self.effective:.0f} of equal weight"
        needed = f", about {self.needed} would tell" if self.needed and self.needed > self.effective else ""
        return (
            f"{self.group}, {self.condition}: {self.value:+.3f} on {told}{needed}, "
            f"and a loss of {-self.low:.3f} is not excluded; {self.margin:g} is allowed"
        )


ALL: Final = "all images"
NEW: Final = "new images"
OLD_FAKES: Final = "old fakes"
_FEW: Final = 20
"""Images of a generator below which it weighs less than others."""
_SIDE_ERROR: Final = (1 - LEVEL) / 2


@dataclass(frozen=True, slots=True, eq=False)
class _Look:
    """Two opinions under one condition, by one rule."""

    condition: str
    labels: NDArray[np.int8]
    names: NDArray[np.object_]
    champion: NDArray[np.bool_]
    candidate: NDArray[np.bool_]
    groups: NDArray[np.int64]

    @property
    def changes(self) -> NDArray[np.int8]:
        return self.candidate.astype(np.int8) - self.champion.astype(np.int8)

    def members(self, group: str) -> NDArray[np.bool_]:
        if group == "real":
            return np.asarray(self.labels == REAL)
        return np.asarray((self.labels == FAKE) & (self.names == group))


class Evidence:
    """All that the gate asks of a comparison.

    Args:
        inputs: the images and what both say; with a champion.
        settings: error rates and the margin.
    """

    def __init__(self, inputs: GateInputs, settings: GateSettings) -> None:
        self._inputs = inputs
        self._settings = settings
        self._conditions = tuple(inputs.candidate.scores)

    @cached_property
    def gains(self) -> list[Change]:
        """All images, the new ones, and the fakes of each new generator, under each condition.

        By the head that decides, on the hold-out alone.
        Cross-fitted scores are of heads that learned less than the champion's, so that a gain would be too large.
        """
        new = self._inputs.new
        # Each of these tests may promote: their number is what `gain_level` divides the error by.
        wholes = [(ALL, np.ones(len(new), dtype=np.bool_))]
        if new.any() and not new.all():
            wholes.append((NEW, new))
        old = self._inputs.old_generators()
        wholes += [(name, members) for name, members in self._inputs.groups() if name not in {"real", *old}]
        return [_gain(look, group, members) for look in self._looks for group, members in wholes if members.any()]

    @cached_property
    def gain_level(self) -> float:
        """Level of each of those tests."""
        level = self._inputs.spends(self._settings.error).level
        return tarone_level([change.gains + change.losses for change in self.gains], level)

    @cached_property
    def groups(self) -> list[Change]:
        """The reals and each generator under each condition, and at each policy as the images are."""
        looks = [*self._widened, *self._at_policies()]
        found = [
            _group_change(look, group, look.members(group))
            for look in looks
            for group in ("real", *sorted({str(name) for name in look.names[look.labels == FAKE]}))
        ]
        level = _harm_level(found, self._settings.error)
        return [self._with_proof(change, level) for change in found]

    def _with_proof(self, change: Change, level: float) -> Change:
        return replace(
            change,
            proven=proven_loss(Stratum(change.gains, change.losses), change.n, level),
            # What changed both ways is noise, which hides losses; what was gained beyond it hides none.
            detectable=detectable_loss(
                change.n, level, self._settings.max_regression, min(change.gains, change.losses)
            ),
        )

    @cached_property
    def harm_level(self) -> float:
        """Level of each of those tests."""
        return _harm_level(self.groups, self._settings.error)

    @property
    def harmed(self) -> list[Change]:
        """Groups that lost more than is allowed: it is proven, and not only measured.

        Of releases that are equally good there is one with a chance of at most `error`. A loss that is proven but
        small does not count, or a large hold-out would refuse every release that learns.
        """
        return [change for change in self.groups if change.proven > self._settings.max_regression]

    @property
    def gained(self) -> list[Change]:
        """Returns what got better."""
        return [change for change in self.gains if change.gains and change.p <= self.gain_level]

    @property
    def too_small(self) -> list[Change]:
        """Groups that are so small that not even the loss of every image would have shown."""
        return [change for change in self.groups if change.detectable is None]

    @property
    def absent(self) -> list[str]:
        """Generators that the champion knows and of which there is no image at all."""
        return sorted(self._inputs.old_generators() - {change.group for change in self.groups})

    @cached_property
    def losses(self) -> list[Loss]:
        """Returns what the reals and the old fakes may have lost under each condition.

        Both must exclude the margin. A release that loses it on both passes with a chance of at most `error`, by
        what their images have in common (`joint_error`); if there are images of one only, its limit errs with
        `error`.
        """
        return [loss for look in self._widened for loss in self._losses_of(look)]

    @cached_property
    def _looks(self) -> list[_Look]:
        return [self._look(condition, *self._rights(condition)) for condition in self._conditions]

    def _rights(self, condition: str) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        champion = self._inputs.champion
        assert champion is not None  # noqa: S101 - the caller compares two
        labels = self._inputs.labels
        return tuple(  # type: ignore[return-value]  # two sides, two arrays
            right(labels, side.deciding(condition), side.threshold) for side in (champion, self._inputs.candidate)
        )

    @cached_property
    def _names(self) -> NDArray[np.object_]:
        return self._inputs.names()

    @cached_property
    def _groups(self) -> NDArray[np.int64]:
        return _numbered(self._inputs.group_of, len(self._inputs.labels))

    def _look(self, name: str, champion: NDArray[np.bool_], candidate: NDArray[np.bool_]) -> _Look:
        return _Look(name, self._inputs.labels, self._names, champion, candidate, self._groups)

    @cached_property
    def _widened(self) -> list[_Look]:
        """The hold-out and the cross-fitted images beside it."""
        return [self._with_more(look) for look in self._looks]

    def _with_more(self, look: _Look) -> _Look:
        more, champion = self._inputs.more, self._inputs.champion
        if more is None or champion is None or look.condition not in more.candidate:
            return look
        sides = ((more.champion, champion), (more.candidate, self._inputs.candidate))
        old, new = (right(more.labels, scores[look.condition], side.threshold) for scores, side in sides)
        return _Look(
            look.condition,
            np.concatenate([look.labels, more.labels]),
            np.concatenate([look.names, generator_names(more.labels, more.generators)]),
            np.concatenate([look.champion, old]),
            np.concatenate([look.candidate, new]),
            # A group is in one part: none is in both.
            np.concatenate([look.groups, len(look.groups) + _numbered(more.group_of, len(more.labels))]),
        )

    def _at_policies(self) -> Iterator[_Look]:
        champion, condition = self._inputs.champion, self._conditions[0]
        for rule in self._inputs.policies:
            sides = [_by_head(side, condition, rule.head) for side in (champion, self._inputs.candidate)]
            # A head that only one of them has cannot be compared; the other judges by its default head then.
            if any(scores is None for scores in sides):
                continue
            at = (rule.low, rule.high)
            old, new = (right(self._inputs.labels, scores, at) for scores in sides if scores is not None)
            yield self._look(f"{condition} at the policy of {rule.name}", old, new)

    def _losses_of(self, look: _Look) -> Iterator[Loss]:
        real, old = look.members("real"), self._inputs.old_generators()
        fake = (look.labels == FAKE) & np.array([name in old for name in look.names], dtype=np.bool_)
        parts = {"real": (real, np.ones(int(real.sum())))} if real.any() else {}
        # What the champion knows and nothing was compared of is not shown to be found as well.
        if old:
            parts[OLD_FAKES] = (fake, _alike(look.names[fake]))
        error = self._settings.error
        if real.any() and fake.any():
            # Limits of reals and of fakes fail together only as far as records with both are in both.
            each = [weights / weights.sum() for _, weights in parts.values()]
            error = joint_error(error, shared_correlation(look.groups, (real, fake), each))
        for group, (members, weights) in parts.items():
            yield self._loss(look, group, (members, weights), error)

    def _loss(
        self, look: _Look, group: str, part: tuple[NDArray[np.bool_], NDArray[np.float64]], error: float
    ) -> Loss:
        members, weights = part
        margin, changes, groups = self._settings.max_regression, look.changes[members], look.groups[members]
        if not members.any():
            return Loss(look.condition, group, 0, 0.0, 0.0, -1.0, error, margin, images_needed(0.0, margin, error))
        shares = weights / weights.sum()
        low, _ = difference_limits(changes, shares, error, groups)
        needed = images_needed(float(shares[changes != 0].sum()), margin, error) if low <= -margin else None
        effective = effective_number(changes, shares, groups)
        return Loss(
            look.condition, group, len(changes), effective, float(shares @ changes), low, error, margin, needed
        )


def _numbered(groups: tuple[str, ...], n: int) -> NDArray[np.int64]:
    """`(n,)` number of each image's group."""
    return np.unique(np.array(groups), return_inverse=True)[1] if groups else np.arange(n)


def _alike(names: NDArray[np.object_]) -> NDArray[np.float64]:
    """Weights by which each generator counts alike; of one with few images each counts as if it had more.

    Else a handful of images would decide for all, and several such handfuls would leave nothing to be shown at all.
    """
    images = Counter(names)
    return np.array([1 / max(images[name], _FEW) for name in names])


def _harm_level(changes: Sequence[Change], error: float) -> float:
    return tarone_level([change.gains + change.losses for change in changes], error)


def _by_head(side: ReleaseScores | None, condition: str, head: str) -> NDArray[np.float32] | None:
    return None if side is None else side.scores[condition].get(head)


def _gain(look: _Look, group: str, members: NDArray[np.bool_]) -> Change:
    labels, changes = look.labels[members], look.changes[members]
    classes = [labels == kind for kind in (REAL, FAKE) if (labels == kind).any()]
    shares = np.zeros(len(labels))
    for of_class in classes:
        # (n,) of sum 1: each class weighs the same, however many images it has.
        shares[of_class] = 1 / (len(classes) * of_class.sum())
    strata = signed_groups(changes, shares, look.groups[members])
    figure = "balanced_accuracy" if len(classes) == 2 else "accuracy"
    both = Stratum(sum(one.gains for one in strata), sum(one.losses for one in strata))
    return _change(look, group, members, shares, (figure, better_p(strata), both))


def _group_change(look: _Look, group: str, members: NDArray[np.bool_]) -> Change:
    n = int(members.sum())
    of_group = counted(look.changes[members])
    # Exact McNemar test; it takes copies as independent images, which errs towards a refusal.
    p = worse_p(of_group.gains, of_group.losses)
    return _change(look, group, members, np.full(n, 1 / max(1, n)), ("accuracy", p, of_group))


def _change(
    look: _Look,
    group: str,
    members: NDArray[np.bool_],
    shares: NDArray[np.float64],
    tested: tuple[str, float, Stratum],
) -> Change:
    """One row of the report; `tested` is the figure, the p-value and what it counted."""
    figure, p, both = tested
    changes = look.changes[members]
    limits = difference_limits(changes, shares, _SIDE_ERROR, look.groups[members])
    return Change(
        condition=look.condition,
        group=group,
        figure=figure,
        n=len(changes),
        champion=float(shares @ look.champion[members]),
        candidate=float(shares @ look.candidate[members]),
        difference=Difference(float(shares @ changes), *limits),
        gains=both.gains,
        losses=both.losses,
        p=p,
    )
