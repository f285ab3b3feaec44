"""What the database knows of a champion that is to be replaced: what it learned, met and is asked to decide."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from code_worker.store import comparisons, image_groups, policies, releases, runs
from code_worker.training import snapshot as snapshots
from code_worker.training.opinions import PolicyRule
from code_worker.training.spending import Comparison, Spending, spend

if TYPE_CHECKING:
    from code_worker.store.engine import Session
    from code_worker.store.policies import PolicyRow
    from code_worker.store.runs import Run
    from code_worker.training.snapshot import Member, Snapshot

__all__ = ["Taught", "compared_on", "policy_rules", "spend_on", "stale_scopes", "taught", "unlearned"]


@dataclass(frozen=True, slots=True)
class Taught:
    """What a release learned here.

    Attributes:
        heads: images that its heads were fitted on, or the one that was asked about; None where one of them was
            fitted elsewhere, such as one that was kept of an imported release.
        encoder: content hashes of images that its encoder, or one that it descends from, learned from or was chosen
            by.
    """

    heads: tuple[Member, ...] | None
    encoder: frozenset[str]


def taught(session: Session, release: str, head: str | None = None) -> Taught:
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
    return Taught(_fitted_on(session, release, heads, line), frozenset(encoder))


def _fitted_on(
    session: Session, release: str, asked: frozenset[str], line: Mapping[str, Sequence[Run]]
) -> tuple[Member, ...] | None:
    """What these heads of a release were fitted on, those that it keeps of others too; None if nobody recorded it."""
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
    """Which of these heads the run did not fit: they are those of the release before."""
    fitted = run.config.get("heads")
    # Names of variables have `_` where a head's may have `-`, and a run has them as they were asked for.
    asked = {name.replace("-", "_") for name in (heads if fitted is None else fitted)}
    return frozenset(name for name in heads if name.replace("-", "_") not in asked)


def _learned_in(session: Session, run: Run) -> list[Member]:
    return snapshots.load(session, run.snapshot_id or "").training_share


def compared_on(session: Session, taken: Snapshot, *, candidate: str, champion: str | None) -> Snapshot:
    """What both are compared on: of the hold-out what neither learned, and `new` as the champion has it."""
    both = [candidate] if champion is None else [candidate, champion]
    return unlearned(session, snapshots.as_new_to(session, taken, champion), both)


def unlearned(session: Session, taken: Snapshot, named: Iterable[str]) -> Snapshot:
    """The same without images of the hold-out that these releases, or those they go back to, learned from.

    Retention forgets which group an image was in: labelled again in another one, it may be held out although it was
    learned. With it go the images of its group, which are copies and siblings. `left_out` counts them as `learned`.
    """
    learned = snapshots.learned_by(session, named).images
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
