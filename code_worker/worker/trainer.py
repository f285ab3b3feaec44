"""The trainer's child process: `python -m code_worker.worker.trainer`; loads no model code until something is due."""

from __future__ import annotations

import sys
from contextlib import closing

from code_worker.logs import get_logger
from code_worker.queues import TRAIN_QUEUE
from code_worker.settings import Settings
from code_worker.store import migrate
from code_worker.worker.app import create_app
from code_worker.worker.noted import note_settings
from code_worker.worker.process import consume, run_to_end

__all__ = ["main"]

log = get_logger(__name__)


def main() -> int:
    """Runs until SIGTERM, one run at a time; exit status as the worker's process."""
    return run_to_end(_run)


def _run(settings: Settings) -> int:
    with closing(migrate.open_current(settings.resolved_database_url, threads=1)) as store:
        note_settings(settings, store)
    app = create_app(settings)
    log.info("trainer_starting", retrain=settings.schedule.retrain, refit=settings.schedule.refit)
    return consume(app, [TRAIN_QUEUE], 1, settings, name="trainer")


if __name__ == "__main__":
    sys.exit(main())
