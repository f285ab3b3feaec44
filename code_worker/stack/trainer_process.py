"""The trainer's child process: `python -m code_worker.stack.trainer_process`; no model code until a run is due."""

from __future__ import annotations

import sys
from contextlib import closing

from code_worker.logs import get_logger
from code_worker.settings import Settings
from code_worker.stack.worker_process import consume, run_to_end
from code_worker.store import migrate
from code_worker.wire import TRAIN_QUEUE
from code_worker.worker.app import create_app
from code_worker.worker.judging.node import note_settings

log = get_logger(__name__)


def main() -> int:
    """Runs until SIGTERM, one run at a time; exit status as the worker's process."""
    return run_to_end(_run)


def _run(settings: Settings) -> int:
    # Closed again: the app opens a store of its own at its first sign of life.
    with closing(migrate.open_current(settings.resolved_database_url, threads=1)) as store:
        note_settings(settings, store)
    app = create_app(settings)
    log.info("trainer_starting", retrain=settings.schedule.retrain, refit=settings.schedule.refit)
    return consume(app, [TRAIN_QUEUE], 1, settings, name="trainer")


if __name__ == "__main__":
    sys.exit(main())
