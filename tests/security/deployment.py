"""A deployment whose every secret is a canary, over a broker that gives each part the rights it needs and no more."""

from __future__ import annotations

import os
import re
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import redis
from sqlalchemy import MetaData, make_url

from code_worker.settings import Settings
from code_worker.store import migrate
from code_worker.store.engine import Store, open_store
from tests.fork_server import forking_python
from tests.servers import RedisServer, S3Server
from tests.worker.harness import Deployment

ACL = Path(__file__).resolve().parents[2] / "deploy" / "redis" / "users.acl"
CANARIES = {
    "database": "canary-database-5d1c",
    "worker": "canary-worker-a83e",
    "beat": "canary-beat-77b0",
    "producer": "canary-producer-19fd",
    "key id": "CANARYKEYID0F3C",
    "key": "canary-key-c2b1",
    "signing": "canary-signing-e410",
    "in a URI": "canary-uri-9f25",
}


class GuardedRedis(RedisServer):
    """Valkey with the users of deploy/redis/users.acl; the test's own way in is one more user."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        text = ACL.read_text(encoding="utf-8")
        filled = re.sub(r">([A-Z]+)_PASSWORD", lambda match: ">" + CANARIES[match[1].lower()], text)
        self._users = directory / "users.acl"
        self._users.write_text(f"{filled}user test on >test ~* &* +@all\n", encoding="utf-8")

    def command(self) -> list[str]:
        return [*super().command(), "--aclfile", str(self._users)]

    def url_of(self, role: str) -> str:
        return f"redis://code_worker_{role}:{CANARIES[role]}@127.0.0.1:{self.port}/0"

    def admin(self) -> redis.Redis:
        return redis.Redis(port=self.port, username="test", password="test")

    def denied(self) -> list[dict[str, str]]:
        """What somebody was refused, newest first, and forgets it."""
        with closing(self.admin()) as admin:
            found = admin.execute_command("ACL", "LOG")
            admin.execute_command("ACL", "LOG", "RESET")
        return [{str(key): str(value) for key, value in entry.items()} for entry in found]


def make_deployment(
    directory: Path, database_url: str, broker: GuardedRedis, s3: S3Server, bucket: str
) -> Deployment:
    """Settings with a canary in every secret, of a worker; other parts get their own broker URL."""
    url = make_url(database_url).set(password=CANARIES["database"])
    (directory / "files").mkdir()
    environment = {
        **s3.environment,
        "CODE_WORKER_DATA_DIR": str(directory / "data"),
        "CODE_WORKER_DATABASE_URL": url.render_as_string(hide_password=False),
        "CODE_WORKER_BROKER_URL": broker.url_of("worker"),
        "CODE_WORKER_ARTIFACTS": str(directory / "releases"),
        "CODE_WORKER_S3__ACCESS_KEY_ID": CANARIES["key id"],
        "CODE_WORKER_S3__SECRET_ACCESS_KEY": CANARIES["key"],
        "CODE_WORKER_S3__BUCKETS": f'["{bucket}"]',
        "CODE_WORKER_FILES__ROOTS": f'["{directory / "files"}"]',
        "CODE_WORKER_SIGNING_KEYS": f'["{CANARIES["signing"]}-which-is-long-enough"]',
        "CODE_WORKER_LOG_FORMAT": "json",
        "CODE_WORKER_LOG_LEVEL": "debug",
    }
    with closing(open_store(environment["CODE_WORKER_DATABASE_URL"])) as store:
        migrate.upgrade(store)
    return Deployment(environment, directory / "workers.log")


def secret_fields(settings: Any = Settings, above: str = "") -> set[str]:
    """Names of all settings that are secrets, as environment variables end."""
    found: set[str] = set()
    for name, field in settings.model_fields.items():
        path = f"{above}{name.upper()}"
        if "SecretStr" in str(field.annotation):
            found.add(path)
        elif hasattr(field.annotation, "model_fields"):
            found |= secret_fields(field.annotation, f"{path}__")
    return found


def everything_in(store: Store) -> str:
    """Every row of every table, as text."""
    metadata = MetaData()
    with store.engine.connect() as connection:
        metadata.reflect(connection)
        rows = [(table.name, row) for table in metadata.sorted_tables for row in connection.execute(table.select())]
    return "\n".join(f"{name}: {tuple(row)!r}" for name, row in rows)


def everything_held_by(broker: GuardedRedis) -> str:
    """Every key and what it holds, as text."""
    with closing(broker.admin()) as admin:
        return "\n".join(f"{key!r}: {admin.dump(key)!r}" for key in admin.keys("*"))


def run_cli(deployment: Deployment, *arguments: str, **extra: str) -> str:
    """What a command prints, on both streams, whatever its exit status."""
    done = subprocess.run(
        [forking_python(), "-m", "code_worker", *arguments],
        env={**os.environ, **deployment.environment, **extra},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return f"{done.stdout}\n{done.stderr}"
