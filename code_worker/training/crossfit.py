"""More images on which a refit's loss would show: labelled ones, judged by heads that were fitted without them.

A fifth of the images is held out, and an old generator may have a handful there. A refit leaves the encoder as it is,
so that only heads learn from labels: each image of the training share is judged by a head that was fitted on the
others (cross-fitting, in five folds), for the candidate and for the champion alike. Images that the encoder learned
from, or whose labels chose it, do not count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from code_worker.data.examples import FAKE, REAL
from code_worker.releases.golden import checked_scores
from code_worker.training.comparison import Side, groups_of, labels_of, one_of_each_group
from code_worker.training.encoded import matrix
from code_worker.training.opinions import CrossFitted
from code_worker.training.refit import HeadPlan, fit_heads
from code_worker.training.snapshot import UNNAMED, Member

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.heads import Head
    from code_worker.plugins import Plugins
    from code_worker.training.snapshot import Snapshot

__all__ = ["cross_fitted", "more_images"]

FOLDS: Final = 5
_STILL_THERE: Final = 0.95
_MOST_REALS: Final = 1000
_MOST_OF_A_GENERATOR: Final = 200


def more_images(taken: Snapshot, learned: AbstractSet[str]) -> list[Member]:
    """Images of the training share that the encoder never learned: at most 1,000 reals and 200 of a generator.

    One of each group, class and generator, in the order of the groups' names, so that the next run sees the same ones
    and nobody who labels can choose them.
    """
    found: dict[str | None, list[Member]] = {}
    # A copy of what the encoder learned is in the same group, and no news to it either.
    known = {member.group for member in taken.members if member.sha256 in learned} - {None}
    for member in one_of_each_group(taken.training_share):
        if member.sha256 not in learned and member.group not in known:
            found.setdefault(None if member.label == REAL else member.generator or UNNAMED, []).append(member)
    chosen = [
        one
        for name, members in found.items()
        for one in members[: _MOST_REALS if name is None else _MOST_OF_A_GENERATOR]
    ]
    return sorted(chosen, key=lambda one: one.sha256)


def cross_fitted(
    more: Sequence[Member],
    taken: Snapshot,
    candidate: Side,
    champion: Side,
    *,
    plans: tuple[Mapping[str, HeadPlan], Mapping[str, HeadPlan]],
    plugins: Plugins,
    taught_champion: Sequence[Member],
) -> CrossFitted | None:
    """Both sides' scores of further images, each by a head that was fitted without them.

    Args:
        more: the images; None of them counts that a side has no embedding of.
        taken: what the candidate's heads were fitted on is its training share.
        candidate: with the champion's encoder.
        champion: what judges now.
        plans: how heads are fitted, by name: the candidate's and the champion's.
        plugins: where head classes come from.
        taught_champion: what the champion's heads were fitted on.

    Returns:
        None where the images are of one class, or too few to fit a head without a fold of them; and where a twentieth
        or more of what the champion's heads were fitted on is gone: heads fitted on the rest would not be the
        champion's, and what the candidate lost with those images would not show.

    Raises:
        TrainingError: a head that cannot be fitted.
        ArtifactError: a head that does not keep its contract.
    """
    usable = [one for one in more if all(one.sha256 in rows for rows in candidate.rows.values())]
    if {one.label for one in usable} != {REAL, FAKE} or len(usable) < 2 * FOLDS:
        return None
    if sum(one.sha256 in champion.clean for one in taught_champion) <= _STILL_THERE * len(taught_champion):
        return None
    fold = np.array([_fold(one) for one in usable])
    fits = [
        _Fit(how[side.head], plugins, _regrouped(learned, taken), side)
        for side, how, learned in zip(
            (candidate, champion), plans, (taken.training_share, taught_champion), strict=True
        )
    ]
    if not all(fit.has_both_classes_without(sorted(set(fold.tolist()))) for fit in fits):
        return None
    judged = [_scores(side, usable, fold, fit) for side, fit in zip((candidate, champion), fits, strict=True)]
    generators = tuple(one.generator if one.label == FAKE else None for one in usable)
    return CrossFitted(labels_of(usable), generators, judged[0], judged[1], groups_of(usable))


@dataclass(frozen=True, slots=True, eq=False)
class _Fit:
    """How one side's deciding head is fitted without a fold."""

    plan: HeadPlan
    plugins: Plugins
    learned: Sequence[Member]
    side: Side

    def has_both_classes_without(self, folds: Sequence[int]) -> bool:
        return all({one.label for one in self._others(fold)} == {REAL, FAKE} for fold in folds)

    def _others(self, fold: int) -> list[Member]:
        return [one for one in self.learned if _fold(one) != fold and one.sha256 in self.side.clean]

    def without(self, fold: int) -> Head:
        members = self._others(fold)
        name = self.side.head
        return fit_heads({name: self.plan}, self.plugins, members, matrix(members, self.side.clean))[name]


def _scores(
    side: Side, usable: Sequence[Member], fold: NDArray[np.int64], fit: _Fit
) -> dict[str, NDArray[np.float32]]:
    found = {condition: np.empty(len(usable), np.float32) for condition in side.rows}
    for number in range(FOLDS):
        places = np.flatnonzero(fold == number)
        if not len(places):
            continue
        head = fit.without(number)
        members = [usable[int(place)] for place in places]
        for condition, rows in side.rows.items():
            found[condition][places] = checked_scores(side.head, head, matrix(members, rows))
    return found


def _regrouped(learned: Sequence[Member], taken: Snapshot) -> list[Member]:
    """An older snapshot may name other groups, or none: an image must be in one fold on both sides."""
    now = {member.sha256: member.group for member in taken.members}
    return [replace(member, group=now.get(member.sha256, member.group)) for member in learned]


def _fold(member: Member) -> int:
    """Images of a group stay together, or a head would know the copies of what it judges."""
    key = member.group or member.sha256
    return int.from_bytes(hashlib.sha256(f"fold {key}".encode()).digest()[:4], "big") % FOLDS
