"""The tasks: short, carrying ids; all they know is in the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery.exceptions import Reject

from code_worker.errors import StoreUnavailableError
from code_worker.queues import MODERATE, SWEEP

if TYPE_CHECKING:
    from celery import Celery

    from code_worker.worker.host import Host

__all__ = ["register_tasks"]


def register_tasks(app: Celery, host: Host) -> None:
    """Adds `code_worker.moderate` and `code_worker.sweep` to the app."""
    options = {"acks_late": True, "reject_on_worker_lost": True, "ignore_result": True, "shared": False}

    def moderate(message: Any = None) -> None:
        from code_worker.worker.intake import handle_message  # noqa: PLC0415 - not in producers that list tasks

        try:
            handle_message(host.node(), message)
        except StoreUnavailableError as error:
            # The ledger was away for long: the message may carry jobs that have no row yet, so it goes back.
            raise Reject(str(error), requeue=True) from error

    def sweep() -> None:
        host.sweep()

    app.task(moderate, name=MODERATE, **options)
    app.task(sweep, name=SWEEP, **options)
