"""Judge whether images are real or generated, inside a content-moderation worker system.

Names are resolved on first use, so that a producer imports no model code.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from code_worker._version import __version__

if TYPE_CHECKING:
    from code_worker.client import enqueue, enqueue_many, label, verdict
    from code_worker.heads import Head, HeadSpec
    from code_worker.hookspecs import hookimpl
    from code_worker.types import Job, Label, Outcome, RejectReason, Verdict
    from code_worker.worker.app import create_app, install

__all__ = [
    "Head",
    "HeadSpec",
    "Job",
    "Label",
    "Outcome",
    "RejectReason",
    "Verdict",
    "__version__",
    "create_app",
    "enqueue",
    "enqueue_many",
    "hookimpl",
    "install",
    "label",
    "verdict",
]


_HOMES = {
    "Head": "code_worker.heads",
    "HeadSpec": "code_worker.heads",
    "Job": "code_worker.types",
    "Label": "code_worker.types",
    "Outcome": "code_worker.types",
    "RejectReason": "code_worker.types",
    "Verdict": "code_worker.types",
    "create_app": "code_worker.worker.app",
    "enqueue": "code_worker.client",
    "enqueue_many": "code_worker.client",
    "hookimpl": "code_worker.hookspecs",
    "install": "code_worker.worker.app",
    "label": "code_worker.client",
    "verdict": "code_worker.client",
}


def __getattr__(name: str) -> Any:
    if (home := _HOMES.get(name)) is None:
        raise AttributeError(f"module 'code_worker' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    # Found there from now on, without another call of this function.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
