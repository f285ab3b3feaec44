from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.servers import RedisServer

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
IGNORED = DOCKERFILE.with_name("Dockerfile.dockerignore")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction and the name of the stage it stands in."""

    stage: str
    word: str
    rest: str


def instructions() -> list[Instruction]:
    text = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text(encoding="utf-8"))
    found, stage = [], ""
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        word, _, rest = line.partition(" ")
        assert re.fullmatch(
            r"FROM|ARG|ENV|RUN|COPY|USER|WORKDIR|VOLUME|STOPSIGNAL|HEALTHCHECK|ENTRYPOINT|CMD", word
        ), line
        if word == "FROM":
            match = re.fullmatch(r"(\S+) AS (\w+)", rest)
            assert match, line
            stage = match[2]
        found.append(Instruction(stage, word, rest))
    return found


def in_stage(stage: str, word: str) -> list[str]:
    return [each.rest for each in instructions() if (each.stage, each.word) == (stage, word)]


def bases() -> dict[str, str]:
    return {each.stage: each.rest.split()[0] for each in instructions() if each.word == "FROM"}


def health_check() -> list[str]:
    (rest,) = in_stage("cpu", "HEALTHCHECK")
    return [str(word) for word in json.loads(rest.partition("CMD ")[2])]


def test_there_is_a_target_for_cpu_and_one_for_gpu() -> None:
    assert bases()["gpu"] == "cpu"
    assert "CODE_WORKER_DEVICE=cpu" in in_stage("cpu", "ENV")[0]
    assert "CODE_WORKER_DEVICE=cuda" in in_stage("gpu", "ENV")[0]


def test_both_targets_run_as_a_user_without_privileges() -> None:
    assert in_stage("cpu", "USER") == ["10001:10001"]
    assert in_stage("gpu", "USER") == []


def test_every_base_is_pinned_or_a_stage() -> None:
    names = bases()
    assert [base for base in names.values() if base not in names and not re.search(r":\d", base)] == []


def copied_from_the_repository() -> list[str]:
    return [
        source
        for each in instructions()
        if each.word == "COPY" and "--from" not in each.rest
        for source in each.rest.split()[:-1]
    ]


def test_everything_copied_exists_and_reaches_the_build() -> None:
    rules = IGNORED.read_text(encoding="utf-8").split()
    assert rules[0] == "*"
    allowed = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    for source in copied_from_the_repository():
        assert (ROOT / source).exists(), source
        assert any(source == rule or fnmatch.fnmatch(source, f"{rule}/*") for rule in allowed), source


def test_every_install_is_hashed_or_without_an_index() -> None:
    installs = [each.rest for each in instructions() if each.word == "RUN" and '"install"' in each.rest]
    assert len(installs) == 3
    assert [line for line in installs if "--require-hashes" not in line and "--no-index" not in line] == []


@pytest.mark.parametrize("word", ["ENTRYPOINT", "CMD"])
def test_the_process_is_started_without_a_shell(word: str) -> None:
    (rest,) = in_stage("cpu", word)
    assert isinstance(json.loads(rest), list)


def test_the_image_says_how_it_is_and_how_it_stops() -> None:
    assert in_stage("cpu", "STOPSIGNAL") == ["SIGTERM"]
    assert health_check()[:2] == ["code-worker", "doctor"]


def test_the_health_check_looks_at_what_can_fail_later_and_loads_no_model_code(
    tmp_path: Path, migrated_sqlite: Path, redis_server: RedisServer
) -> None:
    shutil.copy(migrated_sqlite, tmp_path / "code_worker.db")
    (tmp_path / "code_worker.db").chmod(0o600)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "code_worker", *health_check()[1:]],
        env={**os.environ, "CODE_WORKER_DATA_DIR": str(tmp_path), "CODE_WORKER_BROKER_URL": redis_server.url},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert {json.loads(line)["name"] for line in done.stdout.splitlines()} == {
        "broker",
        "clock",
        "database",
        "workers",
    }
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "sqlalchemy" in loaded
    assert loaded.isdisjoint({"torch", "torchvision", "timm", "sklearn", "transformers"})
