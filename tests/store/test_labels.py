"""Labels: added and never changed; what repeats says nothing new; a stated rule makes them one."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select, text

from code_worker.errors import StoreError
from code_worker.store.engine import Store
from code_worker.store.learning import kept_images, labels
from code_worker.store.learning.kept_images import KeptImage
from code_worker.store.learning.label_rules import ResolvedLabel
from code_worker.store.learning.labels import LabelFilter, NewLabel, Statement
from code_worker.store.models import db_now

A, B, C = "a" * 64, "b" * 64, "c" * 64
DAY = datetime(2024, 3, 1, tzinfo=UTC)


def said(sha256: str, label: str, by: str = "alice", **more: Any) -> NewLabel:
    return NewLabel(sha256, label, by, more.pop("source", "api"), **more)


def add(store: Store, *new: NewLabel) -> int:
    return store.run(lambda session: labels.add(session, new))


def listed(store: Store, **wanted: Any) -> list[Statement]:
    return store.run(
        lambda session: labels.list_labels(session, LabelFilter(**wanted), limit=100, newest_first=False)
    )


def a_later_moment(store: Store) -> datetime:
    """The database's time, once its clock has passed all that was written; SQLite's counts milliseconds."""
    last = max(statement.created_at for statement in listed(store))
    while (now := store.run(lambda session: session.scalar(select(db_now())))) is None or now <= last:
        pass
    return now


def resolved(store: Store, rule: str = "latest", trusted: Sequence[str] = ()) -> dict[str, ResolvedLabel]:
    found = store.run(lambda session: labels.resolve(session, rule=rule, trusted=trusted))
    return {label.sha256: label for label in found}


def test_a_statement_keeps_every_field(store: Store) -> None:
    new = said(
        A, "fake", generator="sdxl", collection="uploads", uri="s3://b/ü.jpg", note="", at=DAY + timedelta(0, 0, 7)
    )
    assert add(store, new) == 1
    (kept,) = listed(store)
    assert kept.created_at.tzinfo is UTC
    fields = ("id", "sha256", "label", "generator", "collection", "by", "source", "uri", "job_id", "note", "at")
    assert [getattr(kept, name) for name in fields] == [getattr(new, name) for name in fields]


def test_without_a_time_it_is_said_when_it_is_written(store: Store) -> None:
    add(store, said(A, "real"))
    (kept,) = listed(store)
    assert kept.at == kept.created_at


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"sha256": "abc"}, "no content hash"),
        ({"sha256": "A" * 64}, "no content hash"),
        ({"label": "uncertain"}, "real or fake, not 'uncertain'"),
        ({"label": "real", "generator": "sdxl"}, "a real image has no generator"),
        ({"generator": "real"}, "no generator can be called 'real'"),
        ({"generator": "old fakes"}, "no generator can be called 'old fakes'"),
        ({"by": ""}, "by must have 1 to 200 characters, not 0"),
        ({"by": "x" * 201}, "by must have 1 to 200 characters, not 201"),
        ({"generator": ""}, "generator must have"),
        ({"collection": "a\0b"}, "collection holds a NUL"),
        ({"note": "\ud800"}, "note holds a NUL or half a surrogate pair"),
        ({"note": "x" * 2001}, "note must have"),
        ({"uri": "s3://b/" + "x" * 5000}, "uri must have"),
        ({"at": datetime(2200, 1, 1, tzinfo=UTC)}, "at: 2200-01-01 .* is in the future"),
        ({"at": datetime(2024, 1, 1)}, "no time zone"),  # noqa: DTZ001 - that it has none is the point
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        replace(said(A, "fake"), **wrong)


@pytest.mark.parametrize("change", ["label = 'real'", "note = note", "\"by\" = 'mallory'"])
def test_the_database_refuses_to_change_a_label(store: Store, change: str) -> None:
    add(store, said(A, "fake"))
    before = listed(store)
    with pytest.raises(StoreError, match="labels are immutable"):
        store.run(lambda session: session.execute(text(f"UPDATE labels SET {change}")))
    assert listed(store) == before


def test_who_says_the_same_again_adds_nothing(store: Store) -> None:
    assert add(store, said(A, "fake", generator="sdxl")) == 1
    assert add(store, said(A, "fake", generator="sdxl")) == 0
    assert add(store, said(A, "fake", generator="sdxl"), said(A, "fake", generator="sdxl", source="cli")) == 0
    assert add(store, said(A, "fake", generator="flux")) == 1
    assert add(store, said(A, "fake", "bob", generator="flux"), said(B, "fake", generator="flux")) == 2


@pytest.mark.parametrize("at_once", [True, False])
def test_who_changes_their_mind_twice_has_said_three_things(store: Store, at_once: bool) -> None:
    thrice = [said(A, label) for label in ("real", "fake", "real")]
    assert (add(store, *thrice) if at_once else sum(add(store, new) for new in thrice)) == 3
    assert [statement.label for statement in listed(store)] == ["real", "fake", "real"]
    assert resolved(store)[A].label == "real"


def test_who_is_contradicted_may_uphold_what_they_said(store: Store) -> None:
    add(store, said(A, "real"))
    add(store, said(A, "fake", "bob"))
    assert resolved(store)[A].label == "fake"
    assert add(store, said(A, "real")) == 1
    assert add(store, said(A, "real")) == 0
    assert resolved(store)[A].label == "real"


def test_a_transaction_that_runs_again_after_a_lost_answer_adds_nothing(store: Store) -> None:
    new = [said(A, label) for label in ("real", "fake", "real")]
    assert add(store, *new) == 3
    assert add(store, *new) == 0
    assert len(listed(store)) == 3


def test_processes_that_say_the_same_at_the_same_moment_say_it_once(store: Store) -> None:
    def race(_: int) -> int:
        return add(store, *(said(f"{number:064x}", "fake") for number in range(30)))

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(race, range(4))) == 30


def test_a_statement_with_a_time_is_the_same_whenever_it_is_read(store: Store) -> None:
    new = [said(A, "real", at=DAY), said(A, "fake", at=DAY + timedelta(1)), said(A, "real", at=DAY + timedelta(2))]
    again = [replace(one, id=NewLabel(A, "real", "x", "x").id, source="file:copy.csv", from_file=True) for one in new]
    assert add(store, *new[::-1]) == 3
    assert add(store, *again) == 0
    assert resolved(store)[A].label == "real"
    assert resolved(store)[A].last_at == DAY + timedelta(2)


def test_a_file_without_times_read_twice_takes_nothing_back(store: Store) -> None:
    def row(label: str, name: str) -> NewLabel:
        return said(A, label, source=f"file:{name}", from_file=True)

    assert add(store, row("real", "monday.csv")) == 1
    assert add(store, row("real", "copy.csv")) == 0
    assert add(store, row("fake", "tuesday.csv")) == 1
    assert add(store, row("real", "monday.csv")) == 0
    assert resolved(store)[A].label == "fake"
    assert add(store, row("real", "wednesday.csv")) == 1
    assert resolved(store)[A].label == "real"


def test_a_file_read_again_upholds_nothing_against_a_contradiction(store: Store) -> None:
    add(store, said(A, "real", source="file:a.csv", from_file=True))
    add(store, said(A, "fake", "bob"))
    assert add(store, said(A, "real", source="file:b.csv", from_file=True)) == 0
    assert resolved(store)[A].label == "fake"


def test_rows_of_files_are_remembered(store: Store) -> None:
    store.run(lambda session: labels.note_imported(session, {"1" * 64: A, "2" * 64: B}))
    store.run(lambda session: labels.note_imported(session, {"1" * 64: A, "3" * 64: C}))
    found = store.run(lambda session: labels.imported(session, ["1" * 64, "3" * 64, "4" * 64, "1" * 64]))
    assert found == {"1" * 64: A, "3" * 64: C}


def contradict(store: Store) -> None:
    """Of A: alice real, bob fake, carol real then fake, dave real; the last is alice's, by its time."""
    add(
        store,
        said(A, "real", "alice", collection="news", at=DAY + timedelta(9)),
        said(A, "fake", "bob", generator="sdxl", at=DAY + timedelta(1)),
        said(A, "real", "carol", at=DAY),
        said(A, "fake", "carol", at=DAY + timedelta(3)),
        said(A, "real", "dave", at=DAY + timedelta(2)),
        said(B, "fake", "bob", at=DAY),
        said(B, "fake", "carol", generator="flux", collection="ads", at=DAY - timedelta(1)),
    )


@pytest.mark.parametrize(
    ("rule", "trusted", "label"),
    [
        ("latest", (), "real"),
        ("majority", (), None),
        ("unanimous", (), None),
        ("trusted", (), "real"),
        ("trusted", ("nobody", "carol", "alice"), "fake"),
        ("trusted", ("dave", "bob"), "real"),
    ],
)
def test_each_rule_decides_as_it_states(store: Store, rule: str, trusted: tuple[str, ...], label: str | None) -> None:
    contradict(store)
    found = resolved(store, rule, trusted)
    assert found[A].label == label if label else A not in found
    assert found[B].label == "fake"


def test_a_resolved_label_says_who_agreed_and_when(store: Store) -> None:
    contradict(store)
    found = resolved(store)
    assert (found[A].labellers, found[A].contradicted, found[A].last_at) == (4, True, DAY + timedelta(9))
    assert (found[A].generator, found[A].collection) == (None, "news")
    assert (found[B].labellers, found[B].contradicted, found[B].last_at) == (2, False, DAY)
    assert (found[B].generator, found[B].collection) == ("flux", "ads")
    assert found[A].first_created_at == min(statement.created_at for statement in listed(store, sha256=A))


def test_a_majority_is_of_labellers_not_of_statements(store: Store) -> None:
    add(store, *(said(A, label) for label in ("real", "fake", "real", "fake", "real")))
    add(store, said(A, "fake", "bob"), said(A, "fake", "carol", generator="sdxl"))
    found = resolved(store, "majority")[A]
    assert (found.label, found.generator, found.labellers) == ("fake", "sdxl", 3)


def test_only_images_spoken_of_since_are_resolved_with_all_that_was_said(store: Store) -> None:
    add(store, said(A, "real"), said(B, "real"))
    border = a_later_moment(store)
    add(store, said(A, "fake", "bob"))
    found = store.run(lambda session: labels.resolve(session, rule="latest", since=border))
    assert [(label.sha256, label.label, label.labellers) for label in found] == [(A, "fake", 2)]


def test_an_unknown_rule_is_refused(store: Store) -> None:
    add(store, said(A, "real"))
    with pytest.raises(ValueError, match="'loudest' is no rule for labels; rules are latest, majority"):
        resolved(store, "loudest")


def test_conflicts_are_between_what_labellers_say_now(store: Store) -> None:
    contradict(store)
    add(store, said(C, "real"), said(C, "fake"), said(C, "fake", "bob"))
    found = store.run(labels.conflicts)
    assert [conflict.sha256 for conflict in found] == [A]
    assert [statement.by for statement in found[0].statements] == ["carol", "bob", "dave", "carol", "alice"]


def test_who_is_ignored_contradicts_nobody(store: Store) -> None:
    add(store, said(A, "real"), said(A, "fake", "mallory"))
    add(store, said(B, "real"), said(B, "fake", "bob"), said(B, "fake", "mallory"))
    (left,) = store.run(lambda session: labels.conflicts(session, ignored=("mallory",)))
    assert left.sha256 == B
    assert [statement.by for statement in left.statements] == ["alice", "bob"]
    assert left.resolved("majority") is None
    (decided,) = store.run(lambda session: labels.resolve(session, rule="majority", ignored=("mallory",)))
    assert decided.sha256 == A, "the rule leaves B undecided, as the conflict says"


def test_conflicts_come_in_pages(store: Store) -> None:
    add(store, *(said(sha256, label, by) for sha256 in (A, B, C) for label, by in (("real", "x"), ("fake", "y"))))
    first = store.run(lambda session: labels.conflicts(session, limit=2))
    rest = store.run(lambda session: labels.conflicts(session, after=first[-1].sha256, limit=2))
    assert [conflict.sha256 for conflict in first + rest] == [A, B, C]


def test_each_filter_finds_its_own(store: Store) -> None:
    add(
        store,
        said(A, "fake", generator="sdxl", collection="ads"),
        said(B, "real", "bob", source="file:x.csv"),
    )
    moment = listed(store)[0].created_at

    def found(**wanted: Any) -> list[str]:
        return [statement.sha256 for statement in listed(store, **wanted)]

    assert found() == [A, B]
    assert found(label="fake") == found(generator="sdxl") == found(collection="ads") == found(by="alice") == [A]
    assert found(source="file:x.csv") == found(sha256=B) == [B]
    assert found(since=moment) == [A, B]
    assert found(until=moment) == found(since=moment + timedelta(hours=1)) == []


def test_pages_and_streams_give_every_statement_once(store: Store) -> None:
    add(store, *(said(f"{number:064x}", "real") for number in range(25)))
    page = store.run(lambda session: labels.list_labels(session, limit=10))
    rest = store.run(lambda session: labels.list_labels(session, after=page[-1].id, limit=100))
    assert [statement.sha256 for statement in page + rest] == [f"{number:064x}" for number in reversed(range(25))]
    assert list(labels.stream(store, page=10)) == (page + rest)[::-1]
    with pytest.raises(StoreError, match="no id of a label"):
        store.run(lambda session: labels.list_labels(session, after="what", limit=1))


def test_kept_images_are_noted_once(store: Store) -> None:
    first = KeptImage(A, 7, "jpeg", 640, 480, "s3://b/a.jpg")
    other = KeptImage(B, 2**40, None, None, None, "/photos/b.jpg")
    store.run(lambda session: kept_images.note_kept(session, [first, replace(first, uri="s3://b/copy.jpg"), other]))
    store.run(lambda session: kept_images.note_kept(session, [replace(first, uri="s3://b/later.jpg")]))
    assert store.run(lambda session: kept_images.kept(session, [A, B, C])) == {A: first, B: other}


@pytest.mark.parametrize("rule", ["latest", "majority", "unanimous", "trusted"])
def test_a_reviewers_word_is_above_every_rule_until_the_next_one(store: Store, rule: str) -> None:
    add(store, said(A, "fake", "alice"), said(A, "real", "bob"))
    add(store, said(A, "real", "rob", source="review"))
    add(store, said(A, "fake", "carol", generator="sdxl"), said(A, "fake", "bob"))
    found = resolved(store, rule, ["alice"])[A]
    assert (found.label, found.by, found.contradicted) == ("real", "rob", True)
    assert store.run(labels.conflicts) == [], "settled is not disputed"
    add(store, said(A, "fake", "rosa", source="review"))
    found = resolved(store, rule, ["bob"])[A]
    assert (found.label, found.by, found.generator) == ("fake", "rosa", "sdxl")


def test_a_reviewer_may_settle_for_what_they_said_before(store: Store) -> None:
    assert add(store, said(A, "fake", "rob")) == 1
    assert add(store, said(A, "fake", "rob", source="review")) == 1
    assert add(store, said(A, "fake", "rob", source="review")) == 0
    assert [statement.source for statement in listed(store)] == ["api", "review"]
