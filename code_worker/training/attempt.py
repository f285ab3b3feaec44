"""One process's attempt at one run: the parts it works with, the run, the hold on it, and where it works."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from code_worker.errors import RunLostError
from code_worker.store import runs

if TYPE_CHECKING:
    from code_worker.data.kept import KeptImages
    from code_worker.plugins import Plugins
    from code_worker.releases.registry import Registry
    from code_worker.settings import Settings
    from code_worker.store.engine import Session, Store
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
    run: runs.Run
    held: Held
    place: Workplace
    listen: Listener

    @property
    def settings(self) -> Settings:
        """Those of this process; what the training itself goes by is kept in the run."""
        return self.parts.settings

    def add_candidate(self) -> str:
        """Adds the candidate to the releases and notes it in the run, both or neither; returns its id.

        So an erasure that ends the run finds the release, or it is never registered.

        Raises:
            RunLostError: the run is not this process's any more; what it stored of a run that has ended is deleted.
            ArtifactError: see `Registry.add`.
        """
        stored: set[str] = set()

        def note(session: Session, release: str) -> None:
            stored.add(release)
            runs.note(session, self.held.lease, candidate=release)

        try:
            some = self.run.config.get("heads") is not None
            return self.parts.registry.add(
                self.place.candidate, by=self.run.by, along=note, heads_of=self.run.base_release if some else None
            )
        except RunLostError:
            # Of a run that goes on, the process that has it now may be storing the same files.
            now = self.parts.store.run(lambda session: runs.get(session, self.run.id), write=False)
            if now is None or now.state != "running":
                for release in stored:
                    self.parts.registry.discard(release)
            raise
