"""A deployment per test: own database, own Redis, own bucket, the session's toy release promoted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import pytest

from code_worker.store import migrate
from code_worker.store.engine import open_store
from tests.servers import RedisServer, S3Server
from tests.worker.harness import Deployment, environment_in, promote_release


@pytest.fixture
def bucket(s3_server: S3Server) -> str:
    name = f"bucket-{uuid4().hex[:12]}"
    s3_server.client().create_bucket(Bucket=name)
    return name


@pytest.fixture
def deploy(
    tmp_path: Path, redis_server: RedisServer, s3_server: S3Server, bucket: str, toy_release_dir: Path
) -> Iterator[Callable[..., Deployment]]:
    made: list[Deployment] = []

    def build(database_url: str, *, promote: bool = True, **extra: str) -> Deployment:
        storage = {**s3_server.environment, "CODE_WORKER_S3__BUCKETS": f'["{bucket}"]'}
        environment = environment_in(tmp_path, database_url, redis_server.url) | storage | extra
        deployment = Deployment(environment, tmp_path / "workers.log")
        made.append(deployment)
        with closing(open_store(database_url)) as store:
            migrate.upgrade(store)
        if promote:
            promote_release(deployment, toy_release_dir)
        return deployment

    yield build
    for deployment in made:
        deployment.close()
    shutil.rmtree(tmp_path / "releases", ignore_errors=True)
