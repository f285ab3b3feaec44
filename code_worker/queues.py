"""Names of tasks and queues and the form of a message: what producer and worker must agree on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Final, TypeVar

from code_worker.errors import MessageError

__all__ = [
    "BACKFILL",
    "LIVE",
    "MAX_JOBS_PER_MESSAGE",
    "MESSAGE_VERSION",
    "MODERATE",
    "NORMAL",
    "QUEUES",
    "REFIT",
    "RETRAIN",
    "SUSPECTS_PER_MESSAGE",
    "SWEEP",
    "SWEEP_QUEUE",
    "TRAIN_QUEUE",
    "WATCH",
    "chunks",
    "jobs_message",
    "parse_message",
    "queue_for",
]

T = TypeVar("T")

MODERATE: Final = "code_worker.moderate"
SWEEP: Final = "code_worker.sweep"
RETRAIN: Final = "code_worker.retrain"
REFIT: Final = "code_worker.refit"
WATCH: Final = "code_worker.learning_watch"

LIVE: Final = "code_worker.live"
NORMAL: Final = "code_worker.normal"
BACKFILL: Final = "code_worker.backfill"
QUEUES: Final = (LIVE, NORMAL, BACKFILL)
"""In the order in which a worker empties them."""
SWEEP_QUEUE: Final = "code_worker.sweep"
TRAIN_QUEUE: Final = "code_worker.train"

MESSAGE_VERSION: Final = 1
MAX_JOBS_PER_MESSAGE: Final = 64
SUSPECTS_PER_MESSAGE: Final = 8
MAX_URI_LENGTH: Final = 4096
_ITEM_FIELDS: Final = {
    "uri": str,
    "head": str,
    "tenant": str,
    "content_type": str,
    "priority": int,
    "metadata": dict,
    "key": str,
}


def queue_for(priority: int) -> str:
    """Queue of a priority: 7–9 live, 4–6 normal, 0–3 backfill.

    Redis' own message priorities are four lists per queue in reversed order; separate queues are plain.
    """
    if not 0 <= priority <= 9:
        raise ValueError(f"priority must be 0 to 9, not {priority}")
    return LIVE if priority >= 7 else NORMAL if priority >= 4 else BACKFILL


def chunks(values: Iterable[T], size: int = MAX_JOBS_PER_MESSAGE) -> Iterator[list[T]]:
    """Cuts a list into lists of at most `size`."""
    iterator = iter(values)
    while chunk := list(islice(iterator, size)):
        yield chunk


def jobs_message(job_ids: Sequence[str]) -> dict[str, Any]:
    """The doorbell: names of jobs whose rows are in SQL already."""
    return {"v": MESSAGE_VERSION, "jobs": list(job_ids)}


def parse_message(message: object) -> tuple[list[str], list[dict[str, Any]]]:
    """Job ids and, from producers that reach only the broker, items to accept (`{"v": 1, "items": [{"uri": …}]}`).

    Raises:
        MessageError: an unknown version, a wrong field, more than 64 entries, or neither list.
    """
    if not isinstance(message, dict):
        raise MessageError(f"message must be an object, not {type(message).__name__}")
    if message.get("v") != MESSAGE_VERSION:
        raise MessageError(f"message version {message.get('v')!r} is unknown; this worker reads {MESSAGE_VERSION}")
    if unknown := set(message) - {"v", "jobs", "items"}:
        raise MessageError(f"unknown message fields: {', '.join(sorted(map(str, unknown)))}")
    jobs, items = message.get("jobs", []), message.get("items", [])
    if not isinstance(jobs, list) or not isinstance(items, list):
        raise MessageError("message fields 'jobs' and 'items' must be lists")
    if not 1 <= len(jobs) + len(items) <= MAX_JOBS_PER_MESSAGE:
        raise MessageError(f"a message lists 1 to {MAX_JOBS_PER_MESSAGE} entries, not {len(jobs) + len(items)}")
    if not all(isinstance(job, str) and 0 < len(job) <= 64 for job in jobs):
        raise MessageError("'jobs' must list job ids (strings of 1 to 64 characters)")
    return jobs, [_checked_item(item) for item in items]


def _checked_item(item: object) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise MessageError("each of 'items' must be an object")
    for name, value in item.items():
        expected = _ITEM_FIELDS.get(name)
        if expected is None:
            raise MessageError(f"unknown item field {name!r}")
        if not isinstance(value, expected) or isinstance(value, bool):
            raise MessageError(f"item field {name!r} must be {expected.__name__}")
    uri = item.get("uri")
    if not uri or len(uri) > MAX_URI_LENGTH:
        raise MessageError(f"each of 'items' needs a 'uri' of 1 to {MAX_URI_LENGTH} characters")
    if not 0 <= item.get("priority", 4) <= 9:
        raise MessageError("item field 'priority' must be 0 to 9")
    return item
