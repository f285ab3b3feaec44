"""Judging: jobs in, verdicts and faults out; knows no broker, no database, no HTTP."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from code_worker._version import __version__
from code_worker.errors import (
    ImageRejectedError,
    PluginError,
    SourceCredentialsError,
    SourcePausedError,
    TransientError,
    UnknownHeadError,
)
from code_worker.logs import Repeats, get_logger
from code_worker.moderation.image_tasks import Item
from code_worker.moderation.pipeline import Collector, Observer
from code_worker.moderation.policy import Policy, PolicyBook
from code_worker.moderation.runtime import Fetcher, KnownEmbeddings
from code_worker.system.processes import raise_if_stop
from code_worker.types import ImageFacts, Job, Outcome, Provenance, RejectReason, Verdict

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.heads import Head
    from code_worker.moderation.pool import PriorityPool
    from code_worker.moderation.runtime import Runtime
    from code_worker.settings import LimitSettings


@dataclass(frozen=True, slots=True)
class JobFault:
    """A job that got no verdict for a reason that is not its image's.

    Attributes:
        job: the job, as it was claimed.
        reason: what its verdict will say when the fault lasts.
        detail: what happened.
        source: the source whose credentials failed, else None.
        blame: whether the fault counts towards the job's limit; a paused source is nobody's fault.
        wait_s: for how long trying again is of no use, where that is known.
        cause: what happened, without naming the object.
    """

    job: Job
    reason: RejectReason
    detail: str
    source: str | None = None
    blame: bool = True
    wait_s: float | None = None
    cause: str = ""


def judged_by(head: str, policy: Policy, runtime: Runtime) -> Provenance:
    """Returns what the verdicts of a head under a policy have in common."""
    return Provenance(
        release=runtime.release,
        manifest_sha256=runtime.manifest_sha256,
        head=head,
        head_sha256=runtime.head_sha256.get(head),
        head_plugin=runtime.head_plugins.get(head),
        policy=policy.id,
        low=policy.low,
        high=policy.high,
        code_version=_code_version(runtime),
    )


def judged_verdict(item: Item, score: float, policy: Policy, provenance: Provenance) -> Verdict:
    """The verdict of a scored image under the policy in force."""
    return Verdict(
        job_id=item.job.id,
        uri=item.job.uri,
        outcome=Outcome.JUDGED,
        label=policy.label(score),
        score=score,
        facts=item.facts,
        provenance=provenance,
        tenant=item.job.tenant,
        content_type=item.job.content_type,
        metadata=item.job.metadata,
        timings_ms=item.timings_ms,
        revision=item.job.revision,
    )


def rejected_verdict(item: Item, reason: RejectReason, detail: str, runtime: Runtime) -> Verdict:
    """The verdict of an image that this release could not judge."""
    provenance = Provenance(
        release=runtime.release, manifest_sha256=runtime.manifest_sha256, code_version=_code_version(runtime)
    )
    return rejected_job(item.job, reason, detail, provenance=provenance, facts=item.facts, timings_ms=item.timings_ms)


def rejected_job(
    job: Job,
    reason: RejectReason,
    detail: str,
    *,
    provenance: Provenance | None = None,
    facts: ImageFacts | None = None,
    timings_ms: dict[str, float] | None = None,
) -> Verdict:
    """A rejection of a job, whether or not its image was ever touched."""
    return Verdict(
        job_id=job.id,
        uri=job.uri,
        outcome=Outcome.REJECTED,
        reason=reason,
        detail=detail,
        facts=facts,
        provenance=provenance or Provenance(code_version=__version__),
        tenant=job.tenant,
        content_type=job.content_type,
        metadata=job.metadata,
        timings_ms=timings_ms or {},
        revision=job.revision,
    )


def _code_version(runtime: Runtime) -> str:
    return __version__ if runtime.precision == "fp32" else f"{__version__} {runtime.precision}"


log = get_logger(__name__)
Failed = Callable[[BaseException, int], None]
"""Called with what a head raised, and over how many images."""


def score_items(head: Head, name: str, items: Sequence[Item]) -> list[float | str]:
    """A score in [0, 1] per item, or the text of what went wrong with it."""
    matrix = np.stack([item.embedding for item in items if item.embedding is not None])

    def failed(error: BaseException, images: int) -> None:
        log.error("head_failed", head=name, images=images, exc_info=error)

    return score_rows(head, name, matrix, failed)


def score_rows(head: Head, name: str, matrix: NDArray[np.float32], failed: Failed) -> list[float | str]:
    """A score in [0, 1] per row of `(n, 192) float32`, or the text of what went wrong with it."""
    whole = _try_score(head, name, matrix, failed)
    # The usual case: all rows in one call.
    if not isinstance(whole, str):
        return [_checked(float(score), name) for score in whole]
    if len(matrix) == 1:
        return [whole]
    # One row at a time: only the images that the head cannot take are without a score.
    rows = [_try_score(head, name, row[None], failed) for row in matrix]
    return [row if isinstance(row, str) else _checked(float(row[0]), name) for row in rows]


def _try_score(head: Head, name: str, matrix: NDArray[np.float32], failed: Failed) -> NDArray[np.float32] | str:
    try:
        # An application may have numpy raise on every underflow; what is not finite is looked for all the same.
        with np.errstate(all="ignore"):
            scores = np.asarray(head.score(matrix))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a head is somebody else's code and may raise anything
        raise_if_stop(error)
        failed(error, len(matrix))
        return f"head {name!r} failed: {type(error).__name__}: {error}"[:500]
    if scores.shape != (len(matrix),):
        return f"head {name!r} returned shape {scores.shape}, not ({len(matrix)},)"
    return scores


def _checked(score: float, name: str) -> float | str:
    if 0.0 <= score <= 1.0:
        return score
    return f"head {name!r} returned {score}, which is not in [0, 1]"


"""(encoder sha256, content hashes) → embeddings as 192 little-endian float32, for those that are known."""
SelectHead = Callable[[Job, Sequence[str]], str | None]


@dataclass(slots=True)
class Judged:
    """Result of a batch: each job is in exactly one of `verdicts` and `faults`."""

    verdicts: list[Verdict] = field(default_factory=list)
    faults: list[JobFault] = field(default_factory=list)
    embeddings: dict[str, bytes] = field(default_factory=dict)


def _no_choice(_: Job, __: Sequence[str]) -> str | None:
    return None


def wanted_head(job: Job, policy: Policy, runtime: Runtime, select_head: SelectHead) -> str:
    """Name of the head for a job: its own, else what a plugin says, else its policy, else the default."""
    return job.head or select_head(job, tuple(sorted(runtime.heads))) or policy.head or runtime.default_head


def selection_fault(error: BaseException) -> Hashable:
    """Returns what makes two faults of a plugin's choice one of a kind.

    Type and line of what it raised, not its text.
    """
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
        observer: Observer | None = None,
    ) -> Judged:
        """Fetches, decodes, encodes and scores a batch; one bad image never touches its neighbours.

        `progress` is called whenever a step of some image ended, so that a watchdog can tell slow from stuck.
        `observer` is shown what the images turn into on the way.
        """
        result = Judged()
        ready: list[tuple[Item, Policy, str]] = []
        for item in self._collector.embeddings(jobs, runtime, progress, observer):
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
        # A head scores all of its images in one call: (n, 192) costs little more than (1, 192).
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
