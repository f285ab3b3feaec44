"""What is installed: hashed, listed in a bill of materials, and by nobody's leave but the lock's."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
import uuid
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "deploy" / "sbom.py"
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
PURL = re.compile(r"pkg:pypi/[a-z0-9][a-z0-9-]*@[A-Za-z0-9.+!_-]+")


def bill_of(lock: Path) -> tuple[dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--lock", str(lock)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found, done.stdout


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_the_bill_lists_every_pin_with_its_hashes(lock: Path) -> None:
    bill, text = bill_of(lock)
    lines = lock.read_text(encoding="utf-8").splitlines()
    pins = [line.split(" ")[0] for line in lines if not line.startswith(" ")]
    assert [f"{one['name']}=={one['version']}" for one in bill["components"]] == [
        re.sub(r"[-_.]+", "-", name).lower() + "==" + version
        for name, _, version in (pin.partition("==") for pin in pins)
    ]
    hashes = [entry["content"] for one in bill["components"] for entry in one["hashes"]]
    assert hashes == re.findall(r"sha256:([0-9a-f]{64})", lock.read_text(encoding="utf-8"))
    assert bill_of(lock)[1] == text, "the same lock gives the same bytes"


def test_the_bill_has_the_form_of_cyclonedx() -> None:
    bill, _ = bill_of(ROOT / "requirements" / "worker.txt")
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.6", 1)
    assert uuid.UUID(bill["serialNumber"].removeprefix("urn:uuid:"))
    root = bill["metadata"]["component"]
    assert (root["type"], root["name"]) == ("application", "code-worker")
    references = [one["bom-ref"] for one in bill["components"]]
    assert len(set(references)) == len(references)
    assert all(PURL.fullmatch(reference) for reference in [root["bom-ref"], *references])
    assert all({"type", "name", "version", "purl", "hashes"} <= one.keys() for one in bill["components"])
    assert bill["dependencies"] == [{"ref": root["bom-ref"], "dependsOn": sorted(references)}]
    assert "torch" in {one["name"] for one in bill["components"]}


@pytest.mark.parametrize("line", ["requests", "requests==1.0 \\\nflask==2.0 \\", "-e .", "requests @ git+ssh://h"])
def test_what_is_not_pinned_by_hash_has_no_bill(tmp_path: Path, line: str) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text(f"{line}\n")
    done = subprocess.run([sys.executable, str(SCRIPT), "--lock", str(lock)], capture_output=True, check=False)
    assert done.returncode != 0
    assert b"neither a pin nor a hash" in done.stderr or b"without a hash" in done.stderr


def test_every_installation_demands_hashes_or_goes_without_an_index() -> None:
    """Of the project itself and its own plugins pip gets the source, without dependencies."""
    for path in (ROOT / "Makefile", ROOT / "deploy" / "Dockerfile"):
        text = re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))
        for name, value in re.findall(r"^(\w+) :?= (.*)$", text, re.MULTILINE):
            text = text.replace(f"$({name})", value)
        installs = [line for line in text.splitlines() if re.search(r"\bpip\b.*\b(install|wheel)\b", line)]
        assert len(installs) >= 3
        assert [line for line in installs if "--require-hashes" not in line and "--no-deps" not in line] == []
    installer = (ROOT / "requirements" / "install.py").read_text(encoding="utf-8")
    assert installer.count('"install", "--') == 3
    assert installer.count("*what]") == 2
    assert installer.count('"--require-hashes", "-r"') == 2


def test_nothing_shipped_is_given_a_shell() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in [*(ROOT / "code_worker").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.keyword) and node.arg == "shell"
    ]
    assert found == []


def test_the_audit_of_pins_asks_for_the_hashed_locks_alone() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "audit-pins"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    command = next(line for line in done.stdout.splitlines() if line.startswith("pip-audit"))
    assert "--require-hashes --disable-pip" in command
    assert "requirements/worker.txt" in command
    assert not re.search(r"https?:", command)


def test_the_policy_says_how_to_report_and_what_is_trusted() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for heading in ("## Reporting", "## Supported versions", "## What is trusted, and what is not"):
        assert heading in text
    assert "within five days" in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    has_address = any("email" in one for one in project["authors"])
    assert ("metadata" in text.partition("## Supported")[0]) == has_address


def named_tests(page: str) -> list[tuple[str, str]]:
    return re.findall(r"`((?:tests|plugins)/[\w/]+\.py)(?:::(\w+))?`", page)


def test_every_test_that_the_checklist_names_is_there() -> None:
    named = named_tests((ROOT / "docs" / "security.md").read_text(encoding="utf-8"))
    assert len(named) >= 25
    for path, function in named:
        assert (ROOT / path).is_file(), path
        assert not function or re.search(rf"^def {function}\(", (ROOT / path).read_text("utf-8"), re.MULTILINE), (
            function
        )
