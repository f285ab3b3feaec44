"""Reads a message: which jobs it rings for, which it brings along, and what to do with one that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from code_worker.errors import IdConflictError, MessageError
from code_worker.logs import get_logger
from code_worker.queues import MODERATE, SUSPECTS_PER_MESSAGE, chunks, parse_message
from code_worker.store import jobs, workers

if TYPE_CHECKING:
    from code_worker.store.engine import Store
    from code_worker.worker.node import Node

__all__ = ["handle_message"]

log = get_logger(__name__)


def handle_message(node: Node, message: object) -> None:
    """Judges what a message lists; afterwards the message may be acknowledged."""
    try:
        job_ids, items = parse_message(message)
    except MessageError as error:
        _bury(node.store, message, str(error))
        return
    if items:
        job_ids = [*job_ids, *node.ledger.outlast(lambda: _accept(node.store, items))]
    attempts = node.store.run(lambda session: jobs.attempts_of(session, job_ids), write=False)
    if fresh := [job for job in job_ids if attempts.get(job) == 0]:
        node.moderate(fresh)
    # A job that was under way when a worker died may have killed it: such jobs go in small groups, and each by itself
    # in its last attempt, so that a file that ends processes is found out and its neighbours are not.
    last = node.settings.worker.max_attempts - 1
    for group in chunks((job for job, tried in attempts.items() if 0 < tried < last), SUSPECTS_PER_MESSAGE):
        node.moderate(group)
    for job in (job for job, tried in attempts.items() if tried and tried >= last):
        node.moderate([job], alone=True)


def _accept(store: Store, items: Sequence[Mapping[str, Any]]) -> list[str]:
    """Writes rows for a producer that reaches only the broker; one that conflicts or cannot be stored is buried."""
    new = [jobs.NewJob(**item) for item in items]
    try:
        return store.run(lambda session: jobs.accept(session, new))
    except (IdConflictError, ValueError) as error:
        if len(new) == 1:
            reason = "id_conflict: " if isinstance(error, IdConflictError) else ""
            _bury(store, {"items": list(items)}, f"{reason}{error}")
            return []
    return [job for item in items for job in _accept(store, [item])]


def _bury(store: Store, message: object, error: str) -> None:
    body = json.dumps(message, default=repr)
    store.run(lambda session: workers.dead_letter(session, task=MODERATE, body=body, error=error))
    log.error("message_refused", error=error)
