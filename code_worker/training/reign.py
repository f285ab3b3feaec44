"""What the database knows of a champion that is to be replaced: what it learned, met and is asked to decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from code_worker.store import comparisons, policies, runs
from code_worker.training import snapshot as snapshots
from code_worker.training.opinions import PolicyRule
from code_worker.training.spending import Comparison, Spending, spend

if TYPE_CHECKING:
    from code_worker.store.engine import Session
    from code_worker.store.policies import PolicyRow
    from code_worker.training.snapshot import Member

__all__ = ["Taught", "policy_rules", "spend_on", "stale_scopes", "taught"]


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
    for at, made in runs.ancestry(session, [release]).items():
        for run in made:
            members = {one.sha256: one for one in snapshots.load(session, run.snapshot_id or "").training_share}
            if at == release:
                heads = {**members, **(heads or {})}
            if run.kind == "retrain":
                encoder |= members.keys()
    return Taught(None if heads is None else tuple(heads.values()), frozenset(encoder))


def spend_on(session: Session, *, run_id: str, champion: str, candidate: str, images: int, error: float) -> Spending:
    """The chance of error of a run's comparison with a champion, written down before the comparison is made."""
    earlier = comparisons.before(session, champion, run_id=run_id)
    spending = spend([Comparison(one.images, one.level) for one in earlier], images, error)
    comparisons.note(
        session, run_id=run_id, champion=champion, candidate=candidate, images=images, level=spending.level
    )
    return spending


def stale_scopes(session: Session, release: str) -> list[str]:
    """Policies in force that another release's scores drew, by what they are for."""
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
