"""Importing: each image fetched once, each row answered for, the same file twice nothing new."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from code_worker.data.label_files.label_import import Imported, import_rows
from code_worker.data.label_files.label_rows import Row
from code_worker.data.labelling import Labeller
from code_worker.errors import SourceCredentialsError, StorageError
from code_worker.settings import S3Settings
from code_worker.store.engine import Store
from tests.data.label_acts import Place, sha256_of
from tests.servers import free_port


@pytest.fixture
def place(sqlite_store: Store, tmp_path: Path) -> Place:
    return Place(tmp_path, sqlite_store)


def run(place: Place, rows: Iterable[Row], *, name: str = "a.csv", labeller: Labeller | None = None) -> Imported:
    """All transactions of an import as one."""
    done = list(import_rows(labeller or place.labeller, rows, name=name, by="alice", collection="ads", threads=4))
    return Imported(
        sum(some.rows for some in done),
        sum(some.new for some in done),
        [refused for some in done for refused in some.refused],
    )


def test_rows_become_statements_with_what_the_file_leaves_open_filled_in(place: Place) -> None:
    a, b = place.image("a.png", 1), place.image("b.png", 2)
    rows = [
        Row("line 2", uri=a, label="fake", generator="sdxl"),
        Row("line 3", uri=b, label="real", by="bob", collection="news", note="ü"),
    ]
    assert run(place, rows) == Imported(2, 2, [])
    said = {statement.sha256: statement for statement in place.statements()}
    first, second = said[sha256_of(a)], said[sha256_of(b)]
    assert (first.label, first.generator, first.by, first.collection) == ("fake", "sdxl", "alice", "ads")
    assert (second.label, second.by, second.collection, second.note) == ("real", "bob", "news", "ü")
    assert {first.source, second.source} == {"file:a.csv"}
    assert place.copies() == set(said)


def test_the_same_file_again_fetches_nothing_and_changes_nothing(store: Store, tmp_path: Path) -> None:
    place = Place(tmp_path, store)
    paths = [place.image(f"{number}.png", number // 2) for number in range(6)]
    rows = [Row(f"line {number}", uri=path, label="real") for number, path in enumerate(paths)]
    assert run(place, rows) == Imported(6, 3, [])
    before = place.statements()
    for path in paths:
        Path(path).unlink()
    assert run(place, rows) == Imported(6, 0, [])
    assert place.statements() == before


def test_a_file_that_grew_adds_what_is_new(place: Place) -> None:
    rows = [Row(f"line {number}", uri=place.image(f"{number}.png", number), label="fake") for number in range(4)]
    assert run(place, rows[:3]).new == 3
    assert run(place, rows) == Imported(4, 1, [])
    assert run(place, rows, name="copy.csv") == Imported(4, 0, [])


def test_two_labellers_in_one_file_contradict_each_other(place: Place) -> None:
    path = place.image("a.png")
    rows = [Row("line 2", uri=path, label="real"), Row("line 3", uri=path, label="fake", by="bob")]
    assert run(place, rows) == Imported(2, 2, [])
    assert [(statement.by, statement.label) for statement in place.statements()] == [
        ("alice", "real"),
        ("bob", "fake"),
    ]


def test_bad_rows_are_named_in_their_order_and_good_ones_kept(place: Place) -> None:
    good = place.image("a.png")
    (place.photos / "words.png").write_bytes(b"no image, but some words")
    rows = [
        Row("line 2", problem="as the reader found it"),
        Row("line 3", uri=f"{place.photos}/missing.png", label="real"),
        Row("line 4", uri=f"{place.photos}/words.png", label="real"),
        Row("line 5", uri="s3://closed/a.png", label="real"),
        Row("line 6", uri=good, label="real", generator="sdxl"),
        Row("line 7", uri=good, label="fake", by="x" * 500),
        Row("line 8", uri=good, label="fake", note="a\0b"),
        Row("line 9", sha256="f" * 64, label="fake"),
        Row("line 10", uri=good, sha256="f" * 64, label="fake"),
        Row("line 11", uri=good, label="fake"),
        Row("line 12", sha256="nonsense", label="fake"),
        Row("line 13", uri="/nul/\0", label="fake"),
    ]
    done = run(place, rows)
    assert (done.rows, done.new) == (12, 1)
    assert [where for where, _ in done.refused] == [
        f"line {number}" for number in (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13)
    ]
    said = dict(done.refused)
    assert said["line 2"] == "as the reader found it"
    assert said["line 3"].startswith("not_found: ")
    assert said["line 4"].startswith("unsupported_format: ")
    assert said["line 5"].startswith("source_not_allowed: ")
    assert said["line 6"] == "a real image has no generator, yet 'sdxl' is named"
    assert said["line 7"] == "by must have 1 to 200 characters, not 500"
    assert said["line 8"].startswith("note holds a NUL")
    assert said["line 9"].startswith("no copy of image ffff")
    assert f"{good} holds other bytes now" in said["line 10"]
    assert "is no content hash" in said["line 12"]
    assert said["line 13"].startswith("uri holds a NUL")
    assert place.copies() == {sha256_of(good)}


def test_a_row_that_was_bad_may_be_good_later(place: Place) -> None:
    row = Row("line 2", uri=f"{place.photos}/late.png", label="real")
    assert len(run(place, [row]).refused) == 1
    place.image("late.png")
    assert run(place, [row]) == Imported(1, 1, [])


def test_a_known_hash_needs_no_source(place: Place) -> None:
    path = place.image("a.png")
    place.labeller.label(path, "real", by="bob")
    sha256 = sha256_of(path)
    Path(path).unlink()
    assert run(place, [Row("line 2", sha256=sha256, label="fake")]).new == 1
    assert run(place, [Row("line 3", uri=path, sha256=sha256, label="fake", by="carol")]).new == 1


def test_more_rows_than_a_transaction_holds_are_answered_for_each(place: Place) -> None:
    path = place.image("a.png")
    rows = (Row(f"line {number}", uri=path, label="real", by=f"by {number}") for number in range(600))
    done = list(import_rows(place.labeller, rows, name="a.csv", by="alice", threads=2))
    assert [some.rows for some in done] == [256, 256, 88]
    assert sum(some.new for some in done) == 600


def test_a_storage_that_fails_ends_the_import(place: Place) -> None:
    path = place.image("a.png")
    labeller = Labeller(place.settings.model_copy(update={"datasets": path}), place.store)
    with pytest.raises(StorageError, match="cannot keep a copy"):
        run(place, [Row("line 2", uri=path, label="real")], labeller=labeller)
    assert place.statements() == []


def test_credentials_that_do_not_work_end_the_import_after_the_good_rows(place: Place) -> None:
    path = place.image("a.png")
    s3 = S3Settings(
        endpoint_url=f"http://127.0.0.1:{free_port()}", region="not a region!", buckets=("b",), max_attempts=1
    )
    labeller = Labeller(place.settings.model_copy(update={"s3": s3}), place.store)
    rows = [Row("line 2", uri=path, label="real"), Row("line 3", uri="s3://b/a.png", label="real")]
    with pytest.raises(SourceCredentialsError):
        run(place, rows, labeller=labeller)
    assert [statement.uri for statement in place.statements()] == [path]
