"""Jobs and verdicts as a worker would have written them."""

from __future__ import annotations

from collections.abc import Sequence

from code_worker.store import jobs, verdicts
from code_worker.store.engine import Store
from code_worker.types import ImageFacts, Label, Outcome, Provenance, RejectReason, Verdict


def accept(store: Store, *uris: str, **fields: str) -> list[str]:
    new = [jobs.NewJob(uri, **fields) for uri in uris]  # type: ignore[arg-type]
    return store.run(lambda session: jobs.accept(session, new))


def claim(store: Store, ids: Sequence[str]) -> None:
    store.run(lambda session: jobs.claim(session, ids, owner="test", lease_s=60, max_attempts=3))


def judged(store: Store, uri: str, score: float, *, tenant: str | None = None) -> str:
    """Accepts, claims and judges one image; returns the job's id."""
    (job_id,) = accept(store, uri, **({"tenant": tenant} if tenant else {}))
    claim(store, [job_id])
    verdict = Verdict(
        job_id=job_id,
        uri=uri,
        outcome=Outcome.JUDGED,
        label=Label.FAKE if score >= 0.5 else Label.REAL,
        score=score,
        facts=ImageFacts("ab" * 32, 1234, format="jpeg", width=640, height=480, mode="RGB"),
        provenance=Provenance("r-1", "cd" * 32, "linear", "ef" * 32, "published", 0.5, 0.5, "0.1", "code-worker 0.1"),
        tenant=tenant,
        timings_ms={"fetch": 1.5},
    )
    store.run(lambda session: verdicts.write(session, [verdict]))
    return job_id


def rejected(store: Store, uri: str, reason: RejectReason) -> str:
    (job_id,) = accept(store, uri)
    claim(store, [job_id])
    verdict = Verdict(job_id=job_id, uri=uri, outcome=Outcome.REJECTED, reason=reason, detail="as a test wants it")
    store.run(lambda session: verdicts.write(session, [verdict]))
    return job_id
