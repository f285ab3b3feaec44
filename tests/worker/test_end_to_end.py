"""The promise: whatever dies, every job ends with exactly one live verdict."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import text

from code_worker.store.engine import Store
from code_worker.types import Outcome
from tests.servers import RedisServer, S3Server
from tests.worker.harness import Deployment, jpeg, wait_until

JOBS = 500


def _counts(store: Store) -> Counter[str]:
    with store.engine.connect() as connection:
        return Counter(dict(connection.execute(text("select state, count(*) from jobs group by state")).all()))


def _upload(server: S3Server, bucket: str, count: int) -> list[str]:
    client = server.client()

    def put(number: int) -> str:
        client.put_object(Bucket=bucket, Key=f"{number}.jpg", Body=jpeg(number))
        return f"s3://{bucket}/{number}.jpg"

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(put, range(count)))


def test_500_jobs_survive_three_killed_workers_and_a_redis_that_comes_back_empty(
    deploy: Callable[..., Deployment], postgres_url: str, redis_server: RedisServer, s3_server: S3Server, bucket: str
) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    deployment = deploy(postgres_url)
    store = deployment.store()
    uris = _upload(s3_server, bucket, JOBS)
    worker = deployment.worker()
    wait_until(lambda: deployment.events("worker_starting"), 60, "a worker")
    client = deployment.client()
    ids = client.enqueue_many(uris)

    for kill in range(3):
        wait_until(lambda: _counts(store)["running"] > 0, 60, "a claimed batch")
        time.sleep(rng.uniform(0.05, 1.0))
        wait_until(lambda: _counts(store)["running"] > 0, 60, "a batch to die in")
        worker.kill()
        if kill == 1:
            redis_server.kill()
            time.sleep(rng.uniform(0.2, 1.5))
            redis_server.start()
        worker = deployment.worker()
    last_fault = time.monotonic()

    wait_until(lambda: _counts(store)["done"] == JOBS, 60, f"all verdicts: {_counts(store)}, seed {seed}")
    print(f"all done {time.monotonic() - last_fault:.1f} s after the last fault")
    with store.engine.connect() as connection:
        rows = connection.execute(text("select job_id, outcome, reason from verdicts")).all()
    assert len(rows) == JOBS
    assert {str(row.job_id) for row in rows} == set(ids)
    assert Counter(row.outcome for row in rows) == {Outcome.JUDGED: JOBS}, Counter(row.reason for row in rows)
    assert worker.terminate() == 0
    with store.engine.connect() as connection:
        idle = connection.execute(
            text("select count(*) from pg_stat_activity where state = 'idle in transaction'")
        ).scalar_one()
    assert idle == 0
