"""The database is restarted: nothing that was committed is missing, and work goes on."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from tests.faults.conftest import Deploy
from tests.faults.deployment import FaultDeployment
from tests.faults.postgres import WAYS, MortalPostgres
from tests.faults.rows import Seen, row
from tests.worker.harness import wait_until


@pytest.fixture
def mortal_postgres() -> Iterator[MortalPostgres]:
    with tempfile.TemporaryDirectory(prefix="code-worker-mortal-") as directory:
        server = MortalPostgres(Path(directory) / "data")
        yield server
        server.stop()


def _seconds_to_the_next(deployment: FaultDeployment) -> float:
    """Seconds until one job more has a verdict."""
    began, before = time.monotonic(), deployment.decided()
    wait_until(lambda: deployment.decided() > before, 30, "the first verdict after the fault")
    return time.monotonic() - began


@row(
    "F12",
    injection="PostgreSQL ended fast, immediately and by SIGKILL while verdicts are written, {rounds} times each",
    expected="0 committed verdicts missing, no job blamed; first job done within 10 s of its return",
)
@pytest.mark.parametrize("rounds", [1, pytest.param(3, marks=pytest.mark.nightly)])
def test_postgresql_that_is_restarted_in_the_midst_of_writing_loses_nothing(
    mortal_postgres: MortalPostgres, deploy: Deploy, rounds: int, seen: Seen
) -> None:
    deployment = deploy(mortal_postgres.new_database(), CODE_WORKER_WORKER__STORE_EMBEDDINGS="false")
    paths, slowest, committed = deployment.images(200), 0.0, 0
    deployment.worker()
    deployment.started()
    for way in [*WAYS] * rounds:
        ids = deployment.enqueue(paths)
        wait_until(lambda ids=ids: deployment.decided(ids) >= 4, 60, "verdicts are being written")
        before = set(deployment.operations().committed)
        deployment.ledger.close()
        mortal_postgres.end(way)
        time.sleep(0.5)
        mortal_postgres.again()
        slowest = max(slowest, _seconds_to_the_next(deployment))
        committed = len(before)
        wait_until(lambda: not deployment.unfinished(), 60, "all of them")
        assert deployment.decided(list(before)) == len(before), "what was committed is there"
    with deployment.ledger.engine.connect() as connection:
        blamed = connection.execute(text("select count(*) from jobs where faults > 0")).scalar_one()
        rejected = connection.execute(text("select count(*) from verdicts where outcome = 'rejected'")).scalar_one()
    assert (blamed, rejected) == (0, 0)
    assert slowest <= 10
    seen(first_job_done_s=slowest, committed=committed, missing=0, blamed=blamed)
