"""Calls and messages with wrong, hostile or merely odd arguments."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from code_worker.client import Client
from code_worker.types import Labelled

RIGHT_TO_LEFT = "\u202egpj.exe"
Jobs = Callable[[Client], list[str]]
Labels = Callable[[Client, str], Labelled]


def jobs() -> dict[str, Jobs]:
    """Name → a call that accepts jobs, or does not; each uses URIs and keys of its own."""

    def one(**item: Any) -> Jobs:
        return lambda client: client.enqueue_many([{"uri": "s3://b/a", **item}])

    return {
        "plain": one(),
        "uri_empty": one(uri=""),
        "uri_of_5000": one(uri="s3://b/" + "x" * 5000),
        "uri_no_text": one(uri=7),
        "uri_missing": lambda client: client.enqueue_many([{"tenant": "t"}]),
        "uri_data_30_megabytes": one(uri="data:" + "A" * 30_000_000),
        "priority_10": one(priority=10),
        "priority_minus_1": one(priority=-1),
        "priority_true": one(priority=True),
        "priority_text": one(priority="9"),
        "metadata_17_kib": one(metadata={"k": "x" * 17_000}),
        "metadata_nan": one(metadata={"score": float("nan")}),
        "metadata_set": one(metadata={"k": {1, 2}}),
        "metadata_list": one(metadata=[1]),
        "metadata_deep": one(metadata=_nested(5_000)),
        "tenant_of_201": one(tenant="t" * 201),
        "tenant_empty": one(tenant=""),
        "tenant_right_to_left": one(tenant=RIGHT_TO_LEFT),
        "tenant_nul": one(tenant="a\0b"),
        "uri_half_a_surrogate": one(uri="s3://b/\ud800"),
        "unknown_field": one(password="p"),
        "not_a_job": lambda client: client.enqueue_many([7]),  # type: ignore[list-item]  # on purpose
        "same_key_same_job": lambda client: [client.enqueue("s3://b/k", key="twice") for _ in range(2)],
        "same_key_other_uri": lambda client: [client.enqueue(f"s3://b/{name}", key="other") for name in "ab"],
        "same_key_other_head": lambda client: [
            client.enqueue("s3://b/h", key="head", head=head) for head in (None, "knn")
        ],
    }


def _nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"k": value}
    return value


def labels() -> dict[str, Labels]:
    """Name → what is said of an image, given its path; each is tried on an image of its own."""
    unknown_job = "01890000-0000-7000-8000-000000000000"
    soon = datetime.now(UTC) + timedelta(days=30)
    naive = datetime.now(UTC).replace(tzinfo=None)
    return {
        "plain": lambda client, path: client.label(path, "fake", by="alice", generator="sdxl"),
        "unknown_label": lambda client, path: client.label(path, "maybe", by="alice"),
        "upper_case_label": lambda client, path: client.label(path, "FAKE", by="alice"),
        "of_unknown_job": lambda client, _: client.label(unknown_job, "fake", by="alice"),
        "of_unknown_hash": lambda client, _: client.label("0" * 64, "fake", by="alice"),
        "of_text_file": lambda client, path: client.label(path.replace(".png", ".txt"), "fake", by="alice"),
        "of_secret_file": lambda client, _: client.label("/etc/passwd", "fake", by="alice"),
        "of_web_address": lambda client, _: client.label("http://169.254.169.254/", "fake", by="alice"),
        "twice": lambda client, path: [client.label(path, "real", by="alice") for _ in range(2)][-1],
        "contradicted": lambda client, path: [client.label(path, said, by=said) for said in ("real", "fake")][-1],
        "taken_back": lambda client, path: [client.label(path, said, by="al") for said in ("real", "fake")][-1],
        "note_10_megabytes": lambda client, path: client.label(path, "real", by="alice", note="x" * 10_000_000),
        "score_nan": lambda client, path: client.label(path, "real", score=float("nan")),  # type: ignore[call-arg]
        "by_nobody": lambda client, path: client.label(path, "real", by=""),
        "by_nul": lambda client, path: client.label(path, "real", by="al\0ice"),
        "by_right_to_left": lambda client, path: client.label(path, "real", by=RIGHT_TO_LEFT),
        "note_control_characters": lambda client, path: client.label(path, "real", by="a", note="\x1b[2J\a"),
        "real_by_generator": lambda client, path: client.label(path, "real", by="alice", generator="sdxl"),
        "in_a_month": lambda client, path: client.label(path, "real", by="alice", at=soon),
        "without_time_zone": lambda client, path: client.label(path, "real", by="a", at=naive),
    }


def messages() -> dict[str, str]:
    """Name → the JSON text of a message's argument."""
    item = {"uri": "s3://b/k"}
    bodies: dict[str, Any] = {
        "good_jobs": {"v": 1, "jobs": ["a"]},
        "good_items": {"v": 1, "items": [{**item, "priority": 9, "key": "k"}]},
        "null": None,
        "number": 7,
        "text": "rm -rf /",
        "list": [1],
        "no_version": {"jobs": ["a"]},
        "other_version": {"v": 99, "jobs": ["a"]},
        "version_true": {"v": "1", "jobs": ["a"]},
        "unknown_field": {"v": 1, "jobs": ["a"], "image": "…"},
        "jobs_text": {"v": 1, "jobs": "abc"},
        "nothing": {"v": 1},
        "too_many": {"v": 1, "jobs": [str(number) for number in range(65)]},
        "job_number": {"v": 1, "jobs": [7]},
        "job_null": {"v": 1, "jobs": [None]},
        "job_of_65": {"v": 1, "jobs": ["x" * 65]},
        "job_of_20_megabytes": {"v": 1, "jobs": ["x" * 20_000_000]},
        "item_text": {"v": 1, "items": ["s3://b/k"]},
        "item_without_uri": {"v": 1, "items": [{}]},
        "item_uri_of_5000": {"v": 1, "items": [{"uri": "x" * 5000}]},
        "item_priority_10": {"v": 1, "items": [{**item, "priority": 10}]},
        "item_priority_true": {"v": 1, "items": [{**item, "priority": True}]},
        "item_password": {"v": 1, "items": [{**item, "password": "p"}]},
        "item_metadata_list": {"v": 1, "items": [{**item, "metadata": []}]},
    }
    return {name: json.dumps(body) for name, body in bodies.items()}
