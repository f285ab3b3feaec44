"""A device that fails: short of memory it takes smaller batches, lost for good the process is replaced."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.faults.conftest import Deploy
from tests.faults.rows import Seen, row
from tests.fork_server import CHILDREN_ENV
from tests.worker.harness import wait_until

JOBS = 24
ONCE = """
import sys
from pathlib import Path

import torch

from code_worker.encoder.torch_engine import Engine

# A file that names neither hook nor hookimpl is no plugin.
inner = Engine.embed
mark = Path({mark!r})

def embed(self, crops):
    {fault}
    return inner(self, crops)

# The test's own process loads this plugin too, for its registry, and its encoder must stay whole.
if "pytest" not in sys.modules:
    Engine.embed = embed
"""
NO_ROOM = 'if len(crops) > 1: raise torch.OutOfMemoryError("CUDA out of memory")'
LOST = """if len(crops) > 1 and not mark.exists():
        mark.touch()
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")"""


def plugin(directory: Path, fault: str) -> dict[str, str]:
    """Settings of a worker whose encoder has that fault."""
    plugins = directory / "plugins"
    plugins.mkdir()
    text = ONCE.replace("{mark!r}", repr(str(directory / "mark"))).replace("{fault}", fault)
    (plugins / "faulty.py").write_text(text)
    return {"CODE_WORKER_PLUGINS_DIR": str(plugins), "CODE_WORKER_ENGINE": "torch"}


@row("F26", injection="out of memory for more than one crop at a time", expected="batches halved to one, all judged")
def test_a_device_short_of_memory_takes_one_crop_at_a_time(
    deploy: Deploy, sqlite_url: str, tmp_path: Path, seen: Seen
) -> None:
    deployment = deploy(sqlite_url, **plugin(tmp_path, NO_ROOM))
    worker = deployment.worker()
    ids = deployment.enqueue(deployment.images(JOBS))
    wait_until(lambda: deployment.decided(ids) == JOBS, 120, "all verdicts")
    with closing(deployment.client()) as client:
        rejected = sum(1 for job in ids if (verdict := client.verdict(job)) and verdict.reason)
    seen(judged=JOBS - rejected, rejected=rejected, exits=0)
    assert worker.alive
    assert rejected == 0


@pytest.mark.slow(reason="a supervisor starts workers again, each after a longer pause")
@row("F26", injection="the device is lost in a batch", expected="jobs put back, exit 70, restarted, all judged")
def test_a_lost_device_ends_the_process_and_the_next_one_judges(
    deploy: Deploy, sqlite_url: str, tmp_path: Path, seen: Seen
) -> None:
    deployment = deploy(sqlite_url, **plugin(tmp_path, LOST))
    deployment.workers_killed = True  # by itself, perhaps before it acknowledged the message of that batch
    deployment.worker("worker", module="code_worker", **{CHILDREN_ENV: "1"})
    ids = deployment.enqueue(deployment.images(JOBS))
    began = time.monotonic()
    wait_until(lambda: deployment.decided(ids) == JOBS, 120, "all verdicts")
    took_s = time.monotonic() - began
    with closing(deployment.client()) as client:
        rejected = sum(1 for job in ids if (verdict := client.verdict(job)) and verdict.reason)
    statuses = [event["status"] for event in deployment.events("child_died")]
    seen(done_s=took_s, exit_status=statuses[0], rejected=rejected)
    assert deployment.events("device_lost")
    assert statuses[0] == 70
    assert rejected == 0
