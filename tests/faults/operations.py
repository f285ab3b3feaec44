"""What a deployment did, job by job: read from the processes' log and from the ledger, not from tables of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Operations", "operations_of"]


@dataclass(slots=True)
class Operations:
    """Counts by job; `acknowledged` by message."""

    published: Counter[str] = field(default_factory=Counter)
    claimed: Counter[str] = field(default_factory=Counter)
    committed: Counter[str] = field(default_factory=Counter)
    acknowledged: Counter[str] = field(default_factory=Counter)

    @property
    def executed_again(self) -> int:
        """Claims beyond the first of each job."""
        return sum(self.claimed.values()) - len(self.claimed)


def operations_of(log: Iterable[Mapping[str, Any]]) -> Operations:
    """The operations that a log at level debug tells of."""
    found = Operations()
    names = {
        "jobs_published": found.published,
        "jobs_claimed": found.claimed,
        "verdicts_committed": found.committed,
    }
    for event in log:
        if (counter := names.get(str(event.get("event")))) is not None:
            counter.update(event["jobs"])
        elif event.get("event") == "message_acknowledged":
            found.acknowledged[event["message"]] += 1
    return found
