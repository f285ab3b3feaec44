"""Calibrates a head of a release on labelled images, and again once another release is the champion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from collections.abc import Set as AbstractSet
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from code_worker._version import __version__
from code_worker.data.datasets.examples import FAKE, REAL, pin_of
from code_worker.data.datasets.open import open_examples
from code_worker.errors import (
    CodeWorkerError,
    DatasetError,
    NoReleaseError,
    StorageError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
    UnknownHeadError,
)
from code_worker.logs import get_logger
from code_worker.moderation.policy import Policy
from code_worker.moderation.runtime import start_runtime
from code_worker.releases.reference_scores import checked_scores
from code_worker.store import embeddings, policies
from code_worker.store.learning import image_groups
from code_worker.training.embed import Embedded, Keep, Known, embed_examples
from code_worker.training.evaluation.robustness import labels_of
from code_worker.training.evaluation.thresholds import RULE, Shares, Thresholds, draw_thresholds, shares_at
from code_worker.training.snapshot import learned_by

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.data.datasets.examples import Example, Skipped
    from code_worker.moderation.runtime import Runtime
    from code_worker.releases.registry import Registry
    from code_worker.settings import LimitSettings, Settings
    from code_worker.store.engine import Session, Store
    from code_worker.store.policies import PolicyRow

Labelled = Callable[[Sequence[str]], AbstractSet[str]]
"""Content hashes → those in the labelled store that a release may have learned from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """The goal that thresholds are to achieve.

    Attributes:
        max_fpr: share of reals that may be called fake.
        max_fnr: share of fakes that may be called real.
        strict_fnr: refuse where there are too few fakes, instead of leaving the border of the reals where it is.
    """

    max_fpr: float
    max_fnr: float
    strict_fnr: bool = False

    def draw(self, reals: NDArray[np.float32], fakes: NDArray[np.float32], low_before: float | None) -> Thresholds:
        """Thresholds that achieve it; see `draw_thresholds`."""
        return draw_thresholds(
            reals,
            fakes,
            max_fpr=self.max_fpr,
            max_fnr=self.max_fnr,
            strict_fnr=self.strict_fnr,
            low_before=low_before,
        )


@dataclass(frozen=True, slots=True)
class Calibration:
    """New thresholds of a head, beside those in force on the same images.

    Attributes:
        head: the head they are for; they mean nothing for another.
        made: the thresholds.
        before: those in force.
        shares_before: what these do to the images.
        evidence: data and figures, plain values.
        skipped: images that could not be used.
    """

    head: str
    made: Thresholds
    before: Policy
    shares_before: Shares
    evidence: dict[str, Any]
    skipped: tuple[Skipped, ...]


def calibrate(
    examples: Iterable[Example],
    runtime: Runtime,
    limits: LimitSettings,
    goal: Goal,
    *,
    head: str,
    before: Policy,
    source: str = "the data",
    labelled: Labelled | None = None,
    keep_low: bool = True,
    known: Known | None = None,
    keep: Keep | None = None,
    threads: int = 4,
    progress: Callable[[int], object] = lambda _: None,
) -> Calibration:
    """Embeds and scores the images, each content once, and draws thresholds by them.

    Args:
        examples: the images.
        runtime: the release.
        limits: what an image may cost.
        goal: the bounds.
        head: which head.
        before: the policy in force.
        source: what the evidence calls the data.
        labelled: tells which images a retrain may have learned from; of these the hold-out alone is used. None: all
            images are used.
        keep_low: with too few fakes leave the border of the reals where `before` has it, if that is of this head;
            False: it was drawn by another release's scores, so too few fakes are refused.
        known: vectors of earlier runs.
        keep: takes new vectors.
        threads: images read and decoded at the same time.
        progress: hears how many more images are done.

    Raises:
        UnknownHeadError: a head that the release lacks; nothing was read.
        DatasetError: too few images for a bound; says how many were left out, and why.
        ArtifactError: a head that does not keep its contract.
    """
    if head not in runtime.heads:
        raise UnknownHeadError(head, tuple(sorted(runtime.heads)))
    embed = partial(embed_examples, embedder=runtime.embedder, limits=limits, known=known, keep=keep, threads=threads)
    embedded, learned = _embed(list(examples), partial(embed, progress=progress), labelled)
    rows = _rows(embedded.examples, learned)
    used = [embedded.examples[row] for row in rows]
    scores = checked_scores(head, runtime.heads[head], embedded.embeddings[rows]) if rows else np.empty(0, np.float32)
    reals, fakes = (scores[labels_of(used) == kind] for kind in (REAL, FAKE))
    try:
        made = goal.draw(reals, fakes, before.low if keep_low and before.head in {None, head} else None)
    except DatasetError as error:
        raise DatasetError(f"{source}: {error}{_left_out(learned, embedded.skipped)}") from None
    evidence = {
        "source": source,
        "digest": pin_of(used),
        "real": len(reals),
        "fake": len(fakes),
        "left_out": {"learned": len(learned), "unusable": len(embedded.skipped)},
        **_tool(runtime, head, goal),
        "everything": labelled is None,
        **_outcome(made),
    }
    shares_before = shares_at(reals, fakes, before.low, before.high)
    return Calibration(head, made, before, shares_before, evidence, embedded.skipped)


def _outcome(made: Thresholds) -> dict[str, Any]:
    return {
        "achieved": made.shares.to_dict(),
        "note": made.note,
        "warning": made.warning,
        "low_kept": made.low_kept,
    }


def learnable(store: Store, release: str) -> Labelled:
    """Tells which images a release may have learned from: labelled ones that are not held out, and what it learned.

    An image that was learned may be held out now, since retention forgets which group it was in.
    """
    learned = store.run(lambda session: learned_by(session, [release]).images, write=False)

    def labelled(hashes: Sequence[str]) -> set[str]:
        found = store.run(lambda session: image_groups.places(session, hashes), write=False)
        return {*learned.intersection(hashes), *(key for key, place in found.items() if place.split != "holdout")}

    return labelled


def _embed(
    images: Sequence[Example], embed: Callable[[Iterable[Example]], Embedded], labelled: Labelled | None
) -> tuple[Embedded, set[str]]:
    """The images' embeddings, and the contents that must not count."""
    learned = _learned(images, labelled)
    embedded = embed(one for one in images if one.sha256 not in learned)
    # Of images from files the content is known only now.
    return embedded, learned | _learned(embedded.examples, labelled)


def _tool(runtime: Runtime, head: str, goal: Goal) -> dict[str, Any]:
    """Returns what drew the thresholds, and to what end."""
    return {
        "release": runtime.release,
        "manifest_sha256": runtime.manifest_sha256,
        "head": head,
        "head_sha256": runtime.head_sha256.get(head),
        "rule": RULE,
        "max_fpr": goal.max_fpr,
        "max_fnr": goal.max_fnr,
        "strict_fnr": goal.strict_fnr,
        "code_version": __version__,
    }


def _learned(examples: Iterable[Example], labelled: Labelled | None) -> set[str]:
    """Contents that a retrain may have learned from."""
    hashes = [one.sha256 for one in examples if one.sha256 is not None]
    return set(labelled(hashes)) if labelled is not None and hashes else set()


def _rows(examples: Sequence[Example], learned: AbstractSet[str]) -> list[int]:
    """Rows of the contents that count, each once: copies would make the data look larger than they are."""
    first: dict[str | None, int] = {}
    for row, one in enumerate(examples):
        if one.sha256 not in learned:
            first.setdefault(one.sha256, row)
    return list(first.values())


def _left_out(learned: Sized, unusable: Sized) -> str:
    parts = []
    if learned:
        parts.append(
            f"; {len(learned)} were left out, since a retrain may have learned from them (--all counts them)"
        )
    if unusable:
        parts.append(f"; {len(unusable)} could not be used")
    return "".join(parts)


log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Redrawn:
    """The result for one policy.

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
    processes at once do no harm: a version that somebody put meanwhile stays. The caller made sure that `by`
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
        # Nothing is wrong with this policy: the caller tries all of it again later.
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
