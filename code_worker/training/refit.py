"""Fits heads on embeddings: on a whole snapshot for a candidate release, or cross-fitted to judge more images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from code_worker.data.datasets.examples import FAKE, REAL, group_of
from code_worker.data.labelled_images import refuse_holdout
from code_worker.errors import ArtifactError, ConfigurationError, TrainingError, UnknownHeadError
from code_worker.heads import fit_head, head_spelt, read_options, unknown_head_settings
from code_worker.releases.building import ReleaseFacts, build_from_parts
from code_worker.releases.manifest import Source, verify_files
from code_worker.releases.reference_scores import checked_scores
from code_worker.system.files import whole_directory
from code_worker.system.processes import raise_if_stop
from code_worker.training.gate.comparison import Side, groups_of, labels_of, one_of_each_group
from code_worker.training.gate.gate_inputs import CrossFitted
from code_worker.training.snapshot import Member
from code_worker.training.snapshot_embeddings import embedding_matrix

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.encoder.weights import EncoderWeights
    from code_worker.heads import Head
    from code_worker.plugins import Plugins
    from code_worker.releases.building import KeptHeads
    from code_worker.releases.manifest import Manifest
    from code_worker.training.snapshot import Snapshot

HeadOptions = Mapping[str, Mapping[str, Any]]
"""Head → its options."""


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """A head to fit: the name under which a plugin registered its class, and its options."""

    plugin_head: str
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of a candidate.

    Attributes:
        kind: retrain or refit.
        run: id of the run.
        base: release whose place it wants, and whose settings it inherits; None: there is none.
        snapshot: id of what it learned from.
    """

    kind: str
    run: str
    base: str | None
    snapshot: str

    def __str__(self) -> str:
        return f"{self.kind} of {self.base or 'nothing'} on snapshot {self.snapshot}"


def plan_heads(
    plugins: Plugins,
    champion: Manifest | None,
    configured: HeadOptions | None = None,
    only: HeadOptions | None = None,
) -> dict[str, HeadPlan]:
    """Every head the champion has, and every other one that a plugin offers, with their options.

    Args:
        plugins: where the classes come from.
        champion: release whose heads are fitted again, with the options that they have there.
        configured: options of `CODE_WORKER_HEADS` by head, which come before those.
        only: heads to be planned, and options that come before all; unset: every one.

    Raises:
        UnknownHeadError: one of `only` that neither the champion nor a plugin has.
        ConfigurationError: one in the settings that neither has, or options that a head refuses.
    """
    own = {} if champion is None else champion.heads
    plans = {name: HeadPlan(name, {}) for name in plugins.heads()}
    plans |= {name: HeadPlan(entry.plugin_head, entry.options) for name, entry in own.items()}
    if wrong := unknown_head_settings(configured or {}, plans):
        raise ConfigurationError("; ".join(wrong))
    # Only variables have no `-`: elsewhere a head is written as it is called.
    for given in ({head_spelt(name, plans) or name: options for name, options in (configured or {}).items()}, only):
        for name, options in (given or {}).items():
            if name not in plans:
                raise UnknownHeadError(name, tuple(sorted(plans)))
            if options:
                plan = plans[name]
                head_class = plugins.head_class(plan.plugin_head)
                plans[name] = replace(plan, options=read_options(name, head_class, options, plan.options))
    return {name: plan for name, plan in sorted(plans.items()) if only is None or name in only}


def fit_heads(
    plans: Mapping[str, HeadPlan], plugins: Plugins, members: Sequence[Member], embeddings: NDArray[np.float32]
) -> dict[str, Head]:
    """Fits each head; a one-class head is given the reals alone.

    Args:
        plans: what to fit, by the name in the release.
        plugins: where the classes come from.
        members: the images, none of the hold-out.
        embeddings: `(n, 192) float32`, row i of `members[i]`.

    Raises:
        TrainingError: an image of the hold-out, or a head that cannot be fitted; the text names it.
        UnknownHeadError: a head whose plugin is not installed.
    """
    refuse_holdout(members)
    labels = np.array([member.label for member in members], dtype=np.int8)
    return {
        name: _fit(name, plan, plugins.head_class(plan.plugin_head), embeddings, labels)
        for name, plan in plans.items()
    }


def _fit(
    name: str, plan: HeadPlan, head_class: type[Head], embeddings: NDArray[np.float32], labels: NDArray[np.int8]
) -> Head:
    try:
        return fit_head(head_class(plan.options), embeddings, labels)
    except (Exception, SystemExit) as error:  # a head is somebody else's code: if it raises, it fails by name
        raise_if_stop(error)
        images = np.count_nonzero(labels == REAL) if head_class.one_class else len(labels)
        raise TrainingError(
            f"head {name!r} cannot be fitted on {images} images: {type(error).__name__}: {error}"
        ) from error


def build_candidate(
    directory: Path,
    weights: EncoderWeights,
    heads: Mapping[str, Head],
    *,
    plans: Mapping[str, HeadPlan],
    plugins: Plugins,
    champion: Manifest | None,
    origin: Origin,
    evaluation: Mapping[str, Any],
    kept: KeptHeads | None = None,
) -> None:
    """Writes the candidate into `directory`, unless a whole one is there from an attempt before.

    It inherits default head, thresholds and the mark of a toy from the champion, and `kept` heads as they are.

    Raises:
        ArtifactError: a head that cannot be saved, or scores otherwise once it is loaded back.
    """
    if _is_whole(directory):
        return
    inherited: dict[str, Any] = {}
    if champion is not None:
        inherited = {
            "default_head": champion.default_head,
            "thresholds": champion.thresholds,
            "toy": champion.toy,
        }
    of = f" of {', '.join(sorted(heads))}" if kept is not None and kept.entries else ""
    facts = ReleaseFacts(
        source=Source(uri=str(origin)),
        plugin_heads={name: plan.plugin_head for name, plan in plans.items()},
        evaluation=evaluation,
        notes=f"{origin.kind}{of} by run {origin.run}",
        **inherited,
    )
    with whole_directory(directory) as partial:
        build_from_parts(partial, weights, heads, plugins, facts, kept=kept)


def _is_whole(directory: Path) -> bool:
    try:
        verify_files(directory)
    except ArtifactError:
        return False
    return True


FOLDS: Final = 5
_STILL_THERE: Final = 0.95
_MOST_REALS: Final = 1000
_MOST_OF_A_GENERATOR: Final = 200


def more_images(taken: Snapshot, learned: AbstractSet[str]) -> list[Member]:
    """Images of the training share that the encoder never learned: at most 1,000 reals and 200 of a generator.

    One of each group, class and generator, in the order of the groups' names, so that the next run sees the same ones
    and nobody who labels can choose them.
    """
    found: dict[str, list[Member]] = {}
    # A copy of what the encoder learned is in the same group, and no news to it either.
    known = {member.group for member in taken.members if member.sha256 in learned} - {None}
    for member in one_of_each_group(taken.training_share):
        if member.sha256 not in learned and member.group not in known:
            found.setdefault(group_of(member.label, member.generator), []).append(member)
    chosen = [
        one
        for name, members in found.items()
        for one in members[: _MOST_REALS if name == "real" else _MOST_OF_A_GENERATOR]
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
    """The way to fit one side's deciding head without a fold."""

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
        return fit_heads({name: self.plan}, self.plugins, members, embedding_matrix(members, self.side.clean))[name]


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
            found[condition][places] = checked_scores(side.head, head, embedding_matrix(members, rows))
    return found


def _regrouped(learned: Sequence[Member], taken: Snapshot) -> list[Member]:
    """An older snapshot may name other groups, or none: an image must be in one fold on both sides."""
    now = {member.sha256: member.group for member in taken.members}
    return [replace(member, group=now.get(member.sha256, member.group)) for member in learned]


def _fold(member: Member) -> int:
    """Images of a group stay together, or a head would know the copies of what it judges."""
    key = member.group or member.sha256
    return int.from_bytes(hashlib.sha256(f"fold {key}".encode()).digest()[:4], "big") % FOLDS
