"""Our own app under the name that `celery -A code_worker` looks for; made when it is first asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from code_worker.errors import ConfigurationError

if TYPE_CHECKING:
    from celery import Celery

    app: Celery


def __getattr__(name: str) -> Celery:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from code_worker.worker.app import create_app

    try:
        # Kept under its name, or each look at the module would make another app.
        globals()[name] = made = create_app()
    except ConfigurationError as error:
        if not _asked_by_celerys_command():
            raise
        # Celery's command makes a traceback of all but this.
        sys.stderr.write(f"Error: {error}\n")
        raise SystemExit(2) from None
    return made


def _asked_by_celerys_command() -> bool:
    program = Path(sys.argv[0])
    return program.stem == "celery" or program.parts[-2:] == ("celery", "__main__.py")
