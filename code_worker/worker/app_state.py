"""What a Celery app holds of us: settings, and the parts that are made when a worker first needs them."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
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


class AppState:
    """Makes the node and the sweeper in the process that uses them: never at import, never before a fork."""

    def __init__(self, app: Celery, settings: Callable[[], Settings]) -> None:
        self._app = app
        self._read_settings = settings
        self._lock = threading.RLock()
        # Taken before the other: a node loads for minutes where kernels are compiled, and all else goes on meanwhile.
        self._loading = threading.RLock()
        self._store: Store | None = None
        self._background: Store | None = None
        self._node: Node | None = None
        self._sweeper: Sweeper | None = None
        self._repeater: Repeater | None = None
        self._learning: Learning | None = None
        self._watcher: Repeater | None = None
        self._retention: Repeater | None = None
        self._retainer: Retention | None = None
        self._keeper: Repeater | None = None
        self._reporter: tuple[Repeater, Reporter] | None = None
        self._release_looked_for = False
        self._owner: str | None = None
        self._queues: frozenset[str] = frozenset()
        self._threads: int | None = None
        self._unkept: deque[tuple[str, str]] = deque()
        self._stop_retaining: Callable[[], None] = lambda: None
        self._stop_learning = threading.Event()
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
        """The store that messages are accepted and judged with, opened at the first call.

        Raises:
            ConfigurationError: an address that cannot be.
            StoreError: a database that is away or not migrated.
        """
        with self._lock:
            if self._store is None:
                from code_worker.store import migrate

                worker = self.settings.worker
                threads = (self._threads or worker.concurrency) + worker.fetch_threads
                self._store = migrate.open_current(self.settings.resolved_database_url, threads=threads)
            return self._store

    def node(self) -> Node:
        """The process's node, made and started at the first call.

        Raises:
            ConfigurationError: a plugin, device or setting that cannot work.
            StoreError: a database that is not migrated.
        """
        with self._loading:
            if self._node is None:
                # It says itself that there is none.
                self._release_looked_for = True
                from code_worker.worker.judging.node import Node

                node = Node(self.settings, self.store(), owner=self._named(), more=self._facts)
                try:
                    node.start()
                except BaseException:
                    node.close()
                    raise
                self._node = node
            return self._node

    def start_reporting(self, queues: Collection[str]) -> None:
        """Says in the ledger, again and again, that this process takes these queues, and what else `doctor` asks."""
        with self._lock:
            self._queues = frozenset(queues)
            if self._reporter is None:
                reporter = Reporter(
                    self.settings, self._background_store, self._role(), owner=self._named(), more=self._facts
                )
                repeater = Repeater("report", reporter.interval_s, lambda: self._report(reporter))
                self._reporter = repeater, reporter
                repeater.start()

    def _report(self, reporter: Reporter) -> None:
        # A process that judges says it with its leases, under the same name.
        if self._node is None:
            reporter.say()
            self._warn_without_release()

    def _warn_without_release(self) -> None:
        """Once: the node, which says it itself, is made with the first job, and until then nobody would know."""
        if self._release_looked_for or not self._queues & frozenset(QUEUES):
            return
        from code_worker.store import releases

        champion = self._background_store().run(
            lambda session: releases.alias(session, releases.CHAMPION), write=False
        )
        looked_for, self._release_looked_for = self._release_looked_for, True
        if champion is None and not looked_for:
            log.warning("waiting_for_release", hint="code-worker releases import DIR --promote")

    def _stop_reporting(self) -> None:
        if self._reporter is None:
            return
        repeater, reporter = self._reporter
        repeater.stop()
        self._reporter = None
        try:
            reporter.end()
        except CodeWorkerError as error:
            # It is silent from now on, and that says the same a minute later.
            log.warning("end_not_reported", error=str(error))

    def _role(self) -> str:
        if self._queues & frozenset(QUEUES):
            return "consumer"
        return "trainer" if TRAIN_QUEUE in self._queues else "sweeper"

    def _facts(self) -> dict[str, Any]:
        swept = {} if self._sweeper is None else self._sweeper.said()
        return {"queues": sorted(self._queues), **swept}

    def _named(self) -> str:
        with self._lock:
            self._owner = self._owner or owner_name()
            return self._owner

    def sweep(self) -> Swept:
        """One pass of the sweeper."""
        with self._lock:
            if self._sweeper is None:
                from code_worker.publisher import Publisher  # needs the app's broker
                from code_worker.worker.judging.recorder import Recorder
                from code_worker.worker.sweeper import Sweeper

                store = self._background_store()
                ledger = Recorder(store, self.settings.worker, f"sweeper-{uuid4().hex[:12]}")
                self._sweeper = Sweeper(ledger, Publisher(self._app), self.settings)
        return self._sweeper.sweep()

    def start_sweeping(self) -> None:
        """Sweeps in the background of this process, beat or no beat."""
        with self._lock:
            if self._repeater is None:
                self._repeater = Repeater("sweep", self.settings.worker.sweep_interval_s, self.sweep)
                self._repeater.start()
                self._start_retaining()

    def bury(self, message: str, error: str) -> None:
        """Keeps what came off a queue and is no message; where the store does not take it, a thread tries again.

        Raises nothing: it is called from Celery's event loop, which would end.
        """
        try:
            self._keep_letter(message, error)
        except Exception as refused:  # noqa: BLE001 - see above
            log.warning("message_kept_later", error=type(refused).__name__)
            with self._lock:
                self._unkept.append((message, error))
                if self._keeper is None:
                    self._keeper = Repeater("unreadable", _KEEP_AGAIN_S, self._keep_letters)
                    self._keeper.start()

    def _keep_letter(self, message: str, error: str) -> None:
        from code_worker.worker.intake import bury

        bury(self.store(), {"unreadable": message}, error, kind="unreadable")

    def _keep_letters(self) -> None:
        while self._unkept:
            letter = self._unkept.popleft()
            try:
                self._keep_letter(*letter)
            except BaseException:
                # Behind the others: one that cannot be kept at all holds none of them up.
                self._unkept.append(letter)
                raise

    def _stop_keeping(self) -> None:
        if self._keeper is None:
            return
        self._keeper.stop()
        self._keeper = None
        try:
            self._keep_letters()
        except Exception as refused:  # noqa: BLE001 - the rest is to be closed all the same
            log.error("messages_not_kept", count=len(self._unkept), error=type(refused).__name__)  # noqa: TRY400 - texts may name images

    def learning(self) -> Learning:
        """What runs retrains and refits, made at the first call.

        Raises:
            ConfigurationError: a plugin or setting that cannot work.
            StoreError: a database that is not migrated.
        """
        with self._lock:
            if self._learning is None:
                from code_worker.worker.learning_watch import Learning

                self._learning = Learning(self.settings, self._background_store(), self._stop_learning)
            return self._learning

    def start_watching(self) -> None:
        """Looks in the background whether a run was left behind or a schedule is due, beat or no beat."""
        with self._lock:
            if self._watcher is None:
                from code_worker.publisher import Publisher  # needs the app's broker
                from code_worker.worker.learning_watch import Watcher

                watcher = Watcher(self.settings, self._background_store, Publisher(self._app))
                self._watcher = Repeater("learning_watch", watcher.interval_s, watcher.look)
                self._watcher.start()
                # A trainer's directories of runs may be on no other machine.
                self._start_retaining()

    def _start_retaining(self) -> None:
        if self._retention is None:
            self._retention = Repeater("retention", self.settings.retention.interval_s, self._retain)
            self._retention.start()

    def _retain(self) -> object:
        from code_worker.worker.retention import Retention

        # At the first turn that finds a database: one that is away, or not migrated yet, stops no other part.
        with self._lock:
            if self._retainer is None:
                self._retainer = Retention(self.settings, self._background_store(), f"retention-{uuid4().hex[:12]}")
                self._stop_retaining = self._retainer.stop
            retainer = self._retainer
        return retainer()

    def _background_store(self) -> Store:
        """One for all that runs in the background, so that its connections are few; the node has its own."""
        with self._lock:
            if self._background is None:
                from code_worker.store import migrate

                self._background = migrate.open_current(self.settings.resolved_database_url)
            return self._background

    def stop_taking(self) -> None:
        """The worker was asked to end: batches are finished, a run is left to the next process, nothing is begun."""
        self._stop_learning.set()
        self._stop_retaining()
        if self._node is not None:
            self._node.stopping = True

    def _forget(self) -> None:
        """In a forked child: parts of the parent, its connections and threads, are not ours to use or to close."""
        parts = (self._node, self._sweeper, self._repeater, self._learning, self._watcher, self._retention)
        _INHERITED.append((self._store, self._background, self._keeper, self._reporter, self._unkept, *parts))
        self._lock, self._loading = threading.RLock(), threading.RLock()
        self._store = self._background = self._node = self._sweeper = self._repeater = None
        self._learning = self._watcher = self._retention = self._keeper = self._reporter = self._owner = None
        self._retainer = None
        self._queues = frozenset()
        self._unkept = deque()

    def close(self) -> None:
        """Ends the background work of this process."""
        self._stop_keeping()
        with self._loading, self._lock:
            if self._retention is not None:
                self._retention.stop()
                self._retention = self._retainer = None
            if self._repeater is not None:
                self._repeater.stop()
                self._repeater = None
            if self._watcher is not None:
                self._watcher.stop()
                self._watcher = None
            self._stop_reporting()
            if self._node is not None:
                self._node.close()
                self._node = None
            for store in (self._store, self._background):
                if store is not None:
                    store.close()
            self._store = self._background = None
