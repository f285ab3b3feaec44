"""Servers shared by the session, and a clean database per test."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from code_worker.doorbell import Doorbell
from code_worker.store import migrate
from code_worker.store.engine import Store, open_store
from tests.faults.rows import (  # noqa: F401 - hooks and fixtures of the fault matrix, whose rows lie in all directories
    bar,
    fault_rng,
    fault_seed,
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_runtest_makereport,
    pytest_sessionfinish,
    seen,
)
from tests.servers import PostgresServer, RedisServer, S3Server

if TYPE_CHECKING:
    from tests.parity import ParitySet

# Tests must not read the settings, caches or hub of the person who runs them.
for name in [name for name in os.environ if name.startswith(("CODE_WORKER_", "AWS_"))]:
    del os.environ[name]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
os.environ["AWS_SHARED_CREDENTIALS_FILE"] = os.environ["AWS_CONFIG_FILE"] = os.devnull
# A shell that puts the tests into its background has them ignore Ctrl-C, and with them whatever they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# And `nohup` does the same with a closed terminal.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command that a test runs in this process sets the least level logged, and later tests look for warnings."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)


@pytest.fixture(autouse=True)
def nothing_installed() -> Iterator[None]:
    """Whoever installs us in an app of a test's must not have the doorbells of later tests ring through it."""
    yield
    Doorbell._installed = None


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    # Not under pytest's directory: run by root the server has a user of its own, and the next pytest to start takes
    # everybody else's access to that directory away.
    with tempfile.TemporaryDirectory(prefix="code-worker-postgres-") as directory:
        server = PostgresServer(Path(directory) / "data")
        yield server
        server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database; every test that asks for it runs on both kinds."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'test.db'}"
    server: PostgresServer = request.getfixturevalue("postgres_server")
    return server.new_database()


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database file to copy: migrating it once per test would be the slowest part of most."""
    path = tmp_path_factory.mktemp("migrated") / "template.db"
    with closing(open_store(f"sqlite:///{path}")) as made:
        migrate.upgrade(made)
    return path


@pytest.fixture(scope="session")
def migrated_postgres(postgres_server: PostgresServer) -> str:
    url = postgres_server.new_database()
    with closing(open_store(url)) as made:
        migrate.upgrade(made)
    return url


@pytest.fixture
def migrated_postgres_url(postgres_server: PostgresServer, migrated_postgres: str) -> Iterator[str]:
    """URL of a PostgreSQL database that has the tables."""
    url = postgres_server.new_database(template=migrated_postgres)
    yield url
    postgres_server.drop_database(url)


@pytest.fixture
def sqlite_store(migrated_sqlite: Path, tmp_path: Path) -> Iterator[Store]:
    shutil.copy(migrated_sqlite, tmp_path / "test.db")
    with closing(open_store(f"sqlite:///{tmp_path / 'test.db'}")) as opened:
        yield opened


@pytest.fixture
def postgres_store(migrated_postgres_url: str) -> Iterator[Store]:
    with closing(open_store(migrated_postgres_url)) as opened:
        yield opened


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest) -> Store:
    """A migrated store of the test's own; every test that asks for it runs on both kinds. `store.url` is its URL."""
    opened: Store = request.getfixturevalue(f"{request.param}_store")
    return opened


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
