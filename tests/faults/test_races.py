"""Many workers, one job: the first claim wins, the others step back, and the ledger holds one verdict."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing

import pytest
from kombu import Connection
from sqlalchemy import text

from code_worker.broker import REDIS_TRANSPORT, transport_options
from code_worker.publisher import Publisher
from code_worker.store import jobs
from code_worker.wire import NORMAL
from tests.faults.deployment import FaultDeployment
from tests.faults.rows import Seen, row
from tests.servers import RedisServer
from tests.worker.harness import wait_until

Deploy = Callable[..., FaultDeployment]
_TIMES = 8


def _skipped(deployment: FaultDeployment) -> int:
    return sum(event["jobs"] for event in deployment.events("duplicate_skipped"))


def _race(deployment: FaultDeployment, count: int, processes: int, concurrency: int) -> dict[str, int]:
    """Publishes each job as often as there are takers, at once; returns figures."""
    for _ in range(processes):
        deployment.worker("--concurrency", str(concurrency))
    deployment.started(processes)
    uris = deployment.images(8)
    new = [jobs.NewJob(uris[number % len(uris)]) for number in range(count)]
    ids = deployment.ledger.run(lambda session: jobs.accept(session, new))
    deployment.accepted += ids
    deployment.ledger.run(lambda session: jobs.mark_published(session, ids))
    with closing(Publisher.for_producer(deployment.settings)) as publisher:
        for job in ids:
            for _ in range(_TIMES):
                publisher.publish(NORMAL, [job])
    wait_until(lambda: deployment.decided(ids) == count, 120, f"{count} verdicts")
    wait_until(lambda: _skipped(deployment) >= count * (_TIMES - 1), 120, "every loser to step back")
    operations = deployment.operations()
    assert operations.executed_again == 0
    assert max(operations.committed.values()) == 1
    return {"jobs": count, "verdicts": count, "duplicate_skipped": _skipped(deployment), "judged_again": 0}


@row(
    "F9",
    injection="60 jobs, each in 8 messages at once, for 8 takers in 2 worker processes",
    expected="one verdict each, losers logged as duplicate_skipped, no unknown error",
)
def test_eight_takers_of_one_job_give_one_verdict(
    deploy: Deploy, ledger_url: str, redis_server: RedisServer, seen: Seen
) -> None:
    seen(**_race(deploy(ledger_url), count=60, processes=2, concurrency=4))


@pytest.mark.nightly
@row(
    "F9",
    injection="200 jobs, each in 8 messages at once, for 8 worker processes",
    expected="one verdict each, losers logged as duplicate_skipped, no unknown error",
)
def test_eight_processes_after_one_job_give_one_verdict(
    deploy: Deploy, ledger_url: str, redis_server: RedisServer, seen: Seen
) -> None:
    seen(**_race(deploy(ledger_url), count=200, processes=8, concurrency=1))


def test_a_row_that_is_locked_while_its_message_is_taken_is_not_left_to_the_sweeper(
    deploy: Deploy, migrated_postgres_url: str
) -> None:
    deployment = deploy(migrated_postgres_url, CODE_WORKER_WORKER__SWEEP_INTERVAL_S="300")
    deployment.worker()
    deployment.started()
    with closing(Publisher.for_producer(deployment.settings)) as publisher:
        publisher.depth(NORMAL)
        # The worker tries for a third of a second; on a busy machine the lock may be held for longer than that.
        assert any(_judged_though_locked(deployment, publisher) for _ in range(10))


def _judged_though_locked(deployment: FaultDeployment, publisher: Publisher) -> bool:
    """Whether a job was judged whose row was locked as its message was taken; one left behind gets a new one."""
    claims, skipped = len(deployment.events("jobs_claimed")), _skipped(deployment)
    (uri,) = deployment.images(1)
    ids = deployment.ledger.run(lambda session: jobs.accept(session, [jobs.NewJob(uri)]))
    deployment.accepted += ids
    with deployment.ledger.engine.begin() as connection:
        # As a producer does that notes that it rang.
        connection.execute(text("update jobs set published_at = now() where due_at is not null"))
        publisher.publish(NORMAL, ids)
        wait_until(lambda: len(deployment.events("jobs_claimed")) > claims, 120, "a claim that passes it over")
    wait_until(lambda: deployment.decided(ids) or _skipped(deployment) > skipped, 120, "the worker's answer")
    if deployment.decided(ids):
        return True
    publisher.publish(NORMAL, ids)
    wait_until(lambda: deployment.decided(ids), 120, "the verdict")
    return False


@row(
    "F10",
    injection="a batch of 10 s, and another app on the broker that gives messages 2 s before it delivers them again",
    expected="one verdict, judged once; a visibility timeout below 4 batches is refused at start",
)
@pytest.mark.parametrize("database", ["postgresql", pytest.param("sqlite", marks=pytest.mark.nightly)])
def test_a_batch_longer_than_the_visibility_timeout_is_judged_once(
    deploy: Deploy,
    request: pytest.FixtureRequest,
    database: str,
    slow_jobs: dict[str, str],
    redis_server: RedisServer,
    seen: Seen,
) -> None:
    url = request.getfixturevalue("sqlite_url" if database == "sqlite" else "migrated_postgres_url")
    deployment = deploy(url, **slow_jobs)
    deployment.worker("--concurrency", "4")
    deployment.started()
    (job,) = deployment.enqueue(deployment.images(1), metadata={"seconds": 10})
    wait_until(lambda: deployment.counts().get("running"), 120, "the batch to begin")
    over = threading.Event()
    impatient = threading.Thread(target=_restore_early, args=(deployment, over))
    impatient.start()
    try:
        wait_until(lambda: deployment.decided([job]), 120, "the verdict")
    finally:
        over.set()
        impatient.join(120)
    again = _skipped(deployment)
    assert again, "the message was delivered again while the batch was under way"
    assert deployment.operations().claimed[job] == 1
    refused = deployment.worker(CODE_WORKER_BROKER__VISIBILITY_TIMEOUT_S="479")
    assert refused.process.wait(120) == 2
    assert "visibility timeout of 479 s" in deployment.events("configuration_error")[0]["error"]
    seen(delivered_again=again, judged=1, refused_below_s=480)


def _restore_early(deployment: FaultDeployment, over: threading.Event) -> None:
    """What a consumer does whose app has a visibility timeout of 2 s: on one broker the shortest wins."""
    options = transport_options(deployment.settings) | {"visibility_timeout": 2}
    url = deployment.settings.resolved_broker_url
    with Connection(url, transport=REDIS_TRANSPORT, transport_options=options) as connection:
        channel = connection.channel()
        while not over.wait(0.5):
            channel.qos.restore_visible(interval=1)
            time.sleep(0)
