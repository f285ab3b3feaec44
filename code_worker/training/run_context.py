"""The context of a run in a process: its services, the lease it holds, and the directory it works in."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from uuid import uuid4

from code_worker.errors import CodeWorkerError, RunLostError, RunStoppedError, TrainingError
from code_worker.logs import get_logger
from code_worker.store.learning import runs
from code_worker.system.files import locked, make_private

if TYPE_CHECKING:
    from code_worker.data.kept_copies import KeptImages
    from code_worker.plugins import Plugins
    from code_worker.releases.registry import Registry
    from code_worker.settings import Settings
    from code_worker.store.engine import Session, Store


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """The outcome of a run that moved no alias."""

    state: str
    reasons: Sequence[str]


Listener = Callable[[str, Mapping[str, Any]], None]
"""Hears the stage and how far it is: `done` of `total`, or what the training process says of itself."""


@dataclass(frozen=True, slots=True)
class RunServices:
    """Services that every run of a process works with."""

    settings: Settings
    store: Store
    registry: Registry
    plugins: Plugins
    kept: KeptImages


@dataclass(frozen=True, slots=True)
class RunContext:
    """See the module."""

    parts: RunServices
    run: runs.Run
    held: RunLease
    place: RunDirectory
    listen: Listener

    @property
    def settings(self) -> Settings:
        """Those of this process; what the training itself goes by is kept in the run."""
        return self.parts.settings

    def add_candidate(self) -> str:
        """Adds the candidate to the releases and notes it in the run, both or neither; returns its id.

        So an erasure that ends the run finds the release, or it is never registered.

        Raises:
            RunLostError: the run is not this process's any more; what it stored of a run that has ended is deleted.
            ArtifactError: see `Registry.add`.
        """
        stored: set[str] = set()

        def note(session: Session, release: str) -> None:
            stored.add(release)
            runs.note(session, self.held.lease, candidate=release)

        try:
            some = self.run.config.get("heads") is not None
            return self.parts.registry.add(
                self.place.candidate, by=self.run.by, along=note, heads_of=self.run.base_release if some else None
            )
        except RunLostError:
            # Of a run that goes on, the process that has it now may be storing the same files.
            now = self.parts.store.run(lambda session: runs.get(session, self.run.id), write=False)
            if now is None or now.state != "running":
                for release in stored:
                    self.parts.registry.discard(release)
            raise


OWNER_ENV: Final = "CODE_WORKER_OWNER"
"""Where a supervisor names the life of a process; what it held is freed under that name when it dies."""
T = TypeVar("T")
log = get_logger(__name__)


def owner_name() -> str:
    """A new name to hold a run by: that of this process's life, and a part of its own."""
    life = os.environ.get(OWNER_ENV) or f"{socket.gethostname()}-{os.getpid()}"
    return f"{life}:{uuid4().hex[:8]}"


class RunLease:
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
        """To be called often by work that takes long.

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


_LOCK: Final = "lock"
_KEPT_RUNS: Final = 10


class RunDirectory:
    """`runs/<run id>` in the data directory."""

    def __init__(self, runs: Path, run_id: str) -> None:
        self.runs = runs
        self.path = runs / run_id
        self._descriptor: int | None = None

    @property
    def job(self) -> Path:
        """Returns where the training process works."""
        return self.path / "job"

    @property
    def candidate(self) -> Path:
        """The release directory, before it is registered."""
        return self.path / "release"

    @property
    def lock(self) -> int:
        """Descriptor of the lock, to be inherited by children.

        A child that outlives its killed parent holds the lock until it has ended, and nobody works beside it.
        """
        if self._descriptor is None:
            raise RuntimeError("the workplace is not open")
        return self._descriptor

    @contextmanager
    def open(self, check: Callable[[], None], *, wait_s: float) -> Iterator[None]:
        """Makes the directory and keeps others out; waits for one who is on the way out, calling `check` meanwhile.

        Raises:
            TrainingError: it cannot be made, or somebody else did not leave it in time.
        """
        try:
            make_private(self.path)
            held = ExitStack()
            descriptor = held.enter_context(locked(self.path / _LOCK, wait_s=wait_s, check=check))
        except BlockingIOError:
            raise TrainingError(f"a process of an earlier attempt still works in {self.path}: end it") from None
        except OSError as error:
            raise TrainingError(f"cannot work in {self.path}: {error.strerror}") from error
        with held:
            self._descriptor = descriptor
            try:
                yield
            finally:
                self._descriptor = None

    def tidy(self) -> None:
        """Drops what only a run under way needs, and whole directories of runs long past."""
        for path in (self.candidate, self.job / "checkpoints", self.job / "initial"):
            shutil.rmtree(path, ignore_errors=True)
        # Ids of runs are in the order of time.
        for path in sorted(self.runs.glob("*/"), reverse=True)[_KEPT_RUNS:]:
            log.info("run_directory_dropped", run=path.name)
            shutil.rmtree(path, ignore_errors=True)
