"""Small real child programs, and a bounded wait."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from code_worker.worker.supervisor import Child

_PRELUDE = """
import os, signal, sys, time
from code_worker.worker.lifeline import die_with_parent
die_with_parent()
def note(path, text):
    with open(path, "a") as stream:
        stream.write(text + "\\n")
"""


def child(name: str, body: str, **options: object) -> Child:
    """A Python child with `note(path, text)` at hand."""
    return Child(name, (sys.executable, "-c", _PRELUDE + body), **options)  # type: ignore[arg-type]


def until(condition: Callable[[], object], limit_s: float = 20.0) -> None:
    """Returns once the condition holds; fails when it never does."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"still not so after {limit_s} s")
        time.sleep(0.02)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def is_gone(pid: int) -> bool:
    """No such process, or one that only waits to be reaped by whoever adopted it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
