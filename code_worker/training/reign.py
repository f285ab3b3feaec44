"""What the database knows of a champion that is to be replaced: what it learned, met and is asked to decide."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from code_worker.store import comparisons, image_groups, policies, runs
from code_worker.training import snapshot as snapshots
from code_worker.training.opinions import PolicyRule
from code_worker.training.spending import Comparison, Spending, spend

if TYPE_CHECKING:
    from code_worker.store.engine import Session
    from code_worker.store.policies import PolicyRow
    from code_worker.training.snapshot import Member, Snapshot

__all__ = ["Taught", "compared_on", "policy_rules", "spend_on", "stale_scopes", "taught", "unlearned"]


@dataclass(frozen=True, slots=True)
class Taught:
    """What a release learned here.

    Attributes:
        heads: images that its heads were fitted on; None where they were fitted elsewhere.
        encoder: content hashes of images that its encoder, or one that it descends from, learned from or was chosen
            by.
    """

    heads: tuple[Member, ...] | None
    encoder: frozenset[str]


def taught(session: Session, release: str) -> Taught:
    """Follows a release back through the runs that made it and those it descends from."""
    heads: dict[str, Member] | None = None
    encoder: set[str] = set()
    fitted_in = {release}
    for at, made in runs.ancestry(session, [release]).items():
        for run in made:
            members = {one.sha256: one for one in snapshots.load(session, run.snapshot_id or "").training_share}
            if at in fitted_in:
                heads = {**members, **(heads or {})}
                if run.config.get("heads") is not None and run.base_release is not None:
                    # The other heads are those of the release before.
                    fitted_in.add(run.base_release)
            if run.kind == "retrain":
                encoder |= members.keys()
    return Taught(None if heads is None else tuple(heads.values()), frozenset(encoder))


def compared_on(session: Session, taken: Snapshot, *, candidate: str, champion: str | None) -> Snapshot:
    """What both are compared on: of the hold-out what neither learned, and `new` as the champion has it."""
    releases = [candidate] if champion is None else [candidate, champion]
    return unlearned(session, snapshots.as_new_to(session, taken, champion), releases)


def unlearned(session: Session, taken: Snapshot, releases: Iterable[str]) -> Snapshot:
    """The same without images of the hold-out that these releases, or those they go back to, learned from.

    Retention forgets which group an image was in: labelled again in another one, it may be held out although it was
    learned. With it go the images of its group, which are copies and siblings. `left_out` counts them as `learned`.
    """
    learned = snapshots.learned_by(session, releases).images
    # Also by images that were learned and are no members now, such as those that labellers contradict.
    groups = {place.group for place in image_groups.places(session, sorted(learned)).values()}
    groups |= {one.group for one in taken.members if one.group is not None and one.sha256 in learned}
    known = {one.sha256: one.by for one in taken.holdout if one.sha256 in learned or one.group in groups}
    stay = [one for one in taken.members if one.sha256 not in known]
    return taken.without("learned", stay, dict(sorted(Counter(known.values()).items())))


def spend_on(session: Session, *, run_id: str, champion: str, candidate: str, images: int, error: float) -> Spending:
    """The chance of error of a run's comparison with a champion, written down before the comparison is made."""
    earlier = comparisons.before(session, champion, run_id=run_id)
    spending = spend([Comparison(one.images, one.level) for one in earlier], images, error)
    comparisons.note(
        session, run_id=run_id, champion=champion, candidate=candidate, images=images, level=spending.level
    )
    return spending


def stale_scopes(session: Session, release: str) -> list[str]:
    """Scopes of thresholds in force that another release's scores drew, once this one is the champion."""
    return [row.scope for row in policies.stale(session, release)]


def policy_rules(rows: Sequence[PolicyRow], head: str, thresholds: tuple[float, float]) -> tuple[PolicyRule, ...]:
    """Where production decides otherwise than the champion by itself, each head and thresholds once.

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
