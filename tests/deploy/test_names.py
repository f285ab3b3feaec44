"""Every setting and every command that a file for operators names is one that exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from pydantic import BaseModel

from code_worker.cli.main import cli
from code_worker.settings import Settings
from code_worker.settings.configuration import CONFIG_ENV

ROOT = Path(__file__).resolve().parents[2]
TEXTS = sorted(
    path
    for path in [*(ROOT / "deploy").rglob("*"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]
    if path.is_file() and path.name != "CHANGELOG.md"
)
SETTING = re.compile(r"\bCODE_WORKER_[A-Z0-9_]*[A-Z0-9]\b(?!…)")
FREE = "CODE_WORKER_HEADS__"
"""Below it stand names of heads and of their options."""
COMMAND = re.compile(r"(?:^|[\s`(])(?:\S*/)?code-worker ([a-z]+(?:\|[a-z]+)*)\b(?!-)", re.MULTILINE)


def setting_names(model: type[BaseModel] = Settings, prefix: str = "CODE_WORKER_") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from setting_names(field.annotation, f"{prefix}{name.upper()}__")
        yield f"{prefix}{name.upper()}"


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_every_setting_named_in_the_file_exists(path: Path) -> None:
    known = {*setting_names(), CONFIG_ENV}
    named = set(SETTING.findall(path.read_text(encoding="utf-8")))
    assert {name for name in named if not name.startswith(FREE)} <= known


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_every_command_named_in_the_file_exists(path: Path) -> None:
    named = {word for match in COMMAND.findall(path.read_text(encoding="utf-8")) for word in match.split("|")}
    known = set(cli.list_commands(click.Context(cli)))
    assert named <= known


def test_every_command_of_a_container_exists() -> None:
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))["services"]
    ours = [each["command"][0] for each in services.values() if each.get("image", "").startswith("code-worker")]
    assert len(ours) == 4
    assert set(ours) <= set(cli.list_commands(click.Context(cli)))


def test_a_wrong_name_would_be_noticed() -> None:
    assert SETTING.findall("set CODE_WORKER_S3__BUKETS=a") == ["CODE_WORKER_S3__BUKETS"]
    assert "CODE_WORKER_S3__BUKETS" not in set(setting_names())
    assert COMMAND.findall("run `code-worker wroker`, or .venv/bin/code-worker up") == ["wroker", "up"]


def test_the_example_environment_is_one_the_settings_accept(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "deploy" / ".env.example").read_text(encoding="utf-8")
    for name, value in re.findall(r"^#?(CODE_WORKER_\w+)=(.*)$", text, re.MULTILINE):
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.s3.buckets == ("uploads",)
    assert settings.broker_url is not None
