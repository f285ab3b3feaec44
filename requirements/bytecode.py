"""Imports what the demonstration will, on two cores, so that its processes find bytecode.

pip is told to compile nothing, since most of it is never imported. Without this three processes that start together
would each compile the same modules, after one that did so alone.
"""

from __future__ import annotations

import subprocess
import sys

__all__ = ["GROUPS"]

GROUPS = (
    ("torch", "torch._dynamo", "code_worker.training.process"),
    (
        *("celery.worker.worker", "celery.concurrency.thread", "celery.beat", "kombu.transport.redis", "redbeat"),
        *("alembic.command", "sqlalchemy.dialects.sqlite", "boto3", "moto.server", "PIL.Image", "scipy.stats"),
        *("sklearn.linear_model", "sklearn.neighbors", "sklearn.svm", "matplotlib.figure", "rich.table"),
        *("tensorboard.summary.writer.event_file_writer", "code_worker.cli.demo", "code_worker.client"),
    ),
)
"""Of about equal length; each is one process."""


def main() -> int:
    """Returns 0, or 1 where a module cannot be imported; what is wrong is printed."""
    running = [subprocess.Popen([sys.executable, "-c", f"import {', '.join(group)}"]) for group in GROUPS]
    statuses = [process.wait() for process in running]
    return 1 if any(statuses) else 0


if __name__ == "__main__":
    sys.exit(main())
