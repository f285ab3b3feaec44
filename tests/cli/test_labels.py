"""Labels from the shell: say, import, list, export, see conflicts."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from code_worker.store.engine import Store
from code_worker.store.learning import image_groups
from tests.cli.conftest import Cli
from tests.data.label_acts import Place, sha256_of


@pytest.fixture
def place(sqlite_store: Store, tmp_path: Path) -> Place:
    return Place(tmp_path, sqlite_store)


@pytest.fixture
def labelling(sqlite_cli: Cli, place: Place) -> Cli:
    sqlite_cli.env["CODE_WORKER_FILES__ROOTS"] = json.dumps([str(place.photos)])
    return sqlite_cli


def test_label_says_what_was_said_and_that_it_was_said_before(labelling: Cli, place: Place) -> None:
    path = place.image("a.png")
    command = (
        "label",
        path,
        "fake",
        "--generator",
        "sdxl",
        "--by",
        "alice",
        "--note",
        "hands",
        "--collection",
        "ads",
    )
    assert labelling(*command).stdout == f"labelled fake: {path} ({sha256_of(path)})\n"
    assert labelling(*command).stdout == f"said before: fake: {path} ({sha256_of(path)})\n"
    (record,) = labelling(*command, "--json").records
    assert record == {"sha256": sha256_of(path), "uri": path, "new": False, "label": "fake"}
    (said,) = place.statements()
    assert (said.source, said.by, said.generator, said.note) == ("cli", "alice", "sdxl", "hands")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("/nowhere/a.png", "real"), 1, "code-worker: source_not_allowed: /nowhere/a.png is not under an allowed"),
        (("f" * 64, "real"), 1, "no copy of image ffff"),
        (("0198c5a2-7f31-7abc-9def-0123456789ab", "real"), 1, "no job has the id 0198c5a2"),
        (("a.png", "maybe"), 2, "'maybe' is not one of 'real', 'fake'"),
        (("a.png", "real", "--generator", "sdxl"), 2, "a real image has no generator"),
        (("a.png", "real", "--by", ""), 2, "by must have 1 to 200 characters"),
    ],
)
def test_what_cannot_be_labelled_is_one_clear_line(
    labelling: Cli, arguments: tuple[str, ...], status: int, said: str
) -> None:
    ran = labelling("label", *arguments)
    assert ran.status == status
    assert said in ran.stderr
    assert "Traceback" not in ran.stderr


def write_csv(place: Place) -> Path:
    """Two labellers on one image, a good row, and bad ones."""
    place.image("a.png", 1)
    place.image("b.png", 2)
    file = place.photos / "labels.csv"
    file.write_text(
        'path,label,by\na.png,real,alice\na.png,fake,bob\nb.png,ai,\nmissing.png,real,\nb.png,"real,\nb.png,sdxl,\n',
        encoding="utf-8",
    )
    return file


def test_import_keeps_good_rows_names_bad_ones_and_changes_nothing_the_second_time(
    labelling: Cli, place: Place
) -> None:
    file = write_csv(place)
    command = ("labels", "import", str(file), "--map", "sdxl=fake:sdxl", "--by", "carol", "--collection", "ads")
    first = labelling(*command)
    assert first.status == 1
    assert first.stdout == "3 new labels, 0 said before, 3 rows refused\n"
    said = first.stderr.splitlines()
    assert said[0] == "line 4: label 'ai': say what it means with --map ai=real or --map ai=fake"
    assert said[1].startswith("line 5: not_found: ")
    assert said[2] == "line 6: a quote is never closed"
    before = place.statements()
    assert {(one.by, one.label, one.generator) for one in before} == {
        ("alice", "real", None),
        ("bob", "fake", None),
        ("carol", "fake", "sdxl"),
    }
    again = labelling(*command, "--json")
    assert again.records == [{"new": 0, "known": 3, "refused": 3, "skipped": 0}]
    assert place.statements() == before


def test_an_import_without_bad_rows_ends_well(labelling: Cli, place: Place) -> None:
    path = place.image("a.png")
    file = place.photos / "labels.json"
    result = [{"type": "choices", "value": {"choices": ["Fake"]}}]
    task = {"id": 1, "data": {"image": path}, "annotations": [{"id": 2, "result": result, "completed_by": 3}]}
    file.write_text(json.dumps([task]), encoding="utf-8")
    ran = labelling("labels", "import", str(file))
    assert (ran.status, ran.stdout, ran.stderr) == (0, "1 new label, 0 said before, 0 rows refused\n", "")
    assert place.statements()[0].by == "label-studio:3"


def test_tasks_without_an_annotation_are_counted(labelling: Cli, place: Place) -> None:
    path, file = place.image("a.png"), place.photos / "labels.json"
    given = {"id": 2, "result": [{"type": "choices", "value": {"choices": ["Fake"]}}], "completed_by": 3}
    tasks = [
        {"id": number, "data": {"image": path}, **more}
        for number, more in enumerate([{"annotations": [given]}, {"annotations": []}, {}])
    ]
    tasks.append({"id": 9, "data": {"image": path}, "annotations": [{**given, "was_cancelled": True}]})
    file.write_text(json.dumps(tasks), encoding="utf-8")
    ran = labelling("labels", "import", str(file))
    assert (ran.status, ran.stdout.strip().split("; ")[1]) == (0, "skipped: 3 without annotation")
    assert labelling("labels", "import", str(file), "--json").records == [
        {"new": 0, "known": 1, "refused": 0, "skipped": 3}
    ]


@pytest.mark.parametrize(
    ("content", "options", "status", "said"),
    [
        ("", (), 1, "there is nothing in it"),
        ("a.png,real\n", (), 1, "the first line must name the columns"),
        ("uri,label\n", ("--map", "x"), 2, "'x' maps nothing"),
        ("uri,label\n", ("--format", "xml"), 2, "'xml' is not one of"),
    ],
)
def test_a_bad_file_is_one_clear_line(
    labelling: Cli, place: Place, content: str, options: tuple[str, ...], status: int, said: str
) -> None:
    file = place.photos / "labels.csv"
    file.write_text(content, encoding="utf-8")
    ran = labelling("labels", "import", str(file), *options)
    assert ran.status == status
    assert said in ran.stderr


def contradict(labelling: Cli, place: Place) -> tuple[str, str]:
    """Alice and Bob on the first image, Alice alone on the second."""
    a, b = place.image("a.png", 1), place.image("b.png", 2)
    labelling("label", a, "real", "--by", "alice")
    labelling("label", a, "fake", "--by", "bob", "--generator", "sdxl")
    labelling("label", b, "fake", "--by", "alice", "--generator", "flux")
    return a, b


def test_list_filters_and_pages(labelling: Cli, place: Place) -> None:
    assert labelling("labels", "list").stdout == "no labels yet\n"
    a, b = contradict(labelling, place)
    newest = labelling("labels", "list", "--json", "--limit", "2")
    assert [record["uri"] for record in newest.records] == [b, a]
    rest = labelling("labels", "list", "--json", *newest.stderr.split()[1:])
    assert [record["by"] for record in rest.records] == ["alice"]

    def found(*options: str) -> list[str]:
        return [record["uri"] for record in labelling("labels", "list", "--json", "--oldest-first", *options).records]

    assert found() == [a, a, b]
    assert found("--label", "fake", "--since", "1h") == [a, b]
    assert found("--by", "alice", "--label", "fake") == found("--generator", "flux") == [b]
    assert found("--sha256", sha256_of(a)) == [a, a]
    assert labelling("labels", "list", "--until", "2020-01-31").stdout == "no labels match\n"
    assert "sdxl" in labelling("labels", "list").stdout


def test_export_writes_one_label_per_image_by_the_rule(labelling: Cli, place: Place) -> None:
    a, b = contradict(labelling, place)
    records = {record["uri"]: record for record in labelling("labels", "export").records}
    assert {uri: record["label"] for uri, record in records.items()} == {a: "fake", b: "fake"}
    assert (records[a]["generator"], records[a]["labellers"], records[a]["contradicted"]) == ("sdxl", 2, True)
    unanimous = labelling("labels", "export", "--csv", env={"CODE_WORKER_LABELS__RULE": "unanimous"})
    assert [row["uri"] for row in csv.DictReader(io.StringIO(unanimous.stdout))] == [b]
    assert unanimous.stderr == "1 label written\n"


@pytest.mark.parametrize("form", ["--csv", "--jsonl"])
def test_what_was_exported_can_be_imported_and_says_nothing_new(labelling: Cli, place: Place, form: str) -> None:
    paths = contradict(labelling, place)
    file = place.photos / "exported"
    labelling("labels", "export", "--statements", form, "--output", str(file))
    for path in paths:
        Path(path).unlink()
    before = place.statements()
    assert labelling("labels", "import", str(file)).stdout == "0 new labels, 3 said before, 0 rows refused\n"
    assert place.statements() == before


def test_conflicts_show_who_says_what_and_what_the_rule_makes_of_it(labelling: Cli, place: Place) -> None:
    assert labelling("labels", "conflicts").stdout == "no conflicts\n"
    a, _ = contradict(labelling, place)
    (record,) = labelling("labels", "conflicts", "--json").records
    assert (record["sha256"], record["resolved"]) == (sha256_of(a), "fake")
    assert [(said["by"], said["label"]) for said in record["statements"]] == [("alice", "real"), ("bob", "fake")]
    shown = labelling("labels", "conflicts", env={"CODE_WORKER_LABELS__RULE": "majority"}).stdout
    assert "undecided" in shown
    assert "(majority)" in shown
    labelling("label", a, "real", "--by", "bob")
    assert labelling("labels", "conflicts", "--json").records == []


def test_a_reviewer_settles_what_is_contradicted(labelling: Cli, place: Place) -> None:
    path = place.image("a.png")
    for by, label in (("alice", "fake"), ("bob", "real")):
        labelling("label", path, label, "--by", by)
    assert "undecided" in labelling("labels", "conflicts", env={"CODE_WORKER_LABELS__RULE": "unanimous"}).stdout
    assert labelling("labels", "settle", path, "fake", "--note", "seen").stdout.startswith(f"settled fake: {path}")
    assert labelling("labels", "settle", path, "fake").stdout.startswith(f"settled before: fake: {path}")
    assert labelling("labels", "conflicts").stdout == "no conflicts\n"
    assert labelling("labels", "settle", path, "real", "--generator", "sdxl").status == 2


def test_a_group_is_said_imported_and_exported(labelling: Cli, place: Place, tmp_path: Path) -> None:
    pictures = [place.image(f"{seed}.png", seed, side=64) for seed in range(3)]
    labelling("label", pictures[0], "real", "--group", "post 7")
    table = tmp_path / "labels.csv"
    table.write_text(f"uri,label,group\n{pictures[1]},fake,post 7\n{pictures[2]},fake,\n")
    labelling("labels", "import", str(table))
    exported = labelling("labels", "export", "--statements").records
    assert {Path(one["uri"]).name: one["group"] for one in exported} == {
        "0.png": "post 7",
        "1.png": "post 7",
        "2.png": None,
    }
    hashes = [sha256_of(path) for path in pictures]
    found = place.store.run(lambda session: image_groups.places(session, hashes), write=False)
    assert found[hashes[0]] == found[hashes[1]]


def test_no_name_of_a_file_of_labels_reaches_the_terminal_as_it_is(labelling: Cli, place: Place) -> None:
    file = place.photos / "labels.jsonl"
    file.write_text(
        '{"uri": "\\u001b[31m\\n.png", "label": "real"}\n{"uri": "a", "label": "\\u001b[2J"}\n', encoding="utf-8"
    )
    ran = labelling("labels", "import", str(file))
    assert ran.status == 1
    assert r"line 1: not_found: " in ran.stderr
    assert ran.stderr.count("\n") == 2
    assert "\x1b" not in ran.stderr


def test_formulas_are_exported_as_text_and_read_back_as_they_were(
    labelling: Cli, place: Place, tmp_path: Path
) -> None:
    note = '=HYPERLINK("http://evil.example","look")'
    labelling("label", place.image("a.png"), "fake", "--generator", "-x", "--by", "@bob", "--note", note)
    cells = csv.DictReader(io.StringIO(labelling("labels", "export", "--statements", "--csv").stdout))
    (escaped,) = cells
    assert (escaped["generator"], escaped["by"], escaped["note"]) == ("'-x", "'@bob", f"'{note}")
    plain = labelling("labels", "export", "--statements", "--csv", "--raw").stdout
    (raw,) = csv.DictReader(io.StringIO(plain))
    assert (raw["generator"], raw["by"], raw["note"]) == ("-x", "@bob", note)
    exported = tmp_path / "statements.csv"
    assert labelling("labels", "export", "--statements", "--csv", "--output", str(exported)).status == 0
    ran = labelling("labels", "import", str(exported), "--json")
    assert (ran.status, ran.records) == (0, [{"new": 0, "known": 1, "refused": 0, "skipped": 0}])
