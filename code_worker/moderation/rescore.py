"""Judging history again: from stored embeddings where the encoder is the same, else from the images themselves."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from code_worker.errors import ArtifactError, ImageRejectedError, SourceCredentialsError, TransientError
from code_worker.logs import Repeats, get_logger
from code_worker.moderation.image_tasks import Item
from code_worker.moderation.judge import judged_by, judged_verdict, score_items, selection_fault, wanted_head
from code_worker.moderation.pipeline import Collector
from code_worker.moderation.vectors import unpack
from code_worker.types import Fetched, Job, Label, RejectReason, Verdict

if TYPE_CHECKING:
    from code_worker.moderation.judge import SelectHead
    from code_worker.moderation.policy import Policy, PolicyBook
    from code_worker.moderation.pool import PriorityPool
    from code_worker.moderation.runtime import Fetcher, KnownEmbeddings, Runtime
    from code_worker.settings import LimitSettings

log = get_logger(__name__)
HEAD_MISSING = "head_missing"
HEAD_FAILED = "head_failed"
MOVED_ON = "moved_on"
SELECT_FAILED = "select_head_failed"
Judged = tuple[Job, Verdict]
"""A job, its revision that of the next verdict, and the live verdict."""


class Copies(Protocol):
    """The project's own copies of images."""

    def among(self, hashes: Sequence[str]) -> Collection[str]:
        """Those of these content hashes of which a copy is kept."""

    def read(self, sha256: str) -> bytes:
        """The bytes of one; raises CodeWorkerError if they are gone or damaged after all."""


@dataclass(slots=True)
class Rejudged:
    """Result of judging some verdicts again.

    Attributes:
        pairs: old and new verdicts; the new ones name the old.
        unchanged: verdicts that this release, head and policy gave already.
        left: verdicts that stay, because their image could not be judged again, by the reason.
        embeddings: those computed now, as they are stored, by content hash.
        credentials: what stopped the work: a source that refuses everything.
    """

    pairs: list[tuple[Verdict, Verdict]] = field(default_factory=list)
    unchanged: int = 0
    left: Counter[str] = field(default_factory=Counter)
    embeddings: dict[str, bytes] = field(default_factory=dict)
    credentials: SourceCredentialsError | None = None


@dataclass(slots=True, eq=False)
class _Plan:
    """A verdict that is to be given again, by which head and policy."""

    job: Job
    old: Verdict
    head: str
    policy: Policy
    item: Item | None = None


class Rescorer:
    """Judges images again that have a verdict, with one release; makes no verdict that says the same again."""

    def __init__(
        self,
        runtime: Runtime,
        policies: PolicyBook,
        *,
        sources: Fetcher,
        pool: PriorityPool,
        limits: LimitSettings,
        known: KnownEmbeddings,
        copies: Copies,
        select_head: SelectHead,
        head: str | None = None,
    ) -> None:
        """Takes what it judges with.

        Args:
            runtime: the release; its encoder is used only for images without a stored embedding.
            policies: thresholds in force.
            sources: where images are fetched from again.
            pool: threads that fetch and decode.
            limits: what an image may cost.
            known: stored embeddings.
            copies: where an image is read from if its source has it no more, or has another in its place.
            select_head: the plugins' choice.
            head: head for every image; unset: chosen for each as when a job is judged.
        """
        self._runtime = runtime
        self._policies = policies
        self._known = known
        self._copies = copies
        self._select_head = select_head
        self._head = head
        self._repeats = Repeats()
        self._originals = _Unchanged(sources)
        self._from_source = Collector(self._originals, pool, limits, None)
        self._from_copies = Collector(_CopySource(copies), pool, limits, None)

    def judge(self, some: Sequence[Judged], *, at_most: int | None = None) -> Rejudged:
        """Gives verdicts again, of the next revision; one image never touches its neighbours.

        `at_most`: so many new verdicts; what is over the limit is neither judged nor counted.

        Raises:
            ArtifactError: a head fails on every image, or the encoder for good.
        """
        result = Rejudged()
        plans = [plan for job, old in some if (plan := self._plan(job, old, result)) is not None][:at_most]
        self._take_stored(plans)
        self._take_originals([plan for plan in plans if plan.item is None], result)
        self._take_copies([plan for plan in plans if _failed(plan)], result)
        if (failure := self._runtime.embedder.failure) is not None:
            raise ArtifactError(f"the encoder of {self._runtime.release} cannot be used here: {failure}")
        ready: dict[str, list[tuple[_Plan, Item]]] = {}
        for plan in plans:
            if plan.item is not None and plan.item.embedding is not None:
                ready.setdefault(plan.head, []).append((plan, plan.item))
            else:
                result.left[_reason(plan)] += 1
        for head, members in ready.items():
            self._score(head, members, result)
        return result

    def _plan(self, job: Job, old: Verdict, result: Rejudged) -> _Plan | None:
        policy = self._policies.find(job.tenant, job.content_type, self._runtime.default_policy)
        try:
            head = self._head or wanted_head(job, policy, self._runtime, self._select_head)
        except Exception as error:
            if (passed_over := self._repeats.due(selection_fault(error))) is not None:
                log.exception("select_head_failed", job=job.id, passed_over=passed_over)
            result.left[SELECT_FAILED] += 1
            return None
        if head not in self._runtime.heads:
            result.left[HEAD_MISSING] += 1
            return None
        if self._said_already(old, head, policy):
            result.unchanged += 1
            return None
        return _Plan(job, old, head, policy)

    def _said_already(self, old: Verdict, head: str, policy: Policy) -> bool:
        by, runtime = old.provenance, self._runtime
        release = (by.release, by.manifest_sha256, by.head, by.head_sha256)
        return (release, by.policy, by.low, by.high) == (
            (runtime.release, runtime.manifest_sha256, head, runtime.head_sha256.get(head)),
            *(policy.id, policy.low, policy.high),
        )

    def _take_stored(self, plans: Sequence[_Plan]) -> None:
        hashes = sorted({plan.old.sha256 or "" for plan in plans})
        stored = unpack(self._known(self._runtime.encoder_sha256, hashes))
        for plan in plans:
            if (embedding := stored.get(plan.old.sha256 or "")) is not None:
                plan.item = Item(plan.job, plan.old.facts, embedding, timings_ms={"reused": 1.0})

    def _take_originals(self, plans: Sequence[_Plan], result: Rejudged) -> None:
        self._originals.expect(plans)
        # All of them, before one is refused: an image that came twice takes its embedding over from its twin.
        items = list(self._from_source.embeddings([plan.job for plan in plans], self._runtime))
        for plan, item in zip(plans, items, strict=True):
            plan.item = item
            if item.error is None and item.facts is not None and item.facts.sha256 != plan.old.sha256:
                item.error = _changed()
                item.embedding = None
            elif isinstance(item.error, SourceCredentialsError):
                result.credentials = item.error
            elif item.fresh is not None and plan.old.sha256 is not None:
                result.embeddings[plan.old.sha256] = item.fresh

    def _take_copies(self, plans: Sequence[_Plan], result: Rejudged) -> None:
        kept = self._copies.among(sorted({plan.old.sha256 or "" for plan in plans}))
        plans = [plan for plan in plans if plan.old.sha256 in kept]
        jobs = [replace(plan.job, uri=plan.old.sha256 or "") for plan in plans]
        for plan, item in zip(plans, self._from_copies.embeddings(jobs, self._runtime), strict=True):
            if item.embedding is not None:
                plan.item = Item(plan.job, plan.old.facts, item.embedding, timings_ms=item.timings_ms)
                if item.fresh is not None and plan.old.sha256 is not None:
                    result.embeddings[plan.old.sha256] = item.fresh

    def _score(self, head: str, members: Sequence[tuple[_Plan, Item]], result: Rejudged) -> None:
        scores = score_items(self._runtime.heads[head], head, [item for _, item in members])
        if len(scores) > 1 and all(isinstance(score, str) for score in scores):
            raise ArtifactError(f"{self._runtime.release} cannot judge history: {scores[0]}")
        for (plan, item), score in zip(members, scores, strict=True):
            if isinstance(score, str):
                result.left[HEAD_FAILED] += 1
                continue
            by = judged_by(head, plan.policy, self._runtime)
            new = judged_verdict(item, score, plan.policy, by)
            result.pairs.append((plan.old, replace(new, supersedes=plan.old.id)))


class _Unchanged:
    """Sources of which only the bytes count that were judged."""

    def __init__(self, sources: Fetcher) -> None:
        self._sources = sources
        self._expected: dict[str, set[str | None]] = {}

    def expect(self, plans: Iterable[_Plan]) -> None:
        """Says what is fetched next."""
        self._expected = {}
        for plan in plans:
            self._expected.setdefault(plan.job.uri, set()).add(plan.old.sha256)

    def fetch(self, uri: str) -> Fetched:
        """Fetches like the source; other bytes are refused before anything decodes them."""
        fetched = self._sources.fetch(uri)
        if hashlib.sha256(fetched.data).hexdigest() not in self._expected[uri]:
            raise _changed()
        return fetched


class _CopySource:
    """Kept copies as a source whose URIs are content hashes."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies

    def fetch(self, uri: str) -> Fetched:
        """The bytes of a copy."""
        return Fetched(self._copies.read(uri))


def _changed() -> ImageRejectedError:
    return ImageRejectedError(RejectReason.CONTENT_CHANGED, "the source has other bytes than those that were judged")


def _failed(plan: _Plan) -> bool:
    return plan.item is not None and plan.item.embedding is None


def _reason(plan: _Plan) -> str:
    error = plan.item.error if plan.item is not None else None
    if isinstance(error, ImageRejectedError | TransientError):
        return error.reason.value
    log.error("image_failed", job=plan.job.id, exc_info=error)
    return RejectReason.INTERNAL.value


@dataclass(slots=True)
class RescoreTally:
    """Counts of what became of the verdicts.

    Attributes:
        examined: verdicts that were looked at.
        rescored: new verdicts.
        unchanged: verdicts that this release, head and policy gave already.
        left: verdicts that stay, by the reason.
        transitions: new verdicts by the label before, then by that after.
        shift: sum of the new scores minus the old ones.
    """

    examined: int = 0
    rescored: int = 0
    unchanged: int = 0
    left: Counter[str] = field(default_factory=Counter)
    transitions: dict[Label, Counter[Label]] = field(default_factory=lambda: {label: Counter() for label in Label})
    shift: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values; `mean_shift` is None without new verdicts."""
        return {
            "examined": self.examined,
            "rescored": self.rescored,
            "unchanged": self.unchanged,
            "left": dict(sorted(self.left.items())),
            "transitions": {was: {now: counts[now] for now in Label} for was, counts in self.transitions.items()},
            "mean_shift": self.shift / self.rescored if self.rescored else None,
        }

    def count(self, rejudged: Rejudged, written: Collection[str]) -> None:
        """Adds a batch, of which the verdicts of these jobs were written."""
        done = [pair for pair in rejudged.pairs if pair[1].job_id in written]
        self.rescored += len(done)
        self.unchanged += rejudged.unchanged
        self.left += rejudged.left
        if moved := len(rejudged.pairs) - len(done):
            self.left[MOVED_ON] += moved
        self.examined += len(rejudged.pairs) + rejudged.unchanged + rejudged.left.total()
        for old, new in done:
            if old.label is not None and new.label is not None:
                self.transitions[old.label][new.label] += 1
            self.shift += (new.score or 0.0) - (old.score or 0.0)


def rescore(
    pages: Iterable[Sequence[Judged]],
    rescorer: Rescorer,
    write: Callable[[Rejudged], Collection[str]],
    *,
    limit: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> RescoreTally:
    """Judges pages of history again, one after the other, in constant memory.

    Args:
        pages: finished jobs with their live verdicts.
        rescorer: what judges.
        write: puts a batch into the ledger, and returns the ids of the jobs whose live verdict is now the new one.
        limit: so many new verdicts at most.
        progress: called with the number of verdicts looked at.

    Raises:
        ArtifactError: a head fails on every image, or the encoder for good; what was written before stays.
        SourceCredentialsError: a source refuses everything; what was written before stays, and the next
            call goes on from there.
    """
    tally = RescoreTally()
    for some in pages:
        rejudged = rescorer.judge(some, at_most=None if limit is None else limit - tally.rescored)
        before = tally.examined
        tally.count(rejudged, write(rejudged))
        progress(tally.examined - before)
        if rejudged.credentials is not None:
            raise rejudged.credentials
        if limit is not None and tally.rescored >= limit:
            break
    return tally
