"""Reads a message: which jobs it names, which it brings along, and what to do with one that cannot be read."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from traceback import format_tb
from typing import TYPE_CHECKING
from uuid import UUID, uuid5

from code_worker.errors import IdConflictError, MessageError, StoreError, StoreRefusedError
from code_worker.logs import get_logger
from code_worker.store import jobs, workers
from code_worker.wire import MODERATE, SUSPECTS_PER_MESSAGE, chunks, parse_message
from code_worker.worker.judging.recorder import Recorder

if TYPE_CHECKING:
    from code_worker.store.engine import Store
    from code_worker.worker.judging.node import Node

log = get_logger(__name__)
_LOCKED_FOR_S = (0.05, 0.25)
_MAX_LEVELS = 100
_CUT = "… nested too deeply"
_MESSAGES = UUID("5f0a0f7e-6a53-5c3b-9d0e-0c7a5d3f1b21")


def take_message(store: Store, message: object, message_id: str) -> list[str]:
    """Ids of the jobs that a message lists or brings along; one that cannot be read is kept, and has none.

    Needs the store alone: what a message brings has its rows although this process cannot judge. `message_id` names
    the message in all its deliveries.

    Raises:
        StoreError: see `accept_items`.
    """
    try:
        job_ids, items = parse_message(message)
    except MessageError as error:
        dead_letter(store, message, str(error))
        return []
    return [*job_ids, *(Recorder.outlast(lambda: accept_items(store, items, message_id)) if items else ())]


def judge_jobs(node: Node, job_ids: Sequence[str]) -> bool:
    """Judges jobs of a message; True when it may be acknowledged, False when the rest is for another worker."""
    # A flag that the handler of SIGTERM sets and nobody takes back: it needs no lock.
    if node.stopping:
        return False
    # Nearly always all are fresh, and asking for their attempts first would be a transaction more for each message.
    taken = node.moderate(job_ids, below=1)
    if not (rest := [job_id for job_id in job_ids if job_id not in taken]):
        return True
    attempts = node.store.look(lambda session: jobs.attempts_of(session, rest))
    # A claim passes a locked row over; most often its producer is noting at this very moment that it published.
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
    """Yields what to judge together.

    Ids, the number of attempts they must be below, and whether with nothing beside them.

    A job that was under way when a worker died may have killed it: such jobs go in small groups, and each by itself
    in its last attempt, so that a file that ends processes is found out and its neighbours are not.
    """
    limit = node.settings.worker.max_attempts
    for group in chunks((job for job, tried in attempts.items() if 0 < tried < limit - 1), SUSPECTS_PER_MESSAGE):
        yield group, limit - 1, False
    for job in (job for job, tried in attempts.items() if tried and tried >= limit - 1):
        yield [job], limit, True


def accept_items(store: Store, items: Sequence[object], message_id: str) -> list[str]:
    """Writes rows for a producer that reaches only the broker and returns their ids; a bad item spoils no other.

    Once this returns, each item has a row or is kept with the messages that could not be read, so that its message
    may be acknowledged. Ids follow from the message: its second delivery brings no second job.

    Raises:
        StoreError: the database is away, only reads, or is not as it must be; no item is to blame, and the message
            must go back.
    """
    accepted: list[str] = []
    refused: list[tuple[object, str, str]] = []
    for place, item in enumerate(items):
        try:
            # By message and place, not by content: two equal items of one message are two jobs.
            new = jobs.NewJob.of(item, id=str(uuid5(_MESSAGES, f"{message_id} {place}")))
            accepted += store.run(partial(jobs.accept, jobs=[new]))
        except IdConflictError as error:
            refused.append((item, f"id_conflict: {error}", "id_conflict"))
        except ValueError as error:
            refused.append((item, str(error), "item"))
        except StoreRefusedError as error:
            refused.append((item, str(error), "database"))
        except StoreError:
            raise
        except Exception as error:  # noqa: BLE001 - Celery acknowledges a failed task's message: it has no other place
            # What the error says may name the item, so the log has only where it was raised.
            raised = "".join(format_tb(error.__traceback__))
            log.error("item_not_accepted", error=type(error).__name__, raised=raised)
            refused.append((item, f"{type(error).__name__}: {error}", "internal"))
    # Last, so that an item is not kept once more by each try that ends before this.
    for item, reason, kind in refused:
        dead_letter(store, {"items": [item]}, reason, kind=kind)
    return accepted


def dead_letter(store: Store, message: object, error: str, *, kind: str = "message") -> None:
    """Keeps a message that cannot be read, for somebody to look at.

    The log has the id under which it is kept and the kind of fault: message and error may name an image or a tenant,
    and an erasure does not reach the log.
    """
    body = json.dumps(_writable(message), default=repr)
    # Outside of the transaction, which may run again after a commit whose answer was lost.
    letter_id = store.new_id()
    store.run(
        lambda session: workers.dead_letter(session, task=MODERATE, body=body, error=error, letter_id=letter_id)
    )
    log.error("message_refused", letter=letter_id, kind=kind)


def _writable(value: object, levels: int = _MAX_LEVELS) -> object:
    """Returns what JSON can hold of a value that came as JSON or in another form.

    What is nested too deeply is cut off.

    Reading takes less depth than writing: some of what could be read could not be written, and would be lost.
    """
    if not isinstance(value, Mapping | list | tuple):
        return value
    if not levels:
        return _CUT
    if isinstance(value, Mapping):
        return {str(name): _writable(inner, levels - 1) for name, inner in value.items()}
    return [_writable(inner, levels - 1) for inner in value]
