from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from code_worker.encoder.weights import random_weights
from code_worker.plugins import load_plugins
from code_worker.releases.building import ReleaseFacts, build_from_parts
from code_worker.releases.manifest import Source, read_manifest, release_id, write_manifest
from code_worker.settings import Settings
from tests.cli.conftest import Cli, Ran
from tests.parity import ParitySet
from tests.servers import S3Server
from tests.toy_release import write_toy_release

Run = Callable[..., Ran]


FICKLE = """
import numpy as np
from code_worker import Head, HeadSpec, hookimpl

class Fickle(Head):
    '''Changes sides once it has scored the reference embeddings of `verify`.'''
    calls = 0
    def fit(self, embeddings, labels):
        return self
    def score(self, embeddings):
        self.calls += len(embeddings) == 4
        return np.full(len(embeddings), float(self.calls > 1), np.float32)
    def save(self, directory):
        (directory / "nothing.txt").write_text("-")
    @classmethod
    def load(cls, directory, options=None):
        return cls(options)

@hookimpl
def code_worker_register_heads():
    return [HeadSpec("fickle", Fickle, "a test")]
"""


@pytest.fixture
def data_dir(bare_cli: Cli) -> Path:
    """The data directory of a new user: nothing is there."""
    bare_cli.env["CODE_WORKER_DEVICE"] = "cpu"
    return Path(bare_cli.env["CODE_WORKER_DATA_DIR"])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two small releases that differ in their notes."""
    first = write_toy_release(tmp_path_factory.mktemp("first") / "release", depth=1, images=8)
    second = Path(shutil.copytree(first, tmp_path_factory.mktemp("second") / "release"))
    write_manifest(second, read_manifest(second)[0].model_copy(update={"notes": "the second"}))
    return [first, second]


@pytest.fixture
def run(bare_cli: Cli, data_dir: Path) -> Run:
    return lambda *words: bare_cli("releases", *map(str, words))


def listed(run: Run) -> list[dict[str, Any]]:
    return run("list", "--json").records


def build_fickle(directory: Path, plugins_dir: Path) -> Path:
    plugins = load_plugins(Settings(plugins_dir=plugins_dir))
    heads = {"fickle": plugins.head_class("fickle")()}
    build_from_parts(directory, random_weights(0, depth=1), heads, plugins, ReleaseFacts(source=Source(uri="test")))
    return directory


def id_of(directory: Path) -> str:
    return release_id(read_manifest(directory)[1])


def test_a_new_user_imports_and_promotes_with_one_command(run: Run, data_dir: Path, two: list[Path]) -> None:
    none = run("list")
    assert (none.status, "no database in" in none.stderr) == (2, True)
    assert not data_dir.exists(), "looking creates nothing"
    output = run("import", two[0], "--promote").stdout
    assert f"imported {id_of(two[0])} from toy, seed 0; heads: knn, linear, svm" in output
    assert f"{id_of(two[0])} is the champion" in output
    (row,) = listed(run)
    assert (row["id"], row["aliases"], row["toy"]) == (id_of(two[0]), ["champion"], True)
    table = run("list").stdout
    assert "champion" in table
    assert "TOY" in table


def test_an_import_alone_says_how_to_promote(run: Run, two: list[Path]) -> None:
    assert f"code-worker releases promote {id_of(two[0])}" in run("import", two[0]).stdout
    assert listed(run)[0]["aliases"] == []
    assert f"here already: {id_of(two[0])}" in run("import", two[0]).stdout


def test_a_head_is_dropped_into_a_release_of_its_own(run: Run, bare_cli: Cli, two: list[Path]) -> None:
    first = id_of(two[0])
    run("import", two[0], "--promote")
    bare_cli("policies", "set", "--low", "0.4", "--high", "0.6", "--head", "svm", "--tenant", "acme")
    dropped = run("drop-head", first, "svm")
    made = next(row["id"] for row in listed(run) if row["id"] != first)
    assert dropped.stdout == (
        f"{made} is {first} without svm; make it live with: code-worker releases promote {made}\n"
    )
    assert "names svm: change it first, or its jobs are rejected" in dropped.stderr
    assert {row["id"]: (row["heads"], row["aliases"]) for row in listed(run)} == {
        first: (["knn", "linear", "svm"], ["champion"]),
        made: (["knn", "linear"], []),
    }
    assert (
        "unknown head 'sv_m'; known: knn, linear, svm; did you mean 'svm'?" in run("drop-head", first, "sv_m").stderr
    )
    refused = run("drop-head", first, "linear")
    assert refused.status == 2
    assert "name another with --default-head" in refused.stderr


def test_a_head_whose_plugin_is_gone_is_dropped_or_rolled_back(
    run: Run, bare_cli: Cli, two: list[Path], tmp_path: Path
) -> None:
    plugins_dir = tmp_path / "plugins"
    plugins_dir.mkdir()
    bare_cli.env["CODE_WORKER_PLUGINS_DIR"] = str(plugins_dir)
    for name in ("gone", "kept"):
        (plugins_dir / f"{name}.py").write_text(
            FICKLE.replace("float(self.calls > 2)", "0.5").replace("fickle", name)
        )
    loaded = load_plugins(Settings(plugins_dir=plugins_dir))
    heads = {name: loaded.head_class(name)() for name in ("gone", "kept")}
    facts = ReleaseFacts(source=Source(uri="test"), default_head="kept")
    build_from_parts(
        tmp_path / "both", random_weights(0, depth=1), heads, load_plugins(Settings(plugins_dir=plugins_dir)), facts
    )
    both = id_of(tmp_path / "both")
    run("import", two[0], "--promote")
    run("import", tmp_path / "both", "--promote")
    (plugins_dir / "gone.py").unlink()
    refused = run("promote", both)
    assert refused.status == 2
    assert "Install it again" in refused.stderr
    assert "releases drop-head RELEASE gone" in refused.stderr
    first = id_of(two[0])
    assert f"{both} stays the champion; ready, with their plugins here: {first} (" in refused.stderr
    assert "is the champion" in run("rollback").stdout
    dropped = run("drop-head", both, "gone")
    assert dropped.status == 0, dropped.stderr
    assert "is the champion" in run("promote", dropped.stdout.split()[0]).stdout


def test_a_rollback_to_what_cannot_be_loaded_names_it_and_what_can_be_promoted(
    run: Run, bare_cli: Cli, two: list[Path], tmp_path: Path
) -> None:
    plugin = tmp_path / "plugins" / "fickle.py"
    plugin.parent.mkdir()
    plugin.write_text(FICKLE)
    bare_cli.env["CODE_WORKER_PLUGINS_DIR"] = str(plugin.parent)
    first, fickle, second = id_of(two[0]), id_of(build_fickle(tmp_path / "fickle", plugin.parent)), id_of(two[1])
    for directory in (two[0], tmp_path / "fickle", two[1]):
        run("import", directory, "--promote")
    plugin.unlink()
    refused = run("rollback")
    assert refused.status == 2
    assert f"{fickle}, to which this would roll back, cannot be loaded here: head 'fickle' needs" in refused.stderr
    assert f"{second} stays the champion; ready, with their plugins here: {first} (" in refused.stderr
    assert "releases rollback" not in refused.stderr
    assert "is the champion" in run("promote", first).stdout


def test_promote_and_rollback_say_what_was_before(run: Run, two: list[Path]) -> None:
    first, second = map(id_of, two)
    run("import", two[0], "--promote")
    run("import", two[1])
    assert f"{second} is the champion (was {first})" in run("promote", second, "--reason", "better").stdout
    assert f"{second} is the champion already" in run("promote", second).stdout
    assert f"{first} is the champion again (was {second})" in run("rollback").stdout
    assert {row["id"]: row["aliases"] for row in listed(run)} == {first: ["champion"], second: []}


def test_challenge_and_its_end_say_what_was_before(run: Run, two: list[Path]) -> None:
    first, second = map(id_of, two)
    run("import", two[0], "--promote")
    run("import", two[1])
    own = run("challenge", first)
    assert (own.status, own.stdout) == (1, "")
    assert f"{first} is the champion: it cannot be its own challenger" in own.stderr
    assert f"{second} is the challenger; it scores in shadow" in run("challenge", second).stdout
    assert f"{second} is the challenger already" in run("challenge", second).stdout
    assert {row["id"]: row["aliases"] for row in listed(run)} == {first: ["champion"], second: ["challenger"]}
    assert f"{second} is no longer the challenger" in run("challenge", "--none").stdout
    assert run("challenge", "--none").stdout == "there is no challenger\n"
    assert listed(run)[0]["aliases"] == []


@pytest.mark.parametrize("words", [("challenge",), ("challenge", "r-0123456789ab", "--none")])
def test_a_challenge_names_one_release_or_none(run: Run, words: tuple[str, ...]) -> None:
    result = run(*words)
    assert result.status == 2
    assert "exactly one of them" in result.stderr


def test_show_prints_the_whole_manifest(run: Run, two: list[Path]) -> None:
    run("import", two[0])
    shown = json.loads(run("show", id_of(two[0])).stdout)
    assert shown["manifest"] == read_manifest(two[0])[0].model_dump(mode="json")
    unknown = run("show", "r-0123456789ab")
    assert unknown.status == 2
    assert "code-worker releases list" in unknown.stderr


def test_a_published_directory_is_imported_with_its_heads(run: Run, parity_set: ParitySet) -> None:
    output = run("import", parity_set.directory, "--note", "the first", "--default-head", "svm", "--json").stdout
    row = json.loads(output)
    assert row["heads"] == ["knn", "linear", "svm"]
    assert (row["default_head"], row["notes"], row["toy"]) == ("svm", "the first", False)


def test_verify_passes_and_prints_the_figures(run: Run, two: list[Path]) -> None:
    run("import", two[0], "--promote")
    result = run("verify", "--images", 8, "--engine", "torch")
    assert result.status == 0
    assert "files match the manifest" in result.stdout
    assert "torch on cpu in fp32, plain kernels, against the reference on 8 crops" in result.stdout
    assert "0 of 8" in result.stdout
    assert "3.12e+03 in 10,000" in result.stdout  # 1 − 0.05^(1/8): eight crops prove next to nothing
    assert "against the reference on 1 crop: " in run("verify", "--images", 1, "--engine", "torch").stdout
    report = json.loads(run("verify", id_of(two[0]), "--images", 4, "--json").stdout)
    assert report["passed"] is True
    assert report["images"] == 4
    assert report["heads"]["svm"]["flips"] == 0


def test_verify_fails_when_a_file_was_touched(run: Run, data_dir: Path, two: list[Path]) -> None:
    run("import", two[0], "--promote")
    with (data_dir / "releases" / id_of(two[0]) / "heads/knn/head.safetensors").open("ab") as file:
        file.write(b"x")
    damaged = run("verify")
    assert damaged.status == 1
    assert "changed: heads/knn/head.safetensors" in damaged.stderr


def test_verify_fails_when_labels_flip(run: Run, bare_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "fickle.py").write_text(FICKLE)
    bare_cli.env["CODE_WORKER_PLUGINS_DIR"] = str(tmp_path / "plugins")
    run("import", build_fickle(tmp_path / "release", tmp_path / "plugins"), "--promote")
    result = run("verify", "--images", 4)
    assert result.status == 1
    assert "4 of 4" in result.stdout
    assert "FAILED" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("promote", "r-0123456789ab"),
        ("rollback",),
        ("challenge", "r-0123456789ab"),
        ("challenge", "--none"),
        ("verify",),
        ("show", "r-0123456789ab"),
    ],
)
def test_without_a_database_commands_say_how_to_get_one(run: Run, data_dir: Path, words: tuple[str, ...]) -> None:
    result = run(*words)
    assert result.status == 2
    assert "no database" in result.stderr
    assert not data_dir.exists()


def test_without_a_champion_there_is_nothing_to_verify(run: Run, two: list[Path]) -> None:
    run("import", two[0])
    result = run("verify")
    assert result.status == 2
    assert "no champion to verify" in result.stderr


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("import", "/nowhere/at/all"), 2, "does not exist"),
        (("import", "hf:not-a-name"), 2, "not a hub name"),
        (("import", ".", "--head", "nonsense"), 2, "write FILE=NAME"),
        (("import", "."), 2, "no config.json"),
    ],
)
def test_a_wrong_source_is_said_in_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], status: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert result.status == status
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_releases_kept_in_s3_are_imported_promoted_and_verified(
    run: Run, bare_cli: Cli, data_dir: Path, two: list[Path], s3_server: S3Server
) -> None:
    s3_server.client().create_bucket(Bucket="cli-releases")
    bare_cli.env |= {**s3_server.environment, "CODE_WORKER_ARTIFACTS": "s3://cli-releases/kept"}
    (row,) = run("import", two[0], "--promote", "--json").records
    assert row["location"] == f"s3://cli-releases/kept/{id_of(two[0])}"
    shutil.rmtree(data_dir / "cache")
    assert run("verify", "--images", 2).status == 0
    assert (data_dir / "cache" / "releases" / id_of(two[0])).is_dir()


def test_a_published_checkpoint_is_imported_from_the_hubs_cache(parity_set: ParitySet, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--team--code"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    for file in (path for path in parity_set.directory.rglob("*") if path.is_file()):
        link = cached / "snapshots" / commit / file.relative_to(parity_set.directory)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    words = [sys.executable, "-m", "code_worker", "releases", "import", "hf:team/code", "--json"]
    # A process of its own: the hub's client reads its environment when it is imported.
    env = {
        **os.environ,
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "CODE_WORKER_DATA_DIR": str(tmp_path / "data"),
    }
    done = subprocess.run(words, check=False, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    imported = json.loads(done.stdout)
    assert imported["source"] == f"hf:team/code@{commit}"
    assert imported["heads"] == ["knn", "linear", "svm"]
