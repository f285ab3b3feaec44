"""One process's attempt at one run: the parts it works with, the run, the hold on it, and where it works."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from code_worker.data.kept import KeptImages
    from code_worker.plugins import Plugins
    from code_worker.releases.registry import Registry
    from code_worker.settings import Settings
    from code_worker.store.engine import Store
    from code_worker.store.runs import Run
    from code_worker.training.lease import Held
    from code_worker.training.workplace import Workplace

__all__ = ["Attempt", "Listener", "Parts"]

Listener = Callable[[str, Mapping[str, Any]], None]
"""Hears the stage and how far it is: `done` of `total`, or what the training process says of itself."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What every run of a process works with."""

    settings: Settings
    store: Store
    registry: Registry
    plugins: Plugins
    kept: KeptImages


@dataclass(frozen=True, slots=True)
class Attempt:
    """See the module."""

    parts: Parts
    run: Run
    held: Held
    place: Workplace
    listen: Listener

    @property
    def settings(self) -> Settings:
        """Those of this process; what the training itself goes by is kept in the run."""
        return self.parts.settings
