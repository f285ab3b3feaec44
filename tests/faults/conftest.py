"""Deployments for faults: a small release, real servers, and the checker when a test is over."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from code_worker.publisher import Publisher
from code_worker.store import migrate
from code_worker.store.engine import open_store
from tests.conftest import built_once
from tests.faults.deployment import FaultDeployment
from tests.faults.proxy import TcpProxy
from tests.servers import PostgresServer, RedisServer
from tests.worker.harness import environment_in, promote_release

Deploy = Callable[..., FaultDeployment]


@pytest.fixture(scope="session")
def small_release_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release like any other, but for an encoder of one block instead of twelve."""
    from tests.toy_release import write_toy_release

    return (
        built_once(tmp_path_factory, "small", lambda root: write_toy_release(root / "release", depth=1)) / "release"
    )


@pytest.fixture
def sqlite_url(migrated_sqlite: Path, tmp_path: Path) -> str:
    """URL of a SQLite database that has the tables."""
    shutil.copy(migrated_sqlite, tmp_path / "faults.db")
    return f"sqlite:///{tmp_path / 'faults.db'}"


@pytest.fixture
def migrated_postgres_url(postgres_server: PostgresServer, migrated_postgres: str) -> str:
    """URL of a PostgreSQL database that has the tables; it outlives the test, since the checker looks at it last."""
    return postgres_server.new_database(template=migrated_postgres)


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger_url(request: pytest.FixtureRequest) -> str:
    """URL of a database that has the tables; a test that asks for it runs on both kinds."""
    name = "sqlite_url" if request.param == "sqlite" else "migrated_postgres_url"
    return str(request.getfixturevalue(name))


@pytest.fixture
def slow_jobs(tmp_path: Path) -> dict[str, str]:
    """Settings under which a job takes the `seconds` of its metadata longer."""
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "slow.py").write_text(
        "import time\n"
        "from code_worker import hookimpl\n"
        "@hookimpl\n"
        "def code_worker_select_head(job, heads):\n"
        # In short sleeps: a machine that stands still does not shorten what is left of the job.
        "    for _ in range(round(job.metadata.get('seconds', 0) / 0.02)):\n"
        "        time.sleep(0.02)\n"
    )
    return {"CODE_WORKER_PLUGINS_DIR": str(plugins)}


@pytest.fixture
def broker_proxy(redis_server: RedisServer) -> Iterator[TcpProxy]:
    """Between the processes of a deployment and their broker, for `deploy(…, proxy=…)`."""
    with TcpProxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
def deploy(tmp_path: Path, redis_server: RedisServer, small_release_dir: Path) -> Iterator[Deploy]:
    """Makes deployments; when the test has passed, each is brought to rest and checked."""
    made: list[FaultDeployment] = []

    def build(database_url: str, *, proxy: TcpProxy | None = None, **extra: str) -> FaultDeployment:
        broker_url = redis_server.url if proxy is None else f"redis://127.0.0.1:{proxy.port}/0"
        environment = environment_in(tmp_path, database_url, broker_url)
        # Debug, for the log of operations.
        environment |= {"CODE_WORKER_LOG_LEVEL": "debug", "CODE_WORKER_WORKER__SWEEP_INTERVAL_S": "1", **extra}
        deployment = FaultDeployment(environment, tmp_path / "workers.log", broker_url=redis_server.url)
        made.append(deployment)
        with closing(open_store(database_url)) as store:
            migrate.upgrade(store)
        promote_release(deployment, small_release_dir)
        return deployment

    try:
        yield build
        found: list[Any] = [deployment.violations() for deployment in made]
        assert not any(found), found
    finally:
        Publisher._installed = None
        for deployment in made:
            deployment.close()
        shutil.rmtree(tmp_path / "releases", ignore_errors=True)
