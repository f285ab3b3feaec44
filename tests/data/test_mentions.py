"""Rows of others that name something erased, written while the eraser reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from code_worker.data.erasure.references import Mentions
from code_worker.store import workers
from code_worker.store.engine import Store
from code_worker.store.erasure import dead_letters
from code_worker.store.erasure.receipts import Receipt
from code_worker.store.learning import labels
from code_worker.worker.intake import dead_letter
from tests.data.test_erasure_races import Place, sha256_of


@pytest.fixture
def place(tmp_path: Path, store: Store) -> Place:
    return Place(tmp_path, store)


@pytest.fixture
def quick(tmp_path: Path, sqlite_store: Store) -> Place:
    return Place(tmp_path, sqlite_store)


def send(place: Place, name: str = "acme") -> None:
    dead_letter(place.store, {"v": 9, "items": [{"uri": "s3://b/never-accepted.png", "tenant": name}]}, "no form")


def test_nobody_waits_for_an_eraser_that_reads_messages(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of them may take it seconds; and a tenant that goes on sending them does not hold it up."""
    read, seen = dead_letters.naming, list[int]()

    def meanwhile(*arguments: object, **named: object) -> object:
        found = read(*arguments, **named)  # type: ignore[arg-type]
        place.judge(place.job(place.image(f"{len(seen)}.png", len(seen) + 9), "other"))
        send(place)
        seen.append(len(found[0]))
        return found

    place.job("s3://b/a.png")
    send(place)
    send(place, "other")
    monkeypatch.setattr(dead_letters, "naming", meanwhile)
    receipt = place.erase()
    monkeypatch.undo()
    assert (seen, receipt.counts["dead_letters"], receipt.last_look["letters"]) == ([1, 1], 2, 0)  # type: ignore[index]
    assert place.count("verdicts") == 2
    bodies = [one.body for one in place.store.run(workers.list_dead_letters)]
    assert ["acme" in body for body in bodies] == [True, False], "what was sent after the last look is new"


def test_a_message_that_is_not_as_it_was_read_stays(quick: Place) -> None:
    send(quick)
    (one,) = quick.store.run(workers.list_dead_letters)
    found = dead_letters.Naming(one.id, one.body + " ", one.error, one.at, None, "")
    assert quick.store.run(lambda session: dead_letters.rewrite(session, [found])) == 0
    assert quick.store.run(workers.list_dead_letters) == [one]


@pytest.mark.parametrize("shared", [True, False])
def test_a_label_by_the_address_of_an_erased_job_goes_whenever_it_was_given(
    quick: Place, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    ours, theirs = quick.image("acme-passport.png"), quick.image("b.png", 1 if shared else 2)
    first, second = quick.job(ours), quick.job(theirs, "other")
    quick.judge(second) if not shared else quick.judge(first, second)
    quick.labeller.label(second, "fake", by="rob")
    original, late = (
        Mentions.erase_letters,
        list[Callable[[], object]]([lambda: quick.labeller.label(ours, "real", by="rosa")]),
    )

    def label_first(mentions: Mentions, receipt: Receipt, *arguments: object) -> int:
        for label in late[:1]:
            late.clear()
            label()
        return original(mentions, receipt, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Mentions, "erase_letters", label_first)
    receipt = quick.erase()
    said = quick.store.run(lambda session: labels.list_labels(session, limit=9))
    assert {(one.by, one.uri) for one in said} == {("rob", theirs), *([("rosa", None)] if shared else [])}
    assert quick.copies() == {sha256_of(theirs)}
    assert "acme" not in quick.text()
    assert receipt.counts["addresses"] == 1


URI = "s3://b/acme/passport of jane doe, 1980.png"


@pytest.mark.parametrize("left", range(6, len(URI), 5))
@pytest.mark.parametrize("before", ["x", "words and " * 7000, "\\"], ids=["little", "a long text", "an escape"])
def test_a_message_is_not_cut_in_the_middle_of_an_address(before: str, left: int) -> None:
    body = json.dumps({"items": [{"uri": "s3://b/1.png", "bogus": before}, {"uri": URI, "tenant": "acme"}]})
    assert dead_letters.cut(body, body.index(URI) + left) == body[: body.index(f'"{URI}')]


@pytest.mark.parametrize("text", ["it's " * 9000, "x" * 40_000, '{"a": "' + "b " * 40_000, '["a", "' + "\\" * 40_000])
def test_of_a_message_that_is_cut_no_more_than_its_last_word_goes(text: str) -> None:
    kept = dead_letters.cut(text, 30_000)
    assert text.startswith(kept)
    assert 29_990 < len(kept) <= 30_000
    assert dead_letters.cut(text, len(text)) == text


def test_what_is_kept_of_a_message_that_is_too_long_names_nothing_erased(quick: Place) -> None:
    quick.job(URI)
    parts = (
        '{"items": [{"uri": "s3://b/1.png", "tenant": "other", "bogus": "',
        f'"}}, {{"uri": "{URI}", "tenant": "acme"}}]}}',
    )
    fill = "x" * (64 * 1024 - len(parts[0]) - parts[1].index(URI) - 20)
    body = parts[0] + fill + parts[1]
    said = "no form: " + "y " * 980 + repr(URI)
    quick.store.run(lambda session: workers.dead_letter(session, task="t", body=body, error=said))
    quick.erase()
    (left,) = quick.store.run(workers.list_dead_letters)
    assert left.body.startswith(parts[0] + fill[:9])
    assert "jane" not in left.body
    assert "jane" not in left.error
