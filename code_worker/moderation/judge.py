"""Judging: jobs in, verdicts and faults out; knows no broker, no database, no HTTP."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from code_worker.errors import (
    ImageRejectedError,
    PluginError,
    SourceCredentialsError,
    SourcePausedError,
    TransientError,
    UnknownHeadError,
)
from code_worker.logs import Repeats, get_logger
from code_worker.moderation.collect import Collector, Item, Witness
from code_worker.moderation.faults import JobFault
from code_worker.moderation.policy import Policy, PolicyBook
from code_worker.moderation.scoring import score_items
from code_worker.moderation.verdicts import judged_by, judged_verdict, rejected_verdict
from code_worker.types import Job, RejectReason, Verdict

if TYPE_CHECKING:
    from code_worker.images.source import Fetched
    from code_worker.moderation.pool import PriorityPool
    from code_worker.moderation.runtime import Runtime
    from code_worker.settings import LimitSettings

__all__ = [
    "Fetcher",
    "JobFault",
    "Judge",
    "Judged",
    "KnownEmbeddings",
    "SelectHead",
    "selection_fault",
    "wanted_head",
]

log = get_logger(__name__)

KnownEmbeddings = Callable[[str, Sequence[str]], Mapping[str, bytes]]
"""(encoder sha256, content hashes) → embeddings as 192 little-endian float32, for those that are known."""
SelectHead = Callable[[Job, Sequence[str]], str | None]


class Fetcher(Protocol):
    """Where bytes come from."""

    def fetch(self, uri: str) -> Fetched:
        """The bytes of one object; raises ImageRejectedError or TransientError."""


@dataclass(slots=True)
class Judged:
    """What became of a batch: each job is in exactly one of `verdicts` and `faults`."""

    verdicts: list[Verdict] = field(default_factory=list)
    faults: list[JobFault] = field(default_factory=list)
    embeddings: dict[str, bytes] = field(default_factory=dict)


def _no_choice(_: Job, __: Sequence[str]) -> str | None:
    return None


def wanted_head(job: Job, policy: Policy, runtime: Runtime, select_head: SelectHead) -> str:
    """Name of the head for a job: its own, else what a plugin says, else its policy, else the default."""
    return job.head or select_head(job, tuple(sorted(runtime.heads))) or policy.head or runtime.default_head


def selection_fault(error: BaseException) -> Hashable:
    """What makes two faults of a plugin's choice one of a kind: type and line of what it raised, not its text."""
    raised = error.__cause__ if isinstance(error, PluginError) else error
    if raised is None:
        return str(error)
    where = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(raised.__traceback__)]
    return type(raised).__qualname__, *where[-1:]


class Judge:
    """Judges batches; safe to call from several threads, which then share the pool and the encoder."""

    def __init__(
        self,
        *,
        sources: Fetcher,
        pool: PriorityPool,
        limits: LimitSettings,
        known: KnownEmbeddings | None = None,
        select_head: SelectHead = _no_choice,
    ) -> None:
        self._collector = Collector(sources, pool, limits, known)
        self._select_head = select_head
        self._repeats = Repeats()

    def judge(
        self,
        jobs: Sequence[Job],
        runtime: Runtime,
        policies: PolicyBook,
        progress: Callable[[], None] = lambda: None,
        witness: Witness | None = None,
    ) -> Judged:
        """Fetches, decodes, encodes and scores a batch; one bad image never touches its neighbours.

        `progress` is called whenever a step of some image ended, so that a watchdog can tell slow from stuck.
        `witness` is shown what the images turn into on the way.
        """
        result = Judged()
        ready: list[tuple[Item, Policy, str]] = []
        for item in self._collector.embeddings(jobs, runtime, progress, witness):
            if item.error is not None:
                self._record_error(item, runtime, result)
                continue
            policy = policies.find(item.job.tenant, item.job.content_type, runtime.default_policy)
            head = self._head_for(item, policy, runtime, result)
            if head is not None:
                ready.append((item, policy, head))
            if item.fresh is not None and item.facts is not None:
                result.embeddings[item.facts.sha256] = item.fresh
        self._score(ready, runtime, result)
        return result

    def _head_for(self, item: Item, policy: Policy, runtime: Runtime, result: Judged) -> str | None:
        try:
            chosen = wanted_head(item.job, policy, runtime, self._select_head)
        except Exception as error:
            if (passed_over := self._repeats.due(selection_fault(error))) is not None:
                log.exception("select_head_failed", job=item.job.id, error=str(error), passed_over=passed_over)
            said = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
            detail = f"no head could be chosen: {said}"
            result.faults.append(JobFault(item.job, RejectReason.MODEL_UNAVAILABLE, detail))
            return None
        if chosen in runtime.heads:
            return chosen
        names = tuple(sorted(runtime.heads))
        hint = UnknownHeadError(chosen, names).hint
        detail = f"unknown head {chosen!r}; release {runtime.release} has {', '.join(names) or 'none'}{hint}"
        if (passed_over := self._repeats.due((chosen, runtime.release))) is not None:
            log.warning("head_unknown", job=item.job.id, error=detail, passed_over=passed_over)
        result.verdicts.append(rejected_verdict(item, RejectReason.MODEL_UNAVAILABLE, detail, runtime))
        return None

    def _score(self, ready: Sequence[tuple[Item, Policy, str]], runtime: Runtime, result: Judged) -> None:
        by_head: dict[str, list[tuple[Item, Policy]]] = {}
        for item, policy, head in ready:
            by_head.setdefault(head, []).append((item, policy))
        for head, members in by_head.items():
            provenance = {policy: judged_by(head, policy, runtime) for policy in {policy for _, policy in members}}
            scores = score_items(runtime.heads[head], head, [item for item, _ in members])
            broken = all(isinstance(score, str) for score in scores)
            for (item, policy), score in zip(members, scores, strict=True):
                if not isinstance(score, str):
                    result.verdicts.append(judged_verdict(item, score, policy, provenance[policy]))
                elif broken:
                    # A head that fails on every image is at fault itself: the jobs wait for one that works.
                    result.faults.append(JobFault(item.job, RejectReason.MODEL_UNAVAILABLE, score))
                else:
                    result.verdicts.append(rejected_verdict(item, RejectReason.INTERNAL, score, runtime))

    def _record_error(self, item: Item, runtime: Runtime, result: Judged) -> None:
        error = item.error
        if isinstance(error, ImageRejectedError):
            result.verdicts.append(rejected_verdict(item, error.reason, error.detail, runtime))
        elif isinstance(error, TransientError):
            source = error.source if isinstance(error, SourceCredentialsError) else None
            blame = not isinstance(error, SourceCredentialsError | SourcePausedError)
            wait_s = error.wait_s if isinstance(error, SourcePausedError) else None
            result.faults.append(JobFault(item.job, error.reason, error.detail, source, blame, wait_s, error.cause))
        else:
            log.error("image_failed", job=item.job.id, exc_info=error)
            detail = f"{type(error).__name__}: {error}"[:500]
            if item.encoding or item.facts is None:
                # Of the device or the way to the bytes, not of the image; how often it may happen is bounded.
                result.faults.append(JobFault(item.job, RejectReason.MODEL_UNAVAILABLE, detail))
            else:
                result.verdicts.append(rejected_verdict(item, RejectReason.INTERNAL, detail, runtime))
