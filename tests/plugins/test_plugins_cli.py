"""`code-worker heads` and `code-worker plugins`, run as a user runs them, with plugins really installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fork_server import forking_python

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "plugins" / "example_head"
UPSIDE_DOWN = """
import numpy as np
from code_worker import HeadSpec, hookimpl
from code_worker_heads.linear import LinearHead

class UpsideDown(LinearHead):
    def score(self, embeddings):
        return np.float32(1) - super().score(embeddings)

@hookimpl
def code_worker_register_heads():
    return [HeadSpec("upside-down", UpsideDown)]
"""
FUSSY = """
from code_worker import HeadSpec, hookimpl
from code_worker_heads.linear import LinearHead

class Fussy(LinearHead):
    class Options(LinearHead.Options):
        size: str = "small"

    def __init__(self, options=None):
        super().__init__(options)
        self.size = {"small": 1}[self.options.size]

@hookimpl
def code_worker_register_heads():
    return [HeadSpec("fussy", Fussy)]
"""


def run(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [forking_python(), "-W", "error", "-m", *arguments],
        env={**os.environ, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def code_worker(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("code_worker", *arguments, cwd=ROOT, **environment)


def rows(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode in (0, 1), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def install(source: Path, target: Path) -> dict[str, str]:
    """Installs a plugin into a directory of its own; returns the environment in which it is found."""
    copied = shutil.copytree(source, target.with_name(f"{target.name}-source"))
    offline = ("--no-cache-dir", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *offline, "--target", str(target), str(copied)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return {"PYTHONPATH": str(target)}


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return install(EXAMPLE, tmp_path_factory.mktemp("installed") / "example")


def test_the_installed_example_is_listed_with_its_distribution_and_hooks(example: dict[str, str]) -> None:
    (plugin,) = [
        row for row in rows(code_worker("plugins", "list", "--json", **example)) if row["name"] == "example_head"
    ]
    assert plugin == {
        "name": "example_head",
        "version": "0.1.0",
        "distribution": "code-worker-example-head",
        "hooks": ["code_worker_register_heads", "code_worker_select_head"],
        "heads": ["mahalanobis"],
        "path": None,
        "state": "in use",
        "why": "",
    }
    heads = {row["name"]: row for row in rows(code_worker("heads", "list", "--json", **example))}
    assert set(heads) == {"knn", "linear", "mahalanobis", "svm"}
    assert heads["mahalanobis"]["distribution"] == "code-worker-example-head"


def test_the_installed_example_passes_the_kit(example: dict[str, str]) -> None:
    done = code_worker("plugins", "check", "example_head", "--json", **example)
    checks = rows(done)
    assert done.returncode == 0
    assert {row["head"] for row in checks} == {"mahalanobis"}
    assert all(row["passed"] for row in checks)
    assert len(checks) > 10


def test_the_example_works_as_a_single_file_too(tmp_path: Path) -> None:
    shutil.copy(EXAMPLE / "code_worker_example_head.py", tmp_path)
    environment = {"CODE_WORKER_PLUGINS_DIR": str(tmp_path)}
    listed = code_worker("heads", "list", **environment)
    assert listed.returncode == 0, listed.stderr
    assert "mahalanobis" in listed.stdout
    assert "sha256:" in listed.stdout
    assert code_worker("plugins", "check", "mahalanobis", **environment).returncode == 0


def test_a_new_plugin_installs_and_passes_its_own_test(tmp_path: Path) -> None:
    made = code_worker("plugins", "new", "my-texture_2", "--dir", str(tmp_path))
    assert made.returncode == 0, made.stderr
    directory = tmp_path / "code-worker-my-texture-2"
    assert sorted(path.name for path in directory.iterdir()) == [
        "README.md",
        "code_worker_my_texture_2.py",
        "pyproject.toml",
        "test_code_worker_my_texture_2.py",
    ]
    assert not [path for path in directory.iterdir() if "$" in path.read_text(encoding="utf-8")]
    environment = install(directory, tmp_path / "installed")
    tested = run("pytest", "-q", "-p", "no:cacheprovider", cwd=directory, **environment)
    assert tested.returncode == 0, tested.stdout
    assert "2 passed" in tested.stdout
    assert "my-texture_2" in {row["name"] for row in rows(code_worker("heads", "list", "--json", **environment))}
    checked = code_worker("plugins", "check", "my-texture_2", **environment)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("new", "Texture"), "'Texture' cannot name a new plugin"),
        (("new", "3d"), "'3d' cannot name a new plugin: begin with a lower case letter"),
        (("new", "real-"), "'real-' cannot name a new plugin"),
        (("new", "real--world"), "put a single '-' or '_' between words only"),
        (("new", "a" * 65), "use at most 64 characters"),
        (("new", "knn"), "there is a head called 'knn' already, of plugin 'code_worker_heads' of code-worker"),
        (("check", "nope"), "no head and no plugin is called 'nope'; known: code_worker_heads, knn, linear, svm"),
    ],
)
def test_wrong_use_says_what_is_wrong_and_writes_nothing(
    arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    where = ("--dir", str(tmp_path)) if arguments[0] == "new" else ()
    done = code_worker("plugins", *arguments, *where)
    assert done.returncode == 2
    assert said in done.stderr
    assert not list(tmp_path.iterdir())
    assert "Traceback" not in done.stderr


def test_a_new_plugin_never_overwrites_anything(tmp_path: Path) -> None:
    (tmp_path / "code-worker-texture").mkdir()
    done = code_worker("plugins", "new", "texture", "--dir", str(tmp_path))
    assert done.returncode == 2
    assert "exists already" in done.stderr
    assert not list((tmp_path / "code-worker-texture").iterdir())


def test_a_head_that_breaks_a_rule_fails_the_check_and_says_how_to_mend_it(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(UPSIDE_DOWN)
    done = code_worker("plugins", "check", "bad", CODE_WORKER_PLUGINS_DIR=str(tmp_path))
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    assert "flip the sign" in done.stdout
    failed = code_worker("plugins", "check", "bad", "--json", CODE_WORKER_PLUGINS_DIR=str(tmp_path))
    assert {row["name"] for row in rows(failed) if not row["passed"]} >= {"direction", "border"}


def test_a_line_is_printed_as_each_check_ends(tmp_path: Path) -> None:
    (tmp_path / "waiting.py").write_text(
        "import os, time\n"
        "from code_worker import HeadSpec, hookimpl\n"
        "from code_worker_heads.linear import LinearHead\n"
        "class Waiting(LinearHead):\n"
        "    def save(self, directory):\n"
        "        until = time.monotonic() + 120\n"
        "        while not os.path.exists(os.environ['SEEN']):\n"
        "            if time.monotonic() > until:\n"
        "                raise TimeoutError('nobody saw the first line')\n"
        "            time.sleep(0.01)\n"
        "        super().save(directory)\n"
        "@hookimpl\n"
        "def code_worker_register_heads():\n"
        "    return [HeadSpec('waiting', Waiting)]\n"
    )
    seen = tmp_path / "seen"
    running = subprocess.Popen(
        [forking_python(), "-m", "code_worker", "plugins", "check", "waiting"],
        env={**os.environ, "CODE_WORKER_PLUGINS_DIR": str(tmp_path), "SEEN": str(seen)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    with running:
        assert running.stdout is not None
        assert running.stdout.readline().split() == ["waiting", "creation", "passed"]
        seen.touch()
        rest = running.stdout.read()
    assert running.returncode == 0, rest
    assert "waiting  save-and-load" in rest


def test_a_head_that_gives_no_scores_is_one_failure_and_not_twenty(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(UPSIDE_DOWN.replace("return np", "return np.nan * np"))
    done = code_worker("plugins", "check", "bad", CODE_WORKER_PLUGINS_DIR=str(tmp_path))
    assert done.returncode == 1
    assert done.stdout.count("FAILED") == 1
    assert "    expected: every score in [0, 1]\n" in done.stdout
    assert re.search(r"1\d other checks not run, since they rest on this one: mend it first\n$", done.stdout)


def test_a_plugin_without_heads_is_checked_by_loading_it(tmp_path: Path) -> None:
    (tmp_path / "chooser.py").write_text(
        "from code_worker import hookimpl\n@hookimpl\ndef code_worker_select_head(job, heads):\n    return None\n"
    )
    done = code_worker("plugins", "check", "chooser", CODE_WORKER_PLUGINS_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "plugin chooser loads; it offers no head to check" in done.stdout


def test_a_broken_plugin_ends_the_command_with_its_file_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("from code_worker import hookimpl\n1 / 0")
    done = code_worker("heads", "list", CODE_WORKER_PLUGINS_DIR=str(tmp_path))
    assert done.returncode == 2
    assert f"plugin {tmp_path / 'broken.py'} cannot be loaded: ZeroDivisionError: division by zero" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broken_plugin_is_listed_with_the_reason_beside_the_others(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("from code_worker import hookimpl\n1 / 0")
    done = code_worker("plugins", "list", CODE_WORKER_PLUGINS_DIR=str(tmp_path))
    assert done.returncode == 2
    assert "refused" in done.stdout
    assert "ZeroDivisionError" in done.stdout
    assert "code_worker_heads" in done.stdout


def test_a_sample_job_shows_which_head_the_plugins_choose(tmp_path: Path) -> None:
    (tmp_path / "chooser.py").write_text(
        "from code_worker import hookimpl\n"
        "@hookimpl\ndef code_worker_select_head(job, heads):\n"
        "    names = {'acme': 'knn', 'broken': 'gone', 'spelt': 'soft_knn'}\n"
        "    return names.get(job.tenant) or job.metadata.get('head')\n"
    )
    environment = {"CODE_WORKER_PLUGINS_DIR": str(tmp_path), "CODE_WORKER_DATA_DIR": str(tmp_path / "data")}

    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        return code_worker("plugins", "select-head", *arguments, **environment)

    assert ask("--heads", "linear,knn", "--tenant", "acme").stdout == "knn\n"
    assert ask("--heads", "linear", "--metadata", '{"head": "linear"}').stdout == "linear\n"
    assert ask("--heads", "linear,knn").stdout.startswith("no plugin has an opinion")
    unknown = ask("--heads", "linear,knn", "--tenant", "broken")
    assert (unknown.returncode, "unknown head 'gone'; known: linear, knn" in unknown.stderr) == (2, True)
    assert "did you mean 'soft-knn'?" in ask("--heads", "soft-knn", "--tenant", "spelt").stderr
    (tmp_path / "chooser.py").write_text(
        "import threading\nfrom code_worker import hookimpl\n"
        "@hookimpl\ndef code_worker_select_head(job, heads):\n    threading.Event().wait()\n"
    )
    hanging = ask("--heads", "knn", "--timeout", "0.5")
    assert hanging.returncode == 2
    assert f"plugin {tmp_path / 'chooser.py'} (line 5) has not answered in 0.5 s" in hanging.stderr
    none = ask("--tenant", "acme")
    assert none.returncode == 2
    assert "no database in" in none.stderr


def test_options_reach_the_head_that_is_checked(tmp_path: Path) -> None:
    for done in (
        code_worker("plugins", "check", "knn", "--options", '{"n_neighbors": 0}'),
        code_worker("plugins", "check", "knn", CODE_WORKER_HEADS__KNN__N_NEIGHBORS="0"),
    ):
        assert done.returncode == 2
        assert "options of head 'knn': n_neighbors: " in done.stderr
        assert not done.stdout
    (tmp_path / "fussy.py").write_text(FUSSY)
    fussy = code_worker(
        *("plugins", "check", "fussy", "--options", '{"size": "big"}'), CODE_WORKER_PLUGINS_DIR=str(tmp_path)
    )
    assert (fussy.returncode, fussy.stdout) == (2, "")
    assert fussy.stderr.startswith("code-worker: options of head 'fussy': KeyError: 'big'; it has C, ")
    assert fussy.stderr.count("\n") == 1
    unknown = code_worker("plugins", "check", "knn", "--options", '{"kk": 3}')
    assert unknown.returncode == 2
    assert "options of head 'knn': kk: " in unknown.stderr
