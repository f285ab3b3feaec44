"""A hook exists only with its section in docs/hooks.md, a plugin of the project that uses it, and a test."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from code_worker import hookspecs
from tests.docs.blocks import ROOT

PAGE = ROOT / "docs" / "hooks.md"
SPECS = {
    node.name: node
    for node in ast.parse(inspect.getsource(hookspecs)).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("code_worker_")
}


def signature(node: ast.FunctionDef) -> str:
    assert node.returns is not None
    return f"{node.name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"


def sections(text: str) -> dict[str, str]:
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def implemented(tree: Path) -> Iterator[str]:
    """Names of the functions marked `@hookimpl` in the modules of a plugin."""
    for path in tree.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(
                "hookimpl" in ast.unparse(mark) for mark in node.decorator_list
            ):
                yield node.name


def test_there_are_hooks() -> None:
    assert set(SPECS) >= {"code_worker_register_heads", "code_worker_select_head"}


@pytest.mark.parametrize("name", SPECS)
def test_the_page_has_a_section_with_the_literal_signature_and_an_example(name: str) -> None:
    section = sections(PAGE.read_text(encoding="utf-8"))[name]
    assert f"```text\n{signature(SPECS[name])}\n```" in section
    assert re.search(rf"```python\n(?:.*\n)*?def {name}\(", section)


@pytest.mark.parametrize("name", SPECS)
def test_a_plugin_of_the_project_uses_the_hook(name: str) -> None:
    assert name in set(implemented(ROOT / "plugins"))


@pytest.mark.parametrize("name", SPECS)
def test_a_test_of_plugins_uses_the_hook(name: str) -> None:
    assert any(name in path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "plugins").glob("test_*.py"))


def test_every_section_of_a_hook_is_of_one_that_exists() -> None:
    named = {title for title in sections(PAGE.read_text(encoding="utf-8")) if title.startswith("code_worker_")}
    assert named == set(SPECS)


def test_a_hook_without_a_section_would_be_found() -> None:
    stale = PAGE.read_text(encoding="utf-8").replace("heads: Sequence[str]", "heads: list[str]")
    assert signature(SPECS["code_worker_select_head"]) not in sections(stale)["code_worker_select_head"]
