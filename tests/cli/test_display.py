"""Names that strangers chose, on the way to an operator's terminal."""

from __future__ import annotations

import json
import logging
import re

import pytest

from code_worker.cli.moderation.scan import Form, printer
from code_worker.logs import configure_logging, get_logger
from code_worker.store.engine import Store
from code_worker.store.learning import labels
from code_worker.store.learning.labels import NewLabel
from code_worker.types import Outcome, RejectReason, Verdict
from tests.cli.conftest import Cli, Ran
from tests.cli.ledger_rows import judged, rejected

EVIL = "\x1b[2J\x9b31m\r\u202e\nall: erased"
SHA = "ab" * 32
URI = f"s3://b/{EVIL}.jpg"
_UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def unharmed(ran: Ran) -> str:
    """What was printed, of which no line begins with what a stranger wrote."""
    said = ran.stdout + ran.stderr
    assert not _UNSAFE.findall(said)
    assert not [line for line in said.splitlines() if line.startswith("all: erased")]
    assert "Traceback" not in said
    return said


@pytest.fixture
def ids(store: Store) -> tuple[str, str]:
    """Ids of a judged and of a rejected job, with labels, all with names of a stranger."""
    found = judged(store, URI, 0.9, tenant=f"ac{EVIL}"), rejected(store, URI, RejectReason.NOT_FOUND)
    said = NewLabel(SHA, "fake", f"eve{EVIL}", "api", generator=f"g{EVIL}", uri=URI, note=EVIL)
    other = NewLabel(SHA, "real", f"adam{EVIL}", "api", uri=URI)
    store.run(lambda session: labels.add(session, [said, other]))
    return found


@pytest.mark.parametrize(
    "command",
    [
        ("jobs", "list"),
        ("jobs", "show", "JUDGED"),
        ("verdicts", "list"),
        ("verdicts", "show", "JUDGED"),
        ("verdicts", "show", "REJECTED"),
        ("labels", "list"),
        ("labels", "conflicts"),
        ("erase", "--tenant", f"none{EVIL}", "--yes"),
        ("erasures", "check", "--tenant", EVIL),
        ("enqueue", f"ftp://x/{EVIL}"),
        ("enqueue", URI),
        ("jobs", "show", EVIL),
        (f"jobs{EVIL}",),
        ("jobs", f"list{EVIL}"),
        ("jobs", "list", f"--{EVIL}"),
        ("data", "show", EVIL),
        ("scan", f"/nowhere/{EVIL}"),
        ("labels", "import", f"/nowhere/{EVIL}.csv"),
        ("db", "backup", f"/proc/{EVIL}/x"),
    ],
    ids=lambda command: " ".join(command).replace(EVIL, "EVIL"),
)
def test_what_strangers_wrote_cannot_change_the_terminal(
    cli: Cli, ids: tuple[str, str], command: tuple[str, ...]
) -> None:
    words = [{"JUDGED": ids[0], "REJECTED": ids[1]}.get(word, word) for word in command]
    unharmed(cli(*words))


def test_a_name_is_shown_with_what_it_really_holds(cli: Cli, ids: tuple[str, str]) -> None:
    said = unharmed(cli("verdicts", "show", ids[0]))
    assert "\\e[2J\\x9b31m\\r\\u202e\\nall: erased" in said.replace("\n", "")


def test_json_and_csv_hold_the_name_itself(cli: Cli, ids: tuple[str, str]) -> None:
    assert {row["uri"] for row in cli("jobs", "list", "--json").records} == {URI}
    assert cli("verdicts", "export", "--jsonl").records[0]["uri"] == URI
    assert f'"{URI}"'.replace("\r", "") in cli("verdicts", "export", "--csv").stdout.replace("\r", "")


def test_a_name_of_bytes_that_are_not_utf8_is_written_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    verdict = Verdict(job_id="", uri="/a/caf\udce9.jpg", outcome=Outcome.REJECTED, reason=RejectReason.NOT_FOUND)
    printer(Form.JSON)(verdict)
    printer(Form.TABLE)(verdict)
    first, _, last = capsys.readouterr().out.splitlines()
    assert json.loads(first)["uri"] == "/a/caf\udce9.jpg"
    assert last.rstrip().endswith("/a/caf\\xe9.jpg")


def test_a_log_for_a_terminal_shows_names_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        configure_logging("info", "console")
        get_logger("code_worker.test").info("image_read", uri=URI, ids=[EVIL], count=3)
        logging.getLogger("celery").info("task with %s", EVIL)
        try:
            raise ValueError(EVIL)
        except ValueError:
            get_logger("code_worker.test").exception("broken")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    said = capsys.readouterr().err
    assert not _UNSAFE.findall(said)
    assert "\\e[2J" in said
    assert "count=3" in said
