"""The whole stack of one data directory: embedded broker, worker, trainer and scheduler under one supervisor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TypeVar

from code_worker.broker import check_broker
from code_worker.errors import CodeWorkerError, ConfigurationError
from code_worker.logs import get_logger
from code_worker.settings import Settings
from code_worker.stack.embedded import EmbeddedBroker
from code_worker.stack.supervisor import Backoff, Child, Supervisor
from code_worker.store import migrate, releases
from code_worker.store.engine import open_store
from code_worker.store.releases import CHAMPION
from code_worker.system.files import locked, make_private
from code_worker.system.machine import library_threads

if TYPE_CHECKING:
    from code_worker.store.engine import Session

T = TypeVar("T")
log = get_logger(__name__)
TRAINER_GRACE_S: Final = 90.0
"""A training process writes a checkpoint before it ends; this is longer than it is given for that."""


def worker_child(settings: Settings, *, env: Mapping[str, str] | None = None, options: Sequence[str] = ()) -> Child:
    """A moderation worker; when it dies, what it had claimed is free at once, not only when its leases lapse."""
    return Child(
        "worker",
        (sys.executable, "-m", "code_worker.stack.worker_process", *options),
        env={**library_threads(), **(env or {})},
        on_death=lambda owner, _: _release_claims(settings, owner),
    )


def trainer_child(settings: Settings, *, env: Mapping[str, str] | None = None) -> Child:
    """A trainer; when it dies, the run that it held goes on in its next life at once."""
    return Child(
        "trainer",
        (sys.executable, "-m", "code_worker.stack.trainer_process"),
        env={**library_threads(), **(env or {})},
        on_death=lambda owner, _: _release_run(settings, owner),
    )


def beat_child(*, env: Mapping[str, str] | None = None) -> Child:
    """The scheduler."""
    return Child("beat", (sys.executable, "-m", "code_worker.stack.beat_process"), env=env or {})


def _release_claims(settings: Settings, owner: str) -> None:
    from code_worker.store import jobs

    released = _in_store(settings, owner, lambda session: jobs.release_owner(session, owner))
    if released is not None:
        log.info("claims_released", owner=owner, jobs=released)


def _release_run(settings: Settings, owner: str) -> None:
    from code_worker.store.learning import runs

    if _in_store(settings, owner, lambda session: runs.release_owner(session, owner)):
        log.info("run_released", owner=owner)


def _in_store(settings: Settings, owner: str, work: Callable[[Session], T]) -> T | None:
    from code_worker.store.engine import open_store

    try:
        with closing(open_store(settings.resolved_database_url, threads=1, create=False)) as store:
            return store.run(work)
    except CodeWorkerError as error:
        log.warning("claims_not_released", owner=owner, error=str(error))  # their leases lapse by themselves
        return None


_REFUSED: Final = 2
# Any other fault is the worker's to name.
_ASK_DEVICE: Final = f"""
import sys
from code_worker.encoder.torch_engine import resolve_device
from code_worker.errors import ConfigurationError
try:
    resolve_device(sys.argv[1])
except ConfigurationError as error:
    print(error)
    sys.exit({_REFUSED})
"""


class Stack:
    """Everything that a data directory needs to run; what the settings name elsewhere is used there.

    Children read their settings from the environment of this process and from `env`, which must lead to the same
    settings. Use it as a context manager, or call `start()` and, no matter what happens, `stop()`.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        env: Mapping[str, str] | None = None,
        backoff: Backoff | None = None,
        log_path: Path | None = None,
    ) -> None:
        self.settings = settings
        self.data_path = settings.data_path
        self._env = {**(env or {}), "CODE_WORKER_DATA_DIR": str(self.data_path)}
        self._lock = _Lock(self.data_path / "run" / "up.lock")
        # No batch may take longer than this: its own watchdog sees to that. Nor a checkpoint of a run.
        grace_s = max(settings.worker.batch_timeout_s, TRAINER_GRACE_S)
        self._supervisor = Supervisor(grace_s=grace_s, backoff=backoff, log_path=log_path)
        self._broker = EmbeddedBroker(self.data_path) if settings.broker_url is None else None

    def start(self) -> None:
        """Makes directories and database, then starts broker, scheduler, trainer and worker.

        Raises:
            ConfigurationError: another stack runs in this directory, no embedded server is installed, or the GPU that
                the settings name is not there; nothing was started.
            StoreError: a database of yours that was not migrated, or that does not answer.
            BrokerUnavailableError: the embedded broker does not start.
        """
        if self._broker is None:
            check_broker(self.settings)
        _check_device(self.settings.device)
        self._make_directories()
        # Before the database is touched: two stacks would both migrate it, and both run a broker on one port.
        self._lock.acquire()
        self._prepare_database()
        self._supervisor.start()
        if self._broker is not None:
            self._supervisor.add(self._broker.prepare())
            self._broker.wait_ready(given_up=lambda: self._supervisor.stopping)
            self._broker.publish()
        # The worker last, since the order of stopping is the reverse: it ends while all that it needs still runs.
        self._supervisor.add(beat_child(env=self._env))
        self._supervisor.add(trainer_child(self.settings, env=self._env))
        self._supervisor.add(worker_child(self.settings, env=self._env))

    def _make_directories(self) -> None:
        for directory in (self.data_path, self.data_path / "run", self.data_path / "releases"):
            try:
                make_private(directory)
            except OSError as error:
                raise ConfigurationError(
                    f"the data directory {directory} cannot be made ({error.strerror}): set CODE_WORKER_DATA_DIR"
                ) from None

    def _prepare_database(self) -> None:
        with closing(open_store(self.settings.resolved_database_url, threads=1)) as store:
            if self.settings.database_url is None:
                migrate.upgrade(store)
            else:  # somebody else's: they say when its tables change
                migrate.require_current(store)

    def champion(self) -> str | None:
        """Id of the release that judges, if there is one."""
        with closing(open_store(self.settings.resolved_database_url, threads=1)) as store:
            return store.run(lambda session: releases.alias(session, CHAMPION), write=False)

    def wait(self) -> int:
        """Blocks until all have stopped: 0 in order, 2 when a child refused its configuration."""
        return self._supervisor.wait()

    def stop(self) -> int:
        """Stops worker, trainer, scheduler and broker, in this order; returns what `wait()` does."""
        try:
            return self._supervisor.stop()
        finally:
            if self._broker is not None and self._lock.held:
                # Only under the lock: without it the address is that of another stack, which runs here.
                self._broker.withdraw()
            self._lock.release()

    def signals(self) -> AbstractContextManager[None]:
        """Within it SIGINT, SIGTERM and SIGHUP make `wait()` return; main thread only."""
        return self._supervisor.signals()

    def pids(self) -> dict[str, int]:
        """Process ids of `broker`, `beat`, `trainer` and `worker`, as far as they live now."""
        return self._supervisor.pids()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _check_device(device: str) -> None:
    """Asks for a GPU that is named, in another process, so that this one need not load torch.

    Raises:
        ConfigurationError: it is not there.
    """
    if device in {"auto", "cpu"}:
        return
    asked = subprocess.run([sys.executable, "-c", _ASK_DEVICE, device], capture_output=True, text=True, check=False)
    if asked.returncode == _REFUSED:
        raise ConfigurationError(asked.stdout.strip())


class _Lock:
    """One stack per data directory; the system frees it however its holder ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held_lock = ExitStack()
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def acquire(self) -> None:
        try:
            descriptor = self._held_lock.enter_context(locked(self._path))
        except BlockingIOError:
            holder = self._path.read_text(errors="replace")[:20].strip() or "unknown"
            raise ConfigurationError(
                f"`code-worker up` runs already in {self._path.parent.parent} (process {holder}): "
                "stop it first, or use another --data-dir"
            ) from None
        # For people alone: the lock says that somebody holds it, the number only who.
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor is not None:
            # While it is still ours: a moment later another holder's number may stand there.
            with suppress(OSError):
                os.ftruncate(self._descriptor, 0)
            self._held_lock.close()
            self._descriptor = None
