"""`code-worker worker`, `trainer` and `beat`: one supervised process each."""

from __future__ import annotations

import re
import sys

import click

from code_worker.broker import check_broker
from code_worker.logs import configure_logging
from code_worker.settings import Settings, load_settings
from code_worker.worker.children import TRAINER_GRACE_S, beat_child, trainer_child, worker_child
from code_worker.worker.supervisor import Child, Supervisor

__all__ = ["beat", "trainer", "worker"]


def _node_name(_: click.Context, __: click.Parameter, name: str | None) -> str | None:
    # An @ would be taken for the host's, a % for one of Celery's own abbreviations.
    if name is not None and not re.fullmatch(r"[\w.-]+", name, re.ASCII):
        raise click.BadParameter("letters, digits, '.', '-' and '_'")
    return name


@click.command()
@click.option("--concurrency", type=click.IntRange(min=1), help="Messages judged at the same time.")
@click.option("--queues", metavar="NAMES", help="Of live,normal,backfill; all of them unless said.")
@click.option("--device", help="auto, cpu, cuda or cuda:N.")
@click.option("--name", callback=_node_name, help='Before @HOST in Celery\'s monitors; "worker" unless said.')
def worker(concurrency: int | None, queues: str | None, device: str | None, name: str | None) -> None:
    """Run a moderation worker, and start it again when it dies.

    Ctrl-C or SIGTERM: it finishes the batches it holds and stops; a second Ctrl-C does not wait. For more than one
    GPU run one worker per device, each with a name of its own where monitors are used. Exit status: 0 stopped in
    order; 2 wrong use or configuration.
    """
    settings = _checked(device)
    options = [
        *(("--concurrency", str(concurrency)) if concurrency else ()),
        *(("--queues", queues) if queues else ()),
        *(("--name", name) if name else ()),
    ]
    env = {"CODE_WORKER_DEVICE": device} if device else {}
    # No batch takes longer than this: the worker's own watchdog sees to that.
    _supervise(worker_child(settings, env=env, options=options), settings.worker.batch_timeout_s)


@click.command()
@click.option("--device", help="auto, cpu, cuda or cuda:N.")
def trainer(device: str | None) -> None:
    """Run what retrains and refits: on their schedules, when asked to, and to finish what a crash interrupted.

    One is enough; of several only one trains at a time. Ctrl-C or SIGTERM: a run writes a checkpoint, and the next
    trainer goes on with it. Exit status as `worker`.
    """
    settings = _checked(device)
    env = {"CODE_WORKER_DEVICE": device} if device else {}
    _supervise(trainer_child(settings, env=env), TRAINER_GRACE_S)


@click.command()
def beat() -> None:
    """Run the scheduler, and start it again when it dies.

    Several may run: a lock in Redis lets one fire at a time. Exit status as `worker`.
    """
    settings = _checked(None)
    _supervise(beat_child(), settings.worker.batch_timeout_s)


def _checked(device: str | None) -> Settings:
    """Settings whose faults show here, in one line, and not in the child's log."""
    settings = load_settings(device=device) if device else load_settings()
    configure_logging(settings.log_level, settings.log_format)
    check_broker(settings)
    return settings


def _supervise(child: Child, grace_s: float) -> None:
    supervisor = Supervisor(grace_s=grace_s)
    supervisor.add(child)
    sys.exit(supervisor.run())
