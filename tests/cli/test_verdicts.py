from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from code_worker.cli.moderation.verdicts import stage_timings
from code_worker.store.engine import Store
from code_worker.types import Outcome, RejectReason, Verdict
from tests.cli.conftest import Cli
from tests.cli.ledger_rows import accept, judged, rejected

NO_SUCH_ID = "0198c5a2-7f31-7abc-9def-0123456789ab"


def test_pages_show_every_verdict_once_while_new_ones_arrive(cli: Cli, store: Store) -> None:
    jobs = [judged(store, f"s3://b/{number}.jpg", number / 10) for number in range(7)]
    seen: list[str] = []
    after: list[str] = []
    while True:
        page = cli("verdicts", "list", "--json", "--limit", "3", *after)
        seen += [record["job_id"] for record in page.records]
        judged(store, f"s3://b/late-{len(seen)}.jpg", 0.5)
        if not page.stderr:
            break
        after = page.stderr.split()[1:]
    assert seen == jobs[::-1]


def test_filters_are_applied_together(cli: Cli, store: Store) -> None:
    wanted = judged(store, "s3://b/a.jpg", 0.8, tenant="acme")
    judged(store, "s3://b/b.jpg", 0.8, tenant="other")
    judged(store, "s3://b/c.jpg", 0.95, tenant="acme")
    judged(store, "s3://b/d.jpg", 0.2, tenant="acme")
    rejected(store, "s3://b/e.jpg", RejectReason.TRUNCATED)
    found = cli(
        *("verdicts", "list", "--json", "--label", "fake", "--tenant", "acme", "--score-max", "0.9"),
        *("--since", "1h", "--head", "linear", "--release", "r-1", "--sha256", "ab" * 32, "--uri-prefix", "s3://b/"),
    )
    assert [record["job_id"] for record in found.records] == [wanted]
    assert cli("verdicts", "list", "--until", "2020-01-31").stdout == "no verdicts match\n"


def test_an_empty_ledger_is_said_to_be_empty(cli: Cli) -> None:
    assert cli("verdicts", "list").stdout == "no verdicts yet\n"


def test_show_says_what_by_what_and_why(cli: Cli, store: Store) -> None:
    job = judged(store, "s3://b/a.jpg", 0.75)
    shown = cli("verdicts", "show", job).stdout
    assert shown.startswith("Judged fake: head linear gave a score of 0.750, at or above 0.5, where fake begins.")
    for fact in (
        "s3://b/a.jpg",
        "640×480",
        "1,234 bytes",
        "ab" * 32,
        "r-1",
        "cd" * 32,
        "code-worker 0.1",
        "published",
        job,
    ):
        assert fact in shown
    verdict_id = cli("verdicts", "show", job, "--json").records[0]["id"]
    assert cli("verdicts", "show", verdict_id).stdout == shown


def test_timings_are_percentiles_over_what_matches(cli: Cli, store: Store) -> None:
    judged(store, "s3://b/a.jpg", 0.75, tenant="acme")
    judged(store, "s3://b/b.jpg", 0.75)
    (row,) = cli("verdicts", "timings", "--json").records
    assert row == {
        "stage": "fetch", "images": 2, "median_ms": 1.5, "p95_ms": 1.5, "p99_ms": 1.5, "longest_ms": 1.5
    }  # fmt: skip
    assert cli("verdicts", "timings", "--tenant", "acme", "--json").records[0]["images"] == 1
    assert "no verdict that matches" in cli("verdicts", "timings", "--tenant", "nobody").stdout


def test_percentiles_are_those_of_the_nearest_rank() -> None:
    taken = [
        Verdict(job_id=str(n), uri="u", outcome=Outcome.JUDGED, timings_ms={"decode": n, "reused": 1})
        for n in range(1, 101)
    ]
    decode, reused = stage_timings(reversed(taken))
    assert decode == {
        "stage": "decode", "images": 100, "median_ms": 50, "p95_ms": 95, "p99_ms": 99, "longest_ms": 100
    }  # fmt: skip
    assert reused == {"stage": "reused", "images": 100}


def test_show_explains_a_rejection(cli: Cli, store: Store) -> None:
    shown = cli("verdicts", "show", rejected(store, "s3://b/a.jpg", RejectReason.TRUNCATED)).stdout
    assert shown.startswith("Rejected, not judged: truncated. Does a retry help? No: the file is at fault.")
    assert "as a test wants it" in shown


def test_show_tells_an_unknown_id_from_a_job_that_waits(cli: Cli, store: Store) -> None:
    (waiting,) = accept(store, "s3://b/a.jpg")
    assert "has no verdict yet; it is accepted" in cli("verdicts", "show", waiting).stderr
    unknown = cli("verdicts", "show", NO_SUCH_ID)
    assert unknown.status == 1
    assert "no job and no verdict has the id" in unknown.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("verdicts", "show", "post-17"), "'post-17' is no id"),
        (("verdicts", "list", "--since", "yesterday"), "'yesterday' is no time"),
        (("verdicts", "list", "--since", "9" * 6 + "w"), "before the calendar begins"),
        (("verdicts", "list", "--score-min", "2"), "2"),
        (("verdicts", "list", "--reason", "ugly"), "ugly"),
    ],
)
def test_wrong_arguments_end_with_status_2(bare_cli: Cli, arguments: tuple[str, ...], said: str) -> None:
    ran = bare_cli(*arguments)
    assert ran.status == 2
    assert said in ran.stderr
    assert not ran.stdout


def test_without_a_database_the_way_to_one_is_named(bare_cli: Cli, tmp_path: Path) -> None:
    ran = bare_cli("verdicts", "list")
    assert ran.status == 2
    assert "code-worker db upgrade" in ran.stderr
    assert not (tmp_path / "data").exists()


def test_export_writes_the_same_records_as_csv_and_jsonl(cli: Cli, store: Store, tmp_path: Path) -> None:
    jobs = [judged(store, "s3://b/a,b.jpg", 0.25), rejected(store, "s3://b/b.jpg", RejectReason.EMPTY)]
    lines = cli("verdicts", "export").records
    assert [record["job_id"] for record in lines] == jobs
    rows = list(csv.DictReader(io.StringIO(cli("verdicts", "export", "--csv").stdout)))
    assert [row["uri"] for row in rows] == ["s3://b/a,b.jpg", "s3://b/b.jpg"]
    assert list(rows[0]) == list(lines[0])
    assert json.loads(rows[0]["timings_ms"]) == lines[0]["timings_ms"]
    assert (rows[0]["score"], rows[1]["score"], rows[1]["reason"]) == ("0.25", "", "empty")
    output = tmp_path / "out.jsonl"
    assert "1 verdict written" in cli("verdicts", "export", "--label", "real", "--output", str(output)).stderr
    assert [json.loads(line)["job_id"] for line in output.read_text().splitlines()] == jobs[:1]


def test_an_export_that_cannot_be_written_leaves_nothing_behind(sqlite_cli: Cli, tmp_path: Path) -> None:
    ran = sqlite_cli("verdicts", "export", "--output", str(tmp_path / "no" / "such" / "out.csv"))
    assert ran.status == 2
    assert "cannot write" in ran.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("verdicts", "list", "--sha256", "abc"),
        ("verdicts", "list", "--score-min", "nan"),
        ("erasures", "check", "--sha256", "abc"),
        ("erase", "--tenant", "", "--yes"),
        ("scan", ""),
        ("label", "", "real"),
    ],
    ids=" ".join,
)
def test_what_can_match_nothing_is_wrong_use_and_no_empty_answer(sqlite_cli: Cli, words: tuple[str, ...]) -> None:
    ran = sqlite_cli(*words)
    assert (ran.status, ran.stdout) == (2, "")
    assert "Traceback" not in ran.stderr


def test_a_content_hash_is_found_in_capitals(sqlite_cli: Cli, sqlite_store: Store) -> None:
    judged(sqlite_store, "s3://b/a.jpg", 0.9)
    assert len(sqlite_cli("verdicts", "list", "--sha256", "AB" * 32, "--json").records) == 1
