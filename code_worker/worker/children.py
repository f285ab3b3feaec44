"""The programs of our own that a supervisor keeps running: worker, trainer and scheduler."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Final, TypeVar

from code_worker.errors import CodeWorkerError
from code_worker.logs import get_logger
from code_worker.machine import library_threads
from code_worker.settings import Settings
from code_worker.worker.supervisor import Child

if TYPE_CHECKING:
    from code_worker.store.engine import Session

__all__ = ["TRAINER_GRACE_S", "beat_child", "trainer_child", "worker_child"]

T = TypeVar("T")
log = get_logger(__name__)
TRAINER_GRACE_S: Final = 90.0
"""A training process writes a checkpoint before it ends; this is longer than it is given for that."""


def worker_child(settings: Settings, *, env: Mapping[str, str] | None = None, options: Sequence[str] = ()) -> Child:
    """A moderation worker; when it dies, what it had claimed is free at once, not only when its leases lapse."""
    return Child(
        "worker",
        (sys.executable, "-m", "code_worker.worker.process", *options),
        env={**library_threads(), **(env or {})},
        on_death=lambda owner, _: _release_claims(settings, owner),
    )


def trainer_child(settings: Settings, *, env: Mapping[str, str] | None = None) -> Child:
    """A trainer; when it dies, the run that it held goes on in its next life at once."""
    return Child(
        "trainer",
        (sys.executable, "-m", "code_worker.worker.trainer"),
        env={**library_threads(), **(env or {})},
        on_death=lambda owner, _: _release_run(settings, owner),
    )


def beat_child(*, env: Mapping[str, str] | None = None) -> Child:
    """The scheduler."""
    return Child("beat", (sys.executable, "-m", "code_worker.worker.beat"), env=env or {})


def _release_claims(settings: Settings, owner: str) -> None:
    from code_worker.store import jobs

    released = _in_store(settings, owner, lambda session: jobs.release_owner(session, owner))
    if released is not None:
        log.info("claims_released", owner=owner, jobs=released)


def _release_run(settings: Settings, owner: str) -> None:
    from code_worker.store import runs

    if _in_store(settings, owner, lambda session: runs.release_owner(session, owner)):
        log.info("run_released", owner=owner)


def _in_store(settings: Settings, owner: str, work: Callable[[Session], T]) -> T | None:
    from code_worker.store.engine import open_store

    try:
        with closing(open_store(settings.resolved_database_url, threads=1, create=False)) as store:
            return store.run(work)
    except CodeWorkerError as error:
        log.warning("claims_not_released", owner=owner, error=str(error))  # their leases lapse by themselves
        return None
