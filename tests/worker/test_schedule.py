"""Cron lines, the times they mean, and which of them are due."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path

import hypothesis
import pytest
from celery import Celery
from celery.beat import ScheduleEntry
from hypothesis import strategies as st

from code_worker.errors import ConfigurationError
from code_worker.settings import Settings, load_settings
from code_worker.settings.cron import cron_line
from code_worker.store import policies, releases
from code_worker.store.engine import Session, Store
from code_worker.store.ids import uuid7
from code_worker.store.learning import runs
from code_worker.store.learning import runs as schedule
from code_worker.wire import REFIT, RETRAIN, TRAIN_QUEUE
from code_worker.worker.app import install
from code_worker.worker.learning_watch import calibration_due, due
from code_worker.worker.schedule import CALIBRATE, UtcCrontab, beat_entries, schedules, times_from, times_until
from tests.store.acts import slots

WEDNESDAY = datetime(2026, 11, 25, 14, 30, 20, tzinfo=UTC)


def scheduled(**lines: str) -> Settings:
    return Settings(schedule=lines)


def times(line: str, now: datetime = WEDNESDAY, count: int = 3) -> tuple[list[str], list[str]]:
    cron = schedules(scheduled(retrain=line))["retrain"]
    return tuple(  # type: ignore[return-value]
        [f"{at:%Y-%m-%d %H:%M}" for at in islice(walk(cron, now), count)] for walk in (times_until, times_from)
    )


@pytest.mark.parametrize(
    "conf",
    [{}, {"timezone": "America/New_York"}, {"timezone": "Asia/Tokyo", "enable_utc": False}, {"enable_utc": False}],
)
@pytest.mark.parametrize("line", ["0 3 * * sun", "30 4 1 * *", "15 */6 * * *"])
def test_an_entry_of_beat_fires_at_the_times_that_the_trainer_looks_for(
    monkeypatch: pytest.MonkeyPatch, conf: dict[str, object], line: str
) -> None:
    monkeypatch.setattr("code_worker.worker.schedule.UtcCrontab.now", lambda self: WEDNESDAY.astimezone(self.tz))
    app = Celery("theirs", broker="memory://", set_as_current=False, changes=conf)
    cron = pickle.loads(
        pickle.dumps(beat_entries(scheduled(retrain=line))[RETRAIN]["schedule"])
    )  # as beat's file keeps it
    entry = ScheduleEntry(name=RETRAIN, task=RETRAIN, schedule=cron, app=app, last_run_at=app.now())
    before, after = next(times_until(cron, WEDNESDAY)), next(times_from(cron, WEDNESDAY))
    local = app.timezone
    for last_run, wait in (
        (WEDNESDAY, after - WEDNESDAY),
        (before, after - WEDNESDAY),
        # Not of the same hour: Celery 5.6 takes the next date then, and the trainer looks itself.
        (before - timedelta(hours=1), None),
    ):
        due, next_s = entry.schedule.is_due(last_run.astimezone(local))
        assert due is (wait is None)
        assert next_s == pytest.approx((after - WEDNESDAY).total_seconds())


def test_times_before_and_after_now() -> None:
    assert times("0 3 * * sun") == (
        ["2026-11-22 03:00", "2026-11-15 03:00", "2026-11-08 03:00"],
        ["2026-11-29 03:00", "2026-12-06 03:00", "2026-12-13 03:00"],
    )
    assert times("*/20 * * * *") == (
        ["2026-11-25 14:20", "2026-11-25 14:00", "2026-11-25 13:40"],
        ["2026-11-25 14:40", "2026-11-25 15:00", "2026-11-25 15:20"],
    )
    assert times("15 6,18 * * mon-fri", count=2) == (
        ["2026-11-25 06:15", "2026-11-24 18:15"],
        ["2026-11-25 18:15", "2026-11-26 06:15"],
    )
    assert times("0 0 29 2 *", count=1) == (["2024-02-29 00:00"], ["2028-02-29 00:00"])


def test_a_time_on_the_minute_is_due_at_once_and_not_again() -> None:
    now = WEDNESDAY.replace(second=0)
    before, after = times("30 14 * * *", now, count=1)
    assert before == ["2026-11-25 14:30"]
    assert after == ["2026-11-26 14:30"]


@pytest.mark.parametrize("line", ["daily", "61 * * * *", "0 0 31 2 *", "0 3 * * funday", "", "* * * * * *"])
def test_a_line_that_is_no_cron_line_is_a_wrong_setting(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match=r"schedule.refit: .*is no cron line"):
        load_settings(schedule={"refit": line})
    if not line:
        return
    with pytest.raises(ConfigurationError, match=r"schedule.refit in app.conf.code_worker: .*is no cron line"):
        load_settings(below={"schedule": {"refit": line}})
    (file := tmp_path / "settings.toml").write_text(f'[schedule]\nretrain = "* * * * *"\nrefit = "{line}"\n')
    monkeypatch.setenv("CODE_WORKER_CONFIG", str(file))
    with pytest.raises(ConfigurationError, match=rf"schedule.refit \({file}, line 3\): .*is no cron line"):
        load_settings()
    monkeypatch.setenv("CODE_WORKER_SCHEDULE__REFIT", line)
    with pytest.raises(ConfigurationError, match=r"CODE_WORKER_SCHEDULE__REFIT: .*is no cron line"):
        load_settings()


number = st.integers(0, 61).map(str) | st.sampled_from(["sun", "Mon", "saturday", "thurs", "7", "funday", "jan"])
numbers = st.builds("{}-{}".format, number, number) | number | st.just("*")
part = st.builds("{}/{}".format, numbers, st.integers(0, 40)) | numbers | numbers
field = st.lists(part, min_size=1, max_size=3).map(",".join)


@hypothesis.given(st.lists(field, min_size=5, max_size=5).map(" ".join))
@hypothesis.settings(deadline=None, max_examples=400)
def test_settings_accept_no_line_that_the_scheduler_refuses_or_that_never_comes(line: str) -> None:
    try:
        read = cron_line(line)
    except ValueError:
        return
    assert next(times_from(UtcCrontab.from_string(read), WEDNESDAY), None) is not None


@pytest.mark.parametrize(
    "line",
    [
        *("* * * * *", "  0  3 * * sun ", "*/15 0-6/2 1,15 * mon-fri", "0 0 29 2 *", "5 22-2 * * Fri-mon"),
        *("0 0 31 1,2 saturday,sun", "0 3 * * tues,thur-Satur"),
    ],
)
def test_lines_that_the_scheduler_takes_are_taken(line: str) -> None:
    assert next(times_from(UtcCrontab.from_string(cron_line(line)), WEDNESDAY)) > WEDNESDAY


def test_beat_gets_an_entry_for_each_schedule_that_is_set(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, schedule={"retrain": "0 3 * * sun"})
    app = Celery("theirs", broker="memory://", set_as_current=False)
    install(app, settings)
    entry = app.conf.beat_schedule[RETRAIN]
    assert (entry["task"], entry["kwargs"]) == (RETRAIN, {"scheduled": True})
    assert entry["options"]["queue"] == TRAIN_QUEUE
    assert (entry["schedule"].hour, entry["schedule"].day_of_week) == ({3}, {0})
    assert REFIT not in app.conf.beat_schedule
    assert app.tasks[RETRAIN].acks_late is False


def look(store: Store, settings: Settings, now: datetime) -> list[str]:
    return store.run(lambda session: due(session, settings, now))


def take(store: Store, name: str, at: datetime) -> bool:
    return store.run(lambda session: schedule.take_slot(session, name, at, run_id=uuid7(), outcome="started"))


def test_a_time_before_the_schedule_was_first_watched_was_not_missed(store: Store) -> None:
    settings = scheduled(retrain="0 3 * * sun")
    assert look(store, settings, WEDNESDAY) == []
    (noted,) = slots(store)
    assert (noted.slot.day, noted.run_id) == (22, None)
    assert look(store, settings, WEDNESDAY + timedelta(days=3)) == []
    assert look(store, settings, WEDNESDAY + timedelta(days=5)) == ["retrain"]


def test_a_time_that_has_just_come_is_due_although_none_was_watched_before(store: Store) -> None:
    assert look(store, scheduled(refit="30 14 * * *"), WEDNESDAY) == ["refit"]


def test_of_several_missed_times_the_last_is_caught_up_once(store: Store) -> None:
    settings = scheduled(retrain="0 3 * * sun")
    take(store, "retrain", datetime(2026, 11, 1, 3, tzinfo=UTC))
    assert look(store, settings, WEDNESDAY) == ["retrain"]
    assert take(store, "retrain", datetime(2026, 11, 22, 3, tzinfo=UTC))
    assert look(store, settings, WEDNESDAY) == []


def test_a_time_that_comes_while_a_run_is_under_way_waits_for_its_end(store: Store) -> None:
    settings = scheduled(refit="30 14 * * *")
    run = store.run(
        lambda session: runs.start(
            session, id=uuid7(), kind="retrain", by="a", owner="a:1", config={}, base_release=None
        )
    )
    assert run is not None
    assert look(store, settings, WEDNESDAY) == []
    store.run(lambda session: runs.finish(session, run.lease, "skipped"))
    assert look(store, settings, WEDNESDAY) == ["refit"]


def test_after_a_promotion_thresholds_of_another_release_are_due_once(store: Store) -> None:
    evidence = {"source": "labels:", "max_fpr": 0.01, "max_fnr": 0.05}

    def happen(session: Session) -> None:
        for name in ("r-1", "r-2"):
            facts = {"location": "", "manifest": {"heads": {}}, "source": "", "by": "ann"}
            releases.add(session, id=name, manifest_sha256=name, **facts)
        releases.move_alias(session, "champion", "r-1", by="ann", reason="")
        policies.put(session, low=0.2, high=0.8, by="ann", evidence=evidence, release_id="r-1")
        policies.put(session, low=0.2, high=0.8, by="ann", tenant="by hand", release_id="r-0")

    store.run(happen)
    settings = Settings(schedule={"calibrate": True})
    assert look(store, settings, WEDNESDAY) == []
    store.run(lambda session: releases.move_alias(session, "champion", "r-2", by="ann", reason=""))
    assert look(store, settings, WEDNESDAY) == ["calibrate"]
    assert look(store, Settings(), WEDNESDAY) == []
    promoted = store.run(lambda session: calibration_due(session, settings))
    assert promoted is not None
    store.run(lambda session: schedule.take_slot(session, CALIBRATE, promoted, run_id=None, outcome="too few images"))
    assert look(store, settings, WEDNESDAY) == []
    store.run(lambda session: releases.move_alias(session, "champion", "r-1", by="ann", reason=""))
    assert look(store, settings, WEDNESDAY) == [], "the champion that it was calibrated on is back"


def test_a_run_that_was_left_behind_comes_first(store: Store) -> None:
    store.run(
        lambda session: runs.start(
            session, id=uuid7(), kind="refit", by="a", owner="a:1", config={}, base_release=None
        )
    )
    store.run(lambda session: runs.release_owner(session, "a"))
    assert look(store, scheduled(refit="30 14 * * *"), WEDNESDAY) == ["resume"]
