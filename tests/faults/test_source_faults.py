"""A bucket that is down: its jobs wait and are not to blame, those of others do not, and none is rejected for it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import pytest
from sqlalchemy import text

from tests import fault_s3 as fault
from tests.fault_s3 import FaultServer
from tests.faults.conftest import Deploy
from tests.faults.deployment import FaultDeployment
from tests.faults.rows import Bar, Seen, row
from tests.worker.harness import jpeg, wait_until

JOBS = 40
OUTAGE_S = 12.0
DRAINED_WITHIN_S = 60.0


class Buckets:
    """Gives every key of every bucket an image, except while the bucket `shaky` has its trouble."""

    def __init__(self, trouble: fault.Behaviour) -> None:
        self.trouble = trouble
        self.over = threading.Event()

    def __call__(self, handler: Any) -> None:
        if handler.path.startswith("/shaky/") and not self.over.is_set():
            self.trouble(handler)
        else:
            number = int(handler.path.partition("?")[0].rsplit("/", 1)[1])
            fault.whole(jpeg(number))(handler)


def settings_of(server: FaultServer) -> dict[str, str]:
    return {
        "CODE_WORKER_S3__ENDPOINT_URL": server.url,
        "CODE_WORKER_S3__REGION": "us-east-1",
        "CODE_WORKER_S3__ACCESS_KEY_ID": "key",
        "CODE_WORKER_S3__SECRET_ACCESS_KEY": "secret",
        "CODE_WORKER_S3__PATH_STYLE": "true",
        "CODE_WORKER_S3__BUCKETS": '["shaky", "steady"]',
    }


def requests_by_bucket(server: FaultServer) -> Counter[str]:
    return Counter(request["path"].split("/")[1] for request in server.requests)


def outcomes(deployment: FaultDeployment, ids: list[str]) -> Counter[str]:
    client = deployment.client()
    verdicts = [client.verdict(job) for job in ids]
    return Counter("none" if verdict is None else verdict.outcome.value for verdict in verdicts)


def faults_of(deployment: FaultDeployment) -> int:
    """Most faults that any job is blamed for."""
    with deployment.ledger.engine.connect() as connection:
        return int(connection.execute(text("select max(faults) from jobs")).scalar_one())


@pytest.mark.slow(reason="lasts as long as the bucket is down")
@row(
    "F18",
    injection="one bucket answers 503 for 12 s, another works",
    expected="no job rejected, the other bucket undisturbed, all done within 60 s after",
)
def test_a_bucket_that_is_down_holds_up_no_other(deploy: Deploy, sqlite_url: str, seen: Seen, bar: Bar) -> None:
    buckets = Buckets(fault.error(503, "SlowDown"))
    with FaultServer(buckets) as server:
        deployment = deploy(sqlite_url, **settings_of(server))
        deployment.worker()
        deployment.started()
        shaky = deployment.enqueue([f"s3://shaky/{number}" for number in range(JOBS)])
        began = time.monotonic()
        wait_until(lambda: requests_by_bucket(server)["shaky"], 120, "the first request")
        steady = deployment.enqueue([f"s3://steady/{number}" for number in range(JOBS)])
        wait_until(lambda: deployment.decided(steady) == JOBS, bar(OUTAGE_S), "the other bucket's verdicts")
        steady_s = time.monotonic() - began
        time.sleep(max(0.0, OUTAGE_S - steady_s))
        asked, blamed = requests_by_bucket(server)["shaky"], faults_of(deployment)
        assert outcomes(deployment, shaky) == {"none": JOBS}
        buckets.over.set()
        recovered = time.monotonic()
        wait_until(lambda: deployment.decided(shaky) == JOBS, bar(DRAINED_WITHIN_S), "all verdicts")
        drained_s = time.monotonic() - recovered
        assert outcomes(deployment, shaky + steady) == {"judged": 2 * JOBS}
        seen(
            other_bucket_done_s=steady_s,
            requests_in_the_outage=asked,
            most_faults_of_a_job=blamed,
            drained_s=drained_s,
        )
        assert deployment.events("source_failing")
        assert deployment.events("source_works_again")


@pytest.mark.nightly
@row(
    "F22",
    injection="{code} on one bucket for 8 s, another works",
    expected="the bucket pauses and is told of, no job rejected, the other undisturbed, all done afterwards",
)
@pytest.mark.parametrize(
    ("status", "code"),
    [(400, "ExpiredToken"), (403, "AccessDenied"), (404, "NoSuchBucket"), (400, "InvalidArgument")],
)
def test_what_a_bucket_refuses_everybody_pauses_it_and_blames_no_image(
    deploy: Deploy, sqlite_url: str, seen: Seen, status: int, code: str
) -> None:
    buckets = Buckets(fault.error(status, code))
    with FaultServer(buckets) as server:
        deployment = deploy(sqlite_url, **settings_of(server))
        deployment.worker()
        deployment.started()
        shaky = deployment.enqueue([f"s3://shaky/{number}" for number in range(JOBS)])
        wait_until(lambda: deployment.events("source_paused"), 120, "the alarm")
        steady = deployment.enqueue([f"s3://steady/{number}" for number in range(JOBS)])
        began = time.monotonic()
        wait_until(lambda: deployment.decided(steady) == JOBS, 120, "the other bucket's verdicts")
        steady_s = time.monotonic() - began
        time.sleep(max(0.0, 8.0 - steady_s))
        assert outcomes(deployment, shaky) == {"none": JOBS}
        assert faults_of(deployment) == 0
        asked = requests_by_bucket(server)["shaky"]
        buckets.over.set()
        began = time.monotonic()
        wait_until(lambda: deployment.decided(shaky) == JOBS, 120, "all verdicts")
        assert outcomes(deployment, shaky + steady) == {"judged": 2 * JOBS}
        seen(
            other_bucket_done_s=steady_s,
            requests_meanwhile=asked,
            done_after_s=time.monotonic() - began,
            rejected=0,
        )
