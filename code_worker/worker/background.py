"""Threads that do one small thing again and again, and what a running part says of itself in the ledger."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from pydantic import BaseModel

from code_worker._version import __version__
from code_worker.errors import CodeWorkerError
from code_worker.logs import get_logger
from code_worker.system.machine import jittered
from code_worker.system.processes import OWNER_ENV

if TYPE_CHECKING:
    from code_worker.settings import Settings
    from code_worker.store.engine import Store

log = get_logger(__name__)
_ALARM_AFTER_S: Final = 60.0
# Each key is written by the thread of that part alone, in one atomic step; readers copy. So there is no lock.
_failing: dict[str, dict[str, Any]] = {}
# None of these threads runs in a child.
os.register_at_fork(after_in_child=_failing.clear)


def failing_parts() -> Mapping[str, Mapping[str, Any]]:
    """Background parts of this process whose last turn failed: name, and how often in a row, for how long, with what.

    Errors are named by their class: their texts may name an image, and an erasure does not reach the rows in which
    this is noted.
    """
    return {name: dict(facts) for name, facts in list(_failing.items())}


class Repeater:
    """Calls `work` every `interval_s` (± a tenth, so that workers do not march in step).

    A turn that fails is followed by the next one. Our own errors, such as a database that is away, are warnings for a
    minute and an alarm (a critical event) from then on; any other error is a bug and an alarm at once. What goes on
    failing is said at the first, second, fourth, eighth … turn.
    """

    def __init__(self, name: str, interval_s: float, work: Callable[[], object]) -> None:
        self._name = name
        self._interval_s = interval_s
        self._work = work
        self._failures = 0
        self._failed_at = 0.0
        self._alarmed = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Starts the thread; the first call comes at once."""
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Asks the thread to end and waits for it."""
        self._stop.set()
        if self._thread.is_alive():
            # With a limit: a turn may hang in a server that does not
            # answer, and a daemon thread keeps no process from ending.
            self._thread.join(timeout_s)
        _failing.pop(self._name, None)

    def _run(self) -> None:
        while True:
            try:
                self._work()
            except Exception as error:  # noqa: BLE001 - the thread must outlive a bug: without it leases lapse and nothing is swept
                self._failed(error)
            else:
                self._succeeded()
            if self._stop.wait(jittered(self._interval_s, 0.1)):
                return

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        if self._failures == 1:
            self._failed_at = time.monotonic()
        lasted_s = round(time.monotonic() - self._failed_at, 1)
        facts = {"failures": self._failures, "seconds": lasted_s, "error": type(error).__name__}
        _failing[self._name] = facts
        bug = not isinstance(error, CodeWorkerError)
        alarm = bug or lasted_s >= _ALARM_AFTER_S
        # The second is true of powers of two.
        if (alarm and not self._alarmed) or self._failures & (self._failures - 1) == 0:
            self._say(error, facts, alarm=alarm, bug=bug)
        self._alarmed = self._alarmed or alarm

    def _say(self, error: Exception, facts: Mapping[str, object], *, alarm: bool, bug: bool) -> None:
        said = {**facts, "part": self._name, "error": str(error), **({"exc_info": error} if bug else {})}
        if alarm:
            log.critical("background_part_broken", **said)
        else:
            log.warning("background_part_failed", **said)

    def _succeeded(self) -> None:
        if self._failures:
            lasted_s = round(time.monotonic() - self._failed_at, 1)
            log.info("background_part_works_again", part=self._name, failures=self._failures, seconds=lasted_s)
            _failing.pop(self._name, None)
            self._failures, self._alarmed = 0, False


_COMPARED: Final = ("gate", "head", "labels", "limits", "retention", "roles", "schedule", "shadow", "training")
_SILENT_LEASES: Final = 3.0


def owner_name() -> str:
    """A name for this process's life: its supervisor's, which frees its claims when it dies, or one of its own."""
    return os.environ.get(OWNER_ENV) or f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"


def silence_s(settings: Settings) -> float:
    """After so long without a word a part counts as gone."""
    return _SILENT_LEASES * settings.worker.lease_s


def facts(settings: Settings, role: str) -> dict[str, Any]:
    """Returns what every part says.

    Its role, digests of the settings that all parts should share, schedules, what fails.
    """
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
        # Nine of them pass before a part counts as gone.
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
