"""What a running part says of itself in the ledger: what it takes, by which settings it runs, what fails in it."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from pydantic import BaseModel

from code_worker._version import __version__
from code_worker.worker.background import failing_parts
from code_worker.worker.supervisor import OWNER_ENV

if TYPE_CHECKING:
    from code_worker.settings import Settings
    from code_worker.store.engine import Store

__all__ = ["Reporter", "differing", "facts", "owner_name", "silence_s"]

_COMPARED: Final = ("gate", "head", "labels", "limits", "retention", "roles", "schedule", "shadow", "training")
_SILENT_LEASES: Final = 3.0


def owner_name() -> str:
    """A name for this process's life: its supervisor's, which frees its claims when it dies, or one of its own."""
    return os.environ.get(OWNER_ENV) or f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"


def silence_s(settings: Settings) -> float:
    """After so long without a word a part counts as gone."""
    return _SILENT_LEASES * settings.worker.lease_s


def facts(settings: Settings, role: str) -> dict[str, Any]:
    """What every part says: its role, digests of the settings that all parts should share, schedules, what fails."""
    return {
        "role": role,
        "settings": {name: _digest(settings, name) for name in _COMPARED},
        "schedule": settings.schedule.model_dump(mode="json", include={"retrain", "refit", "calibrate"}),
        "failing": dict(failing_parts()),
    }


def differing(settings: Settings, said: Mapping[str, Any], *, version: str = __version__) -> list[str]:
    """Sections of the settings in which a part of that version, which said `said`, runs with others than these.

    None where the version is another: its settings and defaults are others too.
    """
    if version != __version__:
        return []
    theirs: Mapping[str, str] = said.get("settings") or {}
    return [name for name in _COMPARED if name in theirs and theirs[name] != _digest(settings, name)]


def _digest(settings: Settings, name: str) -> str:
    """Of the values, which name people: a digest is enough to see that they differ.

    What nobody set and follows from the machine is left out: parts in containers of several sizes share the settings.
    """
    section = getattr(settings, name)
    value = section.model_dump(mode="json", exclude=_derived(section)) if isinstance(section, BaseModel) else section
    return hashlib.sha256(json.dumps({name: value}, sort_keys=True).encode()).hexdigest()[:12]


def _derived(section: BaseModel) -> set[str]:
    fields = type(section).model_fields.items()
    return {name for name, field in fields if field.default_factory is not None} - section.model_fields_set


class Reporter:
    """Signs of life of a process that judges nothing; one that does gives them with its leases."""

    def __init__(
        self,
        settings: Settings,
        store: Callable[[], Store],
        role: str,
        *,
        owner: str,
        more: Callable[[], Mapping[str, Any]],
    ) -> None:
        """Says nothing yet.

        Args:
            settings: those that the process runs by.
            store: where to say it.
            role: what the process does.
            owner: its name.
            more: what it has to say besides.
        """
        self.interval_s = settings.worker.lease_s / 3
        self._settings = settings
        self._store = store
        self._role = role
        self._owner = owner
        self._more = more
        self._heard = False

    def say(self) -> None:
        """One sign of life."""
        from code_worker.store import workers

        said = {**facts(self._settings, self._role), **self._more()}
        self._store().run(lambda session: workers.beat(session, self._owner, version=__version__, info=said))
        self._heard = True

    def end(self) -> None:
        """The process ends in order; nothing is to be taken back where nothing was said."""
        if not self._heard:
            return
        from code_worker.store import workers

        self._store().run(lambda session: workers.gone(session, self._owner))
