"""Checks of a candidate beside being better: enough labellers, a pinned golden set, no unexpected drift."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from code_worker.data.datasets.examples import FAKE, REAL, pin_of
from code_worker.data.datasets.open import open_examples
from code_worker.errors import ConfigurationError, TrainingError
from code_worker.images.phash import perceptual_hash
from code_worker.store.learning import kept_images
from code_worker.training.evaluation.metrics import figures, right, wilson
from code_worker.training.gate.gate_inputs import GoldenScores
from code_worker.training.gate.paired import auroc_limits, counted, detectable_loss, proven_loss

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.data.datasets.examples import Example, Skipped
    from code_worker.settings import GateSettings, LimitSettings, Settings
    from code_worker.store.engine import Store
    from code_worker.store.learning.kept_images import KeptImage
    from code_worker.training.evaluation.metrics import Threshold
    from code_worker.training.gate.gate_inputs import GateInputs, ReleaseScores
    from code_worker.training.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class GoldenSet:
    """Its images with their content hashes, and the hash of all of it."""

    examples: tuple[Example, ...]
    digest: str

    @property
    def hashes(self) -> frozenset[str]:
        """Content hashes of its images: none of them may be learned from."""
        return frozenset(one.sha256 or "" for one in self.examples)

    def near(self, images: Iterable[KeptImage], limits: LimitSettings) -> set[str]:
        """Content hashes of those that are near-duplicates of its images, by their perceptual hashes.

        Raises:
            TransientError: no memory is left to decode one of its images in.
        """
        # 64-bit perceptual hashes; the golden set is small, so each of its hashes is compared with all of theirs at
        # once.
        own = {one for example in self.examples if (one := perceptual_hash(example.read(), limits)) is not None}
        looks = {image.sha256: int(image.phash, 16) for image in images if image.phash is not None}
        theirs = np.fromiter(looks.values(), np.uint64, len(looks))  # (images,)
        found = np.zeros(len(looks), dtype=np.bool_)
        for one in own:
            # Hamming distance; the same bound as for groups, so that what counts as a copy here does so there.
            found |= np.bitwise_count(theirs ^ np.uint64(one)) <= kept_images.NEAR_BITS
        return {sha256 for sha256, is_near in zip(looks, found, strict=True) if is_near}


def read_golden(source: str, settings: Settings) -> GoldenSet:
    """Reads every image of a data set and hashes it.

    Raises:
        DatasetError: it cannot be read.
        TrainingError: an image of it cannot be; half a golden set is none.
    """
    skipped: list[Skipped] = []
    found = [_hashed(one) for one in open_examples(source, settings=settings, skipped=skipped)]
    if lost := [one for one in skipped if one.is_loss]:
        raise TrainingError(
            f"golden set {source}: {len(lost)} images cannot be read, one of them {lost[0].key}: {lost[0].reason}"
        )
    return GoldenSet(tuple(found), pin_of(found))


def load_golden(settings: Settings) -> GoldenSet | None:
    """The golden set of the settings, compared with its pin; None where none is set.

    Raises:
        ConfigurationError: it is not pinned.
        TrainingError: it is not what was pinned.
        DatasetError: it cannot be read.
    """
    source, pin = settings.gate.golden, settings.gate.golden_sha256
    if source is None:
        return None
    if pin is None:
        raise ConfigurationError(
            f"the golden set {source} is not pinned: set CODE_WORKER_GATE__GOLDEN_SHA256 to what "
            f"`code-worker data pin {source}` prints"
        )
    golden = read_golden(source, settings)
    if golden.digest != pin.lower():
        raise TrainingError(
            f"the golden set {source} was changed: it is pinned as {pin[:16]}… and is {golden.digest[:16]}… now; "
            "put it back, or pin it anew if you meant it (`code-worker data pin`)"
        )
    return golden


def without_golden(taken: Snapshot, golden: GoldenSet, store: Store, limits: LimitSettings) -> Snapshot:
    """The snapshot without what the golden set holds and near-duplicates of it, by any labeller.

    Raises:
        TransientError: as `GoldenSet.near`.
    """
    hashes = [member.sha256 for member in taken.members]
    kept = store.run(partial(kept_images.kept, hashes=hashes), write=False)
    held = golden.hashes | golden.near(kept.values(), limits)
    stay = [member for member in taken.members if member.sha256 not in held]
    return taken.without("golden", stay, Counter(member.by for member in taken.members if member.sha256 in held))


def _hashed(example: Example) -> Example:
    data = example.read()
    return replace(example, sha256=hashlib.sha256(data).hexdigest(), read=partial(bytes, data))


MIN_CANARIES: Final = 200
"""Images below which a few per cent are a matter of single images."""
_BINS: Final = 10
_LEAST: Final = 1e-4


@dataclass(frozen=True, slots=True)
class Drift:
    """Candidate beside champion on known images.

    Attributes:
        images: how many.
        canaries: how many of them the champion judges as they are labelled.
        agreement: share of the canaries of which both say the same.
        agreement_high: upper end of its 95 % Wilson interval: what it might be if chance was unkind.
        psi: population stability index of the scores of all of them.
    """

    images: int
    canaries: int
    agreement: float
    agreement_high: float
    psi: float


def stability_index(before: NDArray[np.float32], after: NDArray[np.float32]) -> float:
    """Population stability index: Σ (p - q) ln(p / q) over ten equal parts of [0, 1].

    Equal parts instead of the usual deciles: scores crowd at 0 and 1, where deciles would tell 0.001 from 0.002.
    """
    shares = [np.histogram(scores, bins=_BINS, range=(0, 1))[0] / max(1, len(scores)) for scores in (before, after)]
    # An empty part would make the index infinite; a ten-thousandth stands for it, as is usual.
    p, q = (np.maximum(share, _LEAST) for share in shares)
    return float(((q - p) * np.log(q / p)).sum())


def measure_drift(
    labels: NDArray[np.int8],
    champion: NDArray[np.float32],
    candidate: NDArray[np.float32],
    *,
    champion_at: Threshold,
    candidate_at: Threshold,
) -> Drift | None:
    """Returns how far apart the two are; None without canaries.

    Where the champion is wrong, or in doubt, a candidate may well differ: only what it gets right can be broken.

    Args:
        labels: `(n,) int8`.
        champion: `(n,)` scores of the release in use.
        candidate: `(n,)` scores of the other, of the same images.
        champion_at: where the first decides.
        candidate_at: where the second decides.
    """
    before, after = _said(champion, champion_at), _said(candidate, candidate_at)
    # `_said` has 0 for real and 2 for fake: labels of 0 and 1, doubled.
    canaries = before == 2 * labels
    count = int(canaries.sum())
    if not count:
        return None
    same = int((before == after)[canaries].sum())
    psi = stability_index(champion, candidate)
    return Drift(len(labels), count, same / count, wilson(same, count)[1], psi)


def _said(scores: NDArray[np.float32], threshold: Threshold) -> NDArray[np.int8]:
    """0 real, 1 uncertain, 2 fake."""
    low, high = threshold if isinstance(threshold, tuple) else (threshold, threshold)
    return (scores >= high).astype(np.int8) + (scores >= low).astype(np.int8)


_CLASSES: Final = {"real_accuracy": REAL, "fake_accuracy": FAKE}
_NAMED: Final = 5


def check_safeguards(inputs: GateInputs, settings: GateSettings) -> tuple[list[str], dict[str, Any]]:
    """Reasons not to promote, and the figures they rest on.

    - Labellers of what is new are at least `min_labellers`.
    - No labeller's new labels disagree with their neighbours over `max_disagreement` times as much as old ones do.
    - On the golden set it is not proven that the area under the ROC curve falls by more than `max_golden_loss` or
      that a class loses more accuracy than `max_regression`: exact McNemar tests and limits, DeLong's limits for the
      area, the chance of one false alarm over all three at most `error`.
    - Of the images of the hold-out that are not new and that the champion judges rightly, at least 200 of them, the
      candidate says the same of `min_agreement` at least, unless chance explains the difference (95 % Wilson
      interval), and the population stability index of the scores of all that are not new is at most `max_psi`. A
      person may think otherwise and promote the candidate by hand.

    Raises:
        ValueError: scores that are none.
    """
    shift = _shift(inputs)
    golden = None if inputs.golden is None else _golden_report(inputs.golden, settings)
    problems = [
        *_too_few_labellers(inputs),
        *_doubtful(inputs, settings),
        *_worse_on_golden(golden),
        *_shifted(inputs, shift, settings),
    ]
    report = {
        "labellers": list(inputs.labellers),
        "suspicions": [asdict(one) | {"ratio": one.ratio} for one in inputs.suspicions],
        "golden": golden,
        "drift": None if shift is None else asdict(shift),
    }
    return problems, report


def _too_few_labellers(inputs: GateInputs) -> Iterator[str]:
    if inputs.labellers and len(inputs.labellers) < inputs.min_labellers:
        yield (
            f"what is new was labelled by {len(inputs.labellers)} ({', '.join(inputs.labellers)}): "
            f"{inputs.min_labellers} labellers are needed"
        )


def _doubtful(inputs: GateInputs, settings: GateSettings) -> Iterator[str]:
    doubtful = [one for one in inputs.suspicions if one.ratio > settings.max_disagreement]
    for one in doubtful[:_NAMED]:
        yield (
            f"labels of {one.by} are in quarantine: neighbours of their {one.images} new images disagree with "
            f"{one.share:.0%} of them, {one.ratio:.1f} times as much as with old ones; {settings.max_disagreement:g} "
            f"times is allowed (see `code-worker labels list --by {one.by}`; CODE_WORKER_LABELS__IGNORED leaves "
            "them out)"
        )


def _golden_report(golden: GoldenScores, settings: GateSettings) -> dict[str, Any]:
    names = ("n", "auroc", "tpr_at_1pct_fpr", *_CLASSES)
    sides = {"candidate": golden.candidate, "champion": golden.champion}
    known = {name: _figures_of(golden.labels, side) for name, side in sides.items() if side is not None}
    shown = {name: {key: one[key] for key in names} for name, one in known.items()}
    losses = [] if golden.champion is None else _golden_losses(golden, golden.champion, settings)
    return {"digest": golden.digest, **shown, "losses": losses}


def _golden_losses(golden: GoldenScores, champion: ReleaseScores, settings: GateSettings) -> list[dict[str, Any]]:
    """Of each figure the loss that is proven, if one is, and the accuracy of a class that could have been proven."""
    # Bonferroni's share of three tests.
    level = settings.error / (1 + len(_CLASSES))
    scores = [side.deciding(next(iter(side.scores))) for side in (champion, golden.candidate)]
    # The upper limit of the difference, turned round, is the loss that is proven.
    limits = auroc_limits(golden.labels, scores[0], scores[1], level)
    area = {"figure": "auroc", "allowed": settings.max_golden_loss, "proven": max(0.0, -limits[1]) if limits else 0.0}
    old, new = (
        right(golden.labels, found, side.threshold)
        for found, side in zip(scores, (champion, golden.candidate), strict=True)
    )
    changes = new.astype(np.int8) - old
    margin = settings.max_regression
    found = [area]
    for name, kind in _CLASSES.items():
        of_class = counted(changes[golden.labels == kind])
        n = int((golden.labels == kind).sum())
        found.append(
            {
                "figure": name,
                "allowed": margin,
                "proven": proven_loss(of_class, n, level),
                "detectable": detectable_loss(n, level, margin),
            }
        )
    return found


def _figures_of(labels: NDArray[np.int8], side: ReleaseScores) -> dict[str, float | None]:
    return figures(labels, side.deciding(next(iter(side.scores))), threshold=side.threshold)


def _worse_on_golden(golden: dict[str, Any] | None) -> Iterator[str]:
    for loss in golden["losses"] if golden else ():
        if loss["proven"] > loss["allowed"]:
            name = loss["figure"]
            before, after = golden["champion"][name], golden["candidate"][name]  # type: ignore[index]  # has losses
            yield (
                f"worse on the golden set: {name.replace('_', ' ')} {before:.3f} → {after:.3f}, a loss of "
                f"{loss['proven']:.3f} is proven; {loss['allowed']:g} may be lost"
            )


def _shift(inputs: GateInputs) -> Drift | None:
    if inputs.champion is None:
        return None
    # New images are what the candidate is to judge otherwise: they are no sign of drift.
    old = ~inputs.new
    condition = next(iter(inputs.candidate.scores))
    return measure_drift(
        inputs.labels[old],
        inputs.champion.deciding(condition)[old],
        inputs.candidate.deciding(condition)[old],
        champion_at=inputs.champion.threshold,
        candidate_at=inputs.candidate.threshold,
    )


def _shifted(inputs: GateInputs, shift: Drift | None, settings: GateSettings) -> Iterator[str]:
    if shift is None or shift.canaries < MIN_CANARIES:
        return
    by_hand = f"if that is as it should be, `code-worker releases promote {inputs.candidate.release}`"
    if settings.min_agreement is not None and shift.agreement_high < settings.min_agreement:
        yield (
            f"it says the same as the champion of only {shift.agreement:.1%} of {shift.canaries} old images that one "
            f"judges rightly; {settings.min_agreement:.0%} are expected: {by_hand}"
        )
    if settings.max_psi is not None and shift.psi > settings.max_psi:
        yield (
            f"scores of {shift.images} old images are spread otherwise (population stability index {shift.psi:.2f}; "
            f"{settings.max_psi:g} is allowed): {by_hand}"
        )
