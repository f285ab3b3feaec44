"""Label files of every form: good rows are read, bad ones named by their place, whatever is in them."""

from __future__ import annotations

import base64
import csv
import io
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from code_worker.data.label_files.forms import read_rows
from code_worker.data.label_files.rows import Row, Words
from code_worker.data.label_files.tables import with_formulas, without_formulas
from code_worker.errors import ConfigurationError, DatasetError

SHA = "ab" * 32


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "labels"


def rows(file: Path, content: str | bytes, *mapping: str, **options: Any) -> list[Row]:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_rows(file, Words(mapping), **options))


def problems(found: list[Row]) -> list[tuple[str, str]]:
    return [(row.place, row.problem) for row in found if row.problem]


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
    lines = ["uri;label;by;note;;", "a.jpg;real;bob;;;", "b.jpg;fake", ";;;;;", 'ü.jpg;fake;;"two', 'lines";;']
    found = rows(file, end.join([first, *lines, "d.jpg;real"]).encode(encoding))
    assert not problems(found)
    assert [(row.place, Path(row.uri or "").name, row.label, row.by, row.note) for row in found] == [
        ("line 3", "a.jpg", "real", "bob", None),
        ("line 4", "b.jpg", "fake", None, None),
        ("line 6", "ü.jpg", "fake", None, "two\nlines"),
        ("line 8", "d.jpg", "real", None, None),
    ]


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
        ("line 7", "it is not UTF-8 (byte 1)"),
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
    ],
)
def test_a_file_that_is_bad_as_a_whole_says_why(file: Path, content: str | bytes, why: str) -> None:
    with pytest.raises(DatasetError, match=f"{file}: .*{why}"):
        rows(file, content)


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


def annotation(*choices: str, **more: Any) -> dict[str, Any]:
    results = [{"type": "choices", "from_name": "c", "value": {"choices": [choice]}} for choice in choices]
    return {"id": 34, "result": results, "was_cancelled": False, "completed_by": 5, **more}


def task(address: object, *annotations: object, **more: Any) -> dict[str, Any]:
    data = address if isinstance(address, dict) else {"image": address}
    return {"id": 12, "data": data, "annotations": list(annotations), "predictions": [annotation("Real")], **more}


def minimal(address: object, choice: object, **more: Any) -> dict[str, Any]:
    times = {"created_at": "2026-01-31T12:00:00Z", "updated_at": "2026-02-01T12:00:00Z", "lead_time": 3.2}
    return {"image": address, "id": 12, "choice": choice, "annotator": 5, "annotation_id": 34, **times} | more


def test_label_studios_exports_say_the_same(file: Path) -> None:
    """JSON-MIN and CSV are the JSON export's annotations, with one answer as a word and several as an object."""
    times = {"created_at": "2026-01-31T12:00:00Z", "updated_at": "2026-02-01T12:00:00Z"}
    alice = {"id": 6, "email": "alice@example.com"}
    whole = [
        task("/data/upload/1/a.jpg", annotation("Real", **times)),
        task("/data/upload/1/b.jpg", annotation("Fake", "outdoor", **times, completed_by=alice)),
    ]
    several = {"choices": ["Fake", "outdoor"]}
    least = [
        minimal("/data/upload/1/a.jpg", "Real"),
        minimal("/data/upload/1/b.jpg", several, annotator="alice@example.com"),
    ]
    table = io.StringIO()
    writer = csv.DictWriter(table, least[0])
    writer.writeheader()
    writer.writerows([least[0], least[1] | {"choice": json.dumps(several)}])
    expected = rows(file, json.dumps(whole))
    assert [(row.label, row.by) for row in expected] == [("real", "label-studio:5"), ("fake", "alice@example.com")]
    assert rows(file, json.dumps(least)) == expected
    assert [replace(row, place=expected[0].place) for row in rows(file, table.getvalue())] == expected


def test_label_studios_answers_may_have_any_name(file: Path) -> None:
    answers = [
        minimal("a.jpg", None, label="Real"),
        minimal("a.jpg", None, origin=[{"choices": ["Fake"]}, {"x": 1}]),
        {**minimal(None, "Fake"), "photo": "a.jpg"},
    ]
    for answer in answers:
        (row,) = rows(file, json.dumps([{name: value for name, value in answer.items() if value is not None}]))
        assert (row.problem, row.uri) == ("", str(file.parent / "a.jpg"))


def test_label_studio_gives_one_row_for_each_annotator(file: Path) -> None:
    alice = {"id": 5, "email": "alice@example.com", "first_name": "A"}
    tasks = [
        task(
            "s3://b/a.jpg",
            annotation("Fake", completed_by=alice, created_at="2026-01-31T12:00:00.5Z"),
            annotation("Real", created_at="2026-01-31T12:00:00Z", updated_at="2026-02-01T12:00:00Z", id=35),
            annotation("Fake", was_cancelled=True),
        ),
        task("s3://b/b.jpg"),
    ]
    assert rows(file, json.dumps(tasks, indent=1)) == [
        Row(
            "task 12, annotation 34",
            uri="s3://b/a.jpg",
            label="fake",
            by="alice@example.com",
            at=datetime(2026, 1, 31, 12, 0, 0, 500_000, tzinfo=UTC),
        ),
        Row(
            "task 12, annotation 35",
            uri="s3://b/a.jpg",
            label="real",
            by="label-studio:5",
            at=datetime(2026, 2, 1, 12, tzinfo=UTC),
        ),
    ]


def test_label_studio_answers_of_several_questions_are_joined(file: Path) -> None:
    tasks = [task("a.jpg", annotation("Fake", "Flux", "outdoor")), task("b.jpg", annotation("Fake", "Real"))]
    joined, contradicting = rows(file, json.dumps(tasks), "flux=fake:flux")
    assert (joined.label, joined.generator) == ("fake", "flux")
    assert contradicting.problem == "it says both real and fake: Fake, Real"


@pytest.mark.parametrize(
    ("address", "uri"),
    [
        ("/data/local-files/?d=some%20dir/a.jpg", "{base}/some dir/a.jpg"),
        ("/data/upload/3/ab-a%20b.jpg", "{base}/upload/3/ab-a b.jpg"),
        ("/tasks/7/resolve/?fileuri=" + base64.b64encode(b"s3://b/k?>.jpg").decode(), "s3://b/k?>.jpg"),
        ("/projects/7/presign/?fileuri=" + base64.urlsafe_b64encode(b"s3://b/k?>.jpg").decode(), "s3://b/k?>.jpg"),
        ("https://example.com/a.jpg", "https://example.com/a.jpg"),
        ("https://example.com/data/a.jpg", "https://example.com/data/a.jpg"),
        ("http://[ls/data/upload/a.jpg", "http://[ls/data/upload/a.jpg"),
        ("http://ls.example:8080/data/upload/3/ab-a%20b.jpg", "{base}/upload/3/ab-a b.jpg"),
        ("https://ls.example/studio/data/local-files/?d=dir/a.jpg", "{base}/dir/a.jpg"),
        (
            "https://ls.example/tasks/7/resolve/?fileuri=" + base64.b64encode(b"s3://b/k.jpg").decode(),
            "s3://b/k.jpg",
        ),
        ("/mnt/a.jpg", "/mnt/a.jpg"),
        ({"only": "a.jpg", "number": 7}, "{base}/a.jpg"),
        ({"note": "x", "img": "a.jpg"}, "{base}/a.jpg"),
    ],
)
def test_label_studio_addresses_lead_to_the_image(file: Path, address: object, uri: str) -> None:
    (row,) = rows(file, json.dumps([task(address, annotation("Real"))]))
    assert row.uri == uri.format(base=file.parent)


@pytest.mark.parametrize(
    ("bad", "place", "why"),
    [
        (7, "entry 1", "no task with data and annotations"),
        ({"id": 3, "image": "a.jpg", "choice": "Fake"}, "task 3", "export from Label Studio as JSON"),
        (minimal("a.jpg", None), "task 12, annotation 34", "it has no label"),
        (minimal("a.jpg", "AI"), "task 12, annotation 34", "--map AI=fake"),
        (minimal("a.jpg", "Real", image=7), "task 12, annotation 34", "none of its data is called image"),
        (task("a.jpg", annotation()), "task 12, annotation 34", "it has no label"),
        (task("a.jpg", annotation("AI")), "task 12, annotation 34", "--map AI=fake"),
        (
            task({"x": "a", "y": "b"}, annotation("Real")),
            "task 12, annotation 34",
            "none of its data is called image",
        ),
        (task("/tasks/7/resolve/?fileuri=%FF", annotation("Real")), "task 12, annotation 34", "cannot be read"),
        (task("a.jpg", annotation("Real", created_at="soon")), "task 12, annotation 34", "'soon' is no time"),
        (task("a.jpg", 7), "task 12", "an annotation is no object"),
        (task("a.jpg", annotation("Real")) | {"annotations": 7}, "task 12", "its annotations are no list"),
    ],
)
def test_label_studio_names_the_bad_task_and_reads_the_others(file: Path, bad: object, place: str, why: str) -> None:
    found = rows(file, json.dumps([bad, task("b.jpg", annotation("Real"))]))
    assert [row.uri for row in found if not row.problem] == [str(file.parent / "b.jpg")]
    ((where, said),) = problems(found)
    assert where == place
    assert why in said


def metadata(name: str | None, **more: Any) -> dict[str, Any]:
    return {
        "class-name": name,
        "confidence": 0.95,
        "job-name": "labeling-job/fakes",
        "human-annotated": "yes",
        "creation-date": "2026-01-31T12:00:00.527256",
        "type": "groundtruth/image-classification",
        **more,
    }


def manifest(*entries: object) -> str:
    return "".join(f"{json.dumps(entry)}\n" for entry in entries)


def test_ground_truth_gives_class_job_and_time(file: Path) -> None:
    entry = {"source-ref": "s3://b/a.png", "x": 0, "x-metadata": metadata("Fake")}
    assert rows(file, manifest(entry)) == [
        Row(
            "line 1",
            uri="s3://b/a.png",
            label="fake",
            by="labeling-job/fakes",
            at=datetime(2026, 1, 31, 12, 0, 0, 527_256, tzinfo=UTC),
        )
    ]


def test_a_manifest_without_metadata_is_read_by_its_only_other_field(file: Path) -> None:
    entries = [
        {"source-ref": "s3://b/a.png", "label": "fake", "note": "x"},
        {"source-ref": "s3://b/b.png", "class": "1", "group": "post 7"},
        {"source-ref": "s3://b/c.png", "class": 0},
        {"source-ref": "s3://b/d.png", "class": "7"},
        {"source-ref": "s3://b/e.png", "x": "1", "y": "1"},
    ]
    found = rows(file, manifest(*entries), "1=fake", "0=real")
    assert [(row.label, row.group) for row in found if not row.problem] == [
        ("fake", None),
        ("fake", "post 7"),
        ("real", None),
    ]
    assert problems(found) == [
        ("line 4", "label '7': say what it means with --map 7=real or --map 7=fake"),
        ("line 5", "none of its fields is called label: x, y"),
    ]


def test_what_a_machine_labelled_is_another_labellers_word(file: Path) -> None:
    entry = {"source-ref": "s3://b/a.png", "x": 0, "x-metadata": metadata("Fake", **{"human-annotated": "no"})}
    assert rows(file, manifest(entry))[0].by == "labeling-job/fakes (automatic)"


def test_chained_and_multi_label_jobs_say_what_they_know(file: Path) -> None:
    several = metadata(None, **{"class-map": {"1": "flux", "4": "people"}})
    several["type"] = "groundtruth/image-classification-multilabel"
    found = rows(
        file,
        manifest(
            {
                "source-ref": "s3://b/a.png",
                "sport": 1,
                "sport-metadata": metadata("football", **{"job-name": "sport"}),
                "x": 0,
                "x-metadata": metadata("real", **{"job-name": "one"}),
                "y": [1, 4],
                "y-metadata": several,
                "boxes-metadata": {"type": "groundtruth/object-detection", "class-map": {"0": "real"}},
            }
        ),
        "flux=fake:flux",
    )
    assert [(row.label, row.generator, row.by) for row in found] == [
        ("real", None, "one"),
        ("fake", "flux", "labeling-job/fakes"),
    ]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"source": "text", "x-metadata": metadata("real")}, "it has no source-ref"),
        ({"source-ref": "s3://b/b.png"}, "no image classification is in it"),
        ({"source-ref": "s3://b/b.png", "x-metadata": {"failure-reason": "expired"}}, "x failed: expired"),
        ({"source-ref": "s3://b/b.png", "x-metadata": metadata("Sunrise")}, "--map Sunrise=real"),
        ({"source-ref": "s3://b/b.png", "x-metadata": metadata("real", **{"creation-date": "x"})}, "no time"),
        ([], "it is no JSON object"),
    ],
)
def test_ground_truth_names_the_bad_line_and_reads_the_others(file: Path, bad: object, why: str) -> None:
    good = {"source-ref": "s3://b/a.png", "x": 0, "x-metadata": metadata("Fake")}
    found = rows(file, manifest(good, bad, good) + '{"source-ref": "s3://cut')
    assert [row.place for row in found if not row.problem] == ["line 1", "line 3"]
    (place, said), (last, cut) = problems(found)
    assert (place, last) == ("line 2", "line 4")
    assert why in said
    assert "it is not JSON" in cut


def test_a_form_can_be_forced(file: Path) -> None:
    (row,) = rows(file, '{"source-ref": "a.png", "uri": "a.png", "label": "real"}\n', form="jsonl")
    assert row.label == "real"


def test_label_studio_and_ground_truth_say_which_group_an_image_belongs_to(file: Path) -> None:
    answer = {"completed_by": 1, "result": [{"value": {"choices": ["real"]}}]}
    task = {"id": 1, "data": {"photo": "s3://b/a.jpg", "group": "post 7"}, "annotations": [answer]}
    (row,) = rows(file, json.dumps([task]))
    assert (row.uri, row.group) == ("s3://b/a.jpg", "post 7")
    made = {"class-name": "real", "type": "groundtruth/image-classification", "job-name": "j"}
    entry = {"source-ref": "s3://b/a.jpg", "origin": 0, "origin-metadata": made, "group": 7}
    (row,) = rows(file, json.dumps(entry))
    assert (row.label, row.group) == ("real", "7")
    asked = {"source-ref": "s3://b/a.jpg", "group": 0, "group-metadata": made}
    (row,) = rows(file, json.dumps(asked))
    assert (row.label, row.group) == ("real", None), "the answer of a labelling job of that name is no group"
