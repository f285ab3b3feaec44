"""Releases as commands that measure open them: no source is judged, embeddings are looked up where there are some."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from code_worker.cli.ledger import has_database, open_ledger
from code_worker.cli.output import say
from code_worker.cli.scan_runtime import load

if TYPE_CHECKING:
    from code_worker.data.examples import Skipped
    from code_worker.moderation.policy import PolicyBook
    from code_worker.moderation.runtime import Runtime
    from code_worker.releases.loading import LoadedRelease
    from code_worker.settings import Settings
    from code_worker.store.engine import Store
    from code_worker.training.embed import Keep, Known

__all__ = ["Measured", "list_skipped", "open_measured"]


@dataclass(frozen=True, slots=True)
class Measured:
    """A release in memory, and what measuring it takes.

    Attributes:
        loaded: what its files say.
        runtime: its encoder and heads.
        policies: those in force; none for a release directory.
        known: vectors of images that the database has; None without one.
        keep: takes new vectors; None where none are kept.
    """

    loaded: LoadedRelease
    runtime: Runtime
    policies: PolicyBook
    known: Known | None
    keep: Keep | None


@contextmanager
def open_measured(settings: Settings, release: str | None) -> Iterator[Measured]:
    """Loads a release (a directory, an id, or the champion); a toy is announced as one, on stderr.

    Raises:
        NoReleaseError: none is installed; the text says how to get one.
        ArtifactError: the release must not be used.
    """
    from code_worker.moderation.load import start_runtime
    from code_worker.plugins import load_plugins

    loaded, policies = load(settings, release, load_plugins(settings))
    if loaded.manifest.toy:
        say(f"{loaded.id} is a toy: its figures say nothing about real images", err=True)
    in_database = has_database(settings) and not (release is not None and Path(release).is_dir())
    with open_ledger(settings) if in_database else nullcontext() as store:
        runtime = start_runtime(loaded, settings, lazy=True)
        with closing(runtime.embedder):
            known, keep = (None, None) if store is None else _cache(store, runtime.encoder_sha256, settings)
            yield Measured(loaded, runtime, policies, known, keep)


def _cache(store: Store, encoder_sha256: str, settings: Settings) -> tuple[Known, Keep | None]:
    from code_worker.store import embeddings, personal

    since = store.run(personal.moment, write=False)
    known: Known = lambda hashes: store.run(  # noqa: E731 - a pair of one-liners that share what is above
        lambda session: embeddings.known(session, encoder_sha256, hashes), write=False
    )
    keep: Keep = lambda vectors: store.run(  # noqa: E731 - as above
        lambda session: embeddings.keep(session, encoder_sha256, vectors, since=since)
    )
    return known, keep if settings.worker.store_embeddings else None


def list_skipped(skipped: Sequence[Skipped]) -> None:
    """Every image that could not be used and how many files were passed over, on stderr."""
    for one in skipped:
        say(str(one), err=True)
    if lost := sum(one.is_loss for one in skipped):
        say(f"{lost} skipped", err=True)
