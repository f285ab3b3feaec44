"""A process's hold on its run: signs of life in the background, and the word to stop."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeVar
from uuid import uuid4

from code_worker.errors import CodeWorkerError, RunLostError, RunStoppedError
from code_worker.logs import get_logger
from code_worker.store import runs

if TYPE_CHECKING:
    from code_worker.store.engine import Session, Store

__all__ = ["OWNER_ENV", "Held", "owner_name"]

OWNER_ENV: Final = "CODE_WORKER_OWNER"
"""Where a supervisor names the life of a process; what it held is freed under that name when it dies."""
T = TypeVar("T")
log = get_logger(__name__)


def owner_name() -> str:
    """A new name to hold a run by: that of this process's life, and a part of its own."""
    life = os.environ.get(OWNER_ENV) or f"{socket.gethostname()}-{os.getpid()}"
    return f"{life}:{uuid4().hex[:8]}"


class Held:
    """A run that this process holds; everything it writes goes through here."""

    def __init__(self, store: Store, lease: runs.Lease, *, lease_s: float, stop: threading.Event) -> None:
        self.lease = lease
        self._store = store
        self._lease_s = lease_s
        self._stop = stop
        self._lost: RunLostError | None = None
        self._done = threading.Event()

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Within it a thread gives signs of life, several for each lease."""
        thread = threading.Thread(target=self._beat, name="run-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    def check(self) -> None:
        """To be called often by whatever takes long.

        Raises:
            RunLostError: another process took the run over.
            RunStoppedError: this process was told to stop.
        """
        if self._lost is not None:
            raise self._lost
        if self._stop.is_set():
            raise RunStoppedError(f"run {self.lease.run_id} was left: the next process goes on with it")

    def write(self, work: Callable[[Session], T]) -> T:
        """A unit of work that begins with a proof that the run is still ours.

        Raises:
            RunLostError: it is not.
        """

        def guarded(session: Session) -> T:
            runs.hold(session, self.lease)
            return work(session)

        return self._store.run(guarded)

    def note(self, **columns: object) -> None:
        """Writes columns of the run, see `store.runs.note`."""
        self._store.run(lambda session: runs.note(session, self.lease, **columns))

    def _beat(self) -> None:
        # An outage of the database ends no training: nobody can take the run over meanwhile.
        while not self._done.wait(self._lease_s / 4):
            try:
                self._store.run(lambda session: runs.hold(session, self.lease))
            except RunLostError as error:
                self._lost = error
                return
            except CodeWorkerError as error:
                log.warning("run_heartbeat_missed", run=self.lease.run_id, error=str(error))
            except Exception as error:  # without this thread another process takes the run over
                log.critical("run_heartbeat_broken", run=self.lease.run_id, exc_info=error)
