"""A PostgreSQL server for measurements: as people run it, every commit on disk before it is answered."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from code_worker.store import migrate
from code_worker.store.engine import Store, open_store
from tests.servers import PostgresServer

__all__ = ["ledger", "postgres"]


@contextmanager
def postgres(directory: Path | None = None, **settings: str) -> Iterator[PostgresServer]:
    """A server with the settings that it ships with, but for those given; its data are deleted afterwards."""
    place = Path(tempfile.mkdtemp(prefix="code-worker-bench-", dir=directory))
    server = PostgresServer(place / "data")
    try:
        server.configure(fsync=None, full_page_writes=None, **settings)
        yield server
    finally:
        server.stop()
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def ledger(url: str) -> Iterator[Store]:
    """The store at a URL, with its tables."""
    with closing(open_store(url)) as store:
        migrate.upgrade(store)
        yield store
