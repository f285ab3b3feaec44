"""A plugin's choice that fails, or names no head, on job after job: it is said, and not for each of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import pytest

from code_worker.errors import PluginError
from code_worker.logs import Repeats
from code_worker.moderation.judge import Judge, Judged, SelectHead
from code_worker.moderation.policy import PolicyBook
from code_worker.moderation.pool import PriorityPool
from code_worker.settings import LimitSettings
from code_worker.types import Job
from tests.moderation.doubles import DictSources, FirstValueHead, png, runtime


@pytest.fixture
def pool() -> Iterator[PriorityPool]:
    with PriorityPool(2) as pool:
        yield pool


def judge_jobs(pool: PriorityPool, number: int, select_head: SelectHead) -> Judged:
    objects = {f"image-{place}": png(place) for place in range(number)}
    judge = Judge(sources=DictSources(objects), pool=pool, limits=LimitSettings(), select_head=select_head)
    jobs = [Job(uri, uri) for uri in objects]
    return judge.judge(jobs, runtime(**{"soft-knn": FirstValueHead()}), PolicyBook())


def test_two_errors_that_alternate_are_two_tracebacks_whatever_they_say_of_the_job(
    pool: PriorityPool, caplog: pytest.LogCaptureFixture
) -> None:
    def alternating(job: Job, heads: Sequence[str]) -> str | None:
        try:
            if int(job.uri[-1]) % 2:
                raise LookupError(f"no row for {job.uri}")
            raise ZeroDivisionError(f"no images of {job.uri}")
        except (LookupError, ZeroDivisionError) as error:
            raise PluginError("the choice of plugin by_tenant failed") from error

    judged = judge_jobs(pool, 10, alternating)
    assert len(judged.faults) == 10, "each job waits"
    said = [record.msg for record in caplog.records if record.msg["event"] == "select_head_failed"]
    assert ["LookupError: no row" in line["exception"] for line in said].count(True) == 1
    assert ["ZeroDivisionError: no images" in line["exception"] for line in said].count(True) == 1
    assert len(said) == 2


def test_an_answer_that_is_spelt_otherwise_is_said_once_with_the_head_that_was_meant(
    pool: PriorityPool, caplog: pytest.LogCaptureFixture
) -> None:
    judged = judge_jobs(pool, 3, lambda job, heads: "soft_knn")
    detail = "unknown head 'soft_knn'; release r-test has soft-knn; did you mean 'soft-knn'?"
    assert [verdict.detail for verdict in judged.verdicts] == [detail] * 3
    (line,) = [record for record in caplog.records if record.msg["event"] == "head_unknown"]
    assert (line.levelno, line.msg["error"]) == (logging.WARNING, detail)


def test_what_repeats_is_due_again_after_its_time_with_how_often_it_came() -> None:
    now = 0.0
    repeats = Repeats(60.0, clock=lambda: now)
    assert [repeats.due("a"), repeats.due("a"), repeats.due("b"), repeats.due("a")] == [0, None, 0, None]
    now = 60.0
    assert [repeats.due("a"), repeats.due("a")] == [2, None]


def test_what_was_said_is_forgotten_before_it_fills_the_memory() -> None:
    repeats = Repeats()
    assert {repeats.due(kind) for kind in range(10_000)} == {0}
    assert len(repeats._said) <= Repeats._KINDS
