"""A backfill never delays a live job by more than a batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sqlalchemy import text

from code_worker.store.engine import Store
from tests.worker.harness import Deployment, jpeg, wait_until

BACKFILL = 640


def verdicts_around(store: Store, live: str) -> tuple[int, int]:
    """How many verdicts were written before the job was accepted, and how many from then until its own."""
    statement = (
        "select count(*) filter (where v.created_at < j.created_at), "
        "count(*) filter (where v.created_at between j.created_at and l.created_at and v.id <> l.id) "
        "from verdicts v, jobs j join verdicts l on l.job_id = j.id where j.id = :live"
    )
    with store.engine.connect() as connection:
        before, between = connection.execute(text(statement), {"live": live}).one()
    return int(before), int(between)


def test_a_live_job_overtakes_a_backfill(
    deploy: Callable[..., Deployment], postgres_url: str, tmp_path: Path
) -> None:
    deployment = deploy(postgres_url)
    for number in range(BACKFILL):
        (tmp_path / "files" / f"{number}.jpg").write_bytes(jpeg(number))
    client = deployment.client()
    client.enqueue_many((str(tmp_path / "files" / f"{n}.jpg") for n in range(BACKFILL)), priority=1)
    deployment.worker()
    store = deployment.store()

    def done() -> int:
        with store.engine.connect() as connection:
            return int(connection.execute(text("select count(*) from verdicts")).scalar_one())

    wait_until(lambda: done() >= 64, 120, "the backfill under way")
    (tmp_path / "files" / "live.jpg").write_bytes(jpeg(10_000))
    live = client.enqueue(str(tmp_path / "files" / "live.jpg"), priority=9)
    wait_until(lambda: client.verdict(live), 120, "the live verdict")
    before, overtaken_by = verdicts_around(store, live)
    print(f"{overtaken_by} verdicts were written between the live job's enqueue and its verdict")
    # The batch that had to end first, and at most one more that ended while the live one was fetched.
    assert overtaken_by <= 2 * 64 + 1
    assert before + overtaken_by < BACKFILL, "the backfill went on"
