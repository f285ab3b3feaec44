"""The scheduler's process: `python -m code_worker.stack.beat_process`; it ends when Redis restarts."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from celery import signals
from redbeat.decoder import RedBeatJSONEncoder
from redbeat.schedulers import RedBeatScheduler, get_redis

from code_worker.errors import CodeWorkerError, ConfigurationError
from code_worker.logs import configure_logging, get_logger, log_uncaught, redact
from code_worker.settings import Settings, load_settings
from code_worker.system.processes import die_with_parent
from code_worker.worker.app import create_app
from code_worker.worker.background import Repeater, Reporter, owner_name

if TYPE_CHECKING:
    from code_worker.store.engine import Store

log = get_logger(__name__)


class KeptScheduler(RedBeatScheduler):
    """redbeat's scheduler, which puts back what Redis lost or somebody changed of the entries that settings name.

    redbeat stores them once, at its start. One that then waits for the lock of a dead predecessor, while Redis loses
    its data, would tick for ever without anything to send.
    """

    def tick(self, *args: Any, **kwargs: Any) -> float:
        """One look at what is due, after one whether everything that should be there is."""
        self._put_back()
        wait_s: float = super().tick(*args, **kwargs)
        return wait_s

    def _put_back(self) -> None:
        # At most every five seconds, `beat_max_loop_interval`: a lost schedule fires again after that.
        wanted = self.app.redbeat_conf.schedule
        entries = {name: self._maybe_entry(name, entry) for name, entry in wanted.items()}
        with get_redis(self.app).pipeline() as pipe:
            for entry in entries.values():
                # Two facts of each entry in one round trip: what it is,
                # and that it stands in the set of those that are due.
                pipe.hget(entry.key, "definition")
                pipe.zscore(self.app.redbeat_conf.schedule_key, entry.key)
            answers = pipe.execute()
        stored = dict(zip(entries, zip(answers[::2], answers[1::2], strict=True), strict=True))
        lost = [name for name, (definition, score) in stored.items() if definition is None or score is None]
        changed = [name for name in stored if name not in lost and stored[name][0] != _definition(entries[name])]
        if not lost and not changed:
            return
        # Keeps when each ran last, where that is known: nothing fires twice.
        self.setup_schedule()
        if len(lost) == len(wanted):
            log.error("schedule_empty", put_back=lost)
        else:
            log.warning("schedule_differed", lost=lost, changed=changed)


def _definition(entry: Any) -> str:
    """Returns a schedule entry as redbeat stores it."""
    names = ("name", "task", "args", "kwargs", "options", "schedule", "enabled")
    return json.dumps({name: getattr(entry, name) for name in names}, cls=RedBeatJSONEncoder)


def main() -> int:
    """Runs until SIGTERM; on Redis, redbeat's lock lets only one of several fire."""
    die_with_parent()
    # The first connection looks it up. Celery's handler of SIGTERM raises wherever it interrupts, and out of this
    # lookup that comes as a LookupError: an end in order would look like a death.
    codecs.lookup("idna")
    try:
        settings = load_settings()
        configure_logging(settings.log_level, settings.log_format)
        log_uncaught()
        signals.setup_logging.connect(_keep_logging, weak=False)
        app = create_app(settings)
    except ConfigurationError as error:
        log.error("configuration_error", error=redact(str(error)))
        return 2
    except CodeWorkerError as error:
        log.error("beat_failed", error=redact(str(error)))
        return 1
    stop_reporting = _start_reporting(settings)
    try:
        app.Beat(loglevel=settings.log_level.upper(), quiet=True, redirect_stdouts=False).run()
    except Exception as error:  # noqa: BLE001 - the outermost frame; Celery has logged it with its traceback
        log.critical("beat_died", error=redact(f"{type(error).__name__}: {error}"))
        return 1
    finally:
        stop_reporting()
    return 0


def _start_reporting(settings: Settings) -> Callable[[], None]:
    """Says in the ledger by which settings this beat runs, where it reaches one: for its own work it needs none.

    Returns what says that it ends: until a part that said nothing is heard of no more, `db restore` is refused.
    """
    from code_worker.store import migrate

    # At the first sign of life, on the reporter's thread: a database that is away must not keep beat from starting.
    @cache
    def store() -> Store:
        return migrate.open_current(settings.resolved_database_url, threads=1)

    reporter = Reporter(settings, store, "beat", owner=owner_name(), more=dict)

    def say() -> None:
        if migrate.is_missing(settings.resolved_database_url):
            return
        try:
            reporter.say()
        except CodeWorkerError as error:
            log.debug("not_reported", error=str(error))

    repeater = Repeater("report", reporter.interval_s, say)

    def stop() -> None:
        repeater.stop()
        try:
            reporter.end()
        except CodeWorkerError as error:
            # It is silent from now on, and that says the same a minute later.
            log.warning("end_not_reported", error=str(error))

    repeater.start()
    return stop


def _keep_logging(**_: object) -> None:
    """Logging is configured already."""


if __name__ == "__main__":
    sys.exit(main())
