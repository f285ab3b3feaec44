"""One finding of the doctor, and how a probe is kept from harming the examination."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from code_worker.errors import CodeWorkerError
from code_worker.logs import redact

__all__ = ["Check", "Status", "bounded", "hung"]

LIMIT_S: Final = 20.0
_THREAD_PREFIX: Final = "doctor-"


class Status(StrEnum):
    """How bad it is: `warn` works for now, `fail` does not."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """What was found, and for a fault what to do: a command or a setting."""

    name: str
    status: Status
    message: str
    hint: str = ""


def hung() -> bool:
    """Whether a probe that was given up is still running."""
    return any(thread.name.startswith(_THREAD_PREFIX) for thread in threading.enumerate())


def bounded(
    name: str, probe: Callable[[], Iterable[Check]], *, hint: str = "", limit_s: float = LIMIT_S
) -> list[Check]:
    """Findings of one probe; whatever it raises, or its silence, is a finding too."""
    found: list[Check] = []

    def run() -> None:
        try:
            found.extend(probe())
        except CodeWorkerError as error:
            found.append(Check(name, Status.FAIL, redact(str(error)), hint))
        except Exception as error:  # noqa: BLE001 - whatever is broken must become a line and not end the examination
            found.append(Check(name, Status.FAIL, redact(f"{type(error).__name__}: {error}"), hint))

    # On a thread: some calls into drivers and resolvers know no time limit.
    thread = threading.Thread(target=run, name=f"{_THREAD_PREFIX}{name}", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        return [*found, Check(name, Status.FAIL, f"no answer in {limit_s:g} s", hint)]
    return found
