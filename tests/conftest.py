"""Servers shared by the session, and a clean database per test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.servers import PostgresServer, RedisServer, S3Server

if TYPE_CHECKING:
    from tests.parity import ParitySet

# Tests must not read the settings, caches or hub of the person who runs them.
for name in [name for name in os.environ if name.startswith(("CODE_WORKER_", "AWS_"))]:
    del os.environ[name]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
os.environ["AWS_SHARED_CREDENTIALS_FILE"] = os.environ["AWS_CONFIG_FILE"] = os.devnull


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    server = PostgresServer(tmp_path_factory.mktemp("postgres") / "data")
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database; every test that asks for it runs on both kinds."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'test.db'}"
    server: PostgresServer = request.getfixturevalue("postgres_server")
    return server.new_database()


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> str:
    return postgres_server.new_database()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A server of the test's own: it may be killed and restarted."""
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="session")
def parity_set(tmp_path_factory: pytest.TempPathFactory) -> ParitySet:
    from tests.parity import build_parity_set  # noqa: PLC0415 - imports torch, transformers and scikit-learn

    return build_parity_set(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="session")
def toy_release_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release to import, not to change: full-size untrained encoder; linear, knn and svm tell two noises apart."""
    from tests.toy_release import write_toy_release  # noqa: PLC0415 - imports torch

    return write_toy_release(tmp_path_factory.mktemp("toy") / "release")
