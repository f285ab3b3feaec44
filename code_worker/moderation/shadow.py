"""Scores of a challenger beside the champion's verdicts, and how often the two agree."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from code_worker.moderation.judge import score_rows
from code_worker.moderation.policy import Policy
from code_worker.types import Label, Outcome, ShadowScore, Verdict

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.moderation.runtime import Runtime
    from code_worker.store.learning.challenger_scores import Disagreement, Tally

_OVERHEAD_BYTES: Final = 4096
"""Of an image that waits beside its pixels: its verdict, its place in the queue."""


def in_share(sha256: str, share: float) -> bool:
    """Returns whether an image belongs to a share of all.

    A pure function of its content hash, for every worker the same.

    The last digits decide; the first ones choose the hold-out, and the two must not go together.
    """
    # 32 bits of a SHA-256 are uniform: a share of them is that share of all contents.
    return int(sha256[-8:], 16) < share * 2**32


class Budget:
    """A budget of bytes that may wait at a time; safe to share between threads."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Takes so many bytes; False if they are not left, and nothing is taken."""
        with self._lock:
            if size > self._left:
                return False
            self._left -= size
            return True

    def give(self, size: int) -> None:
        """Gives back what was taken."""
        with self._lock:
            self._left += size


class ShadowBatch:
    """The images of one batch that a challenger scores; an `Observer` of the champion's work.

    With the champion's encoder it needs embeddings alone, with another one crops, or bytes where the champion decoded
    nothing. What the budget does not hold is not kept, and counted in `dropped`.

    Attributes:
        release: the challenger's id.
        same_encoder: whether its encoder is the champion's.
        images: by content hash an embedding, a crop or a file's bytes.
        dropped: images of the share that were not kept.
        verdicts: the champion's, once it has judged.
        own_policy: id of the thresholds that the champion brings along itself.
    """

    def __init__(self, challenger: Runtime, champion: Runtime, share: float, budget: Budget) -> None:
        self.release = challenger.release
        self.images: dict[str, NDArray[Any] | bytes] = {}
        self.dropped = 0
        self.verdicts: Sequence[Verdict] = ()
        self.own_policy = champion.default_policy.id
        self.same_encoder = challenger.encoder_sha256 == champion.encoder_sha256
        self._share = share
        self._budget = budget
        self._held = 0

    def saw_bytes(self, sha256: str, data: bytes) -> None:
        """See `Observer`."""
        if not self.same_encoder:
            self._keep(sha256, data, len(data))

    def saw_crop(self, sha256: str, crop: NDArray[np.uint8]) -> None:
        """See `Observer`."""
        if not self.same_encoder:
            self._keep(sha256, crop, crop.nbytes)

    def saw_embedding(self, sha256: str, embedding: NDArray[np.float32]) -> None:
        """See `Observer`."""
        if self.same_encoder:
            self._keep(sha256, embedding, embedding.nbytes)

    def _keep(self, sha256: str, material: NDArray[Any] | bytes, size: int) -> None:
        if sha256 in self.images or not in_share(sha256, self._share):
            return
        # Dropped and not waited for: this is the champion's thread.
        if not self._budget.take(size + _OVERHEAD_BYTES):
            self.dropped += 1
            return
        self._held += size + _OVERHEAD_BYTES
        self.images[sha256] = material

    def judged(self) -> list[tuple[str, Verdict]]:
        """Content hash and verdict of each image that was judged and is at hand."""
        return [
            (sha256, verdict)
            for verdict in self.verdicts
            if verdict.outcome is Outcome.JUDGED and (sha256 := verdict.sha256) in self.images and sha256 is not None
        ]

    def free(self) -> None:
        """Lets go of everything; the budget has it back."""
        self.images.clear()
        self._budget.give(self._held)
        self._held = 0


def shadow_scores(
    batch: ShadowBatch,
    embeddings: Mapping[str, NDArray[np.float32]],
    challenger: Runtime,
    failed: Callable[[str, BaseException, int], None],
) -> list[ShadowScore]:
    """Returns the challenger's scores of judged images whose embeddings by its encoder are given, by content hash.

    It scores with the head that the verdict names, or its own default if it has none of that name, under the policy
    of the verdict; where none covers the job, under the thresholds that it brings along itself. Images that its head
    cannot take are left out; `failed(head, error, images)` is told what a head raised, and over how many.
    """
    by_head: dict[str, list[tuple[str, Verdict]]] = {}
    for sha256, verdict in batch.judged():
        if sha256 in embeddings:
            head = verdict.head if verdict.head in challenger.heads else challenger.default_head
            by_head.setdefault(str(head), []).append((sha256, verdict))
    found: list[ShadowScore] = []
    for head, members in by_head.items():
        # (n, 192): one call of each head for the whole batch.
        matrix = np.stack([embeddings[sha256] for sha256, _ in members])
        scores = score_rows(challenger.heads[head], head, matrix, partial(failed, head))
        for (sha256, verdict), score in zip(members, scores, strict=True):
            if not isinstance(score, str):
                label = _policy(verdict, batch.own_policy, challenger).label(score)
                found.append(
                    _shadow_score(verdict, sha256, release=challenger.release, head=head, score=score, label=label)
                )
    return found


def _policy(verdict: Verdict, own_policy: str, challenger: Runtime) -> Policy:
    by = verdict.provenance
    if by.policy is None or by.policy == own_policy or by.low is None or by.high is None:
        return challenger.default_policy
    return Policy(by.policy, by.low, by.high)


def _shadow_score(
    verdict: Verdict, sha256: str, *, release: str, head: str, score: float, label: Label
) -> ShadowScore:
    by = verdict.provenance
    assert verdict.label is not None and verdict.score is not None  # noqa: S101, PT018 - it was judged
    return ShadowScore(
        job_id=verdict.job_id,
        revision=verdict.revision,
        sha256=sha256,
        release=release,
        head=head,
        score=score,
        label=label,
        champion=by.release or "",
        champion_head=by.head or "",
        champion_score=verdict.score,
        champion_label=verdict.label,
        tenant=verdict.tenant,
        content_type=verdict.content_type,
    )


@dataclass(frozen=True, slots=True)
class Scope:
    """Images of one tenant and content type (None: the jobs named none).

    Attributes:
        tenant: whose.
        content_type: of which kind.
        images: how many both scored.
        agreement: share of them that both call the same.
        shift: mean of the challenger's scores minus the champion's.
    """

    tenant: str | None
    content_type: str | None
    images: int
    agreement: float
    shift: float


@dataclass(frozen=True, slots=True)
class LabelledOutcomes:
    """Of images that somebody labelled: whose label is the human one. `uncertain` is never right."""

    images: int
    both: int
    only_champion: int
    only_challenger: int
    neither: int


@dataclass(frozen=True, slots=True)
class ShadowReport:
    """Comparison of a challenger with the champion.

    Attributes:
        release: the challenger.
        champions: images by the release that judged them.
        images: how many both scored.
        agreement: share of them that both call the same; None without images.
        shift: mean of the challenger's scores minus the champion's; None without images.
        confusion: images by the champion's label, then by the challenger's.
        scopes: the same by tenant and content type, the most frequent first.
        labelled: who was right where somebody knows.
        disagreements: images on which they differ most.
    """

    release: str
    champions: Mapping[str, int]
    images: int
    agreement: float | None
    shift: float | None
    confusion: Mapping[Label, Mapping[Label, int]]
    scopes: Sequence[Scope]
    labelled: LabelledOutcomes
    disagreements: Sequence[Disagreement]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        return asdict(self)


def summarise(
    release: str, tallies: Sequence[Tally], labelled: LabelledOutcomes, disagreements: Sequence[Disagreement]
) -> ShadowReport:
    """The report over counts by champion, scope and labels."""
    whole = _scope(None, None, tallies) if tallies else None
    champions = {one.champion: _images(tallies, champion=one.champion) for one in tallies}
    scopes = [
        _scope(*names, [one for one in tallies if (one.tenant, one.content_type) == names])
        for names in dict.fromkeys((one.tenant, one.content_type) for one in tallies)
    ]
    return ShadowReport(
        release=release,
        champions=champions,
        images=whole.images if whole else 0,
        agreement=whole.agreement if whole else None,
        shift=whole.shift if whole else None,
        confusion={was: {now: _images(tallies, champion_label=was, label=now) for now in Label} for was in Label},
        scopes=sorted(scopes, key=lambda scope: (-scope.images, scope.tenant or "", scope.content_type or "")),
        labelled=labelled,
        disagreements=disagreements,
    )


def _images(tallies: Iterable[Tally], **wanted: str) -> int:
    return sum(one.images for one in tallies if all(getattr(one, name) == value for name, value in wanted.items()))


def _scope(tenant: str | None, content_type: str | None, tallies: Sequence[Tally]) -> Scope:
    images = _images(tallies)
    agreed = sum(one.images for one in tallies if one.label == one.champion_label)
    shift = sum(one.shift for one in tallies)
    # Tallies hold sums, so means over any scope are sums over sums.
    return Scope(tenant, content_type, images, agreed / images, shift / images)


def compare_with_labels(said: Mapping[str, tuple[Label, Label]], truth: Mapping[str, str]) -> LabelledOutcomes:
    """Compares what champion and challenger said (by content hash) with what people say, `real` or `fake`."""
    counts = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
    for sha256, (champion, challenger) in said.items():
        if (right := truth.get(sha256)) is not None:
            counts[champion == right, challenger == right] += 1
    return LabelledOutcomes(
        images=sum(counts.values()),
        both=counts[True, True],
        only_champion=counts[True, False],
        only_challenger=counts[False, True],
        neither=counts[False, False],
    )
