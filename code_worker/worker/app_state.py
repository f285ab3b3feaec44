"""The state that a Celery app holds for us: settings, and parts that are made when a worker first needs them."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from code_worker.errors import CodeWorkerError
from code_worker.logs import get_logger
from code_worker.system.processes import call_if_alive
from code_worker.wire import QUEUES, TRAIN_QUEUE
from code_worker.worker.background import Repeater, Reporter, owner_name

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from celery import Celery

    from code_worker.settings import Settings
    from code_worker.store.engine import Store
    from code_worker.worker.judging.node import Node
    from code_worker.worker.learning_watch import Learning
    from code_worker.worker.retention import Retention
    from code_worker.worker.sweeper import Sweeper, Swept

log = get_logger(__name__)
_INHERITED: list[object] = []
_KEEP_AGAIN_S = 5.0
_BACKGROUND_THREADS = 4
"""Sweeper, retention, reports and the look at what is due: each may hold a connection beside those that judge."""


@dataclass(slots=True, eq=False)
class _Parts:
    """The parts of one process; `closing` ends them, the last one made first, and after all of them the store."""

    closing: ExitStack = field(default_factory=ExitStack)
    running: dict[str, Repeater] = field(default_factory=dict)
    store: Store | None = None
    node: Node | None = None
    sweeper: Sweeper | None = None
    learning: Learning | None = None
    retention: Retention | None = None
    owner: str | None = None
    queues: frozenset[str] = frozenset()
    unkept: deque[tuple[str, str]] = field(default_factory=deque)
    """Messages that cannot be read and that the store did not take: body and error."""

    def __post_init__(self) -> None:
        # The first to be called back is the last to be registered: parts open the store when they first need it.
        self.closing.callback(self._close_store)

    def _close_store(self) -> None:
        if self.store is not None:
            self.store.close()


class AppState:
    """Makes the node and the sweeper in the process that uses them: never at import, never before a fork.

    `_lock` guards `_parts`. `_loading` is taken before it, and held while a node loads, which takes minutes where
    kernels are compiled: all else goes on meanwhile.
    """

    def __init__(self, app: Celery, settings: Callable[[], Settings]) -> None:
        self._app = app
        self._read_settings = settings
        # Reentrant both: a part that is made under the lock asks for the store, which takes it again.
        self._lock = threading.RLock()
        self._loading = threading.RLock()
        self._parts = _Parts()
        self._threads: int | None = None
        self._release_looked_for = False
        self._stop_learning = threading.Event()
        # Weakly, since what is registered for forks stays for the
        # life of the process, and would keep the app with it.
        forget = weakref.WeakMethod(self._forget)
        os.register_at_fork(after_in_child=lambda: call_if_alive(forget))

    @property
    def settings(self) -> Settings:
        """The settings, read when the app's configuration was.

        Raises:
            ConfigurationError: they cannot be read.
        """
        return self._read_settings()

    def judge_on(self, threads: int) -> None:
        """Sets how many messages this process judges at the same time: each needs a connection to the database."""
        self._threads = threads

    def store(self) -> Store:
        """The process's store, opened at the first call.

        Raises:
            ConfigurationError: an address that cannot be.
            StoreError: a database that is away or not migrated.
        """
        with self._lock:
            if self._parts.store is None:
                from code_worker.store import migrate

                worker = self.settings.worker
                threads = (self._threads or worker.concurrency) + worker.fetch_threads + _BACKGROUND_THREADS
                self._parts.store = migrate.open_current(self.settings.resolved_database_url, threads=threads)
            return self._parts.store

    def node(self) -> Node:
        """The process's node, made and started at the first call.

        Raises:
            ConfigurationError: a plugin, device or setting that cannot work.
            StoreError: a database that is not migrated.
        """
        with self._loading:
            if self._parts.node is None:
                # It says itself that there is none.
                self._release_looked_for = True
                from code_worker.worker.judging.node import Node

                node = Node(self.settings, self.store(), owner=self._named(), more=self._facts)
                try:
                    node.start()
                except BaseException:
                    node.close()
                    raise
                self._parts.node = node
                # Called before the store is closed, since it was
                # registered after it: its last word goes into the ledger.
                self._parts.closing.callback(node.close)
            return self._parts.node

    def learning(self) -> Learning:
        """Returns what runs retrains and refits, made at the first call.

        Raises:
            ConfigurationError: a plugin or setting that cannot work.
            StoreError: a database that is not migrated.
        """
        with self._lock:
            if self._parts.learning is None:
                from code_worker.worker.learning_watch import Learning

                self._parts.learning = Learning(self.settings, self.store(), self._stop_learning)
            return self._parts.learning

    def _start(self, name: str, interval_s: float, work: Callable[[], object]) -> bool:
        """Starts a part that works in the background, unless it runs already."""
        with self._lock:
            if name in self._parts.running:
                return False
            part = self._parts.running[name] = Repeater(name, interval_s, work)
            self._parts.closing.callback(part.stop)
            part.start()
            return True

    def start_reporting(self, queues: Collection[str]) -> None:
        """Says in the ledger, again and again, that this process takes these queues, and what else `doctor` asks."""
        with self._lock:
            self._parts.queues = frozenset(queues)
            if "report" in self._parts.running:
                return
            reporter = Reporter(self.settings, self.store, self._role(), owner=self._named(), more=self._facts)
            # Registered before the thread that reports, so called after
            # that has stopped: no sign of life follows the last word.
            self._parts.closing.callback(self._end_reporting, reporter)
            self._start("report", reporter.interval_s, lambda: self._report(reporter))

    def _report(self, reporter: Reporter) -> None:
        # A process that judges says it with its leases, under the same name.
        if self._parts.node is None:
            reporter.say()
            self._warn_without_release()

    def _warn_without_release(self) -> None:
        """Once: the node, which says it itself, is made with the first job, and until then nobody would know."""
        if self._release_looked_for or not self._parts.queues & frozenset(QUEUES):
            return
        from code_worker.store import releases

        champion = self.store().run(lambda session: releases.alias(session, releases.CHAMPION), write=False)
        looked_for, self._release_looked_for = self._release_looked_for, True
        if champion is None and not looked_for:
            log.warning("waiting_for_release", hint="code-worker releases import DIR --promote")

    @staticmethod
    def _end_reporting(reporter: Reporter) -> None:
        try:
            reporter.end()
        except CodeWorkerError as error:
            # It is silent from now on, and that says the same a minute later.
            log.warning("end_not_reported", error=str(error))

    def _role(self) -> str:
        if self._parts.queues & frozenset(QUEUES):
            return "consumer"
        return "trainer" if TRAIN_QUEUE in self._parts.queues else "sweeper"

    def _facts(self) -> dict[str, Any]:
        swept = {} if self._parts.sweeper is None else self._parts.sweeper.said()
        return {"queues": sorted(self._parts.queues), **swept}

    def _named(self) -> str:
        with self._lock:
            self._parts.owner = self._parts.owner or owner_name()
            return self._parts.owner

    def sweep(self) -> Swept:
        """One pass of the sweeper."""
        with self._lock:
            if self._parts.sweeper is None:
                from code_worker.publisher import Publisher  # needs the app's broker
                from code_worker.worker.judging.recorder import Recorder
                from code_worker.worker.sweeper import Sweeper

                recorder = Recorder(self.store(), self.settings.worker, f"sweeper-{uuid4().hex[:12]}")
                self._parts.sweeper = Sweeper(recorder, Publisher(self._app), self.settings)
            sweeper = self._parts.sweeper
        return sweeper.sweep()

    def start_sweeping(self) -> None:
        """Sweeps in the background of this process, beat or no beat."""
        if self._start("sweep", self.settings.worker.sweep_interval_s, self.sweep):
            self._start_retaining()

    def start_watching(self) -> None:
        """Looks in the background whether a run was left behind or a schedule is due, beat or no beat."""
        from code_worker.publisher import Publisher  # needs the app's broker
        from code_worker.worker.learning_watch import Watcher

        watcher = Watcher(self.settings, self.store, Publisher(self._app))
        if self._start("learning_watch", watcher.interval_s, watcher.look):
            # A trainer's directories of runs may be on no other machine.
            self._start_retaining()

    def _start_retaining(self) -> None:
        self._start("retention", self.settings.retention.interval_s, self._retain)

    def _retain(self) -> object:
        from code_worker.worker.retention import Retention

        # At the first turn that finds a database: one that is away, or not migrated yet, stops no other part.
        with self._lock:
            if self._parts.retention is None:
                self._parts.retention = Retention(self.settings, self.store(), f"retention-{uuid4().hex[:12]}")
            retention = self._parts.retention
        return retention()

    def keep_unreadable(self, message: str, error: str) -> None:
        """Keeps what came off a queue and is no message; where the store does not take it, a thread tries again.

        Raises nothing: it is called from Celery's event loop, which would end.
        """
        try:
            self._keep(message, error)
        except Exception as refused:  # noqa: BLE001 - Celery's event loop would end with it
            log.warning("message_kept_later", error=type(refused).__name__)
            with self._lock:
                # The loop appends on its thread, `_keep_again` takes on another: each is one atomic step of a deque.
                self._parts.unkept.append((message, error))
                if "unreadable" not in self._parts.running:
                    self._parts.closing.callback(self._keep_the_last)
                    self._start("unreadable", _KEEP_AGAIN_S, self._keep_again)

    def _keep(self, message: str, error: str) -> None:
        from code_worker.worker.intake import dead_letter

        dead_letter(self.store(), {"unreadable": message}, error, kind="unreadable")

    def _keep_again(self) -> None:
        unkept = self._parts.unkept
        while unkept:
            message = unkept.popleft()
            try:
                self._keep(*message)
            except BaseException:
                # Behind the others: one that cannot be kept at all holds none of them up.
                unkept.append(message)
                raise

    def _keep_the_last(self) -> None:
        try:
            self._keep_again()
        except Exception as refused:  # noqa: BLE001 - the rest is to be closed all the same
            count = len(self._parts.unkept)
            # No traceback: its texts may name images.
            log.error("messages_not_kept", count=count, error=type(refused).__name__)

    def stop_taking(self) -> None:
        """The worker was asked to end: batches are finished, a run is left to the next process, nothing is begun."""
        # In Celery's handler of SIGTERM, on the main thread: it only sets flags. A lock could be held by the very
        # code that it interrupts; those inside these Events are not, since the main thread never waits for them.
        self._stop_learning.set()
        if self._parts.retention is not None:
            self._parts.retention.stop()
        if self._parts.node is not None:
            self._parts.node.stopping = True

    def _forget(self) -> None:
        """In a forked child: parts of the parent, its connections and threads, are not ours to use or to close."""
        # Kept alive: collected, its sockets would say goodbye to servers that the parent still talks to.
        _INHERITED.append(self._parts)
        # A thread of the parent, which does not exist here, may have held the old ones.
        self._lock, self._loading = threading.RLock(), threading.RLock()
        self._parts = _Parts()

    def close(self) -> None:
        """Ends all parts of this process; what is asked for afterwards is made anew."""
        with self._loading:
            parts = self._parts
            # Not under `_lock`: a part that is asked to stop may be waiting for it.
            parts.closing.close()
            with self._lock:
                self._parts = _Parts()
