"""Verdicts with everything an appeal needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from code_worker._version import __version__
from code_worker.types import ImageFacts, Job, Outcome, Provenance, RejectReason, Verdict

if TYPE_CHECKING:
    from code_worker.moderation.collect import Item
    from code_worker.moderation.policy import Policy
    from code_worker.moderation.runtime import Runtime

__all__ = ["judged_by", "judged_verdict", "rejected_job", "rejected_verdict"]


def judged_by(head: str, policy: Policy, runtime: Runtime) -> Provenance:
    """What the verdicts of a head under a policy have in common."""
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
