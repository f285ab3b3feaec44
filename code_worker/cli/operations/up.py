"""`code-worker up`, `worker`, `trainer` and `beat`: the whole stack, or one supervised process each."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import click
from rich.panel import Panel
from rich.text import Text

from code_worker.broker import check_broker
from code_worker.cli.common.output import console
from code_worker.logs import configure_logging
from code_worker.settings import Settings, load_settings
from code_worker.stack.supervisor import Child, Supervisor
from code_worker.stack.up import TRAINER_GRACE_S, Stack, beat_child, trainer_child, worker_child


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


@click.command()
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where everything is kept; CODE_WORKER_DATA_DIR, or ~/.local/share/code_worker.",
)
def up(data_dir: Path | None) -> None:
    """Run broker, worker, trainer and scheduler until Ctrl-C.

    What the settings name is used: a broker or a database of yours is neither started nor migrated here.
    Exit status: 0 stopped in order; 1 a part did not start; 2 wrong use or configuration.
    """
    settings = load_settings(data_dir=data_dir) if data_dir else load_settings()
    configure_logging(settings.log_level, settings.log_format)
    stack = Stack(settings)
    with stack.signals():
        try:
            stack.start()
            console().print(Panel(_welcome(settings, data_dir, stack.champion()), title="code-worker", expand=False))
            stack.wait()
        finally:
            status = stack.stop()
    sys.exit(status)


def _welcome(settings: Settings, data_dir: Path | None, champion: str | None) -> Text:
    prefix = f"CODE_WORKER_DATA_DIR={shlex.quote(str(settings.data_path))} " if data_dir else ""
    rows = [
        ("data", str(settings.data_path)),
        ("broker", "yours" if settings.broker_url else "embedded, in the data directory"),
        ("database", "yours" if settings.database_url else "SQLite, in the data directory"),
        ("reads from", _sources(settings)),
        ("judges with", champion or "no release yet: jobs wait until one is promoted"),
        *([] if champion else [("get one", f"{prefix}code-worker releases import hf:aimagelab/CoDE --promote")]),
        ("enqueue", f"{prefix}code-worker enqueue URI …   (in another terminal)"),
        ("see", f"{prefix}code-worker verdicts list"),
        ("check", f"{prefix}code-worker doctor"),
        ("stop", "Ctrl-C"),
    ]
    width = max(len(name) for name, _ in rows)
    text = Text()
    for name, value in rows:
        text.append(f"{name:<{width}}  ", style="bold")
        text.append(f"{value}\n")
    text.rstrip()
    return text


def _sources(settings: Settings) -> str:
    found = [*(f"s3://{bucket}" for bucket in settings.s3.buckets), *(str(root) for root in settings.files.roots)]
    return ", ".join(found) or "nowhere yet: set CODE_WORKER_FILES__ROOTS='[\"/images\"]' or CODE_WORKER_S3__BUCKETS"
