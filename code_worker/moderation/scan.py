"""Judges any number of images in this process: verdicts in the order of the URIs, in constant memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from code_worker._version import __version__
from code_worker.errors import UnknownHeadError
from code_worker.moderation.judge import rejected_job
from code_worker.types import Job, Provenance, Verdict
from code_worker.wire import chunks

if TYPE_CHECKING:
    from code_worker.moderation.judge import JobFault, Judge
    from code_worker.moderation.policy import PolicyBook
    from code_worker.moderation.runtime import Runtime

WAITS_S: Final = (0.5, 2.0)
"""Before the second and the third try of an image whose source failed in a way that may pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanOptions:
    """Options of a scan, and how much of it is under way at a time.

    Attributes:
        head: head for every image; unset: what plugins, policy and settings say.
        tenant: on whose behalf; chooses the policy.
        content_type: kind of content; chooses the policy.
        batch: images judged together.
        ahead: batches under way at a time, so that fetching and decoding of one fill the gaps of another.
    """

    head: str | None = None
    tenant: str | None = None
    content_type: str | None = None
    batch: int = 64
    ahead: int = 3


def scan(
    uris: Iterable[str], judge: Judge, runtime: Runtime, policies: PolicyBook, options: ScanOptions | None = None
) -> Iterator[Verdict]:
    """One verdict per URI, in order; `uris` is read as the scan proceeds, at most a few batches ahead.

    An image whose source fails in a way that may pass is tried twice again, then rejected. Job ids are the places
    of the URIs, from 0.

    Raises:
        UnknownHeadError: the release has no such head; nothing was fetched.
    """
    options = options or ScanOptions()
    if options.head is not None and options.head not in runtime.heads:
        raise UnknownHeadError(options.head, tuple(sorted(runtime.heads)))
    return _in_order(chunks(_jobs(uris, options), options.batch), _Scan(judge, runtime, policies), options.ahead)


def _jobs(uris: Iterable[str], options: ScanOptions) -> Iterator[Job]:
    for place, uri in enumerate(uris):
        yield Job(id=str(place), uri=uri, head=options.head, tenant=options.tenant, content_type=options.content_type)


def _in_order(batches: Iterator[list[Job]], scan_: _Scan, ahead: int) -> Iterator[Verdict]:
    under_way: deque[Future[list[Verdict]]] = deque()
    threads = ThreadPoolExecutor(ahead, thread_name_prefix="scan")
    try:
        for batch in batches:
            under_way.append(threads.submit(scan_.judge, batch))
            if len(under_way) >= ahead:
                yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()
    finally:
        # A caller that stops reading waits for the batches that run, not for those that have not begun.
        threads.shutdown(cancel_futures=True)


class _Scan:
    """Judges a batch until each image has a verdict."""

    def __init__(self, judge: Judge, runtime: Runtime, policies: PolicyBook) -> None:
        self._judge = judge
        self._runtime = runtime
        self._policies = policies

    def judge(self, batch: Sequence[Job]) -> list[Verdict]:
        """Verdicts in the order of the jobs."""
        found: dict[str, Verdict] = {}
        left = list(batch)
        # None: the last try, after which what is left is rejected.
        for wait_s in (*WAITS_S, None):
            judged = self._judge.judge(left, self._runtime, self._policies)
            found |= {verdict.job_id: verdict for verdict in judged.verdicts}
            again = [fault for fault in judged.faults if wait_s is not None and _may_pass(fault)]
            found |= {fault.job.id: self._rejected(fault) for fault in judged.faults if fault not in again}
            left = [fault.job for fault in again]
            if not left or wait_s is None:
                break
            time.sleep(wait_s)
        return [found[job.id] for job in batch]

    def _rejected(self, fault: JobFault) -> Verdict:
        provenance = Provenance(
            release=self._runtime.release, manifest_sha256=self._runtime.manifest_sha256, code_version=__version__
        )
        detail = f"{fault.detail} (another try may succeed)" if _may_pass(fault) else fault.detail
        return rejected_job(fault.job, fault.reason, detail, provenance=provenance)


def _may_pass(fault: JobFault) -> bool:
    """Credentials that do not work do not mend themselves within seconds."""
    return fault.blame and fault.source is None
