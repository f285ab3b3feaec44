"""Everything that a scan judges with, made once and closed in order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from code_worker.cli.ledger import has_database, missing_database, open_ledger
from code_worker.errors import NoReleaseError

if TYPE_CHECKING:
    from code_worker.images.source import Sources
    from code_worker.moderation.judge import Judge
    from code_worker.moderation.policy import PolicyBook
    from code_worker.moderation.runtime import Runtime
    from code_worker.plugins import Plugins
    from code_worker.releases.loading import LoadedRelease
    from code_worker.settings import Settings

__all__ = ["Ready", "load", "start"]


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
    from code_worker.moderation.load import start_runtime
    from code_worker.moderation.pool import PriorityPool
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
