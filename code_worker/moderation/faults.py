"""What keeps a job from its verdict without being its image's doing."""

from __future__ import annotations

from dataclasses import dataclass

from code_worker.types import Job, RejectReason

__all__ = ["JobFault"]


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
