from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
GENERATOR = ROOT / "docs" / "generate_settings.py"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
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


def test_the_map_names_every_part_of_the_package() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = ROOT / "code_worker"
    parts = {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").is_file()}
    modules = {path.name for path in package.glob("*.py") if not path.name.startswith("_")}
    plugins = {f"{path.name}/" for path in (ROOT / "plugins").iterdir() if any(path.glob("*.py*"))}
    named = parts | modules | plugins
    assert {part for part in named if not re.search(rf"(?m)^  .*\b{re.escape(part)}", text)} == set()


def test_the_picture_is_well_formed_says_what_it_shows_and_suits_dark_pages() -> None:
    path = ROOT / "docs" / "architecture.svg"
    root = ET.parse(path).getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert root.find(f"{space}title") is not None
    assert root.find(f"{space}desc") is not None
    assert "prefers-color-scheme: dark" in path.read_text(encoding="utf-8")
    assert root.find(f".//{space}script") is None
