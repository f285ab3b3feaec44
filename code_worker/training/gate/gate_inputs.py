"""Inputs of the gate: scores of both releases, the error it may spend, and what the champion learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from code_worker.data.datasets.examples import FAKE, REAL, UNNAMED
from code_worker.store import policies, releases
from code_worker.store.learning import image_groups, runs, snapshots
from code_worker.training import snapshot
from code_worker.training.evaluation.metrics import Threshold

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.store.engine import Session
    from code_worker.store.learning.runs import Run
    from code_worker.store.policies import PolicyRow
    from code_worker.training.gate.label_quality import Noise, Suspicion
    from code_worker.training.snapshot import Member, Snapshot


@dataclass(frozen=True, slots=True, eq=False)
class GoldenScores:
    """Scores of both releases for the golden set, its images as they are.

    Attributes:
        digest: what pins it.
        labels: `(n,) int8`.
        candidate: what wants to be promoted.
        champion: what judges now; None if nothing does.
    """

    digest: str
    labels: NDArray[np.int8]
    candidate: ReleaseScores
    champion: ReleaseScores | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """An earlier comparison with the same champion.

    Attributes:
        images: size of its hold-out.
        level: chance of error that it was allowed.
    """

    images: int
    level: float


@dataclass(frozen=True, slots=True)
class Spending:
    """The chance of error of one comparison, and what is left for those that follow.

    Attributes:
        level: of this comparison.
        error: of the champion's whole reign.
        before: comparisons with this champion before this one.
        spent: their levels and this one's.
        left_now: still to be spent on a hold-out of this size.
        left: still to be spent at all; what is not there now opens as the hold-out grows.
    """

    level: float
    error: float
    before: int
    spent: float
    left_now: float
    left: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def spend(before: Sequence[Comparison], images: int, error: float) -> Spending:
    """The level of the next comparison with a champion.

    On its first hold-out, of `N` images, half of `error` may be spent; once the hold-out has grown `g`-fold,
    `1 - 1 / 2g` of it. Each comparison takes half of what may be spent and was not: the sum over a whole reign stays
    below `error` however many there are, and new labels, which add images to the hold-out, always add room.

    Args:
        before: earlier comparisons with the same champion, the first one first.
        images: size of the hold-out now.
        error: chance that an equal release replaces the champion in its whole reign.
    """
    first = before[0].images if before else images
    growth = max(1.0, images / max(1, first))
    spent = sum(one.level for one in before)
    free = error * (1 - 1 / (2 * growth)) - spent
    level = max(0.0, free) / 2
    return Spending(level, error, len(before), spent + level, max(0.0, free) - level, error - spent - level)


@dataclass(frozen=True, slots=True, eq=False)
class ReleaseScores:
    """Scores of one release for the hold-out.

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


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """A head and thresholds by which production decides: those that a policy in force names.

    Attributes:
        name: for reports, such as `tenant acme`.
        head: the head it judges by.
        low: below it real.
        high: from it on fake.
    """

    name: str
    head: str
    low: float
    high: float


@dataclass(frozen=True, slots=True, eq=False)
class CrossFitted:
    """More images that no side learned from: scored by heads that were fitted without them.

    Attributes:
        labels: `(m,) int8`.
        generators: what made each fake, if known; None for reals.
        candidate: condition → `(m,) float32`, scores of the head that decides.
        champion: the same of the champion.
        group_of: names the group of each image; empty: each is by itself.
    """

    labels: NDArray[np.int8]
    generators: tuple[str | None, ...]
    candidate: Mapping[str, NDArray[np.float32]]
    champion: Mapping[str, NDArray[np.float32]]
    group_of: tuple[str, ...] = ()


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
        old: generators that the champion knows; None: those with images that are not new, or else all.
        min_holdout: images of each class below which nothing is decided.
        labellers: who labelled what is new.
        min_labellers: how many these must be.
        suspicions: how much new labels disagree with their neighbours, by labeller.
        golden: the golden set, if there is one.
        owed: the champion must go, for it learned from what was erased; no worse than it is good enough.
        more: further images on which a loss would show.
        policies: where production decides beside the champion's own thresholds.
        spending: what this comparison may err; None: it is the first with this champion.
        group_of: names the group of each image; empty: each is by itself. Of one class and generator a group has one
            image.
        unrecorded: nobody recorded what the champion learned from; these images may be among it.
    """

    labels: NDArray[np.int8]
    generators: tuple[str | None, ...]
    new: NDArray[np.bool_]
    candidate: ReleaseScores
    champion: ReleaseScores | None
    noise: tuple[Noise, ...] = ()
    unseen: tuple[str, ...] = ()
    old: frozenset[str] | None = None
    min_holdout: int = 1
    labellers: tuple[str, ...] = ()
    min_labellers: int = 1
    suspicions: tuple[Suspicion, ...] = ()
    golden: GoldenScores | None = None
    owed: bool = False
    more: CrossFitted | None = None
    policies: tuple[PolicyRule, ...] = ()
    spending: Spending | None = None
    group_of: tuple[str, ...] = ()
    unrecorded: bool = False

    def spends(self, error: float) -> Spending:
        """Returns what this comparison may err."""
        return self.spending or spend((), len(self.labels), error)

    def names(self) -> NDArray[np.object_]:
        """`(n,)` generator of each fake, `UNNAMED` if nobody named one; of reals None."""
        return generator_names(self.labels, self.generators)

    def old_generators(self) -> frozenset[str]:
        """Generators that the champion knows, which must not be lost."""
        if self.old is not None:
            return self.old
        names = self.names()
        known = {str(name) for name in names[(self.labels == FAKE) & ~self.new]}
        return frozenset(known or {str(name) for name in names[self.labels == FAKE]})

    def groups(self) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        """The reals, and the fakes of each generator: nobody may pay for what others gain."""
        yield "real", self.labels == REAL
        names = self.names()
        for name in sorted({str(name) for name in names[self.labels == FAKE]}):
            yield name, (self.labels == FAKE) & (names == name)


def generator_names(labels: NDArray[np.int8], generators: tuple[str | None, ...]) -> NDArray[np.object_]:
    """`(n,)` generator of each fake, `UNNAMED` if nobody named one; of reals None."""
    pairs = zip(labels, generators, strict=True)
    return np.array([name or UNNAMED if label == FAKE else None for label, name in pairs], dtype=object)


@dataclass(frozen=True, slots=True)
class TrainedOn:
    """The data that a release learned from here.

    Attributes:
        heads: images that its heads were fitted on, or the one that was asked about; None where one of them was
            fitted elsewhere, such as one that was kept of an imported release.
        encoder: content hashes of images that its encoder, or one that it descends from, learned from or was chosen
            by.
    """

    heads: tuple[Member, ...] | None
    encoder: frozenset[str]


def trained_on(session: Session, release: str, head: str | None = None) -> TrainedOn:
    """Follows a release back through the runs that made it and those it descends from.

    Args:
        session: reads the ledger.
        release: its id.
        head: the one of its heads that is asked about; unset: all of them.
    """
    line = runs.ancestry(session, [release])
    retrains = [run for made in line.values() for run in made if run.kind == "retrain"]
    encoder = {one.sha256 for run in retrains for one in _learned_in(session, run)}
    heads = _heads_of(session, release) if head is None else frozenset({head})
    return TrainedOn(_fitted_on(session, release, heads, line), frozenset(encoder))


def _fitted_on(
    session: Session, release: str, asked: frozenset[str], line: Mapping[str, Sequence[Run]]
) -> tuple[Member, ...] | None:
    """Returns what these heads of a release were fitted on, those that it keeps of others too.

    None if nobody recorded it.
    """
    found: dict[str, Member] = {}
    waiting, seen = [(release, asked)], set[tuple[str, frozenset[str]]]()
    while waiting:
        at, heads = waiting.pop()
        if not line[at]:
            return None
        seen.add((at, heads))
        for run in line[at]:
            kept = _kept(run, heads)
            if kept != heads or not heads:
                found = {**{one.sha256: one for one in _learned_in(session, run)}, **found}
            if run.base_release is not None and kept and (run.base_release, kept) not in seen:
                waiting.append((run.base_release, kept))
    return tuple(found.values())


def _heads_of(session: Session, release: str) -> frozenset[str]:
    info = releases.get(session, release)
    return frozenset() if info is None else frozenset(info.manifest.get("heads", ()))


def _kept(run: Run, heads: frozenset[str]) -> frozenset[str]:
    """Returns which of these heads the run did not fit: they are those of the release before."""
    fitted = run.config.get("heads")
    # Names of variables have `_` where a head's may have `-`, and a run has them as they were asked for.
    asked = {name.replace("-", "_") for name in (heads if fitted is None else fitted)}
    return frozenset(name for name in heads if name.replace("-", "_") not in asked)


def _learned_in(session: Session, run: Run) -> list[Member]:
    return snapshot.load(session, run.snapshot_id or "").training_share


def compared_on(session: Session, taken: Snapshot, *, candidate: str, champion: str | None) -> Snapshot:
    """Returns what both are compared on: of the hold-out what neither learned, and `new` as the champion has it."""
    both = [candidate] if champion is None else [candidate, champion]
    return unlearned(session, snapshot.as_new_to(session, taken, champion), both)


def unlearned(session: Session, taken: Snapshot, named: Iterable[str]) -> Snapshot:
    """The same without images of the hold-out that these releases, or those they go back to, learned from.

    Retention forgets which group an image was in: labelled again in another one, it may be held out although it was
    learned. With it go the images of its group, which are copies and siblings. `left_out` counts them as `learned`.
    """
    learned = snapshot.learned_by(session, named).images
    # Also by images that were learned and are no members now, such as those that labellers contradict.
    groups = {place.group for place in image_groups.places(session, sorted(learned)).values()}
    groups |= {one.group for one in taken.members if one.group is not None and one.sha256 in learned}
    known = {one.sha256: one.by for one in taken.holdout if one.sha256 in learned or one.group in groups}
    stay = [one for one in taken.members if one.sha256 not in known]
    return taken.without("learned", stay, dict(sorted(Counter(known.values()).items())))


def spend_on(session: Session, *, run_id: str, champion: str, candidate: str, images: int, error: float) -> Spending:
    """The chance of error of a run's comparison with a champion, written down before the comparison is made."""
    earlier = snapshots.before(session, champion, run_id=run_id)
    spending = spend([Comparison(one.images, one.level) for one in earlier], images, error)
    snapshots.note_comparison(
        session, run_id=run_id, champion=champion, candidate=candidate, images=images, level=spending.level
    )
    return spending


def stale_scopes(session: Session, release: str) -> list[str]:
    """Scopes of thresholds in force that another release's scores drew, once this one is the champion."""
    return [row.scope for row in policies.stale(session, release)]


def policy_rules(rows: Sequence[PolicyRow], head: str, thresholds: tuple[float, float]) -> tuple[PolicyRule, ...]:
    """Returns where production decides otherwise than the champion by itself, each head and thresholds once.

    Args:
        rows: policies in force.
        head: the one that decides where a policy names none.
        thresholds: the champion's own.
    """
    found: dict[tuple[str, float, float], list[str]] = {}
    for row in rows:
        place = (row.head or head, row.low, row.high)
        if place != (head, *thresholds):
            found.setdefault(place, []).append(row.scope)
    return tuple(PolicyRule("; ".join(names), *place) for place, names in found.items())
