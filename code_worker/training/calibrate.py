"""Calibrates a head of a release on labelled images that it did not learn from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence, Sized
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from code_worker._version import __version__
from code_worker.data.examples import FAKE, REAL
from code_worker.errors import DatasetError, UnknownHeadError
from code_worker.releases.golden import checked_scores
from code_worker.store import image_groups
from code_worker.training.embed import Embedded, Keep, Known, embed_examples
from code_worker.training.evaluation.groups import labels_of
from code_worker.training.snapshot import learned_by
from code_worker.training.thresholds import RULE, Shares, Thresholds, draw_thresholds, shares_at

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.data.examples import Example, Skipped
    from code_worker.moderation.policy import Policy
    from code_worker.moderation.runtime import Runtime
    from code_worker.settings import LimitSettings
    from code_worker.store.engine import Store

__all__ = ["Calibration", "Goal", "Labelled", "calibrate", "learnable"]

Labelled = Callable[[Sequence[str]], AbstractSet[str]]
"""Content hashes → those in the labelled store that a release may have learned from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What thresholds are to achieve.

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
        "digest": _digest(used),
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
    """What drew the thresholds, and to what end."""
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


def _digest(examples: Sequence[Example]) -> str:
    lines = sorted(f"{one.sha256} {one.label}\n" for one in examples)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _left_out(learned: Sized, unusable: Sized) -> str:
    parts = []
    if learned:
        parts.append(
            f"; {len(learned)} were left out, since a retrain may have learned from them (--all counts them)"
        )
    if unusable:
        parts.append(f"; {len(unusable)} could not be used")
    return "".join(parts)
