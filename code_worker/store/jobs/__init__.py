"""Jobs in the ledger, everything one may do with them; functions take a session and never commit."""

from __future__ import annotations

from code_worker.store.jobs.claims import (
    ACCEPT_GRACE_S,
    Fault,
    NewJob,
    accept,
    accepted_before,
    attempts_of,
    claim,
    claimed_unheard,
    exhausted,
    put_back,
    release_owner,
    renew,
)
from code_worker.store.jobs.due import DueJob, due, mark_published, queue_wait_s, unpublish, with_lost_messages
from code_worker.store.jobs.joblist import (
    JobFilter,
    JobInfo,
    counts,
    get,
    list_jobs,
    oldest_unfinished_s,
    retry,
    retry_denied,
)

__all__ = [
    "ACCEPT_GRACE_S",
    "DueJob",
    "Fault",
    "JobFilter",
    "JobInfo",
    "NewJob",
    "accept",
    "accepted_before",
    "attempts_of",
    "claim",
    "claimed_unheard",
    "counts",
    "due",
    "exhausted",
    "get",
    "list_jobs",
    "mark_published",
    "oldest_unfinished_s",
    "put_back",
    "queue_wait_s",
    "release_owner",
    "renew",
    "retry",
    "retry_denied",
    "unpublish",
    "with_lost_messages",
]
