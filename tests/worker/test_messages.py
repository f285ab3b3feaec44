"""The message on the wire: what is read, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from code_worker.errors import MessageError
from code_worker.wire import (
    BACKFILL,
    LIVE,
    MAX_METADATA_BYTES,
    MAX_NAME_LENGTH,
    MAX_URI_LENGTH,
    NORMAL,
    checked_item,
    chunks,
    jobs_message,
    parse_message,
    queue_for,
)


def test_what_a_producer_sends_is_what_a_worker_reads() -> None:
    message = json.loads(json.dumps(jobs_message(["a", "b"])))
    assert parse_message(message) == (["a", "b"], [])


def test_a_producer_without_a_database_sends_items() -> None:
    items = [{"uri": "s3://b/k", "head": "knn", "priority": 9, "metadata": {"post": 1}, "key": "k", "tenant": "t"}]
    assert parse_message({"v": 1, "items": items}) == ([], items)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (None, "must be an object"),
        ([1], "must be an object"),
        ({"jobs": ["a"]}, "version None is unknown"),
        ({"v": 2, "jobs": ["a"]}, "version 2 is unknown"),
        ({"v": 1, "jobs": ["a"], "image": "…"}, "unknown message fields: image"),
        ({"v": 1, "jobs": "a"}, "must be lists"),
        ({"v": 1}, "1 to 64"),
        ({"v": 1, "jobs": [str(n) for n in range(65)]}, "1 to 64"),
        ({"v": 1, "jobs": [7]}, "job ids"),
        ({"v": 1, "jobs": ["x" * 65]}, "job ids"),
    ],
)
def test_a_message_that_is_not_ours_is_refused_by_name(message: Any, text: str) -> None:
    with pytest.raises(MessageError, match=text):
        parse_message(message)


def test_a_bad_item_is_left_to_who_reads_it_so_that_its_neighbours_are_read() -> None:
    items = [{"uri": "s3://b/k"}, "s3://b/k", {"uri": 7}]
    assert parse_message({"v": 1, "items": items}) == ([], items)


def test_the_limits_of_a_job_are_stated_once() -> None:
    assert checked_item({"uri": "u" * MAX_URI_LENGTH, "tenant": "ü" * MAX_NAME_LENGTH}).priority == 4
    room = MAX_METADATA_BYTES - len('{"k": ""}')
    assert checked_item({"uri": "a", "metadata": {"k": "x" * room}})
    for over in ({"uri": "u" * (MAX_URI_LENGTH + 1)}, {"uri": "a", "metadata": {"k": "x" * (room + 1)}}):
        with pytest.raises(ValueError, match="at most"):
            checked_item(over)


def test_what_is_wrong_with_an_item_is_said_without_its_value() -> None:
    with pytest.raises(ValueError, match="job not accepted") as raised:
        checked_item({"uri": "https://me:hunter2@host/k", "tenant": 7, "s" * 5000: 1})
    assert "hunter2" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_priorities_map_to_three_queues() -> None:
    assert [queue_for(priority) for priority in range(10)] == [BACKFILL] * 4 + [NORMAL] * 3 + [LIVE] * 3
    for wrong in (-1, 10):
        with pytest.raises(ValueError, match="0 to 9"):
            queue_for(wrong)


def test_chunks_keep_order_and_lose_nothing() -> None:
    assert list(chunks(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(chunks([])) == []
