"""Workers that are killed at random moments: nothing is lost, nothing is judged twice."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import UUID, uuid4

import psutil
import pytest
from sqlalchemy import text

from code_worker.system.failpoints import FAILPOINT_STATUS
from tests.faults.deployment import FaultDeployment
from tests.faults.rows import Bar, Seen, row
from tests.fork_server import CHILDREN_ENV
from tests.servers import RedisServer, S3Server
from tests.worker.harness import jpeg, wait_until

_CONCURRENCY = 4
_MESSAGE = 8
"""Jobs in a message: enough messages for the threads of both workers."""


@pytest.fixture
def held_jobs(tmp_path: Path) -> dict[str, str]:
    """Settings under which a job gets no verdict before the file that its metadata names is there."""
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "held.py").write_text(
        "import time\n"
        "from pathlib import Path\n"
        "from code_worker import hookimpl\n"
        "@hookimpl\n"
        "def code_worker_select_head(job, heads):\n"
        "    while 'until' in job.metadata and not Path(job.metadata['until']).exists():\n"
        "        time.sleep(0.02)\n"
    )
    return {"CODE_WORKER_PLUGINS_DIR": str(plugins)}


def _holders(deployment: FaultDeployment, ids: Collection[str]) -> list[int]:
    """Process ids of the workers that hold claims on these jobs."""
    with deployment.ledger.engine.connect() as connection:
        claims = connection.execute(text("select id, owner from jobs where state = 'running'")).all()
    owners = {str(owner) for job, owner in claims if str(UUID(str(job))) in ids}
    return [event["pid"] for event in deployment.events("child_started") if event["owner"] in owners]


def _kill_one(
    deployment: FaultDeployment, uris: Sequence[str], gate: Path, rng: random.Random, pause_s: float
) -> tuple[list[str], int]:
    """Kills a worker that holds claims on these images, none of which is decided before the worker is dead.

    Returns the ids, and how many jobs were unfinished then.
    """
    ids = []
    for begin in range(0, len(uris), _MESSAGE):
        ids += deployment.enqueue(uris[begin : begin + _MESSAGE], metadata={"until": str(gate)})
    wait_until(lambda: _holders(deployment, ids), 120, "a claimed batch")
    time.sleep(rng.uniform(0.05, pause_s))  # while it fetches, encodes, or waits at the gate
    victim = psutil.Process(rng.choice(wait_until(lambda: _holders(deployment, ids), 120, "a worker to kill")))
    victim.kill()
    victim.wait(60)
    left = deployment.unfinished()
    gate.touch()
    return ids, left


def _upload(deployment: FaultDeployment, server: S3Server, count: int) -> list[str]:
    """Images in a bucket that the deployment may read."""
    bucket, client = f"faults-{uuid4().hex[:12]}", server.client()
    client.create_bucket(Bucket=bucket)
    deployment.environment |= server.environment | {"CODE_WORKER_S3__BUCKETS": f'["{bucket}"]'}

    def put(number: int) -> str:
        client.put_object(Bucket=bucket, Key=f"{number}.jpg", Body=jpeg(number))
        return f"s3://{bucket}/{number}.jpg"

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(put, range(count)))


def _survive(
    deployment: FaultDeployment,
    uris: list[str],
    rng: random.Random,
    seen: Seen,
    bar: Bar,
    *,
    kills: int,
    pause_s: float,
) -> None:
    deployment.workers_killed = True
    for _ in range(2):
        deployment.worker("worker", module="code_worker", **{CHILDREN_ENV: "1"})
    deployment.started(2)
    ids: list[str] = []
    for number in range(kills):
        gate = deployment.log_path.with_name(f"gate-{number}")
        share, left = _kill_one(deployment, uris[number::kills], gate, rng, pause_s)
        last_kill = time.monotonic()
        ids += share
        assert left, "work is left at every kill, the last one too"
    limit_s = deployment.settings.worker.lease_s + 30
    wait_until(lambda: not deployment.unfinished(), bar(limit_s), f"all verdicts: {deployment.counts()}")
    last_verdict_s = time.monotonic() - last_kill
    again = deployment.operations().executed_again
    assert again <= kills * (_CONCURRENCY + 1) * 64
    assert deployment.decided(ids) == len(uris)
    seen(
        jobs=len(uris),
        kills=kills,
        left_at_the_last_kill=left,
        lost=0,
        last_verdict_s=last_verdict_s,
        judged_again=again,
        quarantined=deployment.counts().get("quarantined", 0),
    )


_FULL = pytest.mark.nightly


@pytest.mark.slow(reason="killed workers are started again, from nothing by their supervisors")
@row(
    "F1c",
    injection="{kills} workers killed while they hold claims, {jobs} jobs, 2 supervisors",
    expected="{jobs} verdicts, one each; the last ≤ lease + 30 s after the last kill",
)
@pytest.mark.parametrize(
    ("database", "jobs", "kills"),
    [
        ("postgresql", 120, 3),
        pytest.param("postgresql", 400, 8, marks=_FULL),
        pytest.param("sqlite", 400, 8, marks=_FULL),
    ],
)
def test_jobs_survive_killed_workers(
    deploy: Callable[..., FaultDeployment],
    request: pytest.FixtureRequest,
    database: str,
    jobs: int,
    kills: int,
    redis_server: RedisServer,
    s3_server: S3Server,
    held_jobs: dict[str, str],
    fault_rng: random.Random,
    seen: Seen,
    bar: Bar,
) -> None:
    deployment = deploy(
        request.getfixturevalue("sqlite_url" if database == "sqlite" else "migrated_postgres_url"), **held_jobs
    )
    _survive(deployment, _upload(deployment, s3_server, jobs), fault_rng, seen, bar, kills=kills, pause_s=1.6)


@pytest.mark.nightly
@row(
    "F1",
    injection="50 workers killed while they hold claims, 2,000 jobs, 2 supervisors",
    expected="2,000 verdicts, one each; the last ≤ lease + 30 s after the last kill",
)
def test_2000_jobs_survive_fifty_killed_workers(
    deploy: Callable[..., FaultDeployment],
    migrated_postgres_url: str,
    redis_server: RedisServer,
    s3_server: S3Server,
    held_jobs: dict[str, str],
    fault_rng: random.Random,
    seen: Seen,
    bar: Bar,
) -> None:
    deployment = deploy(migrated_postgres_url, **held_jobs)
    _survive(deployment, _upload(deployment, s3_server, 2000), fault_rng, seen, bar, kills=50, pause_s=1.6)


_POINTS = ("after_claim", "before_verdict_commit", "after_verdict_commit", "before_ack")


@pytest.mark.nightly
@row(
    "F1",
    injection="workers end after the claim, before and after the commit of verdicts, before the acknowledgement",
    expected="one verdict each; what was committed is not judged again",
)
def test_a_worker_may_end_between_any_two_steps(
    deploy: Callable[..., FaultDeployment], ledger_url: str, redis_server: RedisServer, seen: Seen
) -> None:
    # No supervisor here that frees the claims of the dead at once.
    deployment = deploy(ledger_url, CODE_WORKER_WORKER__LEASE_S="5")
    deployment.workers_killed = True
    ids = deployment.enqueue(deployment.images(64 * len(_POINTS)))
    doomed = [deployment.worker("--concurrency", "1", CODE_WORKER_FAILPOINT=point) for point in _POINTS]
    assert [worker.process.wait(240) for worker in doomed] == [FAILPOINT_STATUS] * len(_POINTS)
    committed = deployment.decided(ids)
    deployment.worker()
    wait_until(lambda: deployment.decided(ids) == len(ids), 120, f"all verdicts: {deployment.counts()}")
    operations = deployment.operations()
    assert max(operations.committed.values()) == 1
    seen(jobs=len(ids), committed_before=committed, judged_again=operations.executed_again, lost=0)
