"""A pool of processes: each child loads an encoder, which is said at the start and measured once it has judged."""

from __future__ import annotations

import os
import resource
import sys
from functools import partial
from typing import Any, Final

from celery import signals

from code_worker.logs import get_logger
from code_worker.machine import usable_memory
from code_worker.queues import MODERATE

__all__ = ["warn_of_prefork"]

log = get_logger(__name__)
_MB: Final = 1e6


def warn_of_prefork(children: int, max_memory_kb: int | None) -> None:
    """Warns of as many encoders as children; the first message that one of them judged shows what each of them takes.

    Call it in the parent, before it forks. `max_memory_kb` is the app's `worker_max_memory_per_child`.
    """
    log.warning(
        "prefork_loads_per_child",
        children=children,
        worker_max_memory_per_child=max_memory_kb,
        hint="each child loads the encoder for itself, again whenever it is replaced; --pool threads loads it once",
    )
    signals.task_postrun.connect(partial(_measure, children, set()), weak=False)


def _measure(children: int, measured: set[int], sender: Any = None, **_: Any) -> None:
    if getattr(sender, "name", None) != MODERATE or os.getpid() in measured:
        return
    measured.add(os.getpid())
    each_mb = _peak_bytes() / _MB
    usable_mb = usable_memory() / _MB
    say = log.warning if each_mb * children > usable_mb else log.info
    say("prefork_child_memory", child_mb=round(each_mb), children=children, usable_mb=round(usable_mb))


def _peak_bytes() -> int:
    """The most that this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
