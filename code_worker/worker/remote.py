"""Celery's remote control of our own app's workers, as far as the settings allow it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from celery import bootsteps
from celery.worker.control import Panel

if TYPE_CHECKING:
    from celery import Celery

    from code_worker.settings import Settings

__all__ = ["limit_remote_control"]

# Without `hello`, with which workers greet each other: it takes a list of revoked tasks from whoever sends it, and
# what is revoked is acknowledged and never run.
_LOOKING: Final = frozenset(
    {
        *("active", "active_queues", "clock", "ping", "query_task", "registered"),
        *("reserved", "revoked", "scheduled", "stats"),
        # Monitors have workers send events with these two, and ask for a sign of life with the third.
        *("enable_events", "disable_events", "heartbeat"),
    }
)
_NEVER: Final = frozenset({"conf"})
"""It would show the broker's password: Celery hides that of `broker_url`, and not of `redbeat_redis_url`."""


class _LookingOnly(bootsteps.Step):  # type: ignore[misc]  # Celery ships no types
    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        for name in Panel.data.keys() - _LOOKING:
            del Panel.data[name]


class _WithoutPasswords(bootsteps.Step):  # type: ignore[misc]  # Celery ships no types
    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        for name in Panel.data.keys() & _NEVER:
            del Panel.data[name]


def limit_remote_control(app: Celery, settings: Settings) -> None:
    """Has workers of the app forget commands of remote control that the settings do not allow."""
    if settings.worker.remote_control != "off":
        app.steps["worker"].add(_LookingOnly if settings.worker.remote_control == "inspect" else _WithoutPasswords)
