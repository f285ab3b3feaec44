"""The frozen list of labelled images that a run learns from and is measured on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from code_worker.data.datasets.examples import FAKE, REAL, UNNAMED
from code_worker.errors import DatasetError
from code_worker.store import releases
from code_worker.store.erasure import personal, receipts
from code_worker.store.ids import uuid7
from code_worker.store.learning import image_groups, kept_images, labels, runs, snapshots
from code_worker.store.learning.label_rules import SPLITS, Split

if TYPE_CHECKING:
    from code_worker.settings import LabelSettings, ScheduleSettings, Settings
    from code_worker.store.engine import Session

LeftOut = Mapping[str, int]


def cap_shares(
    members: Sequence[Member], max_share: float | None, trusted: Collection[str] = ()
) -> tuple[list[Member], LeftOut]:
    """Leaves out of the new images what exceeds a labeller's share of all new ones that stay.

    Among fewer labellers than would fit the share, each may have an equal one; a single labeller is not capped, for
    there is nobody to be outvoted. Trusted ones count and are never cut. Which images stay is decided by content
    hash, so that the next run keeps the same ones.

    Args:
        members: sorted by content hash.
        max_share: of the new images, 0 to 1; None: no cap.
        trusted: labellers that are not cut.
    """
    counts = Counter(member.by for member in members if member.new)
    if max_share is None or len(counts) < 2:
        return list(members), {}
    # Among few, equal shares are as small as shares can be; trusted ones make room for smaller ones.
    least = 0 if any(by in trusted for by in counts) else 1 / len(counts)
    limit = _limit(counts, max(max_share, least), trusted)
    seen: Counter[str] = Counter()
    stay, left = [], Counter[str]()
    for member in members:
        if member.new and member.by not in trusted:
            seen[member.by] += 1
            if seen[member.by] > limit:
                left[member.by] += 1
                continue
        stay.append(member)
    return stay, dict(sorted(left.items()))


def _limit(counts: Mapping[str, int], share: float, trusted: Collection[str]) -> int:
    """The most that one labeller may have, so that it is at most the share of what all have then."""
    fixed = sum(count for by, count in counts.items() if by in trusted)
    others = [count for by, count in counts.items() if by not in trusted]

    def fits(limit: int) -> bool:
        total = fixed + sum(min(count, limit) for count in others)
        return min(max(others, default=0), limit) <= share * total + 1e-9

    low, high = 0, max(others, default=0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


TRAIN: Final = "train"
VALIDATION: Final = "validation"
HOLDOUT: Final = "holdout"


@dataclass(frozen=True, slots=True)
class Member:
    """One labelled image; `new` unless the champion, or a release that it goes back to, was taught the same of it.

    `by` said what decides its label. `group` names the images that are always in the same part as this one.
    """

    sha256: str
    label: int
    generator: str | None
    collection: str | None
    new: bool
    by: str = ""
    split: Split = TRAIN
    group: str | None = None

    @property
    def holdout(self) -> bool:
        """True if it is only measured on."""
        return self.split == HOLDOUT


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Members by content hash, and how they were come by.

    Attributes:
        rule: how contradicting labels were resolved.
        members: one per image, sorted by content hash.
        contradicted: members of which labellers differ, decided by the rule.
        undecided: labelled images that the rule left undecided; they are not members.
        unkept: labelled images of which no copy is kept; they are not members.
        left_out: why → by whom → labelled images that are not members. Why is `split` where an image is near images
            of different parts, else `share`, `duplicates` or `golden`; `learned` where only what may be judged stays.
        id: of the frozen snapshot, or of the one to be.
    """

    rule: str
    members: tuple[Member, ...]
    contradicted: int = 0
    undecided: int = 0
    unkept: int = 0
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)
    id: str = field(default_factory=uuid7)

    @property
    def train(self) -> list[Member]:
        """Returns what is learned from."""
        return [member for member in self.members if member.split == TRAIN]

    @property
    def validation(self) -> list[Member]:
        """Returns what chooses among what was learned: epoch, patience, share, thresholds."""
        return [member for member in self.members if member.split == VALIDATION]

    @property
    def training_share(self) -> list[Member]:
        """Returns what is not held out: `train` and `validation`."""
        return [member for member in self.members if not member.holdout]

    @property
    def holdout(self) -> list[Member]:
        """Returns what is only measured on."""
        return [member for member in self.members if member.holdout]

    def of_training_share(self) -> Snapshot:
        """The same without the hold-out, for anything that decides how to train."""
        return replace(self, members=tuple(self.training_share))

    @property
    def digest(self) -> str:
        """Of what is known of which image and of its part, whether new or not: equal digests teach the same."""
        return snapshots.digest_of(asdict(one) for one in self.members)

    def counts(self) -> dict[str, Any]:
        """Members by split, label and generator, and what was left out; plain JSON."""
        return {
            TRAIN: _counted(self.train),
            VALIDATION: _counted(self.validation),
            HOLDOUT: _counted(self.holdout),
            "contradicted": self.contradicted,
            "undecided": self.undecided,
            "unkept": self.unkept,
            "labellers": dict(sorted(Counter(member.by for member in self.members if member.new).items())),
            "left_out": {why: dict(by) for why, by in self.left_out.items()},
        }

    def without(self, why: str, members: Sequence[Member], left: LeftOut) -> Snapshot:
        """The same with these members alone; `left` says who labelled the others."""
        if not left:
            return self
        return replace(self, members=tuple(members), left_out={**self.left_out, why: left})


def _counted(members: Sequence[Member]) -> dict[str, Any]:
    fakes = Counter(member.generator or UNNAMED for member in members if member.label == FAKE)
    return {
        "real": sum(member.label == REAL for member in members),
        "fake": fakes.total(),
        "new_real": sum(member.new and member.label == REAL for member in members),
        "new_fake": sum(member.new and member.label == FAKE for member in members),
        "generators": dict(sorted(fakes.items())),
    }


def take(session: Session, settings: LabelSettings) -> Snapshot:
    """Returns what is labelled now, resolved by the rule, as far as copies are kept; nothing is written."""
    resolved = labels.resolve(
        session, rule=settings.rule, trusted=settings.trusted, ignored=frozenset(settings.ignored)
    )
    places = image_groups.places(session, (label.sha256 for label in resolved))
    before = _labels_known_to(session, releases.alias(session, releases.CHAMPION))
    # Without a copy there is nothing to learn from; without a group nobody knows the part.
    kept = [(label, places[label.sha256]) for label in resolved if label.sha256 in places]
    members = [
        Member(
            sha256=label.sha256,
            label=(number := FAKE if label.label == "fake" else REAL),
            generator=labels.generator_name(label.generator),
            collection=label.collection,
            new=before.get(label.sha256) != number,
            by=label.by,
            split=place.split,
            group=place.group,
        )
        for label, place in kept
        if place.split is not None
    ]
    between = Counter(label.by for label, place in kept if place.split is None)
    disputed = {conflict.sha256 for conflict in labels.conflicts(session, ignored=settings.ignored)}
    taken = Snapshot(
        rule=settings.rule,
        members=tuple(sorted(members, key=lambda member: member.sha256)),
        contradicted=len(disputed & {member.sha256 for member in members}),
        undecided=len(disputed - {label.sha256 for label in resolved}),
        unkept=len(resolved) - len(kept),
        left_out={"split": between} if between else {},
    )
    return taken.without("share", *cap_shares(taken.members, settings.max_share, settings.trusted))


def as_new_to(session: Session, snapshot: Snapshot, champion: str | None) -> Snapshot:
    """The same, its members `new` as this champion has it: it may have moved since the snapshot was taken."""
    before = _labels_known_to(session, champion)
    members = (replace(one, new=before.get(one.sha256) != one.label) for one in snapshot.members)
    return replace(snapshot, members=tuple(members))


def _labels_known_to(session: Session, release: str | None) -> Mapping[str, int]:
    """Labels by content hash that a release, or one that it goes back to, was taught or measured by; the last ones.

    None are known to a release that nobody taught here.
    """
    if release is None:
        return {}
    made = [run for line in runs.ancestry(session, [release]).values() for run in line]
    known: dict[str, int] = {}
    for run in reversed(made):
        rows = snapshots.unpack(snapshots.members(session, run.snapshot_id or ""))
        known.update((row["sha256"], row["label"]) for row in rows)
    return known


def freeze(session: Session, snapshot: Snapshot) -> Snapshot:
    """Writes the snapshot, which only an erasure changes afterwards; writing it again changes nothing.

    Returns it as it was written: without images that were erased, or of which the copy went, since it was taken.
    """
    there = personal.left(session, images=(member.sha256 for member in snapshot.members)).images
    kept = kept_images.kept(session, there)
    snapshot = replace(snapshot, members=tuple(member for member in snapshot.members if member.sha256 in kept))
    snapshots.add(
        session,
        id=snapshot.id,
        digest=snapshot.digest,
        rule=snapshot.rule,
        counts=snapshot.counts(),
        members=snapshots.pack([asdict(member) for member in snapshot.members]),
    )
    return snapshot


def load(session: Session, snapshot_id: str) -> Snapshot:
    """A frozen snapshot as it was taken.

    Raises:
        StoreError: there is none of this id, or it is damaged.
    """
    members = tuple(Member(**row) for row in snapshots.unpack(snapshots.members(session, snapshot_id)))
    info = snapshots.get(session, snapshot_id)
    counts = {} if info is None else info.counts
    return Snapshot(
        rule="" if info is None else info.rule,
        members=members,
        contradicted=counts.get("contradicted", 0),
        undecided=counts.get("undecided", 0),
        unkept=counts.get("unkept", 0),
        left_out=counts.get("left_out", {}),
        id=snapshot_id,
    )


@dataclass(frozen=True, slots=True)
class Learned:
    """The images that releases learned from, and the releases that their encoders go back to.

    Attributes:
        images: content hashes that one of them learned from or was chosen on.
        unknown: releases of which nothing here says what they learned from: imported, or made elsewhere.
    """

    images: frozenset[str]
    unknown: tuple[str, ...]


def learned_by(session: Session, named: Iterable[str]) -> Learned:
    """Returns what these releases learned from, as far as the runs that made them are recorded."""
    line = runs.ancestry(session, named)
    taught = {run.snapshot_id or "" for made in line.values() for run in made}
    images = {one.sha256 for snapshot_id in sorted(taught) for one in load(session, snapshot_id).training_share}
    return Learned(frozenset(images), tuple(sorted(release for release, made in line.items() if not made)))


def check_classes(snapshot: Snapshot) -> None:
    """Refuses a snapshot that lacks a class.

    Raises:
        DatasetError: nothing is labelled, or nothing to learn from is of one of the two classes.
    """
    if not snapshot.members:
        left_out = snapshot.undecided + snapshot.unkept
        why = f" ({snapshot.undecided} undecided, {snapshot.unkept} without a kept copy)" if left_out else ""
        raise DatasetError(f"no labelled image to learn from{why}: label some with `code-worker label`")
    counts = _counted(snapshot.train)
    for label in ("real", "fake"):
        if not counts[label]:
            raise DatasetError(
                f"no {label} image to learn from among {len(snapshot.members)} labelled ones: both classes are needed"
            )


def shortages(snapshot: Snapshot, settings: ScheduleSettings, *, min_labellers: int = 1) -> list[str]:
    """Returns what is missing to the minimum numbers, one sentence each; empty when a run is due."""
    counts = snapshot.counts()
    new = {name: sum(counts[split][name] for split in SPLITS) for name in ("new_real", "new_fake")}
    wanted = [
        ("new real images", new["new_real"], settings.min_new_real),
        ("new generated images", new["new_fake"], settings.min_new_fake),
        ("real images in the hold-out", counts[HOLDOUT]["real"], settings.min_holdout),
        ("generated images in the hold-out", counts[HOLDOUT]["fake"], settings.min_holdout),
    ]
    if counts["labellers"]:
        wanted.append(("labellers of what is new", len(counts["labellers"]), min_labellers))
    return [f"{found} {what}, {least} are needed" for what, found, least in wanted if found < least]


def reasons_to_wait(
    session: Session, taken: Snapshot, *, kind: str, champion: str | None, settings: Settings
) -> list[str]:
    """Returns why no run is due, one sentence each; empty when one is.

    For a champion that learned from what was erased one always is.
    """
    if champion in receipts.releases_owed(session):
        return []
    why = shortages(taken, settings.schedule, min_labellers=settings.labels.min_labellers)
    before = runs.concluded(session, kind=kind, digest=taken.digest)
    if before is not None and champion in {before.base_release, before.candidate}:
        why.append(f"nothing was labelled since run {before.id}, which was {before.state}")
    return why
