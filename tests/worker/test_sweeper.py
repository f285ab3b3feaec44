"""The sweeper: what nobody holds is published for again, whatever became of its message."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from sqlalchemy import text

from code_worker.publisher import Publisher
from code_worker.settings import Settings
from code_worker.store import jobs, verdicts
from code_worker.store.engine import Store
from code_worker.types import JobState, Outcome, RejectReason, Verdict
from code_worker.wire import BACKFILL, NORMAL
from code_worker.worker.judging.recorder import Recorder
from code_worker.worker.sweeper import Sweeper
from tests.servers import RedisServer, free_port


@pytest.fixture
def settings(tmp_path: Path, redis_server: RedisServer) -> Settings:
    return Settings(data_dir=tmp_path, broker_url=redis_server.url)


@pytest.fixture
def publisher(settings: Settings) -> Iterator[Publisher]:
    publisher = Publisher.for_producer(settings)
    yield publisher
    publisher.close()


@pytest.fixture
def sweeper(store: Store, publisher: Publisher, settings: Settings) -> Sweeper:
    return Sweeper(Recorder(store, settings.worker, "sweeper-1"), publisher, settings)


def _accept(store: Store, count: int, *, priority: int = 4, publish: bool = True) -> list[str]:
    new = [jobs.NewJob(f"s3://b/{number}", priority=priority) for number in range(count)]
    ids = store.run(lambda session: jobs.accept(session, new))
    if publish:
        store.run(lambda session: jobs.mark_published(session, ids))
    return ids


def _age(store: Store, seconds: int) -> None:
    """Moves every time of every job into the past; below 0 into the future, however slow the test is."""
    if store.dialect == "sqlite":
        shift = "strftime('%Y-%m-%d %H:%M:%f000', {0}, '" + f"{-seconds:+d}" + " seconds')"
    else:
        shift = "{0} - interval '" + str(seconds) + " seconds'"
    columns = ("due_at", "published_at", "created_at", "claimed_at")
    with store.engine.begin() as connection:
        connection.execute(text("update jobs set " + ", ".join(f"{name} = {shift.format(name)}" for name in columns)))


def test_a_broker_that_lost_everything_is_told_again(
    sweeper: Sweeper, store: Store, publisher: Publisher, redis_server: RedisServer
) -> None:
    assert sweeper.sweep().published == 0
    ids = _accept(store, 200)
    _age(store, -600)
    assert sweeper.sweep().published == 0, "just published: not yet anybody's business"
    _age(store, 600)
    with redis.Redis.from_url(redis_server.url) as server:
        server.flushall()
    publisher.publish(NORMAL, ["somebody-else"])
    assert sweeper.sweep().published == len(ids)
    assert publisher.depth(NORMAL) == 1 + 4
    assert sweeper.sweep().published == 0, "once is enough"


def test_a_first_start_is_no_loss_to_warn_of(
    sweeper: Sweeper, store: Store, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    def level(count: int) -> int:
        caplog.clear()
        assert sweeper.sweep().published == count
        (found,) = (each for each in caplog.records if "broker_without_mark" in each.getMessage())
        return found.levelno

    caplog.set_level(logging.INFO)
    first, *_ = _accept(store, 3)
    assert level(3) == logging.INFO, "enqueued before any worker was there"
    verdict = Verdict(first, "s3://b/0", Outcome.REJECTED, reason=RejectReason.NOT_FOUND)
    store.run(lambda session: verdicts.write(session, [verdict]))
    with redis.Redis.from_url(redis_server.url) as server:
        server.flushall()
    assert level(2) == logging.WARNING


def test_messages_that_were_deleted_are_sent_again_once_their_queue_is_empty(
    sweeper: Sweeper, store: Store, publisher: Publisher
) -> None:
    sweeper.sweep()
    _accept(store, 70, priority=1)
    _age(store, 20)
    assert publisher.depth(BACKFILL) == 0
    assert sweeper.sweep().published == 70
    assert publisher.depth(BACKFILL) == 2


def test_a_long_queue_is_not_rung_for_twice(sweeper: Sweeper, store: Store, publisher: Publisher) -> None:
    sweeper.sweep()
    _accept(store, 10)
    publisher.publish(NORMAL, ["ten jobs"])
    _age(store, 30)
    assert sweeper.sweep().published == 0


def test_accepted_but_unpublished_jobs_are_published(sweeper: Sweeper, store: Store) -> None:
    sweeper.sweep()
    _accept(store, 5, publish=False)
    _age(store, -600)
    assert sweeper.sweep().published == 0, "their producer has ten seconds"
    _age(store, 611)
    assert sweeper.sweep().published == 5


def test_a_job_that_used_up_its_attempts_is_quarantined_unseen(sweeper: Sweeper, store: Store) -> None:
    sweeper.sweep()
    (job,) = _accept(store, 1)
    for attempt in range(1, 4):
        claimed = store.run(lambda session: jobs.claim(session, [job], owner="dead", lease_s=0, max_attempts=3))
        assert [each.attempts for each in claimed] == [attempt]
        store.run(lambda session: jobs.release_owner(session, "dead"))
    assert sweeper.sweep().quarantined == 1
    verdict = store.run(lambda session: verdicts.live(session, job))
    assert verdict is not None
    assert verdict.reason is RejectReason.QUARANTINED
    info = store.run(lambda session: jobs.get(session, job))
    assert info is not None
    assert info.state == JobState.QUARANTINED
    assert sweeper.sweep().quarantined == 0


def test_suspects_go_in_short_messages(sweeper: Sweeper, store: Store, publisher: Publisher) -> None:
    sweeper.sweep()
    ids = _accept(store, 20)
    store.run(lambda session: jobs.claim(session, ids[:16], owner="dead", lease_s=60, max_attempts=3))
    store.run(lambda session: jobs.release_owner(session, "dead"))
    assert sweeper.sweep().published == 16
    assert publisher.depth(NORMAL) == 2


def test_only_one_sweeper_sweeps(sweeper: Sweeper, store: Store, publisher: Publisher, settings: Settings) -> None:
    sweeper.sweep()
    _accept(store, 3, publish=False)
    _age(store, 11)
    other = Sweeper(Recorder(store, settings.worker, "sweeper-2"), publisher, settings)
    assert other.sweep().published == 0
    assert sweeper.sweep().published == 3


def test_a_broker_that_is_away_is_survived(store: Store, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, broker_url=f"redis://127.0.0.1:{free_port()}/0")
    publisher = Publisher.for_producer(settings)
    _accept(store, 3, publish=False)
    _age(store, 11)
    assert Sweeper(Recorder(store, settings.worker, "sweeper-1"), publisher, settings).sweep().published == 0
    publisher.close()
