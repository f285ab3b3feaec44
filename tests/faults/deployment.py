"""A deployment that faults are put to: it keeps account of what was accepted and is checked when the test is over."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from sqlalchemy import text

from code_worker.client import Client
from code_worker.store.engine import Store
from tests.faults.checker import broker_violations, idle_violations, ledger_violations, log_violations, overdue
from tests.faults.operations import Operations, operations_of
from tests.worker.harness import Deployment, jpeg, wait_until

__all__ = ["FaultDeployment"]

_SETTLED_WITHIN_S = 120.0


@dataclass
class FaultDeployment(Deployment):
    """Its encoder has one block, so that two cores judge hundreds of images in seconds."""

    accepted: list[str] = field(default_factory=list)
    broker_url: str = ""
    """Where the broker itself is, when the processes reach it through a proxy."""
    tolerated: set[str] = field(default_factory=set)
    """How events begin that a test provokes and that may carry a traceback."""
    workers_killed: bool = False
    """Set by a test that kills workers: messages that they held come back only after the visibility timeout."""
    _ledger: Store | None = None
    _producer: Client | None = None

    @property
    def ledger(self) -> Store:
        """One store for the test's own looks at the ledger."""
        if self._ledger is None:
            self._ledger = self.store()
        return self._ledger

    def images(self, count: int, start: int = 0) -> list[str]:
        """Writes images, each of its own content, and returns their paths."""
        directory = Path(self.environment["CODE_WORKER_DATA_DIR"]).parent / "files"
        paths = [directory / f"{number}.jpg" for number in range(start, start + count)]
        for number, path in enumerate(paths, start):
            path.write_bytes(jpeg(number))
        return [str(path) for path in paths]

    def enqueue(self, wanted: Iterable[Any], **options: Any) -> list[str]:
        """Accepts jobs and remembers their ids: each is a promise."""
        if self._producer is None:
            self._producer = self._direct_client()
        ids = self._producer.enqueue_many(wanted, **options)
        self.accepted += ids
        return ids

    def _direct_client(self) -> Client:
        """A producer whose way to the broker leads past the proxy."""
        settings = self.settings
        if self.broker_url:
            settings = settings.model_copy(update={"broker_url": SecretStr(self.broker_url)})
        self.opened.append(client := Client(settings))
        return client

    def counts(self) -> dict[str, int]:
        """Jobs by state; states without a job are left out."""
        with self.ledger.engine.connect() as connection:
            rows = connection.execute(text("select state, count(*) from jobs group by state")).all()
        return {str(state): int(count) for state, count in rows}

    def decided(self, ids: Sequence[str] | None = None) -> int:
        """How many of the jobs, or of all, have a verdict."""
        with self.ledger.engine.connect() as connection:
            rows = connection.execute(text("select distinct job_id from verdicts")).scalars()
            found = {str(row).replace("-", "") for row in rows}
        return len(found if ids is None else found & {job.replace("-", "") for job in ids})

    def unfinished(self) -> int:
        """How many jobs are neither judged nor rejected nor quarantined; quick however long the ledger is."""
        with self.ledger.engine.connect() as connection:
            return int(connection.execute(text("select count(*) from jobs where due_at is not null")).scalar_one())

    def started(self, count: int = 1) -> None:
        """Returns once so many worker processes were ready to take messages."""
        wait_until(lambda: len(self.events("worker_starting")) >= count, 120, f"{count} workers")

    def operations(self) -> Operations:
        """What was published, claimed, committed and acknowledged so far."""
        return operations_of(self.log())

    def violations(self) -> list[str]:
        """Lets the jobs come to rest, ends the workers in order, and returns what the checker found."""
        found = list(overdue(self.ledger, self.settings.worker.lease_s))
        if self.workers and self.unfinished() and not any(worker.alive for worker in self.workers):
            self.worker()
        if self.workers:
            wait_until(lambda: not self.unfinished(), _SETTLED_WITHIN_S, "every accepted job decided")
        found += [f"a worker ended with status {status}" for status in self._end_workers() if status]
        found += ledger_violations(self.ledger, self.accepted)
        broker_url = self.broker_url or self.settings.resolved_broker_url
        if not self.workers_killed:
            found += broker_violations(broker_url, self.settings.broker.key_prefix or "")
        found += idle_violations(self.ledger)
        found += log_violations(self.log(), self.tolerated)
        return found

    def _end_workers(self) -> list[int]:
        return [worker.terminate(120) for worker in self.workers if worker.alive]
