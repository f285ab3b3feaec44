"""What we are measured beside says what the published pipeline says: else a ratio would compare different work."""

from __future__ import annotations

import asyncio
import json
import sys
import warnings
from typing import Any

import pytest

from bench.contestants import Contestant, PublishedModel
from tests.fork_server import forking_python
from tests.parity import ParitySet

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what a foreign package warns of while it is imported is not ours to mend
    from bench.serving_fastapi import app
    from bench.serving_litserve import Moderation


@pytest.fixture(scope="module")
def some(parity_set: ParitySet) -> dict[str, int]:
    """Labels of four images by name."""
    return {parity_set.names[place]: int(parity_set.linear[place]) for place in range(4)}


async def post(application: Any, body: bytes) -> tuple[int, Any]:
    """One POST /predict by ASGI, the interface that the server speaks."""
    sent: list[dict[str, Any]] = []
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/predict",
        "raw_path": b"/predict",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/octet-stream")],
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await application(scope, receive, send)
    return sent[0]["status"], json.loads(b"".join(one.get("body", b"") for one in sent[1:]))


def test_fastapi_answers_with_the_published_labels(parity_set: ParitySet, some: dict[str, int]) -> None:
    application = app(parity_set.directory)
    for name, label in some.items():
        answer = asyncio.run(post(application, parity_set.images[name].read_bytes()))
        assert answer == (200, {"label": label})


def test_litserve_answers_with_the_published_labels(parity_set: ParitySet, some: dict[str, int]) -> None:
    moderation = Moderation(parity_set.directory)
    moderation.setup("cpu")
    requests = [moderation.decode_request(parity_set.images[name].read_bytes()) for name in some]
    labels = moderation.unbatch(moderation.predict(moderation.batch(requests)))
    assert [moderation.encode_response(label) for label in labels] == [{"label": label} for label in some.values()]


@pytest.mark.slow(reason="starts the published pipeline with its loader processes")
@pytest.mark.parametrize("name", ["ours", "published-0"])
def test_a_contestant_judges_files_with_the_published_labels(
    name: str, parity_set: ParitySet, some: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", forking_python())
    with Contestant(name, parity_set.directory) as contestant:
        seconds, labels = contestant.judge([parity_set.images[image] for image in some])
        assert labels == list(some.values())
        assert seconds > 0
        with pytest.raises(RuntimeError, match=f"{name} ended"):
            contestant.judge([parity_set.directory / "absent.jpg"])


def test_the_model_that_rivals_load_is_in_evaluation_mode(parity_set: ParitySet) -> None:
    assert not PublishedModel(parity_set.directory)._model.training
