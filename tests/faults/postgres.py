"""A PostgreSQL server of a test's own, to be ended in every way and started again."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

from tests.patience import polls
from tests.servers import PostgresServer

__all__ = ["WAYS", "MortalPostgres"]

WAYS: Final = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT, "kill -9": signal.SIGKILL}
"""What a shutdown of that name sends to the postmaster."""


class MortalPostgres(PostgresServer):
    """Its socket, and so the URLs of its databases, outlive a restart."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._directory = directory

    def end(self, way: str) -> None:
        """Ends the postmaster so, and returns when its processes are gone."""
        pid = int((self._directory / "postmaster.pid").read_text().split()[0])
        family = [psutil.Process(pid), *psutil.Process(pid).children()]
        os.kill(pid, WAYS[way])
        _, alive = psutil.wait_procs(family, timeout=120)
        assert not alive, f"{way}: {alive}"

    def again(self) -> None:
        """Starts it on the same data; a server that was killed has to recover first."""
        for _ in polls(every_s=0.5):
            with suppress(subprocess.SubprocessError):
                self._server.ensure_postgres_running()
                return
        raise AssertionError("it does not start")
