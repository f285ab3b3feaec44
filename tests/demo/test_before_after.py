from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from code_worker.demo.findings import GroupRow, by_group, lesson_checks
from code_worker.demo.second_act import Lesson
from code_worker.demo.toy_images import NEWCOMER
from tests.demo.lessons import ASKED, FAKE, NEW, OLD, lesson, moves, verdict


def failed(made: Lesson) -> list[str]:
    return [statement for statement, holds in lesson_checks(made) if not holds]


def test_rows_tell_the_labelled_images_from_the_others_and_put_the_newcomer_last() -> None:
    assert by_group(lesson()) == [
        GroupRow("real", 2, 1.0, 1.0),
        GroupRow("real, labelled", 1, 0.0, 1.0),
        GroupRow("toy-nearest", 1, 1.0, 1.0),
        GroupRow(NEWCOMER, 3, pytest.approx(1 / 3), 1.0),
        GroupRow(f"{NEWCOMER}, labelled", 1, 0.0, 0.0),
    ]


def test_every_check_holds_when_the_newcomer_was_learned() -> None:
    assert failed(lesson()) == []
    assert len(list(lesson_checks(lesson()))) == 7


def test_a_rejected_run_fails_its_check_and_leaves_nothing_to_compare() -> None:
    rejected = lesson("rejected")
    assert failed(rejected) == ["the gate let the new release pass (rejected)"]
    assert {row.after for row in by_group(rejected)} == {None}


def test_images_that_were_labelled_do_not_count_as_found() -> None:
    made = lesson(after=(*ASKED[1][:7], FAKE))
    assert [one.partition(",")[0] for one in failed(made)] == [f"{NEWCOMER} is found now"]


def test_a_newcomer_that_was_never_missed_is_no_show() -> None:
    made = lesson()
    made.before = {job: replace(one, label=FAKE) if "7" > job[-1] > "3" else one for job, one in made.before.items()}
    made.ledger = [*made.before.values(), *made.ledger[8:]]
    assert [one.partition(":")[0] for one in failed(made)] == [
        f"{NEWCOMER} was missed at first",
        f"{NEWCOMER} is found now, on images that nobody labelled",
    ]


@pytest.mark.parametrize(
    ("spoilt", "check"),
    [
        ({"moves": moves(NEW, OLD, NEW)}, "the champion moved once"),
        ({"afterwards": [verdict(8, NEWCOMER, FAKE, OLD)]}, "the running worker judged 1 more with it"),
        ({"ledger": lesson().ledger[1:]}, "the old verdicts stay as they were"),
        (
            {"ledger": lesson().ledger[:-2]},
            "each of 8 verdicts was given again, and the new one names the old",
        ),
    ],
)
def test_each_part_of_the_promise_is_checked_on_its_own(spoilt: dict[str, Any], check: str) -> None:
    assert failed(replace(lesson(), **spoilt)) == [check]
