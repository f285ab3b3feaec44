"""Names of tasks and queues, a job's fields, the form of a message: what producer and worker must agree on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Annotated, Any, Final, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from code_worker.errors import MessageError
from code_worker.logs import redact

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
MAX_NAME_LENGTH: Final = 200
"""Characters of a head, tenant, content type or key: what an index of PostgreSQL holds in any script."""
MAX_METADATA_BYTES: Final = 16 * 1024
"""Of metadata as JSON in UTF-8."""
_JSON: Final = json.JSONEncoder(allow_nan=False, ensure_ascii=False, sort_keys=True)
# How JSON writes a NUL, which PostgreSQL's JSONB refuses; after an unpaired backslash it is only text.
_ESCAPED_NUL: Final = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def _storable(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL")
    return text


def _without_secrets(uri: str) -> str:
    if redact(uri) != uri:
        raise ValueError("carries a password or a signature, which would be kept for ever")
    return uri


def _json_object(value: object) -> dict[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError("must be a JSON object")  # noqa: TRY004 - pydantic makes it one finding among others
    metadata = dict(value)
    if not metadata:
        return metadata
    try:
        written = _JSON.encode(metadata)
        size = len(written.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"must be a JSON object: {error}") from None
    if size > MAX_METADATA_BYTES:
        raise ValueError(f"must be a JSON object of at most {MAX_METADATA_BYTES} bytes, not {size}")
    if _ESCAPED_NUL.search(written):
        raise ValueError("holds a NUL")
    return metadata


_Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_LENGTH), AfterValidator(_storable)]


class JobItem(BaseModel):
    """The fields of a job, the same in a call, a message and a line of a list.

    Attributes:
        uri: `s3://bucket/key[?versionId=…]`, `file://…` or a path that the workers can read, without credentials.
        head: head to judge with; unset: what plugins, policy and settings say.
        tenant: whose image it is; chooses the policy.
        content_type: kind of content (`avatar`, `listing`…); chooses the policy.
        priority: 0–3 backfill, 4–6 normal, 7–9 live.
        metadata: JSON object that is handed through to the verdict.
        key: idempotency key: the same key (and tenant) twice is one job.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    uri: Annotated[
        str,
        Field(min_length=1, max_length=MAX_URI_LENGTH),
        AfterValidator(_storable),
        AfterValidator(_without_secrets),
    ]
    head: _Name | None = None
    tenant: _Name | None = None
    content_type: _Name | None = None
    priority: Annotated[int, Field(ge=0, le=9)] = 4
    metadata: Annotated[dict[Any, Any], BeforeValidator(_json_object)] = Field(default_factory=dict)
    key: _Name | None = None


def checked_item(fields: object) -> JobItem:
    """The item that a mapping of its fields makes.

    Raises:
        ValueError: names each wrong field and what is wrong with it, never its value.
    """
    try:
        return JobItem.model_validate(fields)
    # `from None`: pydantic's own error would quote the values in a traceback.
    except ValidationError as error:
        raise ValueError(f"job not accepted: {'; '.join(map(_finding, error.errors()))}") from None


def _finding(problem: Mapping[str, Any]) -> str:
    # A field that nobody knows is somebody's text, of any length.
    name = ".".join(map(str, problem["loc"]))[:80]
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown field {name!r}"
        case "model_type":
            return "it must be an object of its fields"
        case "value_error":
            return f"{name} {problem['ctx']['error']}"
    return f"{name}: {problem['msg']}"


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
    """The message that names jobs whose rows are in SQL already."""
    return {"v": MESSAGE_VERSION, "jobs": list(job_ids)}


def parse_message(message: object) -> tuple[list[str], list[object]]:
    """Job ids and, from producers that reach only the broker, items to accept (`{"v": 1, "items": [{"uri": …}]}`).

    The items come as they are, each to be read by `checked_item`: a bad one must not take its neighbours along.

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
    # Only bounded here: what is no id names no row, and is passed over when it is claimed.
    if not all(isinstance(job, str) and 0 < len(job) <= 64 for job in jobs):
        raise MessageError("'jobs' must list job ids (strings of 1 to 64 characters)")
    return jobs, items
