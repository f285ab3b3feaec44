"""Manifests: rows that name an image, and those that cannot."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from code_worker.data.datasets.examples import FAKE, REAL, Example, Skipped
from code_worker.data.datasets.open import open_examples
from code_worker.data.kept_copies import open_kept
from code_worker.errors import DatasetError, ImageRejectedError
from code_worker.settings import FileSettings, Settings
from tests.servers import S3Server


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "set"
    (made / "in").mkdir(parents=True)
    (made / "in" / "a.jpg").write_bytes(b"a")
    (made / "b.jpg").write_bytes(b"b")
    return made


def read(path: Path, **settings: Any) -> tuple[list[Example], list[Skipped]]:
    skipped: list[Skipped] = []
    made = Settings(data_dir=path.parent / "data", **settings)
    return list(open_examples(str(path), settings=made, skipped=skipped)), skipped


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8"
    )
    return path


def test_json_lines_and_csv_say_the_same(directory: Path) -> None:
    lines = write_lines(
        directory / "m.jsonl",
        {"path": "in/a.jpg", "label": "fake", "generator": "sdxl", "collection": "c", "group": "g", "variant": "v"},
        "",
        {"uri": "b.jpg", "label": 0, "generator": "ignored for a real one", "note": "passed over"},
    )
    table = directory / "m.csv"
    table.write_bytes(
        "\ufeffPath,uri, Label ,generator,collection,group,variant\r\n"
        "in/a.jpg,,FAKE,sdxl,c,g,v\r\n"
        ",b.jpg,0,,,,\r\n".encode()
    )
    for path in (lines, table):
        examples, skipped = read(path)
        assert not skipped
        assert [(one.label, one.generator, one.collection, one.group, one.variant) for one in examples] == [
            (FAKE, "sdxl", "c", "g", "v"),
            (REAL, None, None, None, None),
        ]
        assert [example.read() for example in examples] == [b"a", b"b"]
        assert examples[0].key == str(directory / "in" / "a.jpg")


def test_a_hash_beside_a_path_is_checked_when_it_is_read(directory: Path) -> None:
    right = hashlib.sha256(b"a").hexdigest()
    path = write_lines(
        directory / "m.jsonl",
        {"path": "in/a.jpg", "label": 1, "sha256": right.upper()},
        {"path": "b.jpg", "label": 1, "sha256": right},
    )
    examples, _ = read(path)
    assert examples[0].read() == b"a"
    assert examples[0].sha256 == right
    with pytest.raises(DatasetError, match="not those of sha256"):
        examples[1].read()


def test_a_hash_alone_names_a_kept_copy(directory: Path) -> None:
    known = open_kept(Settings(data_dir=directory / "data")).put(b"kept")
    path = write_lines(
        directory / "m.jsonl", {"sha256": known, "label": "real"}, {"sha256": "0" * 64, "label": "real"}
    )
    examples, skipped = read(path)
    assert not skipped
    assert examples[0].read() == b"kept"
    assert (examples[0].key, examples[0].sha256) == (known, known)
    with pytest.raises(DatasetError, match="no copy"):
        examples[1].read()


def test_wrong_rows_are_told_by_their_line_and_good_ones_kept(directory: Path) -> None:
    path = write_lines(
        directory / "m.jsonl",
        "{",
        "[1]",
        {"path": "b.jpg"},
        {"path": "b.jpg", "label": "maybe"},
        {"path": "b.jpg", "label": 1.0},
        {"path": "b.jpg", "label": True},
        {"label": "real"},
        {"label": "real", "sha256": "abc"},
        {"label": "real", "path": 7},
        {"label": "real", "path": "b.jpg", "group": ["g"]},
        {"label": "real", "path": "b.jpg"},
        "[" * 100_000,
    )
    examples, skipped = read(path)
    assert [example.read() for example in examples] == [b"b"]
    assert [lost.key for lost in skipped] == [f"{path}:{line}" for line in (*range(1, 11), 12)]
    assert skipped[3].reason == "label is 'maybe'; it must be real (or 0) or fake (or 1)"


def test_a_wrong_row_of_a_table_is_told_and_the_next_one_read(directory: Path) -> None:
    path = directory / "m.csv"
    path.write_text(f"path,label\nb.jpg\n{'x' * 200_000},real\nb.jpg,real,too,many\nb.jpg,real\n", encoding="utf-8")
    examples, skipped = read(path)
    assert [example.read() for example in examples] == [b"b"]
    assert [lost.key for lost in skipped] == [f"{path}:{line}" for line in (2, 3, 4)]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_table_is_read_as_spreadsheets_write_it(directory: Path, encoding: str) -> None:
    path = directory / "m.csv"
    path.write_bytes("sep=;\r\npath;label;group;;\r\nin/a.jpg;1;'=x;;\r\nb.jpg;real\r\n;;;;\r\n".encode(encoding))
    examples, skipped = read(path)
    assert not skipped
    assert [(one.label, one.group, one.read()) for one in examples] == [(FAKE, "=x", b"a"), (REAL, None, b"b")]


def test_a_name_that_is_no_text_can_stand_in_a_table(directory: Path) -> None:
    (directory / "b.jpg").rename(os.fsdecode(os.fsencode(directory) + b"/\xe9.jpg"))
    (directory / "m.csv").write_bytes(b"path,label\n\xe9.jpg,real\n")
    ((example,), _) = read(directory / "m.csv")
    assert (example.key, example.read()) == (f"{directory}/\\xe9.jpg", b"b")


def test_a_column_that_is_named_twice_is_refused(directory: Path) -> None:
    path = directory / "m.csv"
    path.write_text("path,label,label\nb.jpg,real,fake\n", encoding="utf-8")
    with pytest.raises(DatasetError, match=f"{path}: the first line names the column label twice"):
        read(path)


@pytest.mark.parametrize("content", ["", "path,generator\nb.jpg,x\n", "label\nreal\n", "x" * 200_000])
def test_a_table_whose_header_does_not_fit_is_refused(directory: Path, content: str) -> None:
    path = directory / "m.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DatasetError, match="first line must name the columns, among them label and one of"):
        read(path)


def test_files_elsewhere_are_read_only_under_the_allowed_roots(directory: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(b"outside")
    path = write_lines(
        directory / "m.jsonl",
        {"path": str(outside), "label": "real"},
        {"uri": outside.as_uri(), "label": "real"},
        {"path": "../outside.jpg", "label": "real"},
    )
    for example in read(path)[0]:
        with pytest.raises(ImageRejectedError, match="not under an allowed directory"):
            example.read()
    allowed, _ = read(path, files=FileSettings(roots=(tmp_path,)))
    assert [example.read() for example in allowed] == [b"outside"] * 3


def test_uris_are_read_from_their_source(directory: Path, s3_server: S3Server, monkeypatch) -> None:
    with closing(s3_server.client()) as s3:
        s3.create_bucket(Bucket="manifests")
        s3.put_object(Bucket="manifests", Key="a.jpg", Body=b"from s3")
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CODE_WORKER_S3__BUCKETS", '["manifests"]')
    path = write_lines(
        directory / "m.jsonl",
        {"uri": "s3://manifests/a.jpg", "label": "real"},
        {"uri": "https://example.org/a.jpg", "label": "real"},
    )
    examples = open_examples(str(path), settings=Settings(), skipped=[])
    assert next(examples).read() == b"from s3"
    with pytest.raises(ImageRejectedError, match="not from 'https'"):
        next(examples).read()
    examples.close()  # type: ignore[attr-defined]  # a generator


def test_an_empty_manifest_is_refused(directory: Path) -> None:
    with pytest.raises(DatasetError, match="holds no usable image"):
        read(write_lines(directory / "m.jsonl"))
    with pytest.raises(DatasetError, match="no such file"):
        read(directory / "missing.jsonl")
