"""The worker's child process: `python -m code_worker.stack.worker_process`; restarted by a supervisor."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from celery import signals
from celery.utils.nodenames import gethostname, nodename

from code_worker.errors import CodeWorkerError, ConfigurationError, StoreError, StoreUnavailableError
from code_worker.logs import configure_logging, get_logger, log_uncaught, redact
from code_worker.settings import Settings, load_settings
from code_worker.system.processes import die_with_parent
from code_worker.wire import QUEUES, SWEEP_QUEUE
from code_worker.worker.app import create_app, host_of

if TYPE_CHECKING:
    from celery import Celery

    from code_worker.worker.judging.node import Node

log = get_logger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until SIGTERM; returns 0 after an orderly stop, 2 for a configuration that cannot work."""
    parser = argparse.ArgumentParser(prog="code_worker.stack.worker_process")
    parser.add_argument("--queues", default=",".join(name.removeprefix("code_worker.") for name in QUEUES))
    parser.add_argument("--concurrency", type=int)
    parser.add_argument("--name", default="worker")
    arguments = parser.parse_args(argv)
    queues = arguments.queues.split(",")
    return run_to_end(lambda settings: _run(settings, queues, arguments.concurrency, arguments.name))


def run_to_end(work: Callable[[Settings], int]) -> int:
    """Runs a supervised process on the settings of its environment; our own errors become its exit status."""
    # First of all: a supervisor that dies before this line is noticed by it, one that dies after it by the kernel.
    die_with_parent()
    # Until Celery has its own way to stop: what is being loaded is let go of, and nothing stays half written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        settings = load_settings()
        configure_logging(settings.log_level, settings.log_format)
        log_uncaught()
        # Connected, this signal keeps Celery from arranging logging of its own.
        signals.setup_logging.connect(_keep_logging, weak=False)
        return work(settings)
    except ConfigurationError as error:
        log.error("configuration_error", error=redact(str(error)))
        return 2
    except StoreUnavailableError as error:
        log.error("worker_failed", error=redact(str(error)))
        return 1
    except StoreError as error:
        # Tables that are missing do not come by starting again.
        log.error("database_not_ready", error=redact(str(error)))
        return 2
    except CodeWorkerError as error:
        log.error("worker_failed", error=redact(str(error)))
        return 1


def _run(settings: Settings, queues: Sequence[str], concurrency: int | None, name: str) -> int:
    names = [f"code_worker.{name.strip().removeprefix('code_worker.')}" for name in queues]
    if unknown := set(names) - {*QUEUES, SWEEP_QUEUE}:
        raise ConfigurationError(f"unknown queues: {', '.join(sorted(unknown))}; there are {', '.join(QUEUES)}")
    app = create_app(settings)
    host, concurrency = host_of(app), concurrency or settings.worker.concurrency
    host.judge_on(concurrency)
    # In this thread, where SIGTERM breaks into it: a database that hangs is not waited for at the end as well.
    host.store()
    # Before the model is loaded, which may take minutes: `doctor` sees a consumer that is on its way.
    host.start_reporting(names)
    try:
        # The model is loaded before the first message is taken; nothing forks afterwards, so CUDA is safe.
        _await_release(host.node())
    except BaseException:
        # Else `doctor` would take it for one that is about to judge.
        host.close()
        raise
    log.info("worker_starting", queues=names, concurrency=concurrency, connections=host.store().connections)
    return consume(app, [*names, SWEEP_QUEUE], concurrency, settings, name=name)


def consume(app: Celery, queues: Sequence[str], concurrency: int, settings: Settings, *, name: str) -> int:
    """A Celery worker on threads, until it is told to stop; returns its exit status.

    Monitors know it as `name@host`; two of one name on a host are one to them.
    """
    watched = settings.worker.remote_control != "off"
    worker = app.Worker(
        hostname=nodename(name, gethostname()),
        pool="threads",
        concurrency=concurrency,
        queues=list(queues),
        # Workers have nothing to tell each other: all that they share is in the ledger, and each of these is a
        # subscription that a half-open connection would hold up.
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=not watched,
        task_events=watched,
        quiet=True,
        loglevel=settings.log_level.upper(),
    )
    worker.start()
    return int(worker.exitcode or 0)


def _await_release(node: Node) -> None:
    """Takes no message before there is something to judge with: others can, or messages wait.

    A worker without a release would acknowledge them faster than any other can judge.
    """
    while node.runtimes.release is None:
        time.sleep(0.2)


def _keep_logging(**_: object) -> None:
    """Logging is configured already."""


if __name__ == "__main__":
    sys.exit(main())
