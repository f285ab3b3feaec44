from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote

import pytest

from code_worker.cli.common.records import RETRY_HELPS
from code_worker.types import RejectReason

ROOT = Path(__file__).resolve().parents[2]
GENERATOR = ROOT / "docs" / "generate_settings.py"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SOURCE = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "code_worker").rglob("*.py"))}
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_settings_page_is_what_the_settings_say() -> None:
    done = subprocess.run([sys.executable, str(GENERATOR), "--check"], check=False)
    assert done.returncode == 0, "docs/settings.md is stale: make settings"


def anchors(text: str) -> set[str]:
    """Anchors that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_link_within_the_project_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = page.parent / unquote(name) if name else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_setting_that_a_page_names_is_one(page: Path) -> None:
    listed = set(
        re.findall(r"\| `(CODE_WORKER_\w+)` \|", (ROOT / "docs" / "settings.md").read_text(encoding="utf-8"))
    )
    sections = {name.rpartition("__")[0] for name in listed}
    named = set(re.findall(r"CODE_WORKER_[A-Z0-9_]*[A-Z0-9]", page.read_text(encoding="utf-8")))
    # Beneath it come heads, which are whoever's.
    named = {name for name in named if not name.startswith("CODE_WORKER_HEADS__")}
    assert named - listed - sections - {"CODE_WORKER_CONFIG"} == set()


def rows(page: str, heading: str) -> list[list[str]]:
    """Cells of the table under a heading, without its head."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_operations_lists_every_reason_and_says_which_a_retry_helps() -> None:
    told = {
        reason: help_ for reasons, help_ in rows("operations.md", "Reading a verdict") for reason in quoted(reasons)
    }
    assert told == {reason.value: helps for reason, helps in RETRY_HELPS.items()}, "as `verdicts show` says it"
    assert set(told) == {reason.value for reason in RejectReason}
    reserved = {reason for reason, help_ in told.items() if help_.startswith("reserved")}
    helped = {reason for reason, help_ in told.items() if help_.startswith("yes")}
    assert helped == {reason.value for reason in RejectReason if reason.retryable} - reserved
    given = {path.name for reason in reserved for path in SOURCE if f"RejectReason.{reason.upper()}" in SOURCE[path]}
    assert given == {"types.py", "records.py"}, "where they are named and explained"


def test_security_lists_every_act_that_is_audited() -> None:
    told = {action for actions, _, _ in rows("security.md", "Audit") for action in quoted(actions)}
    kinds = "|".join(sorted({action.partition(".")[0] for action in told}))
    assert told == set(re.findall(rf'"((?:{kinds})\.[a-z]+)"', "".join(SOURCE.values())))


def test_events_that_operations_names_are_logged() -> None:
    section = "\n".join("|".join(row) for row in rows("operations.md", "What happens when something dies"))
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)` (?:is|when|and|are)", section))
    assert len(named) >= 4
    assert {name for name in named if f'"{name}"' not in "".join(SOURCE.values())} == set()


def test_the_map_names_every_part_of_the_package() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = ROOT / "code_worker"
    parts = {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").is_file()}
    modules = {path.name for path in package.glob("*.py") if not path.name.startswith("_")}
    plugins = {f"{path.name}/" for path in (ROOT / "plugins").iterdir() if any(path.glob("*.py*"))}
    named = parts | modules | plugins
    assert {part for part in named if not re.search(rf"(?m)^  .*\b{re.escape(part)}", text)} == set()


def test_the_ways_and_places_of_the_architecture_page_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    symbols = set(re.findall(r"code_worker[\w.]*:[\w.]+", text))
    assert len(symbols) >= 40
    assert {symbol for symbol in symbols if not _resolves(symbol)} == set()
    places = {place for place in re.findall(r"`([\w-]+/[\w./-]*)`", text) if place != "code_worker/"}
    assert len(places) >= 20
    assert {place for place in places if not _is_there(place)} == set()
    ways = re.findall(r"```text\n((?:code_worker\S+:\S+\n)+)```", text)
    assert [len(way.splitlines()) >= 10 for way in ways] == [True, True], "of a job and of a label"


def _resolves(symbol: str) -> bool:
    module, _, names = symbol.partition(":")
    found = import_module(module)
    for name in names.split("."):
        # A field of a dataclass or model without a default is no attribute of its class.
        if not hasattr(found, name) and name not in getattr(found, "__annotations__", {}):
            return False
        found = getattr(found, name, None)
    return True


def _is_there(place: str) -> bool:
    return any((ROOT / base / place).exists() for base in ("", "code_worker", "plugins"))


def test_the_picture_is_well_formed_says_what_it_shows_and_suits_dark_pages() -> None:
    path = ROOT / "docs" / "architecture.svg"
    root = ET.parse(path).getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert root.find(f"{space}title") is not None
    assert root.find(f"{space}desc") is not None
    assert "prefers-color-scheme: dark" in path.read_text(encoding="utf-8")
    assert root.find(f".//{space}script") is None
