"""Values that no part could work with are wrong settings, named and not shown, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from code_worker.errors import ConfigurationError
from code_worker.settings import Settings, load_settings
from code_worker.store import retention
from code_worker.store.engine import Store


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("WORKER__BACKOFF_S", "inf"), ("WORKER__BACKOFF_MAX_S", "nan"), ("WORKER__MAX_FAULTS", "5000")),
        *(("RETENTION__JOBS_DAYS", "1e9"), ("RETENTION__SUPERSEDED_DAYS", "36500"), ("S3__BUCKETS", "uploads")),
        *(("FILES__ROOTS", "/images"), ("S3__ANONYMOUS", "secret-bucket"), ("SIGNING_KEYS", "secret-and-long")),
    ],
)
def test_what_nothing_can_work_with_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"CODE_WORKER_{name}", value)
    with pytest.raises(ConfigurationError, match=f"(?i)wrong settings: (CODE_WORKER_)?{name}") as refused:
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


def test_what_a_program_sets_counts_below_file_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "code_worker.toml"
    file.write_text('head = "of the file"\n[s3]\nregion = "of-the-file"\n')
    monkeypatch.setenv("CODE_WORKER_CONFIG", str(file))
    monkeypatch.setenv("CODE_WORKER_S3__REGION", "of-the-environment")
    below = {"head": "of the app", "s3": {"region": "of-the-app", "buckets": ["uploads"]}, "engine": "torch"}

    settings = load_settings(below=below, data_dir=tmp_path)
    assert (settings.head, settings.s3.region) == ("of the file", "of-the-environment")
    assert (settings.s3.buckets, settings.engine, settings.data_dir) == (("uploads",), "torch", tmp_path)
    assert load_settings().s3.buckets == ()
