"""Whatever somebody pushes onto a queue, the worker lives, nothing is unpickled, and the next good job is judged."""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis
from sqlalchemy import text

from code_worker.wire import MODERATE, NORMAL
from tests.faults.deployment import FaultDeployment
from tests.faults.rows import Bar, Seen, row
from tests.servers import RedisServer
from tests.worker.harness import wait_until


class _Planted:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def _envelope(body: bytes | str, *, kind: str = "application/json", encoding: str = "utf-8", **changes: Any) -> bytes:
    encoded = base64.b64encode(body if isinstance(body, bytes) else body.encode()).decode()
    message = {
        "body": encoded,
        "content-encoding": encoding,
        "content-type": kind,
        "headers": {"id": "strange", "task": MODERATE, "lang": "py", "argsrepr": "", "kwargsrepr": ""},
        "properties": {
            "body_encoding": "base64",
            "correlation_id": "strange",
            "delivery_info": {"exchange": "", "routing_key": NORMAL},
            "delivery_mode": 2,
            "delivery_tag": "strange",
            "priority": 0,
        },
    }
    headers = changes.pop("headers", {})
    message["headers"] = {**message["headers"], **headers} if headers is not None else {}
    return json.dumps({**message, **changes}).encode()


def _call(*args: Any, **kwargs: Any) -> str:
    return json.dumps([args, kwargs, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])


def _bad_base64() -> bytes:
    message = json.loads(_envelope(_call({"v": 1, "jobs": ["x"]})))
    return json.dumps({**message, "body": "not base64!"}).encode()


def strange_messages(planted: Path) -> dict[str, bytes]:
    """Seventeen kinds of what is no message of ours."""
    fine = _call({"v": 1, "jobs": ["no-such-job"]})
    payload = pickle.dumps(_Planted(planted))
    return {
        "no JSON": b"\xff\xfe this is no JSON",
        "text": b"hello",
        "a JSON scalar": b"42",
        "a JSON list": b"[1, 2, 3]",
        "an empty object": b"{}",
        "bad base64": _bad_base64(),
        "compressed junk": _envelope(b"junk", headers={"compression": "application/x-gzip"}),
        "pickled content": _envelope(payload, kind="application/x-python-serialize", encoding="binary"),
        "YAML content": _envelope(b"!!python/object/apply:os.system [id]", kind="application/x-yaml"),
        "an unknown task": _envelope(fine, headers={"task": "os.system"}),
        "no headers": _envelope(fine, headers=None),
        "the wrong number of arguments": _envelope(_call(1, 2, 3, four=5)),
        "very deep JSON": _envelope("[" * 100_000 + "]" * 100_000),
        "bad UTF-8": _envelope(b'[[{"v": 1, "jobs": ["\xc3\x28"]}], {}, {}]'),
        "a NUL": _envelope(_call({"v": 1, "jobs": ["\x00"]})),
        "a bogus ETA": _envelope(fine, headers={"eta": "the day after tomorrow"}),
        "an argument of 8 MB": _envelope(_call({"v": 1, "jobs": ["x" * 8_000_000]})),
    }


@row(
    "F32",
    injection="17 kinds of malformed message pushed onto the queue, a pickle among them",
    expected="next good job judged ≤ 15 s, ≤ 1 restart per message, nothing unpickled",
)
def test_no_message_ends_a_worker_or_keeps_the_next_from_it(
    deploy: Callable[..., FaultDeployment],
    migrated_postgres_url: str,
    redis_server: RedisServer,
    tmp_path: Path,
    seen: Seen,
    bar: Bar,
) -> None:
    deployment = deploy(migrated_postgres_url)
    # Celery's own words on what it refuses.
    deployment.tolerated |= {"Received unregistered task", "Received invalid task", "Can't decode message body"}
    worker = deployment.worker()
    deployment.started()
    (uri,) = deployment.images(1)
    with redis.Redis.from_url(redis_server.url) as client:
        for kind, raw in strange_messages(tmp_path / "planted").items():
            client.lpush(f"cw:{NORMAL}", raw)
            job = deployment.enqueue([uri])
            wait_until(lambda ids=job: deployment.decided(ids), bar(15), f"the job behind {kind}")
            assert worker.alive, kind
    with deployment.ledger.engine.connect() as connection:
        kept = connection.execute(text("select count(*) from dead_letters")).scalar_one()
    assert not (tmp_path / "planted").exists()
    seen(kinds=17, restarts=len(deployment.events("worker_starting")) - 1, kept_for_a_look=kept, unpickled=0)
