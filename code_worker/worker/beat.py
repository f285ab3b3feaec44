"""The scheduler's process: `python -m code_worker.worker.beat`; supervised, since it ends when Redis restarts."""

from __future__ import annotations

import sys

from celery import signals

from code_worker.broker import is_redis
from code_worker.errors import CodeWorkerError, ConfigurationError
from code_worker.logs import configure_logging, get_logger, redact
from code_worker.settings import load_settings
from code_worker.worker.app import create_app
from code_worker.worker.lifeline import die_with_parent

__all__ = ["main"]

log = get_logger(__name__)


def main() -> int:
    """Runs until SIGTERM; on Redis, redbeat's lock lets only one of several fire."""
    die_with_parent()
    try:
        settings = load_settings()
        configure_logging(settings.log_level, settings.log_format)
        signals.setup_logging.connect(_keep_logging, weak=False)
        app = create_app(settings)
    except ConfigurationError as error:
        log.error("configuration_error", error=redact(str(error)))  # noqa: TRY400 - a traceback would not help
        return 2
    except CodeWorkerError as error:
        log.error("beat_failed", error=redact(str(error)))  # noqa: TRY400 - as above
        return 1
    if is_redis(settings.resolved_broker_url):
        app.conf.beat_scheduler = "redbeat.RedBeatScheduler"
    else:
        app.conf.beat_schedule_filename = str(settings.data_path / "run" / "beat-schedule")
    app.Beat(loglevel=settings.log_level.upper(), quiet=True, redirect_stdouts=False).run()
    return 0


def _keep_logging(**_: object) -> None:
    """Logging is configured already."""


if __name__ == "__main__":
    sys.exit(main())
