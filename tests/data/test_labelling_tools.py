"""Exports of labelling tools: every annotation is a row, and a bad one is named by its place."""

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

from code_worker.data.label_files.label_rows import Row
from tests.data.label_rows import problems, rows


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "labels"


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
        Row("task 12", unsaid=True),
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
