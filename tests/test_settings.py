"""Values that no part could work with are wrong settings, named and not shown, before anything starts."""

from __future__ import annotations

import socket
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import pytest
from annotated_types import Ge, Gt, Le, Lt
from pydantic import SecretStr
from sqlalchemy import BigInteger, literal, select

from code_worker.errors import ConfigurationError
from code_worker.settings import Settings, load_settings
from code_worker.store import retention
from code_worker.store.engine import Store
from code_worker.worker.retention import Retention
from tests.test_configuration import fields, value_of


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("WORKER__BACKOFF_S", "inf"), ("WORKER__BACKOFF_MAX_S", "nan"), ("WORKER__MAX_FAULTS", "5000")),
        *(("RETENTION__JOBS_DAYS", "1e9"), ("RETENTION__SUPERSEDED_DAYS", "36500"), ("SIGNING_KEYS", "secret")),
    ],
)
def test_what_nothing_can_work_with_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"CODE_WORKER_{name}", value)
    with pytest.raises(ConfigurationError, match=f"wrong settings: CODE_WORKER_{name}: ") as refused:
        load_settings()
    assert "secret" not in str(refused.value)


def test_the_longest_time_that_can_be_set_is_one_that_retention_can_reckon_with(store: Store) -> None:
    longest = Settings(retention={"superseded_days": 18_250, "jobs_days": 18_250}).retention
    for days, remove in ((longest.superseded_days, retention.superseded), (longest.jobs_days, retention.jobs)):
        assert days is not None
        assert store.run(lambda session, remove=remove, days=days: remove(session, days, 10)) == 0


@pytest.mark.parametrize(
    ("url", "resolved"),
    [
        ("postgresql://u@h/db", "postgresql://u@h/db?pooler=transaction"),
        ("postgresql://u@h/db?sslmode=require", "postgresql://u@h/db?sslmode=require&pooler=transaction"),
        ("postgresql://u@h/db?pooler=transaction", "postgresql://u@h/db?pooler=transaction"),
        ("sqlite:////tmp/a.db", "sqlite:////tmp/a.db"),
    ],
)
def test_a_pooler_is_told_of_once(url: str, resolved: str) -> None:
    assert Settings(database_url=SecretStr(url), database_pooler="transaction").resolved_database_url == resolved


def extreme(kind: Any) -> Settings:
    """Settings of which every number is at its border on one side; where the border itself is outside, next to it."""
    table: dict[str, Any] = {}
    for names, field in fields():
        bound = next((one for one in field.metadata if isinstance(one, get_args(kind))), None)
        if bound is None:
            continue
        value = next(getattr(bound, name) for name in ("ge", "gt", "le", "lt") if hasattr(bound, name))
        if isinstance(bound, Gt | Lt):
            whole = int in {field.annotation, *get_args(field.annotation)}
            value += (1 if isinstance(bound, Gt) else -1) * (1 if whole else 1e-9)
        place = table
        for name in names[:-1]:
            place = place.setdefault(name, {})
        place[names[-1]] = value
    return Settings(**table)


def test_every_number_has_bounds_on_both_sides() -> None:
    for names, field in fields():
        if {int, float} & {field.annotation, *get_args(field.annotation)}:
            assert any(isinstance(bound, Ge | Gt) for bound in field.metadata), names
            assert any(isinstance(bound, Le | Lt) for bound in field.metadata), names


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e400", "9" * 5000, "-1", "1_0_"])
def test_no_number_is_endless_or_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for names, field in fields():
        if {int, float} & {field.annotation, *get_args(field.annotation)}:
            monkeypatch.setenv(f"CODE_WORKER_{'__'.join(names).upper()}", text)
            with pytest.raises(ConfigurationError, match=f"CODE_WORKER_{'__'.join(names).upper()}: "):
                load_settings()
            monkeypatch.delenv(f"CODE_WORKER_{'__'.join(names).upper()}")


@pytest.mark.parametrize("side", [Ge | Gt, Le | Lt])
def test_clocks_sockets_and_databases_take_every_border(side: Any, store: Store, tmp_path: Path) -> None:
    settings = extreme(side).model_copy(update={"data_dir": tmp_path})
    Retention(settings, store, "a")()
    now = datetime.now(UTC)
    with socket.socket() as connection:
        for names, _ in fields():
            value = value_of(settings, names)
            if names[-1].endswith("_s"):
                assert now - timedelta(seconds=value) <= now + timedelta(seconds=value)
                connection.settimeout(value)
                threading.Event().wait(0 if value > 1 else value)
                assert value < threading.TIMEOUT_MAX
            if type(value) is int:
                assert (
                    store.run(lambda session, value=value: session.scalar(select(literal(value, BigInteger))))
                    == value
                )
