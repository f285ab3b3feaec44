"""One finding of the doctor, and how a probe is kept from harming the examination."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from shlex import quote
from typing import Final

from code_worker.errors import CodeWorkerError
from code_worker.logs import redact

WAIT_S: Final = 20.0
WORK_S: Final = 60.0
_TICK_S: Final = 0.1
_THREAD_BUSY: Final = 0.005
"""Share of a tick: a thread that polls while it waits takes less, one that loads from a cold disk more."""
_PROCESS_BUSY: Final = 0.1
"""Share of a tick: watching and the spinner in the terminal take less."""
_THREAD_PREFIX: Final = "doctor-"


class Status(StrEnum):
    """Severity of a finding: `warn` works for now, `fail` does not."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding, and for a fault what to do: a command or a setting."""

    name: str
    status: Status
    message: str
    hint: str = ""


def hung() -> bool:
    """Returns whether a probe that was given up is still running."""
    return any(thread.name.startswith(_THREAD_PREFIX) for thread in threading.enumerate())


def bounded(
    name: str,
    probe: Callable[[], Iterable[Check]],
    *,
    hint: str = "",
    wait_s: float = WAIT_S,
    work_s: float = WORK_S,
) -> list[Check]:
    """Findings of one probe; what it raises, or its silence, is a finding too.

    A probe that waits for an answer fails after `wait_s`; one that works has `work_s` of processor time, and is then
    a warning, since a busy machine is not a broken one. Waiting is counted in ticks that this process lived through:
    while the machine stands still, nobody waits.
    """
    found: list[Check] = []
    work = _Work()

    def run() -> None:
        work.begin()
        try:
            # Findings are appended as they come, so that those before the one that hangs are not lost.
            found.extend(probe())
        except CodeWorkerError as error:
            found.append(Check(name, Status.FAIL, redact(str(error)), hint))
        except Exception as error:  # noqa: BLE001 - anything that is broken must become a line and not end the examination
            found.append(Check(name, Status.FAIL, redact(f"{type(error).__name__}: {error}"), hint))

    # On a thread: some calls into drivers and resolvers know no time limit.
    thread = threading.Thread(target=run, name=f"{_THREAD_PREFIX}{name}", daemon=True)
    # A daemon that is never joined for good: a call that hangs in C cannot be ended, and must not keep us here.
    thread.start()
    waited_s = worked_s = 0.0
    while waited_s < wait_s and worked_s < work_s:
        thread.join(_TICK_S)
        if not thread.is_alive():
            return found
        if done_s := work.of_tick():
            worked_s += done_s
        else:
            waited_s += _TICK_S
    if waited_s >= wait_s:
        return [*found, Check(name, Status.FAIL, f"no answer in {wait_s:g} s", hint)]
    again = f"code-worker doctor {quote(name)}, when less is running"
    return [*found, Check(name, Status.WARN, f"slow: not done after {worked_s:.0f} s of work", again)]


class _Work:
    """Processor time that a probe takes, as far as it can be told from that of others."""

    def __init__(self) -> None:
        # A probe given up earlier may still work; then the process's time says nothing of this one.
        self._alone = not hung()
        self._clock: int | None = None
        self._own_s, self._all_s = 0.0, time.process_time()

    def begin(self) -> None:
        """To be called on the probe's thread: from another one its clock cannot be named safely."""
        if hasattr(time, "pthread_getcpuclockid"):  # macOS has none
            self._clock = time.pthread_getcpuclockid(threading.get_ident())

    def of_tick(self) -> float:
        """Seconds of work since it was last asked; 0 when the probe only waited."""
        own_before_s, all_before_s = self._own_s, self._all_s
        self._all_s = time.process_time()
        if self._clock is not None:
            with suppress(OSError):  # the thread has just ended
                self._own_s = time.clock_gettime(self._clock)
        if (own_s := self._own_s - own_before_s) > _THREAD_BUSY * _TICK_S:
            return own_s
        # Libraries compute in threads of their own while the one that called them waits.
        return _TICK_S if self._alone and self._all_s - all_before_s > _PROCESS_BUSY * _TICK_S else 0.0
