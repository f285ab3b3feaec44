"""House rules that no linter knows: sizes, names, unsafe calls, words."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYTHON_TREES = ("code_worker", "plugins", "migrations", "tests", "bench", "docs")
MAX_FILE_LINES = 400
LISTS = {"migrations/versions/2026_12_01-initial.py"}
"""Every table, one after the other: a list has no parts to be cut into."""
MAX_FUNCTION_LINES = 40
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "manager", "managers", "misc"}


def python_files(*trees: str) -> list[Path]:
    found = {path for tree in trees for path in (ROOT / tree).rglob("*.py")}
    assert found
    return sorted(path for path in found if not {"__pycache__", "build"} & {*path.parts})


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring: a contract is not length."""
    assert node.end_lineno is not None
    total = node.end_lineno - node.lineno + 1
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        assert first.end_lineno is not None
        total -= first.end_lineno - first.lineno + 1
    return total


def test_no_python_file_is_longer_than_the_cap() -> None:
    long = {
        relative(path): count
        for path in python_files(*PYTHON_TREES)
        if relative(path) not in LISTS
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > MAX_FILE_LINES
    }
    assert not long


def test_no_function_is_longer_than_the_cap() -> None:
    long = {
        f"{relative(path)}:{node.name}": count
        for path in python_files("code_worker", "plugins", "bench", "docs")
        for node in functions(ast.parse(path.read_text(encoding="utf-8")))
        if (count := code_lines(node)) > MAX_FUNCTION_LINES
    }
    assert not long


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        relative(path)
        for path in python_files("code_worker", "plugins", "migrations", "bench", "docs")
        if (text := path.read_text(encoding="utf-8")).strip() and ast.get_docstring(ast.parse(text)) is None
    ]
    assert not silent


def test_every_module_name_carries_a_term_of_the_field() -> None:
    vague = [
        relative(path)
        for path in python_files("code_worker", "plugins", "tests")
        if {path.stem, *path.relative_to(ROOT).parts[:-1]} & FORBIDDEN_NAMES
    ]
    assert not vague


def documented(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        has_one = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module)
        if has_one and (text := ast.get_docstring(node)):
            yield text


def test_docstrings_begin_with_what_a_thing_does_or_is() -> None:
    turned = {"What", "How", "Whether", "Whoever", "Whatever", "Who", "Where", "Which", "Why", "When", "As", "That"}
    found = {
        f"{relative(path)}: {text.splitlines()[0]}"
        for path in python_files("code_worker", "plugins")
        for text in documented(ast.parse(path.read_text(encoding="utf-8")))
        if text.split()[0] in turned
    }
    assert not found


def test_no_private_word_stands_where_the_field_has_one() -> None:
    private = re.compile(
        r"(?i)\b(doorbell|undertaker|mourner|errand|witness(?!es)|whatever|whoever|likewise|as above|see above)\b"
    )
    files = [*python_files("code_worker", "plugins"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    found = {
        f"{relative(path)}:{number}: {match[0]}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (match := private.search(line))
    }
    assert not found


def test_suppressed_lint_rules_stay_few() -> None:
    marks = re.compile(r"# (?:noqa|type: ignore)")
    found = [
        relative(path)
        for path in python_files("code_worker", "plugins")
        for line in path.read_text(encoding="utf-8").splitlines()
        if marks.search(line)
    ]
    assert len(found) <= 90


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def unsafe_calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = called(node)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in {
            "pickle.load",
            "pickle.loads",
            "joblib.load",
            "cloudpickle.load",
            "cloudpickle.loads",
            "eval",
            "exec",
        }:
            yield name
        if name == "torch.load" and keywords.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if name.endswith("np.load") and keywords.get("allow_pickle", "False") != "False":
            yield "np.load with allow_pickle"
        if keywords.get("shell") == "True" or name == "os.system":
            yield f"{name} through a shell"


def test_nothing_shipped_unpickles_or_runs_a_string() -> None:
    found = {
        relative(path): calls
        for path in python_files("code_worker", "plugins")
        if (calls := list(unsafe_calls(ast.parse(path.read_text(encoding="utf-8")))))
    }
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(file)",
        "import joblib\njoblib.load('head.sav')",
        "import torch\ntorch.load('a.pth')",
        "import torch\ntorch.load('a.pth', weights_only=False)",
        "import numpy as np\nnp.load('a.npz', allow_pickle=True)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
    ],
)
def test_each_unsafe_call_would_be_found(source: str) -> None:
    assert list(unsafe_calls(ast.parse(source)))


def skipping_calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if name in {
            "pytest.skip",
            "pytest.importorskip",
            "pytest.mark.skip",
            "pytest.mark.skipif",
            "pytest.mark.xfail",
        }:
            yield name


def test_no_test_is_ever_skipped() -> None:
    found = {
        relative(path): names
        for path in python_files("tests", "plugins")
        if (names := list(skipping_calls(ast.parse(path.read_text(encoding="utf-8")))))
    }
    assert not found


def tracked_text_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False, text=True)
    names = listed.stdout.split("\0") if listed.returncode == 0 else []
    paths = [ROOT / name for name in names if name] or [path for path in ROOT.glob("*.*") if path.is_file()]
    return [
        path
        for path in paths
        if path.is_file() and path.suffix in {".md", ".py", ".toml", ".yaml", ".txt", ".in", ""}
    ]


def test_every_suppressed_lint_rule_says_why() -> None:
    marker = re.compile(r"#\s*noqa(?P<rest>.*)$")
    bare = [
        f"{relative(path)}:{number}"
        for path in python_files("code_worker", "plugins", "migrations", "tests", "bench", "docs")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (match := marker.search(line)) and not re.match(r": [A-Z0-9, ]+ - \w", match["rest"])
    ]
    assert not bare


def test_no_file_names_a_place_on_one_machine() -> None:
    own = re.compile(r"/(?:root|home/\w+|Users/\w+|work)/")
    allowed = {"tests/test_repository.py"}
    found = [
        f"{relative(path)}: {match.group()}"
        for path in tracked_text_files()
        if relative(path) not in allowed
        for match in own.finditer(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert not found
