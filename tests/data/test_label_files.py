"""Label files of every form: good rows are read, bad ones named by their place, whatever is in them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from code_worker.data.label_files.label_import import read_rows
from code_worker.data.label_files.label_rows import Row, Words
from code_worker.data.label_files.tables import csv_line, with_formulas, without_formulas
from code_worker.errors import ConfigurationError, DatasetError
from tests.data.label_rows import problems, rows

SHA = "ab" * 32
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + SHA.encode() + b"\nsize 7\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "labels"


def test_csv_takes_every_field(file: Path) -> None:
    content = (
        "\ufeffURI, Label ,generator,collection,group,by,at,note,extra\n"
        's3://b/a.jpg,fake,sdxl,ads,post 7,alice,2026-01-31T12:00:00+01:00,"two\nlines, quoted ""so""",x\n'
        "b.jpg,Real,,,,,2026-01-31,,\n"
    )
    first, second = rows(file, content)
    assert first == Row(
        "line 2",
        uri="s3://b/a.jpg",
        label="fake",
        generator="sdxl",
        collection="ads",
        group="post 7",
        by="alice",
        at=datetime(2026, 1, 31, 11, tzinfo=UTC),
        note='two\nlines, quoted "so"',
    )
    assert second == Row("line 4", uri=str(file.parent / "b.jpg"), label="real", at=datetime(2026, 1, 31, tzinfo=UTC))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_is_read_as_spreadsheets_write_it(file: Path, delimiter: str, end: str) -> None:
    lines = ["path,label", "a.jpg,fake", "", '"b c.jpg",real']
    found = rows(file, end.join(lines).replace(",", delimiter))
    assert [(row.place, row.uri, row.label) for row in found] == [
        ("line 2", str(file.parent / "a.jpg"), "fake"),
        ("line 4", str(file.parent / "b c.jpg"), "real"),
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("first", ["", "sep=;", '"sep=;"'])
def test_csv_of_excel_is_read_in_every_encoding_with_any_line_end(
    file: Path, encoding: str, end: str, first: str
) -> None:
    lines = ["uri;label;by;note;;", "a.jpg;real;bob;;;seen", "b.jpg;fake", ";;;;;", 'ü.jpg;fake;;"two', 'lines";;']
    found = rows(file, end.join([first, *lines, "d.jpg;real"]).encode(encoding))
    assert not problems(found)
    assert [(row.place, Path(row.uri or "").name, row.label, row.by, row.note) for row in found] == [
        ("line 3", "a.jpg", "real", "bob", None),
        ("line 4", "b.jpg", "fake", None, None),
        ("line 6", "ü.jpg", "fake", None, f"two{end}lines"),
        ("line 8", "d.jpg", "real", None, None),
    ]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", ":"])
def test_a_delimiter_may_be_declared(file: Path, delimiter: str) -> None:
    found = rows(file, f"sep={delimiter}\nuri,label,note\na.jpg,real,x\n".replace(",", delimiter))
    assert [(row.place, row.label, row.note) for row in found] == [("line 3", "real", "x")]


@pytest.mark.parametrize("line", ['sep="', "sep=a", "sep=", "sep=;;"])
def test_what_declares_no_delimiter_is_no_header(file: Path, line: str) -> None:
    with pytest.raises(DatasetError, match="the first line must name the columns"):
        rows(file, f"{line}\nuri;label\na.jpg;real\n")


def test_a_stray_carriage_return_costs_one_row(file: Path) -> None:
    content = 'uri,label,note\na.jpg,real,fine\nb.jpg,fake,two\rlines\nc.jpg,real,"a\rb"\nd.jpg,real,\r\n'
    found = rows(file, content)
    assert problems(found) == [("line 3", "a carriage return stands in it outside quotes")]
    assert [(row.place, row.note) for row in found if not row.problem] == [
        ("line 2", "fine"),
        ("line 4", "a\rb"),
        ("line 5", None),
    ]


def test_lines_are_found_whole_wherever_the_file_is_cut(file: Path) -> None:
    content = "uri,label\r" + "".join(f"{'x' * 70_000}{number},real\r" for number in range(5))
    found = rows(file, content)
    assert [(row.place, (row.uri or "")[-2:]) for row in found] == [(f"line {n + 2}", f"x{n}") for n in range(5)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_what_is_in_quotes_is_taken_as_it_is_written(file: Path, end: str) -> None:
    lines = [
        "label , uri,by,note",
        f'" real ","s3://b/two{end}lines {end}","  bob "," seen ""twice"" "',
        'real, s3://b/by hand.jpg ,  bob , " seen" ',
        'real," s3",,"  "',
    ]
    found = rows(file, end.join(lines))
    assert not problems(found)
    assert [(row.label, row.uri, row.by, row.note) for row in found] == [
        ("real", f"s3://b/two{end}lines {end}", "  bob ", ' seen "twice" '),
        ("real", "s3://b/by hand.jpg ", "bob", '" seen"'),
        ("real", str(file.parent / " s3"), None, None),
    ]


def plain_rows(text: str) -> list[list[str]]:
    """CSV as spreadsheets read it: outside of quotes a carriage return, a line feed and both together end a row."""
    found, row, cell, quoted = [], list[str](), "", False
    for character in re.sub('"[^"]*"|\r\n?', lambda one: one[0] if one[0][0] == '"' else "\n", text):
        if character == '"':
            quoted = not quoted
        elif quoted or character not in ",\n":
            cell += character
        else:
            row.append(cell)
            cell = ""
            if character == "\n":
                found.append(row)
                row = []
    return found


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_every_reader_finds_the_rows_that_were_written(file: Path, end: str) -> None:
    cells = [f"s3://b/a{end}=HYPERLINK(1),x{end}", "real", f"{end}b", "", f" c {end}{end}d"]
    written = csv_line(["uri", "label", "by", "collection", "note"]) + csv_line(map(without_formulas, cells))
    expected = [["uri", "label", "by", "collection", "note"], [without_formulas(cell) for cell in cells]]
    assert list(csv.reader(io.StringIO(written, newline=""), strict=True)) == expected
    assert plain_rows(written) == expected
    (found,) = rows(file, written)
    assert [found.uri, found.label, found.by, found.collection or "", found.note] == cells
    assert csv_line([None, 0.25, 7]) == ",0.25,7\n"


@pytest.mark.parametrize("text", ["=HYPERLINK(1)", "+1", "-1", "@a", "\tx", "'=x", "''+x", "plain", "'quoted'", ""])
def test_a_formula_is_escaped_so_that_it_can_be_read_back(text: str) -> None:
    assert not without_formulas(text).startswith(("=", "+", "-", "@", "\t", "\r"))
    assert with_formulas(without_formulas(text)) == text
    assert (without_formulas(text) == text) is (text in {"plain", "'quoted'", ""})


def test_a_quote_that_is_never_closed_costs_one_row(file: Path) -> None:
    content = (
        'uri,label,note\na,fake,"open\nb,real,fine\nc,fake,"quoted"\nd,fake,"x"y\ne,real,"still\nopen"\nf,real,"'
    )
    found = rows(file, content)
    assert problems(found) == [
        ("line 2", "a quote is never closed"),
        ("line 5", "',' expected after '\"'"),
        ("line 8", "a quote is never closed"),
    ]
    assert [(row.place, row.note) for row in found if not row.problem] == [
        ("line 3", "fine"),
        ("line 4", "quoted"),
        ("line 6", "still\nopen"),
    ]


def test_csv_names_each_bad_row_and_reads_the_others(file: Path) -> None:
    content = (
        b"uri,sha256,label,at\n"
        b"a,,maybe,\n"
        b"b,,real,,more\n"
        b",,real,\n"
        b"d,,,\n"
        b"e,,real,yesterday\n"
        b"\xff,,real,\n" + b"x" * (1 << 20) + b",,real,\n"
        b"h,,0,\n"
        b",%s,real,\n" % SHA.upper().encode()
    )
    found = rows(file, content)
    assert problems(found) == [
        ("line 2", "label 'maybe': say what it means with --map maybe=real or --map maybe=fake"),
        ("line 3", "5 values under 4 columns"),
        ("line 4", "it names no image: one of uri, image, path, sha256 is needed"),
        ("line 5", "it has no label"),
        ("line 6", "'yesterday' is no time such as 2026-01-31T12:00:00Z"),
        ("line 7", "it is not UTF-8 (byte 1): save the file as UTF-8"),
        ("line 8", "it is longer than 1048576 bytes"),
        ("line 9", "label '0': say what it means with --map 0=real or --map 0=fake"),
    ]
    assert found[-1] == Row("line 10", sha256=SHA, label="real")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "there is nothing in it"),
        (" \n\n", "there is nothing in it"),
        ("a.jpg,fake\nb.jpg,real\n", "the first line must name the columns, among them label and one of uri, image"),
        ("uri,verdict\na,fake\n", "it is 'uri,verdict'"),
        ("uri,label\na,fake\n".encode("utf-16-le"), "line 1: it is not UTF-8|the first line must name"),
        ("uri,label\na,fake\n".encode("utf-16")[:-3], "it begins as UTF-16, but is cut short or damaged"),
        ("uri,label,Label\na,real,fake\n", "the first line names the column label twice"),
        ("[1, 2", "it is not JSON"),
        (gzip.compress(b"uri,label\na,fake\n", mtime=0), "it is compressed with gzip: unpack it first"),
        (b"PK\3\4\x14\0\6\0", "it is a zip archive or a spreadsheet: unpack it, or save it as CSV"),
        (POINTER, "it is a Git LFS pointer: `git lfs pull` fetches the file"),
    ],
)
def test_a_file_that_is_bad_as_a_whole_says_why(file: Path, content: str | bytes, why: str) -> None:
    with pytest.raises(DatasetError, match=f"{file}: .*{why}"):
        rows(file, content)


def test_a_row_names_one_image(file: Path) -> None:
    content = b"uri,path,label\ns3://b/a,/x/b,fake\ns3://b/c,,real\n,/x/d,real\ns3://b/e,s3://b/e,real\n"
    found = rows(file, content)
    assert problems(found) == [("line 2", "uri and path name different images: leave one of them empty")]
    assert [row.uri for row in found[1:]] == ["s3://b/c", "/x/d", "s3://b/e"]


def test_a_file_that_cannot_be_opened_is_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot read .*: No such file"):
        list(read_rows(tmp_path / "none.csv", Words()))


def test_json_lines_take_text_and_numbers_and_name_what_is_neither(file: Path) -> None:
    content = "\n".join(
        [
            json.dumps({"image": "a.jpg", "label": "FAKE", "generator": "ü\0", "by": 7, "more": [1]}),
            json.dumps({"path": "/x/b.jpg", "label": "generated", "sha256": SHA}),
            "",
            '{"uri": "c", "label": "real"',
            "[1]",
            json.dumps({"uri": ["c"], "label": "real"}),
            json.dumps({"uri": "c", "label": True}),
            "[" * 100_000,
            json.dumps({"uri": "c", "label": "real", "by": True}),
        ]
    )
    found = rows(file, content)
    assert found[0] == Row("line 1", uri=str(file.parent / "a.jpg"), label="fake", generator="ü\0", by="7")
    assert found[1] == Row("line 2", uri="/x/b.jpg", sha256=SHA, label="fake")
    assert [place for place, _ in problems(found)] == [f"line {number}" for number in (4, 5, 6, 7, 8, 9)]
    said = dict(problems(found))
    assert said["line 5"] == "it is no JSON object"
    assert said["line 6"] == "uri must be text, not \"['c']\""
    assert "--map True=real" in said["line 7"]
    assert said["line 9"] == "by must be text, not 'True'"


def test_an_array_of_objects_is_read_as_their_lines_are(file: Path) -> None:
    entries = [{"uri": "a.jpg", "label": "fake", "by": "bob"}, {"uri": "b.jpg", "label": "AI"}, {"label": "real"}]
    found = rows(file, json.dumps(entries))
    assert found[0] == Row("entry 1", uri=str(file.parent / "a.jpg"), label="fake", by="bob")
    assert problems(found) == [
        ("entry 2", "label 'AI': say what it means with --map AI=real or --map AI=fake"),
        ("entry 3", "it names no image: one of uri, image, path, sha256 is needed"),
    ]


def test_words_mean_what_the_user_says(file: Path) -> None:
    content = "uri,label,generator\na,AI,\nb,authentic,\nc,flux,\nd,flux,other\ne,0,\nf,real,\n"
    found = rows(file, content, "ai=fake", "Authentic=real", "flux=fake:flux-dev", "0=fake", "real=fake")
    assert [(row.label, row.generator) for row in found] == [
        ("fake", None),
        ("real", None),
        ("fake", "flux-dev"),
        ("fake", "other"),
        ("fake", None),
        ("fake", None),
    ]


@pytest.mark.parametrize(
    "mapping", [("ai",), ("ai=maybe",), ("=fake",), ("a=real:sdxl",), ("a=real", "A=fake")], ids=str
)
def test_a_map_that_maps_nothing_is_wrong_use(mapping: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError, match=r"maps nothing|two meanings"):
        Words(mapping)


def test_relative_paths_begin_where_one_says(file: Path) -> None:
    content = "uri,label\na/b.jpg,real\n/c.jpg,real\nfile:///d.jpg,real\ns3://o/e.jpg,real\n"
    found = rows(file, content, base="s3://bucket/prefix/")
    assert [row.uri for row in found] == ["s3://bucket/prefix/a/b.jpg", "/c.jpg", "file:///d.jpg", "s3://o/e.jpg"]
    assert rows(file, content, base="/photos")[0].uri == "/photos/a/b.jpg"


@settings(deadline=None, max_examples=300)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(
            st.sampled_from([*"\"'\r\n,;\t=[{", "uri", "label", "a.jpg", "real", "\ufeff", "sep=;", "é"]), max_size=40
        ).map("".join),
    ),
    st.sampled_from(
        ["", "uri,label\n", "uri;label;note\r\n", "sep=;\nuri;label\n", "image,choice,annotator,annotation_id\n"]
    ),
    st.sampled_from(["utf-8", "utf-16", "utf-16-le"]),
)
def test_whatever_is_in_a_file_it_gives_rows_or_one_reason(content: str | bytes, header: str, encoding: str) -> None:
    data = header.encode(encoding) + (content if isinstance(content, bytes) else content.encode(encoding))
    with tempfile.TemporaryDirectory() as directory:
        try:
            found = rows(Path(directory) / "labels", data)
        except DatasetError:
            return
    assert all(row.problem or row.label for row in found)
    assert all(row.place.startswith(("line ", "task ", "entry ")) for row in found)


@given(
    st.lists(
        st.text(
            st.sampled_from("ab \t\r\n\",;'=-\u00a0\ufeffé") | st.characters(exclude_categories=["Cs"]), max_size=12
        ),
        min_size=3,
        max_size=3,
    )
)
@settings(deadline=None)
def test_whatever_is_exported_is_read_back_as_it_was(cells: list[str]) -> None:
    key, by, note = cells
    kept = [f"s3://b/{key}", *(cell if cell.strip() else "" for cell in (by, note))]
    written = csv_line(["uri", "by", "note", "label"]) + csv_line([*map(without_formulas, kept), "real"])
    with tempfile.TemporaryDirectory() as directory:
        (found,) = rows(Path(directory) / "labels.csv", written)
    assert (found.problem, found.uri, found.by or "", found.note or "") == ("", *kept)
