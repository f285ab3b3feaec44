"""`code-worker up`: the whole stack on this machine."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click
from rich.panel import Panel
from rich.text import Text

from code_worker.cli.output import console
from code_worker.logs import configure_logging
from code_worker.settings import Settings, load_settings
from code_worker.worker.stack import Stack

__all__ = ["up"]


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
