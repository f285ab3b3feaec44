"""One worker process: everything that judging needs, made once, shared by its threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

from code_worker._version import __version__
from code_worker.errors import CodeWorkerError, StoreUnavailableError
from code_worker.heads import unknown_head_settings
from code_worker.images.source import Sources
from code_worker.logs import get_logger
from code_worker.moderation.judge import Judge
from code_worker.moderation.policy import Policy, PolicyBook
from code_worker.moderation.pool import PriorityPool
from code_worker.moderation.runtime import start_runtime
from code_worker.plugins import load_plugins
from code_worker.releases.registry import open_registry
from code_worker.roles import current_user
from code_worker.store import audit, embeddings, jobs, policies, releases, workers
from code_worker.system.failpoints import failpoint
from code_worker.worker.background import Repeater, facts, owner_name
from code_worker.worker.judging.fetching import GuardedSources
from code_worker.worker.judging.recorder import Recorder
from code_worker.worker.judging.runtimes import Runtimes
from code_worker.worker.judging.shadowing import Shadow
from code_worker.worker.judging.watchdog import InFlight, Watchdog

if TYPE_CHECKING:
    from code_worker.settings import Settings
    from code_worker.store.engine import Session, Store
    from code_worker.types import Job

_SECTIONS: Final = ("schedule", "gate", "labels", "roles")


def note_settings(settings: Settings, store: Store) -> None:
    """Records each of schedule, gate, labels and roles that is not as it was recorded last.

    They live in files and environments, which the database does not see change; a process that starts does.
    """
    states = {name: getattr(settings, name).model_dump(mode="json") for name in _SECTIONS}

    def note(session: Session) -> None:
        for name, state in states.items():
            audit.note_state(session, actor=current_user(), subject=f"settings {name}", state=state)

    store.run(note)


class ExclusiveLock:
    """Many batches at once, or one suspect alone; a waiting suspect lets no new batch in."""

    def __init__(self) -> None:
        # Guards the three below. Invariant: `_alone` is true only while `_inside` is 0.
        self._changed = threading.Condition()
        self._inside = 0
        self._alone = False
        self._waiting = 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Runs beside other batches."""
        with self._changed:
            # A stream of ordinary batches would otherwise never leave a moment for the one that must be alone.
            self._changed.wait_for(lambda: not self._alone and not self._waiting)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Runs with nothing beside it."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._alone and not self._inside)
                self._alone = True
            finally:
                self._waiting -= 1
                if not self._alone:
                    # Interrupted: those who let it go first wait for nothing any more.
                    self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


log = get_logger(__name__)
_NO_RELEASE_WAIT_S = 10.0


class Node:
    """A worker process's parts; `start` begins the background work, `close` ends all."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        *,
        owner: str | None = None,
        more: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """Makes the parts; `owner` is the name that claims carry, `more` what each sign of life says besides."""
        self.settings = settings
        self.store = store
        self.owner = owner or owner_name()
        self._more = more
        self.ledger = Recorder(store, settings.worker, self.owner)
        self.gate = ExclusiveLock()
        self.in_flight = InFlight()
        # Set by the handler of SIGTERM, read by the threads that judge.
        self.stopping = False
        self._plugins = load_plugins(settings)
        registry = open_registry(settings, store=store, plugins=self._plugins)
        self.runtimes = Runtimes(registry.champion, lambda release: start_runtime(registry.load(release), settings))
        self.shadow = Shadow(
            registry.challenger,
            lambda release: start_runtime(registry.load(release), settings, lazy=True, streams=1),
            settings,
            store,
            busy=lambda: self.runtimes.encoding,
        )
        self._sources = Sources(settings)
        self._guarded = GuardedSources(self._sources)
        self._pool = PriorityPool(settings.worker.fetch_threads)
        self.judge = Judge(
            sources=self._guarded,
            pool=self._pool,
            limits=settings.limits,
            known=self._known if settings.worker.store_embeddings else None,
            select_head=self._plugins.select_head,
        )
        self._policies = PolicyBook()
        self._watchdog = Watchdog(self.in_flight, lambda: self.runtimes.failure, settings.worker.batch_timeout_s)
        self._background = self._repeaters()

    def _repeaters(self) -> list[Repeater]:
        return [
            Repeater("follow", self.settings.worker.release_poll_s, self.follow),
            # Two of them may fail before a lease lapses.
            Repeater("heartbeat", self.settings.worker.lease_s / 3, self.heartbeat),
            Repeater("watchdog", self._watchdog.interval_s, self._watchdog.look),
        ]

    def start(self) -> None:
        """Loads the champion, then starts the background work."""
        self.store.run(lambda session: workers.saw_plugins(session, self._plugins.installed()))
        note_settings(self.settings, self.store)
        log.info("plugins_in_use", plugins=[str(plugin) for plugin in self._plugins.installed()])
        own = self.store.run(releases.champions_heads, write=False) or ()
        for wrong in unknown_head_settings(self.settings.heads, {*self._plugins.heads(), *own}):
            log.warning("head_settings_unused", error=wrong)
        self.follow()
        for repeater in self._background:
            repeater.start()
        self.shadow.start()

    def moderate(self, job_ids: Sequence[str], *, below: int, alone: bool = False) -> AbstractSet[str]:
        """Claims, judges and records a batch; returns when it is in the ledger or nothing was left to do.

        Returns which jobs it had to do with: those claimed, or all of them while there is no release to judge by.

        Jobs with `below` attempts or more are passed over: since they were looked at, another worker died over them.
        """
        with ExitStack() as stack:
            # Held in this order: the lock of suspects, a use of the release, claims; let go of in reverse, so that no
            # release is unloaded, and no suspect let in, while a batch is being recorded.
            stack.enter_context(self.gate.alone() if alone else self.gate.together())
            runtime = stack.enter_context(self.runtimes.use())
            if runtime is None:
                self.store.run(lambda session: jobs.mark_published(session, job_ids, wait_s=_NO_RELEASE_WAIT_S))
                return frozenset(job_ids)
            # If the process dies before the record, the leases lapse and the sweeper publishes these jobs again.
            claimed = self.ledger.claim(job_ids, below=below, held=self.in_flight.jobs)
            log.debug("jobs_claimed", jobs=[job.id for job in claimed])
            failpoint("after_claim")
            if not claimed:
                return frozenset()
            progress = stack.enter_context(self.in_flight.batch([job.id for job in claimed]))
            # What may have killed a worker is shown to nobody else.
            shadow_batch = None if alone else stack.enter_context(self.shadow.watch(runtime))
            try:
                judged = self.judge.judge(claimed, runtime, self._policies, progress, shadow_batch)
                written = self.ledger.record(judged, runtime.encoder_sha256, progress)
            except Exception:
                # A bug or a database that stayed away; none of the jobs has killed anything.
                self._give_back(claimed)
                raise
            if shadow_batch is not None:
                self.shadow.offer(shadow_batch, written)
        log.info(
            "batch_done", jobs=len(claimed), verdicts=len(judged.verdicts), faults=len(judged.faults), alone=alone
        )
        return {job.id for job in claimed}

    def _give_back(self, claimed: Sequence[Job]) -> None:
        try:
            self.ledger.give_back(claimed)
        except CodeWorkerError as error:
            log.warning("claims_left_to_lapse", jobs=len(claimed), error=str(error))

    def follow(self) -> None:
        """Takes over what changed in the store: policies, pauses, the champion."""
        rows, paused = self.store.run(
            lambda session: (policies.in_force(session), workers.paused_sources(session, lately=True)), write=False
        )
        # Replaced whole, as the two below: a batch under way keeps the book that it began with.
        self._policies = PolicyBook(
            Policy(row.id, row.low, row.high, row.head, row.tenant, row.content_type) for row in rows
        )
        self._guarded.paused = {name: pause.left_s for name, pause in paused.items() if pause.left_s > 0}
        self.ledger.troubled = frozenset(paused)
        before = self.runtimes.release
        self.runtimes.follow()
        if self.runtimes.release != before:
            # Those who wait for the new release need not wait for the next beat as well.
            self.heartbeat()

    def heartbeat(self) -> None:
        """Says that this process lives, and renews the leases of what it works on."""
        # Only what is in flight: a claim of which this process knows nothing, since its answer was lost, must lapse.
        held = self.in_flight.jobs()
        lease_s = self.settings.worker.lease_s
        # Read once: the thread that follows the alias sets it, and takes it back.
        last = self.runtimes.refused
        refused = {} if last is None else {"refused": last}
        heads = sorted(self._plugins.heads())
        said = {**facts(self.settings, workers.JUDGES), "heads": heads, **refused, **self._more()}

        def write(session):  # type: ignore[no-untyped-def]  # SQLAlchemy's session, known to store/ alone
            workers.beat(session, self.owner, version=__version__, release=self.runtimes.release, info=said)
            if held:
                jobs.renew(session, owner=self.owner, lease_s=lease_s, ids=held)

        self.store.run(write)

    def _known(self, encoder_sha256: str, hashes: Sequence[str]) -> Mapping[str, bytes]:
        try:
            return self.store.look(lambda session: embeddings.known(session, encoder_sha256, hashes))
        except StoreUnavailableError as error:
            log.warning("embeddings_not_looked_up", error=str(error))
            return {}

    def close(self) -> None:
        """Ends the background work and frees the device."""
        for repeater in self._background:
            # First what runs by itself: nothing loads a release, or
            # renews a lease, while the parts below are taken away.
            repeater.stop()
        self._watchdog.close()
        self.shadow.close()
        self._pool.close()
        self.runtimes.close()
        self._sources.close()
        # Last: until here it is alive, and `doctor` and `db restore` are to see it.
        self.store.run(lambda session: workers.gone(session, self.owner))
