"""The layout: no circles, no flat bags, and strings that name modules that exist."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_MODULES = 16
"""Directly in one package, its `__init__` among them."""
MODULE_RUNS = ("code_worker", "plugins", "tests", "bench", "docs", "deploy")


def product_modules() -> dict[str, Path]:
    """Every module that is shipped, by its dotted name."""
    found = {}
    for base, tree in ((ROOT, "code_worker"), (ROOT / "plugins", "code_worker_heads")):
        for path in sorted((base / tree).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    assert len(found) > 100
    return found


def imported(tree: ast.AST, known: set[str]) -> set[str]:
    """Modules that a file imports anywhere: at its top, inside functions, and for types alone."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(
                whole if (whole := f"{node.module}.{alias.name}") in known else node.module for alias in node.names
            )
    return found & known


def circles(graph: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """Sets of modules that import each other in a circle: what is left when all that import none of the rest went."""
    left = {module: set(targets) - {module} for module, targets in graph.items()}
    while free := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in free:
            del left[module]
    reached = {module: _reached(module, left) for module in left}
    return sorted(
        {tuple(sorted(other for other in reached[module] if module in reached[other])) for module in left} - {()}
    )  # type: ignore[arg-type]


def _reached(start: str, graph: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        for target in graph.get(todo.pop(), set()) & graph.keys():
            if target not in seen:
                seen.add(target)
                todo.append(target)
    return seen


def test_no_file_imports_itself_through_others() -> None:
    modules = product_modules()
    graph = {
        name: imported(ast.parse(path.read_text(encoding="utf-8")), modules.keys() - {name})
        for name, path in modules.items()
    }
    assert circles(graph) == []


def test_a_circle_would_be_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == [("a", "b", "c")]
    tree = ast.parse("if TYPE_CHECKING:\n    from p import q\ndef f():\n    from p.r import s\n    import t")
    assert imported(tree, {"p", "p.q", "p.r", "t"}) == {"p.q", "p.r", "t"}


def test_no_package_is_a_flat_bag() -> None:
    sizes = Counter(path.parent.relative_to(ROOT) for path in product_modules().values())
    assert {str(package): size for package, size in sizes.items() if size > MAX_MODULES} == {}


def test_every_module_that_is_run_by_its_name_exists() -> None:
    """`-m` with a module of ours, in a list of arguments or in a line of a shell."""
    argument = re.compile(r"""-m["']?,?\s+["']?(code_worker(?:\.\w+)*)""")
    files = [
        path
        for tree in MODULE_RUNS
        for path in (ROOT / tree).rglob("*")
        if path.suffix in {".py", ".md", ".yaml", ".yml", ".service"}
    ]
    named = defaultdict(list)
    for path in [*files, ROOT / "Makefile", ROOT / "README.md", *ROOT.glob("deploy/*")]:
        if path.is_file():
            for match in argument.finditer(path.read_text(encoding="utf-8", errors="replace")):
                named[match[1]].append(str(path.relative_to(ROOT)))
    assert len(named) >= 5
    assert {name: where for name, where in named.items() if not _runs(name)} == {}


def _runs(name: str) -> bool:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        return False
    text = Path(spec.origin).read_text(encoding="utf-8")
    return find_spec(f"{name}.__main__") is not None if spec.submodule_search_locations else "__main__" in text


def test_every_test_file_that_the_makefile_names_exists() -> None:
    """Lists such as `$(patsubst %,tests/worker/test_%.py,install worker)`, and paths as they are."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    lists = re.findall(r"\$\(patsubst %,(\S+),([^)]*)\)", text)
    named = [pattern.replace("%", name) for pattern, names in lists for name in names.split()]
    named += re.findall(r"(?<![\w/])tests/[\w/]+\.py", text)
    assert len(named) >= 10
    assert [name for name in named if not (ROOT / name).is_file()] == []
