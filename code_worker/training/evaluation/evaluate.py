"""Measures a release on labelled images: every head, under every condition, for every group; and describes both."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from code_worker._version import __version__
from code_worker.data.datasets.examples import (
    FAKE,
    PUBLISHED_GENERATORS,
    PUBLISHED_VARIANTS,
    REAL,
    UNNAMED,
    losses,
    passed_over,
)
from code_worker.errors import DatasetError, UnknownHeadError
from code_worker.releases.reference_scores import checked_scores
from code_worker.training.embed import Embedded, Keep, Known, embed_examples
from code_worker.training.evaluation.metrics import DECISIONS, FIGURES, LEVEL, RANKINGS, Threshold, figures, intervals
from code_worker.training.evaluation.robustness import (
    Condition,
    Transform,
    conditions,
    group_images,
    labels_of,
    make_crop,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.data.datasets.examples import Example, Skipped
    from code_worker.moderation.policy import Policy
    from code_worker.moderation.runtime import Runtime
    from code_worker.settings import LimitSettings


def describe_release(runtime: Runtime, heads: Sequence[str], *, toy: bool) -> dict[str, Any]:
    """Ids and hashes of what was measured."""
    return {
        "id": runtime.release,
        "manifest_sha256": runtime.manifest_sha256,
        "encoder_sha256": runtime.encoder_sha256,
        "precision": runtime.precision,
        "heads": {name: runtime.head_sha256.get(name) for name in heads},
        "default_head": runtime.default_head,
        "toy": toy,
    }


def describe_data(source: str, examples: Sequence[Example]) -> dict[str, Any]:
    """Counts, and a digest: equal digests are the same images with the same labels."""
    lines = sorted(f"{one.sha256} {one.label} {one.generator} {one.collection} {one.variant}\n" for one in examples)
    generators = Counter(one.generator or UNNAMED for one in examples if one.label == FAKE)
    collections = Counter(one.collection or UNNAMED for one in examples if one.label == REAL)
    return {
        "source": source,
        "digest": hashlib.sha256("".join(lines).encode()).hexdigest(),
        "images": len(examples),
        "distinct": len({one.sha256 for one in examples}),
        "real": sum(one.label == REAL for one in examples),
        "fake": sum(one.label == FAKE for one in examples),
        "generators": dict(sorted(generators.items())),
        "collections": dict(sorted(collections.items())),
    }


def learned_lines(data: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Returns what a report says of images that a release learned from: in passing, and in red."""
    if not (learned := data.get("learned")):
        return [], []
    said: list[str] = []
    warned: list[str] = []
    if count := learned["left_out"]:
        line = f"{count} images left out: a release, or one that it was trained from, learned from them"
        (warned if data["source"] == "holdout:" else said).append(line)
    if learned["unknown"]:
        warned.append(
            f"nothing here says what {' and '.join(learned['unknown'])} learned from (imported, or made elsewhere): "
            "these images may be among it, and figures on what was learned are too good"
        )
    return said, warned


def nothing_usable(source: str, skipped: Sequence[Skipped]) -> str:
    """Returns why there is nothing to measure on."""
    if not skipped:
        return f"{source or 'the data'} holds no labelled image"
    reasons = Counter(one.reason for one in skipped).most_common(3)
    said = "; ".join(f"{count} × {reason}" for reason, count in reasons)
    return f"{source or 'the data'}: none of {len(skipped)} images can be used: {said}"


FORMAT: Final = 1
"""Of `metrics.json`; raised when a reader of it would have to change."""
PUBLISHED: Final = 0.5
"""The published decision: from here on generated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """The measurements to make, and how.

    Attributes:
        heads: which; none named: all of the release.
        presets: names in `robustness.PRESETS`.
        deployed: thresholds in use beside the published 0.5; None: those of the release.
        resamples: of the bootstrap; 0: no intervals.
        seed: of everything random.
        threads: images read and decoded at the same time.
    """

    heads: tuple[str, ...] = ()
    presets: tuple[str, ...] = ("clean",)
    deployed: Policy | None = None
    resamples: int = 1000
    seed: int = 0
    threads: int = 4


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores of one head for the images under one condition.

    Attributes:
        condition: key of the condition.
        head: name of the head.
        examples: the images, each with its sha256.
        scores: `(n,) float32`.
    """

    condition: str
    head: str
    examples: tuple[Example, ...]
    scores: NDArray[np.float32]

    @property
    def labels(self) -> NDArray[np.int8]:
        """`(n,) int8`."""
        return labels_of(self.examples)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The measured figures.

    Attributes:
        report: plain values, the content of `metrics.json`.
        scored: scores per condition and head, in the order of the plan.
        embedded: the images, after the first condition's transform if it has one, with their embeddings.
    """

    report: dict[str, Any]
    scored: tuple[Scored, ...]
    embedded: Embedded = field(repr=False)

    def of(self, condition: str, head: str) -> Scored:
        """The scores of one condition and head.

        Raises:
            KeyError: it was not measured.
        """
        for one in self.scored:
            if (one.condition, one.head) == (condition, head):
                return one
        raise KeyError((condition, head))


def evaluate(
    examples: Iterable[Example],
    runtime: Runtime,
    limits: LimitSettings,
    plan: EvaluationPlan,
    *,
    source: str = "",
    toy: bool = False,
    skipped: Sequence[Skipped] = (),
    known: Known | None = None,
    keep: Keep | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> Evaluation:
    """Embeds the images once per transform, scores them with each head, and measures each group.

    Args:
        examples: the images; read once per transform.
        runtime: the release.
        limits: what an image may cost.
        plan: what to measure.
        source: what the report calls the data.
        toy: whether the release is one that is only good for demonstrations.
        skipped: what was unusable before it came here; goes into the report.
        known: vectors of earlier runs, for images as they are.
        keep: takes new vectors of images as they are.
        progress: hears how many more images are done; each counts once per transform.

    Raises:
        UnknownHeadError: a head that the release lacks; nothing was read.
        DatasetError: not one image could be used.
        ArtifactError: a head that does not keep its contract.
    """
    heads = _chosen(runtime, plan.heads)
    images = tuple(examples)
    wanted = conditions(plan.presets, {one.variant for one in images if one.variant is not None})
    embed = partial(embed_examples, images, runtime.embedder, limits, known=known, keep=keep, threads=plan.threads)
    embeddings = _Embeddings(partial(embed, progress=progress), limits)
    scored = [
        _score(runtime, condition.key, head, embeddings.under(condition)) for condition in wanted for head in heads
    ]
    unusable = [*(one for one in skipped if one.is_loss), *embeddings.skipped]
    if not any(one.examples for one in scored):
        raise DatasetError(nothing_usable(source, unusable))
    whole = embeddings.under(replace(wanted[0], variant=None))
    report = {
        "format": FORMAT,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "code_version": __version__,
        "release": describe_release(runtime, heads, toy=toy),
        "data": describe_data(source, whole.examples),
        "plan": _describe_plan(plan, runtime, [one.key for one in wanted]),
        "results": [row for one in scored for row in measure(one, plan, _deployed(plan, runtime))],
        "skipped": losses(unusable),
        "passed_over": passed_over(skipped),
    }
    return Evaluation(report, tuple(scored), whole)


class _Embeddings:
    """Embeddings of the images per transform; conditions that differ in what they select share them."""

    def __init__(self, embed: Callable[..., Embedded], limits: LimitSettings) -> None:
        self._embed = embed
        self._limits = limits
        self._made: dict[Transform | None, Embedded] = {}

    def under(self, condition: Condition) -> Embedded:
        if (transform := condition.transform) not in self._made:
            self._made[transform] = self._embed(
                crop=None if transform is None else make_crop(transform, self._limits)
            )
        whole = self._made[condition.transform]
        if condition.variant is None:
            return whole
        rows = [row for row, one in enumerate(whole.examples) if one.variant == condition.variant]
        return Embedded(tuple(whole.examples[row] for row in rows), whole.embeddings[rows], whole.skipped)

    @property
    def skipped(self) -> list[Skipped]:
        """Returns what no condition could use, each image once."""
        return list({one.key: one for made in self._made.values() for one in made.skipped}.values())


def _chosen(runtime: Runtime, heads: Sequence[str]) -> tuple[str, ...]:
    names = tuple(sorted(runtime.heads))
    if unknown := [name for name in heads if name not in runtime.heads]:
        raise UnknownHeadError(unknown[0], names)
    chosen = tuple(dict.fromkeys(heads)) or names
    # The one that judges comes first, in tables and on the page.
    return tuple(sorted(chosen, key=lambda name: name != runtime.default_head))


def _score(runtime: Runtime, condition: str, head: str, embedded: Embedded) -> Scored:
    if not embedded.examples:
        return Scored(condition, head, (), np.empty(0, np.float32))
    scores = checked_scores(head, runtime.heads[head], embedded.embeddings)
    return Scored(condition, head, embedded.examples, scores.astype(np.float32))


def measure(scored: Scored, plan: EvaluationPlan, deployed: tuple[float, float]) -> list[dict[str, Any]]:
    """A row per group: counts, ranking figures, and decisions at the published and at the deployed thresholds.

    A figure is `{"value", "low", "high"}` with the 95 % interval (None without a bootstrap), or None where the group
    cannot tell.
    """
    labels = scored.labels
    rows = []
    for group in group_images(scored.examples):
        kinds, scores = labels[group.members], scored.scores[group.members]
        counts = figures(kinds, scores)
        at = {"published": _figures(kinds, scores, (PUBLISHED, PUBLISHED), plan, FIGURES)}
        at["deployed"] = (
            at["published"]
            if deployed == (PUBLISHED, PUBLISHED)
            else _figures(kinds, scores, deployed, plan, DECISIONS)
        )
        rows.append(
            {
                "condition": scored.condition,
                "head": scored.head,
                "kind": group.kind,
                "name": group.name,
                **{name: counts[name] for name in ("n", "n_real", "n_fake")},
                "ranking": {name: at["published"][name] for name in RANKINGS},
                **{where: {name: found[name] for name in DECISIONS} for where, found in at.items()},
            }
        )
    return rows


def _figures(
    labels: NDArray[np.int8],
    scores: NDArray[np.float32],
    threshold: Threshold,
    plan: EvaluationPlan,
    names: Sequence[str],
) -> dict[str, dict[str, float | None] | None]:
    values = figures(labels, scores, threshold=threshold)
    bounds: dict[str, tuple[float, float] | None] = {}
    if plan.resamples and len(labels):
        bounds = intervals(labels, scores, threshold=threshold, names=names, resamples=plan.resamples, seed=plan.seed)
    found: dict[str, dict[str, float | None] | None] = {}
    for name in names:
        low, high = bounds.get(name) or (None, None)
        found[name] = None if values[name] is None else {"value": values[name], "low": low, "high": high}
    return found


def published_table(
    report: Mapping[str, Any], head: str
) -> list[tuple[str, float | None, float | None, float | None]]:
    """The published form: for each condition and generator, accuracy on reals, fakes and both in percent, at 0.5.

    D³'s eight pairs come first, under the keys and in the order of the published script (`validate_d3.py`): the
    reals and gen_0 to gen_3 under `augm`, then under `no_augm`. Others are called after condition and generator.
    """
    found: dict[tuple[int, int], tuple[str, float | None, float | None, float | None]] = {}
    for row in report["results"]:
        if row["head"] == head and row["kind"] == "generator":
            shares = (row["published"][name] for name in ("real_accuracy", "fake_accuracy", "accuracy"))
            real, fake, both = (None if share is None else 100 * share["value"] for share in shares)
            place, key = _published_pair(row["condition"], row["name"])
            found[place, len(found)] = (key, real, fake, both)
    return [line for _, line in sorted(found.items())]


def _published_pair(condition: str, generator: str) -> tuple[int, str]:
    """Place and key in the published table."""
    if condition not in PUBLISHED_VARIANTS or generator not in PUBLISHED_GENERATORS:
        return len(PUBLISHED_VARIANTS) * len(PUBLISHED_GENERATORS), f"{condition}_{generator}"
    number = PUBLISHED_GENERATORS.index(generator)
    place = PUBLISHED_VARIANTS.index(condition) * len(PUBLISHED_GENERATORS) + number
    return place, f"{condition}_gen_{number}" if number else f"{condition}_gen0_and_real"


def _deployed(plan: EvaluationPlan, runtime: Runtime) -> tuple[float, float]:
    policy = plan.deployed or runtime.default_policy
    return policy.low, policy.high


def _describe_plan(plan: EvaluationPlan, runtime: Runtime, keys: Sequence[str]) -> dict[str, Any]:
    policy = plan.deployed or runtime.default_policy
    return {
        "presets": list(plan.presets),
        "conditions": list(keys),
        "thresholds": {
            "published": {"low": PUBLISHED, "high": PUBLISHED},
            "deployed": {"policy": policy.id, "low": policy.low, "high": policy.high},
        },
        "resamples": plan.resamples,
        "level": LEVEL,
        "seed": plan.seed,
    }
