"""Servers shared by the session, and a clean database per test."""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from celery import _state
from celery.app import trace

from code_worker.publisher import Publisher
from code_worker.settings import Settings
from code_worker.store import migrate
from code_worker.store.engine import Store, open_store
from code_worker.system.machine import usable_cores
from tests.durations import Durations
from tests.faults.proxy import TcpProxy
from tests.faults.rows import (  # noqa: F401 - hooks and fixtures of the fault matrix, whose rows lie in all directories
    bar,
    choose_rows,
    fault_rng,
    fault_seed,
    pytest_addoption,
    pytest_runtest_makereport,
    pytest_sessionfinish,
    seen,
)
from tests.fork_server import ForkServer
from tests.servers import PostgresServer, RedisServer, S3Server

if TYPE_CHECKING:
    from tests.parity import ParitySet

FIRST = (
    "tests/docs/",
    "tests/cli/test_demo.py",
    "tests/training/",
    "tests/faults/",
    "tests/worker/",
    "tests/embedded/",
    "tests/cli/",
)

# Tests must not read the settings, caches or hub of the person who runs them, nor look for their servers by a proxy.
for name in list(os.environ):
    if name.startswith(("CODE_WORKER_", "AWS_")) or name.lower().endswith("_proxy"):
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


def pytest_configure(config: pytest.Config) -> None:
    """Once for a run, however many processes share it: the report on durations, and the fork server.

    Without a fork server every program starts from nothing: on systems on which forking is not safe, and in
    `make faults`.
    """
    if hasattr(config, "workerinput"):
        return
    if getattr(config.option, "tx", None):
        # Several processes share the cores: threads that spin while they wait for each other take them from the rest.
        os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}
    config.pluginmanager.register(Durations(shared=bool(getattr(config.option, "tx", None))), "durations")
    if sys.platform == "linux" and config.getoption("--fault-report") is None:
        server = ForkServer()
        config.add_cleanup(server.close)
        if getattr(config.option, "tx", None):
            config.option.tx = [f"popen//python={shlex.quote(str(server.python))}" for _ in config.option.tx]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow directories first: each file is one process's, and none should be left with one at the end."""
    choose_rows(config, items)
    items.sort(key=lambda item: next((n for n, name in enumerate(FIRST) if item.nodeid.startswith(name)), len(FIRST)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported until now stays: no collection of garbage during the tests has to walk through it again."""
    gc.collect()
    gc.freeze()


def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: one more than cores, since tests wait too, and each process takes a gigabyte and a half."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(usable_cores() + 1, int(memory // 3e9)))


@pytest.fixture(autouse=True)
def excused(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Tells the report on durations of tests that may take long."""
    if request.node.get_closest_marker("slow") or request.node.get_closest_marker("nightly"):
        record_property("slow", value=True)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command that a test runs in this process sets the least level logged, and later tests look for warnings."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)


@pytest.fixture(autouse=True)
def nothing_installed() -> Iterator[None]:
    """Whoever installs us in an app of a test's must not have the messages of later tests go through it."""
    yield
    Publisher._installed = Settings.of_app = None


@pytest.fixture(autouse=True)
def celery_as_it_was() -> Iterator[None]:
    """A worker that a test makes in this process makes its app everybody's, and forbids to wait for results."""
    default_app, current_app, waits = _state.default_app, _state._tls.current_app, _state.task_join_will_block()
    yield
    trace.reset_worker_optimizations(app=SimpleNamespace())
    _state._set_task_join_will_block(waits)
    _state._set_current_app(current_app)
    _state.set_default_app(default_app)


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


@pytest.fixture
def lossy_postgres(postgres_server: PostgresServer, postgres_store: Store) -> Iterator[tuple[TcpProxy, str]]:
    """A proxy that may lose answers, and the URL of `postgres_store`'s database by way of it."""
    with TcpProxy(postgres_server.socket) as proxy:
        url = postgres_store.engine.url.set(host="127.0.0.1", port=proxy.port, query={})
        yield proxy, url.render_as_string(hide_password=False)


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
    from tests.parity import build_parity_set, read_parity_set

    return read_parity_set(built_once(tmp_path_factory, "parity", build_parity_set))


@pytest.fixture(scope="session")
def toy_release_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release to import, not to change: an untrained encoder; linear, knn and svm tell two noises apart."""
    from tests.toy_release import write_toy_release

    return built_once(tmp_path_factory, "toy", lambda root: write_toy_release(root / "release")) / "release"


def built_once(tmp_path_factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """A directory for the whole run, not to be changed: the first of pytest's processes to ask for it builds it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # each process has its own below it
    finished = root / f"shared-{name}"
    with (root / f"shared-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.is_dir():
            begun = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=root))
            build(begun)
            begun.rename(finished)
    return finished
