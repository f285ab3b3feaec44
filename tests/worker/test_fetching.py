"""A source that fails is left alone for a while, tried by one image at a time, and used again once it works."""

from __future__ import annotations

import threading

import pytest

from code_worker.errors import ImageRejectedError, SourceCredentialsError, SourcePausedError, TransientError
from code_worker.types import RejectReason
from code_worker.worker.judging.fetching import FAILURES, FIRST_REST_S, LONGEST_REST_S, GuardedSources
from tests.moderation.doubles import DictSources

LATE = TransientError(RejectReason.FETCH_TIMEOUT, "late")


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def objects() -> DictSources:
    return DictSources({"s3://bad/a": LATE, "s3://good/a": b"good", "s3://bad/gone": LATE})


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def guarded(objects: DictSources, clock: Clock) -> GuardedSources:
    return GuardedSources(objects, clock)


def fail(guarded: GuardedSources, times: int = FAILURES) -> None:
    for _ in range(times):
        with pytest.raises(TransientError, match="late"):
            guarded.fetch("s3://bad/a")


def paused(guarded: GuardedSources) -> float:
    """For how long the source is said to be left alone."""
    with pytest.raises(SourcePausedError, match="s3://bad is left alone") as caught:
        guarded.fetch("s3://bad/a")
    return caught.value.wait_s


def test_a_source_that_fails_in_a_row_is_left_alone_and_others_are_not(
    guarded: GuardedSources, objects: DictSources
) -> None:
    fail(guarded)
    assert paused(guarded) == FIRST_REST_S
    assert objects.fetched.count("s3://bad/a") == FAILURES
    assert guarded.fetch("s3://good/a").data == b"good"


def test_a_source_that_fails_now_and_then_is_used_on(guarded: GuardedSources, objects: DictSources) -> None:
    for answer in (objects.objects["s3://good/a"], ImageRejectedError(RejectReason.NOT_FOUND)):
        fail(guarded, FAILURES - 1)
        objects.objects["s3://bad/a"] = answer
        try:
            guarded.fetch("s3://bad/a")
        except ImageRejectedError:
            assert isinstance(answer, ImageRejectedError)
        objects.objects["s3://bad/a"] = LATE
    fail(guarded, FAILURES - 1)


def test_one_image_at_a_time_tries_it_and_the_distances_grow(guarded: GuardedSources, clock: Clock) -> None:
    fail(guarded)
    rests = []
    for _ in range(5):
        clock.now += paused(guarded)
        fail(guarded, 1)
        rests.append(paused(guarded))
    assert rests == [4.0, 8.0, LONGEST_REST_S, LONGEST_REST_S, LONGEST_REST_S]


def test_while_one_image_tries_the_others_wait(clock: Clock) -> None:
    asked, answer = threading.Event(), threading.Event()

    class Slow(DictSources):
        def fetch(self, uri):  # type: ignore[no-untyped-def]
            if asked.is_set():
                return super().fetch(uri)
            asked.set()
            assert answer.wait(120)
            return super().fetch(uri)

    objects = Slow({"s3://bad/a": LATE})
    asked.set()
    guarded = GuardedSources(objects, clock)
    fail(guarded)
    clock.now += FIRST_REST_S
    asked.clear()
    objects.objects["s3://bad/a"] = b"works again"
    found: list[bytes] = []
    probe = threading.Thread(target=lambda: found.append(guarded.fetch("s3://bad/a").data))
    probe.start()
    assert asked.wait(120)
    assert paused(guarded) == FIRST_REST_S
    answer.set()
    probe.join()
    assert found == [b"works again"]
    assert guarded.fetch("s3://bad/a").data == b"works again"


def test_one_answer_opens_it_and_an_image_that_is_not_there_is_one(
    guarded: GuardedSources, objects: DictSources, clock: Clock
) -> None:
    fail(guarded)
    clock.now += FIRST_REST_S
    objects.objects["s3://bad/gone"] = ImageRejectedError(RejectReason.NOT_FOUND)
    with pytest.raises(ImageRejectedError):
        guarded.fetch("s3://bad/gone")
    fail(guarded, FAILURES - 1)


def test_a_damaged_body_is_one_objects(guarded: GuardedSources, objects: DictSources) -> None:
    for reason in (RejectReason.CHECKSUM_MISMATCH, RejectReason.FETCH_TRUNCATED):
        objects.objects["s3://bad/gone"] = TransientError(reason, "damaged")
        for _ in range(2 * FAILURES):
            with pytest.raises(TransientError, match="damaged"):
                guarded.fetch("s3://bad/gone")


def test_wrong_credentials_are_the_ledgers_to_pause(guarded: GuardedSources, objects: DictSources) -> None:
    objects.objects["s3://bad/a"] = SourceCredentialsError("s3://bad", "ExpiredToken")
    for _ in range(2 * FAILURES):
        with pytest.raises(SourceCredentialsError):
            guarded.fetch("s3://bad/a")
    guarded.paused = {"s3://bad": 77.0}
    assert paused(guarded) == 77.0
