from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path

from sqlalchemy import text

from code_worker.store.engine import open_store

READ_AND_CLOSE = (
    "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT * FROM kept').fetchall(); c.close()"
)


def test_opening_a_database_twice_keeps_the_locks_of_the_first(tmp_path: Path) -> None:
    """SQLite's locks are the process's: were they dropped, the next process would delete the log in use."""
    path = tmp_path / "twice.db"
    with closing(open_store(f"sqlite:///{path}")) as first:
        first.run(lambda session: session.execute(text("CREATE TABLE kept (id INTEGER)")) and None)
        with closing(open_store(f"sqlite:///{path}")):
            subprocess.run([sys.executable, "-c", READ_AND_CLOSE, str(path)], check=True, timeout=120)
        assert (tmp_path / "twice.db-wal").exists()
        first.run(lambda session: session.execute(text("INSERT INTO kept VALUES (1)")) and None)
    with closing(open_store(f"sqlite:///{path}")) as again:
        assert again.run(lambda session: session.execute(text("SELECT count(*) FROM kept")).scalar_one()) == 1
