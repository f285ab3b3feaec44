"""Reads a message: which jobs it rings for, which it brings along, and what to do with one that cannot be read."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid5

from code_worker.errors import IdConflictError, MessageError
from code_worker.logs import get_logger
from code_worker.queues import MODERATE, SUSPECTS_PER_MESSAGE, chunks, parse_message
from code_worker.store import jobs, workers

if TYPE_CHECKING:
    from code_worker.store.engine import Store
    from code_worker.worker.node import Node

__all__ = ["bury", "handle_message"]

log = get_logger(__name__)
_LOCKED_FOR_S = (0.05, 0.25)
_MESSAGES = UUID("5f0a0f7e-6a53-5c3b-9d0e-0c7a5d3f1b21")


def handle_message(node: Node, message: object, message_id: str) -> bool:
    """Judges what a message lists; True when it may be acknowledged, False when the rest is for another worker.

    `message_id` names the message in all its deliveries.
    """
    try:
        job_ids, items = parse_message(message)
    except MessageError as error:
        bury(node.store, message, str(error))
        return True
    if items:
        job_ids = [*job_ids, *node.ledger.outlast(lambda: _accept(node.store, items, message_id))]
    if job_ids and node.stopping:
        return False
    # Nearly always all are fresh, and asking for their attempts first would be a transaction more for each message.
    taken = node.moderate(job_ids, below=1)
    if not (rest := [job_id for job_id in job_ids if job_id not in taken]):
        return True
    attempts = node.store.look(lambda session: jobs.attempts_of(session, rest))
    # A claim passes a locked row over; most often its producer is noting at this very moment that it rang.
    for pause_s in _LOCKED_FOR_S:
        if not (fresh := [job_id for job_id, tried in attempts.items() if not tried and job_id not in taken]):
            break
        time.sleep(pause_s)
        taken = taken | node.moderate(fresh, below=1)
    for group, below, alone in _suspects(node, attempts):
        if node.stopping:
            return False
        taken = taken | node.moderate(group, below=below, alone=alone)
    if skipped := sum(job_id not in taken for job_id in job_ids):
        # Decided already, held by another worker, or told to wait: the message was a second one.
        log.info("duplicate_skipped", jobs=skipped)
    return True


def _suspects(node: Node, attempts: Mapping[str, int]) -> Iterator[tuple[list[str], int, bool]]:
    """What to judge together: ids, the number of attempts they must be below, and whether with nothing beside them.

    A job that was under way when a worker died may have killed it: such jobs go in small groups, and each by itself
    in its last attempt, so that a file that ends processes is found out and its neighbours are not.
    """
    limit = node.settings.worker.max_attempts
    for group in chunks((job for job, tried in attempts.items() if 0 < tried < limit - 1), SUSPECTS_PER_MESSAGE):
        yield group, limit - 1, False
    for job in (job for job, tried in attempts.items() if tried and tried >= limit - 1):
        yield [job], limit, True


def _accept(store: Store, items: Sequence[Mapping[str, Any]], message_id: str) -> list[str]:
    """Writes rows for a producer that reaches only the broker; one that conflicts or cannot be stored is buried.

    Ids follow from the message, so that its second delivery brings no second job.
    """
    accepted: list[str] = []
    for place, item in enumerate(items):
        try:
            new = jobs.NewJob(**item, id=str(uuid5(_MESSAGES, f"{message_id} {place}")))
            accepted += store.run(lambda session, new=new: jobs.accept(session, [new]))  # type: ignore[misc]
        except (IdConflictError, ValueError) as error:
            reason = "id_conflict: " if isinstance(error, IdConflictError) else ""
            bury(store, {"items": [item]}, f"{reason}{error}")
    return accepted


def bury(store: Store, message: object, error: str) -> None:
    """Keeps a message that cannot be read, for somebody to look at."""
    body = json.dumps(message, default=repr)
    store.run(lambda session: workers.dead_letter(session, task=MODERATE, body=body, error=error))
    log.error("message_refused", error=error)
