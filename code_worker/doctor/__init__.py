"""Checks each part of an installation; a fault in one is a line and never keeps the others from being looked at."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Final

from code_worker.doctor import fleet, installation, ledger_state, services
from code_worker.doctor.check import Check, Status, bounded
from code_worker.errors import ConfigurationError
from code_worker.settings import Settings, load_settings

Probe = Callable[[Settings], Iterable[Check]]
_DATABASE: Final = "database"
_PROBES: Final[Mapping[str, tuple[Probe, str]]] = {
    "settings": (installation.environment, ""),
    "data directory": (
        installation.data_directory,
        "chown it to the user that runs this, or set CODE_WORKER_DATA_DIR",
    ),
    "broker": (services.broker, "code-worker up, or see CODE_WORKER_BROKER_URL"),
    "s3": (services.object_store, "see the CODE_WORKER_S3__… settings"),
    "files": (installation.image_directories, "see CODE_WORKER_FILES__ROOTS"),
    "plugins": (installation.plugins, "code-worker plugins check NAME"),
    "decoding": (installation.decoding, "see plugins/jpeg"),
    "device": (installation.device, "see CODE_WORKER_DEVICE and CODE_WORKER_PRECISION"),
    _DATABASE: (services.database, "see CODE_WORKER_DATABASE_URL"),
    "release": (ledger_state.release, "code-worker releases rollback, or import it once more"),
    "policies": (ledger_state.stale_policies, ""),
    "workers": (fleet.running_parts, ""),
    "queues": (fleet.queues, ""),
    "jobs": (ledger_state.jobs, ""),
    "sources": (ledger_state.pauses, ""),
}
_OF_LEDGER: Final = frozenset({"release", "policies", "workers", "queues", "jobs", "sources"})
PARTS: Final = ("python", *_PROBES)
"""What can be looked at, in this order."""


def examine(
    parts: Collection[str] = PARTS, *, on_part: Callable[[str], object] = lambda _: None, **overrides: Any
) -> Iterator[Check]:
    """Yields findings about the parts as they come; each part has a limit, see `check.bounded`.

    Args:
        parts: what to look at; the order is that of `PARTS`.
        on_part: called with the name of a part before it is looked at.
        overrides: settings that count before those that are written.
    """
    if "python" in parts:
        on_part("python")
        yield from bounded("python", installation.python)
    try:
        settings = load_settings(**overrides)
    except ConfigurationError as error:
        yield Check("settings", Status.FAIL, str(error), "docs/settings.md lists all settings and their forms")
        return
    reachable = True
    for name in (name for name in _PROBES if name in parts):
        if name in _OF_LEDGER and not reachable:
            yield Check(name, Status.WARN, "not looked at: it takes the database")
            continue
        on_part(name)
        found = _look(name, settings)
        yield from found
        if name == _DATABASE:
            reachable = all(check.status is not Status.FAIL for check in found if check.name == _DATABASE)


def _look(name: str, settings: Settings) -> list[Check]:
    probe, hint = _PROBES[name]
    return bounded(name, lambda: probe(settings), hint=hint)
