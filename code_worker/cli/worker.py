"""`code-worker worker` and `code-worker beat`: one supervised process each."""

from __future__ import annotations

import sys

import click

from code_worker.broker import check_broker
from code_worker.logs import configure_logging
from code_worker.settings import Settings, load_settings
from code_worker.worker.children import beat_child, worker_child
from code_worker.worker.supervisor import Child, Supervisor

__all__ = ["beat", "worker"]


@click.command()
@click.option("--concurrency", type=click.IntRange(min=1), help="Messages judged at the same time.")
@click.option("--queues", metavar="NAMES", help="Of live,normal,backfill; all of them unless said.")
@click.option("--device", help="auto, cpu, cuda or cuda:N.")
def worker(concurrency: int | None, queues: str | None, device: str | None) -> None:
    """Run a moderation worker, and start it again when it dies.

    Ctrl-C or SIGTERM: it finishes the batches it holds and stops; a second Ctrl-C does not wait. For more than one
    GPU run one worker per device. Exit status: 0 stopped in order; 2 wrong use or configuration.
    """
    settings = _checked(device)
    options = [
        *(("--concurrency", str(concurrency)) if concurrency else ()),
        *(("--queues", queues) if queues else ()),
    ]
    env = {"CODE_WORKER_DEVICE": device} if device else {}
    _supervise(worker_child(settings, env=env, options=options), settings)


@click.command()
def beat() -> None:
    """Run the scheduler, and start it again when it dies.

    Several may run: a lock in Redis lets one fire at a time. Exit status as `worker`.
    """
    settings = _checked(None)
    _supervise(beat_child(), settings)


def _checked(device: str | None) -> Settings:
    """Settings whose faults show here, in one line, and not in the child's log."""
    settings = load_settings(**({"device": device} if device else {}))
    configure_logging(settings.log_level, settings.log_format)
    check_broker(settings)
    return settings


def _supervise(child: Child, settings: Settings) -> None:
    # No batch takes longer than this: the worker's own watchdog sees to that.
    supervisor = Supervisor(grace_s=settings.worker.batch_timeout_s)
    supervisor.add(child)
    sys.exit(supervisor.run())
