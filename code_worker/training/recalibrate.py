"""Draws the thresholds of calibrated policies anew, once another release has become the champion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from code_worker.data.open import open_examples
from code_worker.errors import (
    CodeWorkerError,
    NoReleaseError,
    StorageError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
)
from code_worker.logs import get_logger
from code_worker.moderation.load import start_runtime
from code_worker.moderation.policy import Policy
from code_worker.store import embeddings, policies
from code_worker.training.calibrate import Calibration, Goal, calibrate, learnable

if TYPE_CHECKING:
    from code_worker.data.examples import Skipped
    from code_worker.moderation.runtime import Runtime
    from code_worker.releases.registry import Registry
    from code_worker.settings import Settings
    from code_worker.store.engine import Session, Store
    from code_worker.store.policies import PolicyRow

__all__ = ["Redrawn", "recalibrate"]

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Redrawn:
    """What became of one policy.

    Attributes:
        policy: the version that was stale.
        made: the new thresholds; None where they could not be drawn.
        row: the version that they became; None where nothing was set.
        problem: why not, or empty.
    """

    policy: PolicyRow
    made: Calibration | None
    row: PolicyRow | None
    problem: str = ""


def recalibrate(
    settings: Settings,
    store: Store,
    registry: Registry,
    *,
    by: str,
    set_them: bool = True,
    listen: Callable[[str], object] = lambda _: None,
) -> list[Redrawn]:
    """Calibrates each stale policy on the champion: by the data set, bounds and head of then, for the same scope.

    One that cannot be drawn, such as by too few images, stays as it is and keeps none of the others from it. Two
    processes at once do no harm: a version that somebody put meanwhile stays. Whoever calls this made sure that `by`
    may set thresholds.

    Args:
        settings: of everything.
        store: a migrated one.
        registry: loads the champion.
        by: for the record.
        set_them: put them in force; else only tell.
        listen: hears the scope of each policy before it is drawn.

    Raises:
        NoReleaseError: there is no champion.
        StorageError, StoreFullError, StoreUnavailableError: what is drawn already stays.
        ArtifactError, ConfigurationError: the champion cannot be loaded, or its device not be used.
    """
    if (champion := registry.champion()) is None:
        raise NoReleaseError("no release is the champion: there is nothing to calibrate")
    found = store.run(lambda session: policies.redrawable(session, champion), write=False)
    if not found:
        return []
    runtime = start_runtime(registry.load(champion), settings, lazy=True)
    redrawn = []
    with closing(runtime.embedder):
        for row in found:
            listen(row.scope)
            redrawn.append(_redraw(settings, store, runtime, row, by=by if set_them else None))
    return redrawn


def _redraw(settings: Settings, store: Store, runtime: Runtime, row: PolicyRow, *, by: str | None) -> Redrawn:
    made = None
    try:
        made = _calibrated(settings, store, runtime, row)
        new = None if by is None else store.run(partial(_put, row=row, made=made, by=by))
    except (StorageError, StoreFullError, StoreUnavailableError):
        # Nothing is wrong with this policy: whoever called tries all of it again later.
        raise
    except CodeWorkerError as error:
        log.warning("policy_stays_stale", policy=row.id, release=runtime.release, error=str(error))
        return Redrawn(row, made, None, str(error))
    if new is not None:
        log.info("policy_recalibrated", policy=new.id, before=row.id, release=runtime.release)
    return Redrawn(row, made, new)


def _calibrated(settings: Settings, store: Store, runtime: Runtime, row: PolicyRow) -> Calibration:
    evidence: Mapping[str, Any] = row.evidence or {}
    skipped: list[Skipped] = []
    examples = list(open_examples(evidence["source"], settings=settings, skipped=skipped, store=store))
    key = runtime.encoder_sha256
    return calibrate(
        examples,
        runtime,
        settings.limits,
        Goal(max_fpr=evidence["max_fpr"], max_fnr=evidence["max_fnr"], strict_fnr=evidence.get("strict_fnr", False)),
        head=row.head or runtime.default_head,
        before=Policy(row.id, row.low, row.high, row.head, row.tenant, row.content_type),
        source=evidence["source"],
        labelled=None if evidence.get("everything", False) else learnable(store, runtime.release),
        # Drawn by another release's scores it means nothing for this one's; kept it was drawn by none.
        keep_low=bool(evidence.get("low_kept")),
        known=lambda hashes: store.run(lambda session: embeddings.known(session, key, hashes), write=False),
        threads=settings.worker.fetch_threads,
    )


def _put(session: Session, *, row: PolicyRow, made: Calibration, by: str) -> PolicyRow:
    """The next version, unless somebody put one meanwhile: what a person sets now is not undone by what was drawn."""
    newest = policies.history(session, tenant=row.tenant, content_type=row.content_type)[0]
    if newest.id != row.id:
        raise StoreError(f"{row.scope}: somebody put version {newest.version} meanwhile, which stays")
    release = made.evidence["release"]
    return policies.put(
        session,
        low=made.made.low,
        high=made.made.high,
        tenant=row.tenant,
        content_type=row.content_type,
        head=made.head,
        by=by,
        note=f"calibrated anew for {release}, as version {row.version} was for {row.release_id}",
        evidence=made.evidence,
        release_id=release,
    )
