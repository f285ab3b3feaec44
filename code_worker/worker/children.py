"""The programs of our own that a supervisor keeps running: worker and scheduler."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import closing

from code_worker.errors import CodeWorkerError
from code_worker.logs import get_logger
from code_worker.settings import Settings
from code_worker.worker.supervisor import Child

__all__ = ["beat_child", "worker_child"]

log = get_logger(__name__)


def worker_child(settings: Settings, *, env: Mapping[str, str] | None = None, options: Sequence[str] = ()) -> Child:
    """A moderation worker; when it dies, what it had claimed is free at once, not only when its leases lapse."""
    return Child(
        "worker",
        (sys.executable, "-m", "code_worker.worker.process", *options),
        env=env or {},
        on_death=lambda owner, _: _release_claims(settings, owner),
    )


def beat_child(*, env: Mapping[str, str] | None = None) -> Child:
    """The scheduler."""
    return Child("beat", (sys.executable, "-m", "code_worker.worker.beat"), env=env or {})


def _release_claims(settings: Settings, owner: str) -> None:
    from code_worker.store import jobs  # noqa: PLC0415 - SQLAlchemy, only once something died
    from code_worker.store.engine import open_store  # noqa: PLC0415 - as above

    try:
        with closing(open_store(settings.resolved_database_url, threads=1)) as store:
            released = store.run(lambda session: jobs.release_owner(session, owner))
    except CodeWorkerError as error:
        log.warning("claims_not_released", owner=owner, error=str(error))  # their leases lapse by themselves
    else:
        log.info("claims_released", owner=owner, jobs=released)
