"""Candidate and champion on identical images: what the gate decides by, and what a manifest reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from code_worker.data.datasets.examples import FAKE, REAL, UNNAMED, group_of
from code_worker.errors import TrainingError
from code_worker.releases.reference_scores import checked_scores
from code_worker.training.evaluation.metrics import figures
from code_worker.training.gate.gate_inputs import CrossFitted, GateInputs, GoldenScores, PolicyRule, ReleaseScores
from code_worker.training.gate.label_quality import Noise, Suspicion, label_noise, suspicions, unseen
from code_worker.training.snapshot_embeddings import CONDITIONS, EmbeddingsByHash, embedding_matrix

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.heads import Head
    from code_worker.releases.manifest import Thresholds
    from code_worker.training.gate.safeguards import GoldenSet
    from code_worker.training.snapshot import Member, Snapshot

_FOUND: Final = 0.75
_FEWEST: Final = 10


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """A release, and the snapshot through its encoder.

    Attributes:
        release: its id.
        encoder_sha256: equal ones give equal embeddings.
        heads: its fitted heads.
        head: the one that decides.
        thresholds: where it decides.
        rows: condition → embeddings; the first condition's are of the whole snapshot, the others' of the hold-out.
    """

    release: str
    encoder_sha256: str
    heads: Mapping[str, Head]
    head: str
    thresholds: Thresholds
    rows: Mapping[str, EmbeddingsByHash]

    @property
    def decides_at(self) -> tuple[float, float]:
        """Low and high threshold."""
        return self.thresholds.low, self.thresholds.high

    @property
    def clean(self) -> EmbeddingsByHash:
        """Embeddings of the images as they are."""
        return self.rows[CONDITIONS[0].key]

    def opinion(self, members: Sequence[Member]) -> ReleaseScores:
        """Scores of every head under every condition.

        Raises:
            ArtifactError: a head does not keep its contract.
        """
        scores = {
            condition: {
                name: checked_scores(name, head, embedding_matrix(members, rows)) for name, head in self.heads.items()
            }
            for condition, rows in self.rows.items()
        }
        return ReleaseScores(self.release, self.head, self.decides_at, scores)


def labels_of(members: Sequence[Member]) -> NDArray[np.int8]:
    """`(n,) int8`."""
    return np.array([member.label for member in members], dtype=np.int8)


def gate_inputs(
    snapshot: Snapshot,
    candidate: Side,
    champion: Side | None,
    *,
    min_holdout: int,
    min_labellers: int = 1,
    golden: GoldenScores | None = None,
    owed: bool = False,
    more: CrossFitted | None = None,
    policies: tuple[PolicyRule, ...] = (),
) -> GateInputs:
    """The hold-out as both see it, without what one of them could not read or decode under every condition.

    Of a group of images one of each class and generator counts: more would be no further evidence.

    Raises:
        TrainingError: the candidate lacks the head that is to decide.
        ArtifactError: a head does not keep its contract.
    """
    sides = [side for side in (candidate, champion) if side is not None]
    for side in sides:
        if side.head not in side.heads:
            raise TrainingError(f"{side.release} has no head {side.head!r} to decide with")
    rows = [rows for side in sides for rows in side.rows.values()]
    members = one_of_each_group(one for one in snapshot.holdout if all(one.sha256 in each for each in rows))
    noise, unchecked = _noise(snapshot, candidate, champion)
    return GateInputs(
        labels=labels_of(members),
        generators=tuple(member.generator for member in members),
        new=np.array([member.new for member in members], dtype=np.bool_),
        candidate=candidate.opinion(members),
        champion=None if champion is None else champion.opinion(members),
        noise=noise,
        unseen=unchecked,
        min_holdout=min_holdout,
        labellers=tuple(sorted({member.by for member in snapshot.members if member.new})),
        min_labellers=min_labellers,
        suspicions=_suspicions(snapshot, candidate, champion, frozenset(unchecked)),
        golden=golden,
        owed=owed,
        old=None if champion is None else _old_generators(snapshot, champion),
        more=more,
        policies=policies,
        group_of=groups_of(members),
    )


def one_of_each_group(members: Iterable[Member]) -> list[Member]:
    """One image of each class and generator of a group, in the order of the groups' names.

    These are keyed by the installation's secret: nobody who labels can choose which groups come first.
    """
    found: dict[tuple[str, int, str | None], Member] = {}
    for member in sorted(members, key=lambda one: (one.group or one.sha256, one.sha256)):
        found.setdefault((member.group or member.sha256, member.label, member.generator), member)
    return list(found.values())


def groups_of(members: Iterable[Member]) -> tuple[str, ...]:
    """Names of their groups."""
    return tuple(member.group or member.sha256 for member in members)


def _old_generators(snapshot: Snapshot, champion: Side) -> frozenset[str]:
    """Generators that the champion learned of; where nobody knows what it learned, those that it does not miss.

    Whether it misses one is asked of images that are not of the hold-out, which would otherwise decide by chance
    what it is asked about.
    """
    fakes = [member for member in snapshot.members if member.label == FAKE]
    known = {member.generator or UNNAMED for member in fakes if not member.new}
    if known:
        return frozenset(known)
    missed = missed_generators(snapshot.training_share, champion)
    return frozenset({member.generator or UNNAMED for member in fakes} - missed)


def golden_scores(golden: GoldenSet, candidate: Side, champion: Side | None) -> GoldenScores:
    """Returns what both say of the golden set; its images are rows of the sides' first condition.

    Raises:
        TrainingError: an image that a release cannot judge.
        ArtifactError: a head does not keep its contract.
    """
    labels = np.array([one.label for one in golden.examples], dtype=np.int8)
    other = None if champion is None else _golden_scores_of(golden, champion)
    return GoldenScores(golden.digest, labels, _golden_scores_of(golden, candidate), other)


def _golden_scores_of(golden: GoldenSet, side: Side) -> ReleaseScores:
    hashes = [one.sha256 or "" for one in golden.examples]
    if lost := [sha256 for sha256 in hashes if sha256 not in side.clean]:
        raise TrainingError(f"{len(lost)} images of the golden set cannot be decoded, {lost[0]} for one")
    scores = checked_scores(side.head, side.heads[side.head], np.stack([side.clean[sha256] for sha256 in hashes]))
    return ReleaseScores(side.release, side.head, side.decides_at, {CONDITIONS[0].key: {side.head: scores}})


def _suspicions(
    snapshot: Snapshot, candidate: Side, champion: Side | None, unseen_names: frozenset[str]
) -> tuple[Suspicion, ...]:
    """By labeller, the smaller of what two encoders say; one that learned the labels speaks for the hold-out alone.

    New generators that the champion's encoder does not see would make every labeller of theirs look wrong.
    """
    first = candidate if champion is None else champion
    known = [one for one in snapshot.members if one.label == REAL or one.generator not in unseen_names]
    found = _suspicions_seen_by(known, first, learned=champion is None)
    if champion is None or champion.encoder_sha256 == candidate.encoder_sha256:
        return found
    own = {one.by: one for one in _suspicions_seen_by(snapshot.members, candidate, learned=True)}
    return tuple(min((one, own.get(one.by, one)), key=lambda each: each.ratio) for one in found)


def _suspicions_seen_by(labelled: Sequence[Member], side: Side, *, learned: bool) -> tuple[Suspicion, ...]:
    members = [member for member in labelled if member.sha256 in side.clean]
    eligible = np.array([member.holdout or not learned for member in members], dtype=np.bool_)
    return suspicions(members, embedding_matrix(members, side.clean), labels_of(members), eligible)


def missed_generators(members: Sequence[Member], side: Side) -> frozenset[str]:
    """Named generators with ten images or more, of which a release calls fewer than three quarters fake.

    Raises:
        ArtifactError: the head that decides does not keep its contract.
    """
    fakes = [
        member for member in members if member.generator and member.label == FAKE and member.sha256 in side.clean
    ]
    if not fakes or side.head not in side.heads:
        return frozenset()
    scores = checked_scores(side.head, side.heads[side.head], embedding_matrix(fakes, side.clean))
    found: dict[str, list[bool]] = {}
    for member, score in zip(fakes, scores, strict=True):
        found.setdefault(str(member.generator), []).append(bool(score >= side.thresholds.high))
    return frozenset(
        name for name, calls in found.items() if len(calls) >= _FEWEST and sum(calls) < _FOUND * len(calls)
    )


def _noise(snapshot: Snapshot, candidate: Side, champion: Side | None) -> tuple[tuple[Noise, ...], tuple[str, ...]]:
    """Estimates of wrong labels, and generators whose labels the champion's encoder cannot check.

    Embeddings of an encoder that learned from these labels speak for images of the hold-out alone. Of two encoders
    the smaller estimate counts: what only one of them cannot tell apart is not labelled wrongly. New generators that
    the champion's encoder does not see would all look like wrong labels to it, so it is not asked about them; a
    candidate that was trained to see them is.
    """
    if champion is None:
        return _noise_seen_by(snapshot.members, candidate, learned=True), ()
    unseen_names = unseen_generators(snapshot, champion)
    checkable = [one for one in snapshot.members if one.label == REAL or one.generator not in unseen_names]
    by_champion = _noise_seen_by(checkable, champion, learned=False)
    if champion.encoder_sha256 == candidate.encoder_sha256:
        return by_champion, unseen_names
    own = _noise_seen_by(snapshot.members, candidate, learned=True)
    if not unseen_names:
        return tuple(map(_smaller, own, by_champion)), ()
    strict = _noise_seen_by(snapshot.members, champion, learned=False)
    return tuple(
        one if one.share is not None else other for one, other in zip(own, strict, strict=True)
    ), unseen_names


def unseen_generators(snapshot: Snapshot, champion: Side) -> tuple[str, ...]:
    """New generators that the champion's encoder does not tell from reals."""
    members = [member for member in snapshot.members if member.sha256 in champion.clean]
    embeddings, labels = embedding_matrix(members, champion.clean), labels_of(members)
    old = {member.generator for member in members if not member.new}
    new = {member.generator for member in members if member.label == FAKE and member.generator} - old
    return tuple(
        name
        for name in sorted(filter(None, new))
        if unseen(embeddings, labels, np.array([member.generator == name for member in members]))
    )


def _noise_seen_by(labelled: Sequence[Member], side: Side, *, learned: bool) -> tuple[Noise, ...]:
    members = [member for member in labelled if member.sha256 in side.clean]
    embeddings, labels = embedding_matrix(members, side.clean), labels_of(members)
    eligible = np.array([member.holdout or not learned for member in members], dtype=np.bool_)
    new = np.array([member.new for member in members], dtype=np.bool_)
    return (
        *label_noise(embeddings, labels, eligible, among="all images"),
        *label_noise(embeddings, labels, eligible & new, among="new images"),
    )


def _smaller(one: Noise, other: Noise) -> Noise:
    known = [noise for noise in (one, other) if noise.share is not None]
    return min(known, key=lambda noise: noise.share or 0.0, default=one)


def measured(members: Sequence[Member], opinion: ReleaseScores) -> dict[str, Any]:
    """Figures of every head under every condition, overall and per group, for the candidate's manifest."""
    labels = labels_of(members)
    groups: dict[str, list[int]] = {}
    for place, member in enumerate(members):
        groups.setdefault(group_of(member.label, member.generator), []).append(place)
    return {
        condition: {
            head: {
                "overall": figures(labels, scores, threshold=opinion.threshold),
                "groups": {
                    name: figures(labels[places], scores[places], threshold=opinion.threshold)["accuracy"]
                    for name, places in sorted(groups.items())
                },
            }
            for head, scores in by_head.items()
        }
        for condition, by_head in opinion.scores.items()
    }
