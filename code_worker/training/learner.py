"""Begins learning runs and finishes them, also those that another process left unfinished."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from code_worker.errors import (
    CodeWorkerError,
    ConfigurationError,
    RunActiveError,
    RunLostError,
    RunStoppedError,
    StoreUnavailableError,
    TrainingError,
)
from code_worker.logs import get_logger
from code_worker.plugins import load_plugins
from code_worker.releases.manifest import Manifest
from code_worker.releases.registry import open_registry
from code_worker.roles import Role, require
from code_worker.store.learning import runs
from code_worker.training import snapshot as snapshots
from code_worker.training.refit import HeadOptions, plan_heads
from code_worker.training.run_context import (
    Listener,
    RunContext,
    RunDirectory,
    RunLease,
    RunOutcome,
    RunServices,
    owner_name,
)
from code_worker.training.stages import Stages

if TYPE_CHECKING:
    from code_worker.plugins import Plugins
    from code_worker.settings import Settings
    from code_worker.store.engine import Session, Store

KINDS: Final = ("retrain", "refit")
_WAIT_FOR_OLD_S: Final = 120.0
log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class DueSlot:
    """A time at which a schedule was due."""

    name: str
    at: datetime


@dataclass(frozen=True, slots=True)
class RunRequest:
    """Options of a run beside its kind.

    Attributes:
        force: run although fewer images are labelled than the minimum numbers want.
        challenge: make the candidate the challenger, without the gate; that needs no new labels either.
        heads: of a refit that challenges, the heads to fit and options of each; the champion's others stay as they
            are. Unset: all.
    """

    force: bool = False
    challenge: bool = False
    heads: HeadOptions | None = None

    def to_config(self) -> dict[str, Any]:
        """Plain values, for the run."""
        heads = None if self.heads is None else {name: dict(options) for name, options in self.heads.items()}
        return {"force": self.force or self.challenge, "challenge": self.challenge, "heads": heads}

    def is_of(self, run: runs.Run) -> bool:
        """Returns whether the run does what is asked for."""
        wanted = self.to_config()
        return (run.config.get("heads"), bool(run.config.get("challenge"))) == (wanted["heads"], self.challenge)


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The plan of a run that would start now.

    Attributes:
        kind: retrain or refit.
        champion: release that it would begin from and be compared with.
        snapshot: counts of the labelled images, see `Snapshot.counts`.
        missing: why it would wait, such as for the minimum numbers; with nothing missing it would run.
        heads: names of the heads that it would fit.
        training: settings of the training, for a retrain.
        running: id of the run that is under way.
    """

    kind: str
    champion: str | None
    snapshot: Mapping[str, Any]
    missing: tuple[str, ...]
    heads: tuple[str, ...]
    training: Mapping[str, Any] | None
    running: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class _SlotTakenError(Exception):
    """Somebody else took the slot; takes the whole transaction back."""


class Learner:
    """Begins runs and finishes them; one per process is enough.

    Args:
        settings: of everything.
        store: a migrated one.
        plugins: loaded from the settings unless given.
        stop: set from elsewhere, it makes a run under way end in order and be left to the next process.
        listen: hears the stages.

    Raises:
        PluginError: a plugin that cannot be loaded.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        *,
        plugins: Plugins | None = None,
        stop: threading.Event | None = None,
        listen: Listener = lambda *_: None,
    ) -> None:
        from code_worker.data.kept_copies import open_kept

        plugins = plugins or load_plugins(settings)
        registry = open_registry(settings, store=store, plugins=plugins)
        self._parts = RunServices(settings, store, registry, plugins, open_kept(settings))
        self._settings = settings
        self._store = store
        self._stop = stop or threading.Event()
        self._listen = listen

    def learn(self, kind: str, *, by: str, slot: DueSlot | None = None, **asked: Any) -> runs.Run | None:
        """Begins a run and finishes it; before it, one that a dead process left behind.

        Args:
            kind: retrain or refit.
            by: who asks for it.
            slot: the time of the schedule that it is for; None is returned when somebody took it already.
            asked: what else is wanted of it, see `RunRequest`.

        Returns:
            The run as it ended. Without a slot, a run of this kind that was left behind is the one asked for.

        Raises:
            NotAllowedError: without a slot, `by` is no operator.
            ConfigurationError: heads or options that nothing here has, or heads of what is no refit or no challenge.
            RunActiveError: another process works on a run.
            RunLostError, RunStoppedError: see `Held.check`; the run goes on elsewhere or later.
            StoreUnavailableError: the database stayed away; the run goes on when it is back.
        """
        if slot is None:
            require(self._settings.roles, by, Role.OPERATOR, f"start a {kind}")
        wanted = RunRequest(**asked)
        self._check_heads(kind, wanted)
        left_behind = self.resume()
        if left_behind is not None and slot is None and left_behind.kind == kind and wanted.is_of(left_behind):
            return left_behind
        begun = self._begin(kind, by=by, asked=wanted, slot=slot)
        return None if begun is None else self._finish(begun)

    def _check_heads(self, kind: str, asked: RunRequest) -> None:
        if asked.heads is not None and kind != "refit":
            raise ConfigurationError("a retrain makes another encoder and fits every head: name heads for a refit")
        if asked.heads is not None and not asked.challenge:
            raise ConfigurationError("the gate compares what judges by default, which stays: ask for a challenge")
        plan_heads(self._parts.plugins, self._champions_manifest(), self._settings.heads, asked.heads)

    def _champions_manifest(self) -> Manifest | None:
        champion = self._parts.registry.champion()
        if champion is None:
            return None
        return Manifest.model_validate(self._parts.registry.show(champion).info.manifest)

    def resume(self) -> runs.Run | None:
        """Finishes the run that a dead process left behind, if there is one.

        Raises:
            RunLostError, RunStoppedError, StoreUnavailableError: see `learn`.
        """
        owner, lapse_s = owner_name(), self._settings.training.lease_s
        taken = self._store.run(lambda session: runs.take_over(session, owner=owner, lapse_s=lapse_s))
        if taken is None:
            return None
        log.warning("run_resumed", run=taken.id, kind=taken.kind, attempt=taken.attempts, stage=taken.stage)
        return self._finish(taken)

    def plan(self, kind: str, **asked: Any) -> RunPlan:
        """Returns what `learn` would do; writes nothing, and encodes none of the images.

        What only their embeddings tell (floods of near copies), and a golden set's images, are not left out yet.
        """
        settings, wanted = self._settings, RunRequest(**asked)
        self._check_heads(kind, wanted)
        taken = self._store.run(lambda session: snapshots.take(session, settings.labels), write=False)
        champion = self._parts.registry.champion()
        heads = plan_heads(self._parts.plugins, self._champions_manifest(), settings.heads, wanted.heads)
        active = self._store.run(runs.running, write=False)
        wait = partial(snapshots.reasons_to_wait, taken=taken, kind=kind, champion=champion, settings=settings)
        return RunPlan(
            kind=kind,
            champion=champion,
            snapshot=taken.counts(),
            missing=() if wanted.to_config()["force"] else tuple(self._store.run(wait, write=False)),
            heads=tuple(heads),
            training=settings.training.model_dump(mode="json") if kind == "retrain" else None,
            running=None if active is None else active.id,
        )

    def _begin(self, kind: str, *, by: str, asked: RunRequest, slot: DueSlot | None) -> runs.Run | None:
        if kind not in KINDS:
            raise ConfigurationError(f"{kind!r} is no kind of run; one of {', '.join(KINDS)}")
        chosen, owner, champion = self._store.new_id(), owner_name(), self._parts.registry.champion()
        config = {"training": self._settings.training.model_dump(mode="json"), **asked.to_config()}

        def begin(session: Session) -> runs.Run | None:
            run = runs.start(session, id=chosen, kind=kind, by=by, owner=owner, config=config, base_release=champion)
            if run is None or slot is None:
                return run
            if not runs.take_slot(session, slot.name, slot.at, run_id=chosen, outcome="started"):
                raise _SlotTakenError
            return run

        try:
            run = self._store.run(begin)
        except _SlotTakenError:
            return None
        if run is None:
            raise self._active()
        log.info("run_started", run=run.id, kind=kind, by=by, champion=champion)
        return run

    def _active(self) -> RunActiveError:
        other = self._store.run(runs.running, write=False)
        which = "" if other is None else f": {other.kind} {other.id}, in stage {other.stage}, by {other.owner}"
        return RunActiveError(f"another run is under way{which}; one at a time")

    def _finish(self, run: runs.Run) -> runs.Run:
        held = RunLease(self._store, run.lease, lease_s=self._settings.training.lease_s, stop=self._stop)
        place = RunDirectory(self._settings.data_path / "runs", run.id)
        with held.beating():
            self._attempt(run, held, place)
        place.tidy()
        ended = self._store.run(lambda session: runs.get(session, run.id), write=False)
        if ended is None:
            raise TrainingError(f"run {run.id} is gone from the database")
        log.info("run_ended", run=ended.id, kind=ended.kind, state=ended.state, reasons=list(ended.reasons))
        return ended

    def _attempt(self, run: runs.Run, held: RunLease, place: RunDirectory) -> None:
        stages = Stages(RunContext(self._parts, run, held, place, self._listen))
        try:
            self._check_attempts(run)
            with place.open(held.check, wait_s=_WAIT_FOR_OLD_S):
                ending = stages.work()
                if ending is not None:
                    self._end(held, ending, stages.report)
        except (RunLostError, StoreUnavailableError):
            # Somebody else has it, or will have it once the database is back.
            raise
        except (RunStoppedError, KeyboardInterrupt, SystemExit):
            self._store.run(lambda session: runs.let_go(session, held.lease))
            raise
        except (CodeWorkerError, OSError) as error:
            self._end(held, RunOutcome("failed", [_said(error)]), stages.report)
        except Exception as error:
            # A bug of ours or a library's: recorded like any other end, so that it is not tried again and again.
            self._end(held, RunOutcome("failed", [f"internal: {_said(error)}"]), stages.report)
            raise

    def _check_attempts(self, run: runs.Run) -> None:
        limit = self._settings.training.max_attempts
        if run.attempts > limit:
            raise TrainingError(f"{limit} processes died over it, the last in stage {run.stage}")

    def _end(self, held: RunLease, ending: RunOutcome, report: Mapping[str, Any]) -> None:
        self._store.run(
            lambda session: runs.finish(
                session, held.lease, ending.state, reasons=list(ending.reasons), report=report
            )
        )


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, CodeWorkerError) else f"{type(error).__name__}: {error}"
