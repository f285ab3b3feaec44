"""Keeps child processes running: restarts what dies, stops all in order, leaves nobody behind."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Final

from code_worker.logs import get_logger
from code_worker.system.processes import OWNER_ENV, SUPERVISOR_ENV

CONFIGURATION_STATUS: Final = 2
_POLL_S: Final = 0.1
_REPORTS_S: Final = 2.0
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Child:
    """One program to keep running.

    Every start of it gets a new name in `CODE_WORKER_OWNER`. `on_death(owner, status)` is called, on a thread of its
    own, after an end that was not in order (status ≠ 0; negative: the signal), so that what the dead one had claimed
    can be freed at once.
    """

    name: str
    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    on_death: Callable[[str, int], None] | None = None


@dataclass(frozen=True, slots=True)
class Backoff:
    """Wait before a restart: `first_s`, doubled up to `max_s`, from the start again after `healthy_s` of life."""

    first_s: float = 0.5
    max_s: float = 5.0
    healthy_s: float = 30.0

    def next(self, last_s: float, lived_s: float) -> float:
        """Seconds to wait now, after a life of `lived_s` that followed a wait of `last_s` (0: none)."""
        if last_s <= 0 or lived_s >= self.healthy_s:
            return self.first_s
        return min(last_s * 2, self.max_s)


class _Running:
    """One child's present life, or its wait for the next; used by the supervisor's thread alone."""

    def __init__(self, child: Child, log_path: Path | None) -> None:
        self.child = child
        self._log_path = log_path
        self.owner = ""
        self.process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0
        self.wait_s = 0.0
        self.start_at = 0.0

    def start(self) -> None:
        # An owner outlives no process: a restarted child must not renew the leases of the one that died.
        self.owner = f"{socket.gethostname()}:{self.child.name}:{uuid.uuid4().hex[:12]}"
        environment = {**os.environ, **self.child.env, OWNER_ENV: self.owner, SUPERVISOR_ENV: str(os.getpid())}
        self.started_at = time.monotonic()
        with ExitStack() as opened:
            out = None if self._log_path is None else opened.enter_context(self._log_path.open("ab"))
            # A session of its own: Ctrl-C in the terminal reaches the supervisor alone, which then stops in order.
            self.process = subprocess.Popen(
                list(self.child.command),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        log.info("child_started", child=self.child.name, pid=self.process.pid, owner=self.owner)

    def ended(self) -> int | None:
        """Exit status of a life that has just ended, once."""
        if self.process is None or (status := self.process.poll()) is None:
            return None
        self.process = None
        return status

    def send(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the child and to anything it started."""
        if self.process is not None and self.process.poll() is None:
            with suppress(ProcessLookupError):
                # Its session is its own, so its process id is that of its group: what it started dies with it.
                os.killpg(self.process.pid, signal.SIGKILL)


class Supervisor:
    """Runs children until told to stop; all of them are started and reaped by one thread of its own.

    The kernel ties a child to the *thread* that started it, hence one thread for as long as there are children.
    Children stop in the reverse of the order in which they were added. What they print goes where this process's
    goes, or is appended to the file `log_path`.
    """

    def __init__(
        self, *, grace_s: float = 30.0, backoff: Backoff | None = None, log_path: Path | None = None
    ) -> None:
        self.grace_s = grace_s
        self._log_path = log_path
        self._backoff = backoff or Backoff()
        self._new: queue.SimpleQueue[Child] = queue.SimpleQueue()
        # Appended to and looked through by the supervisor's thread; `pids` copies it. New children come by the queue.
        self._running: list[_Running] = []
        self._exit_threads: list[threading.Thread] = []
        # Plain flags, polled: setting an Event inside a signal handler can deadlock with the wait it interrupts.
        self._stopping = False
        self._killing = False
        self._status = 0
        self._thread = threading.Thread(target=self._supervise, name="supervisor", daemon=True)

    def add(self, child: Child) -> None:
        """Starts a child now, or with `start()`."""
        self._new.put(child)

    def start(self) -> None:
        """Begins to supervise, in the background."""
        self._thread.start()

    def stop(self) -> int:
        """SIGTERM to each child in turn, SIGKILL after `grace_s`; returns what `wait()` does."""
        self._stopping = True
        return self.wait()

    def wait(self) -> int:
        """Blocks until all have stopped; 0 after an orderly stop, 2 when a child refused its configuration."""
        while self._thread.is_alive():
            self._thread.join(_POLL_S)
        return self._status

    def run(self) -> int:
        """Supervises until a signal ends it; status as `wait()`. Main thread only."""
        with self.signals():
            self.start()
            return self.wait()

    @property
    def stopping(self) -> bool:
        """True if it was told to stop, or a child refused its configuration."""
        return self._stopping

    def pids(self) -> dict[str, int]:
        """Process ids of the children that live now, by name."""
        return {each.child.name: process.pid for each in list(self._running) if (process := each.process)}

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Within it SIGINT, SIGTERM and SIGHUP stop the children in order; a second SIGINT kills them."""

        def handle(number: int, _frame: FrameType | None) -> None:
            self._killing = self._killing or (self._stopping and number == signal.SIGINT)
            self._stopping = True

        # What `nohup` ignores stays ignored.
        wanted = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, handle) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _supervise(self) -> None:
        while not self._stopping:
            self._start_due()
            for each in self._running:
                if (status := each.ended()) is not None:
                    self._died(each, status)
            time.sleep(_POLL_S)
        for each in reversed(self._running):
            self._end(each)
        deadline = time.monotonic() + _REPORTS_S
        for exit_thread in self._exit_threads:
            # A moment for what died last to be reported; daemons, so
            # that a hanging database holds up no end of the process.
            exit_thread.join(max(0.0, deadline - time.monotonic()))

    def _start_due(self) -> None:
        while not self._new.empty():
            self._running.append(_Running(self._new.get(), self._log_path))
        for each in self._running:
            if each.process is None and each.start_at <= time.monotonic() and not self._stopping:
                self._start(each)

    def _start(self, each: _Running) -> None:
        try:
            each.start()
        except (FileNotFoundError, PermissionError) as error:
            log.error("child_cannot_start", child=each.child.name, error=str(error))
            self._refuse()
        except OSError as error:  # out of processes or memory: that passes
            log.warning("child_start_failed", child=each.child.name, error=str(error))
            self._postpone(each)

    def _died(self, each: _Running, status: int) -> None:
        self._report_end(each, status)
        if status == CONFIGURATION_STATUS:
            log.error("child_refused_configuration", child=each.child.name, status=status)
            self._refuse()
            return
        self._postpone(each)
        log.warning("child_died", child=each.child.name, status=status, restart_in_s=each.wait_s)

    def _refuse(self) -> None:
        self._status = CONFIGURATION_STATUS
        self._stopping = True

    def _postpone(self, each: _Running) -> None:
        each.wait_s = self._backoff.next(each.wait_s, time.monotonic() - each.started_at)
        each.start_at = time.monotonic() + each.wait_s

    def _end(self, each: _Running) -> None:
        # One after the other, the last started first: the worker
        # ends while the broker still takes its acknowledgements.
        each.send(signal.SIGTERM)
        deadline = time.monotonic() + self.grace_s
        while each.process is not None:
            if self._killing or time.monotonic() >= deadline:
                each.kill()
            if (status := each.ended()) is None:
                time.sleep(_POLL_S / 2)
                continue
            log.info("child_stopped", child=each.child.name, status=status)
            self._report_end(each, status)

    def _report_end(self, each: _Running, status: int) -> None:
        if status == 0 or each.child.on_death is None:
            return
        # On a thread: a database that does not answer must delay neither the restart nor the stop.
        exit_thread = threading.Thread(target=each.child.on_death, args=(each.owner, status), daemon=True)
        exit_thread.start()
        self._exit_threads = [*(thread for thread in self._exit_threads if thread.is_alive()), exit_thread]
