"""Releases as commands open them, to judge or to measure with, closed in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from code_worker.cli.common.database import has_database, missing_database, open_ledger
from code_worker.cli.common.output import say
from code_worker.errors import NoReleaseError

if TYPE_CHECKING:
    from code_worker.data.datasets.examples import Skipped
    from code_worker.images.source import Sources
    from code_worker.moderation.judge import Judge
    from code_worker.moderation.policy import PolicyBook
    from code_worker.moderation.runtime import Runtime
    from code_worker.plugins import Plugins
    from code_worker.releases.loading import LoadedRelease
    from code_worker.settings import Settings
    from code_worker.store.engine import Store
    from code_worker.training.embed import Keep, Known


@dataclass(frozen=True, slots=True)
class Ready:
    """A release in memory, and what it needs to judge."""

    sources: Sources
    judge: Judge
    runtime: Runtime
    policies: PolicyBook


@contextmanager
def start(settings: Settings, release: str | None) -> Iterator[Ready]:
    """Loads the release (a directory, an id, or the champion) and opens what it needs.

    Raises:
        NoReleaseError: none is installed; the text says how to get one.
        ArtifactError: the release must not be used.
    """
    from code_worker.images.source import Sources
    from code_worker.moderation.judge import Judge
    from code_worker.moderation.pool import PriorityPool
    from code_worker.moderation.runtime import start_runtime
    from code_worker.plugins import load_plugins

    plugins = load_plugins(settings)
    loaded, policies = load(settings, release, plugins)
    with closing(Sources(settings)) as sources, PriorityPool(settings.worker.fetch_threads) as pool:
        runtime = start_runtime(loaded, settings)
        with closing(runtime.embedder):
            judge = Judge(sources=sources, pool=pool, limits=settings.limits, select_head=plugins.select_head)
            yield Ready(sources, judge, runtime, policies)


def load(settings: Settings, release: str | None, plugins: Plugins) -> tuple[LoadedRelease, PolicyBook]:
    """The release (a directory, an id, or the champion), and the policies in force; none beside a directory.

    Raises:
        NoReleaseError: see `start`.
        ArtifactError: see `start`.
    """
    from code_worker.moderation.policy import Policy, PolicyBook
    from code_worker.releases.loading import load_release
    from code_worker.releases.registry import open_registry

    if release is not None and Path(release).is_dir():
        loaded = load_release(Path(release), plugins, keys=settings.signing_keys, if_changed=settings.changed_heads)
        return loaded, PolicyBook()
    if not has_database(settings):
        raise _no_release(release, f" ({missing_database(settings)})")
    from code_worker.store import policies

    with open_ledger(settings) as store:
        registry = open_registry(settings, store=store, plugins=plugins)
        if (wanted := release or registry.champion()) is None:
            raise _no_release(None)
        rows = store.run(policies.in_force, write=False)
        book = PolicyBook(Policy(row.id, row.low, row.high, row.head, row.tenant, row.content_type) for row in rows)
        return registry.load(wanted), book


def _no_release(wanted: str | None, why: str = "") -> NoReleaseError:
    what = (
        f"no release is installed{why}"
        if wanted is None
        else f"{wanted} is neither a directory nor an installed release"
    )
    return NoReleaseError(
        f"{what}; get the published one with `code-worker releases import hf:aimagelab/CoDE --promote` "
        "(or a directory instead of the hub's name), or judge with --release DIR"
    )


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
    from code_worker.moderation.runtime import start_runtime
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
    from code_worker.store import embeddings
    from code_worker.store.erasure import personal

    since = store.run(personal.moment, write=False)
    known: Known = lambda hashes: store.run(  # noqa: E731 - a pair of one-liners that share what is above
        lambda session: embeddings.known(session, encoder_sha256, hashes), write=False
    )
    keep: Keep = lambda vectors: store.run(  # noqa: E731 - the other of the pair
        lambda session: embeddings.keep(session, encoder_sha256, vectors, since=since)
    )
    return known, keep if settings.worker.store_embeddings else None


def list_skipped(skipped: Sequence[Skipped]) -> None:
    """Every image that could not be used and how many files were passed over, on stderr."""
    for one in skipped:
        say(str(one), err=True)
    if lost := sum(one.is_loss for one in skipped):
        say(f"{lost} skipped", err=True)
