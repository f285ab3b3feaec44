"""The hooks a plugin may implement; each has a section with this very signature in docs/hooks.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from code_worker.heads import HeadSpec
    from code_worker.types import Job

__all__ = [
    "PROJECT",
    "hookimpl",
    "hookspec",
]


PROJECT = "code_worker"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def code_worker_register_heads() -> Iterable[HeadSpec]:  # type: ignore[empty-body]
    """The heads this plugin offers; import nothing heavy here."""


@hookspec(firstresult=True)
def code_worker_select_head(job: Job, heads: Sequence[str]) -> str | None:
    """The head to judge this job with, out of the release's `heads`; None leaves it to the next plugin."""
