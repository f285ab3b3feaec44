"""Our own app under the name that `celery -A code_worker` looks for; made when it is first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from celery import Celery

    app: Celery

__all__ = ["app"]


def __getattr__(name: str) -> Celery:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from code_worker.worker.app import create_app  # noqa: PLC0415 - Celery, and the settings of this process

    globals()[name] = made = create_app()
    return made
