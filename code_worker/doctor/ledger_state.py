"""Checks of the ledger: release, policies, unfinished jobs, paused sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Final, TypeVar

from code_worker.doctor.check import Check, Status
from code_worker.errors import ArtifactError, CodeWorkerError, PluginError
from code_worker.releases.artifacts import LocalArtifacts, open_artifacts
from code_worker.releases.loading import load_heads
from code_worker.releases.manifest import read_manifest
from code_worker.releases.registry import open_registry
from code_worker.settings import Settings
from code_worker.store import policies, releases, workers
from code_worker.store.engine import open_store
from code_worker.store.jobs import queries
from code_worker.store.releases import CHAMPION

if TYPE_CHECKING:
    from code_worker.releases.loading import LoadedHeads
    from code_worker.releases.manifest import Manifest
    from code_worker.store.engine import Session

T = TypeVar("T")
_OLD_S: Final = 600.0
_LETTERS: Final = 100
_PLUGINS_HINT: Final = "code-worker plugins list here, and plugins seen for what workers have"


def _ask(settings: Settings, work: Callable[[Session], T]) -> T:
    with closing(open_store(settings.resolved_database_url, threads=1, create=False)) as store:
        return store.run(work, write=False)


def release(settings: Settings) -> Iterator[Check]:
    """A champion is set, kept whole, loads here, its heads score as they did, and it has the default head."""
    champion = _ask(settings, lambda session: releases.alias(session, CHAMPION))
    if champion is None:
        yield Check(
            "release",
            Status.WARN,
            "none judges yet: jobs wait",
            "code-worker releases import hf:aimagelab/CoDE --promote",
        )
        return
    artifacts = open_artifacts(settings)
    # A cached copy would load, and the next worker could not.
    if not isinstance(artifacts, LocalArtifacts) and not artifacts.exists(champion):
        text = f"champion {champion} is missing, or not whole, in {settings.resolved_artifacts}"
        yield Check("release", Status.FAIL, text, "code-worker releases import, once more")
        return
    manifest, loaded = _heads(settings, champion)
    if isinstance(loaded, CodeWorkerError):
        yield Check("release", Status.FAIL, f"champion {champion} cannot judge here: {loaded}", _PLUGINS_HINT)
        return
    for warning in loaded.warnings:
        yield Check("release", Status.WARN, f"champion {champion}: {warning}", _PLUGINS_HINT)
    if not loaded.warnings:
        text = (
            f"champion {champion} is whole: {len(manifest.files)} files; heads: {', '.join(sorted(manifest.heads))}"
        )
        yield Check("release", Status.OK, text)
    if settings.head is not None and settings.head not in manifest.heads:
        yield Check(
            "release",
            Status.FAIL,
            f"champion {champion} lacks the default head {settings.head!r}",
            f"CODE_WORKER_HEAD={next(iter(sorted(manifest.heads)))}, or promote a release that has it",
        )


def _heads(settings: Settings, champion: str) -> tuple[Manifest, LoadedHeads | CodeWorkerError]:
    """Manifest of the champion, and its heads as a worker here would have them, or why it would refuse them.

    Raises:
        CodeWorkerError: its files are not those that were registered, or a plugin is broken.
    """
    from code_worker.plugins import load_plugins  # imports strangers' code

    plugins = load_plugins(settings)
    with closing(open_store(settings.resolved_database_url, threads=1, create=False)) as store:
        directory = open_registry(settings, store=store, plugins=plugins).directory(champion)
    manifest, _ = read_manifest(directory)
    try:
        return manifest, load_heads(directory, manifest, champion, plugins, if_changed=settings.changed_heads)
    except (ArtifactError, PluginError) as error:
        return manifest, error


def stale_policies(settings: Settings) -> Iterator[Check]:
    """The thresholds in force were drawn by the scores of the champion."""

    def read(session: Session) -> tuple[str | None, int, list[policies.PolicyRow]]:
        champion = releases.alias(session, CHAMPION)
        return champion, len(policies.in_force(session)), policies.stale(session, champion)

    champion, number, stale = _ask(settings, read)
    for row in stale:
        yield Check(
            "policies",
            Status.WARN,
            f"{row.scope}: calibrated on {row.release_id}, the champion is {champion}",
            "code-worker calibrate --after-promote, or CODE_WORKER_SCHEDULE__CALIBRATE=true for every time",
        )
    if not stale:
        yield Check("policies", Status.OK, f"{number} in force, none calibrated on another release than the champion")


def jobs(settings: Settings) -> Iterator[Check]:
    """Nothing waits for long, and no message was unreadable."""
    age_s, states, letters = _ask(
        settings,
        lambda session: (
            queries.oldest_unfinished_s(session),
            queries.counts(session, finished=False),
            workers.list_dead_letters(session, limit=_LETTERS),
        ),
    )
    waiting = ", ".join(f"{number} {state.value}" for state, number in states.items() if number)
    if age_s is None:
        yield Check("jobs", Status.OK, "none unfinished")
    else:
        status = Status.WARN if age_s > _OLD_S else Status.OK
        yield Check(
            "jobs", status, f"{waiting}; the oldest for {age_s:.0f} s", "code-worker jobs list --state accepted"
        )
    if letters:
        number = f"{len(letters)}{' or more' if len(letters) == _LETTERS else ''}"
        text = f"{number} broker messages could not be read; the last on {letters[0].at:%Y-%m-%d}: {letters[0].error}"
        yield Check("jobs", Status.WARN, text, 'mend the producer: a message is {"v": 1, "items": [{"uri": …}]}')


def pauses(settings: Settings) -> Iterator[Check]:
    """Sources that are left alone because they refuse all that is asked."""
    paused = _ask(settings, workers.paused_sources)
    for name, pause in paused.items():
        text = f"{name} is paused since {pause.since:%Y-%m-%d %H:%M} UTC: {pause.detail}"
        hint = "mend what it says, see `code-worker doctor s3`; it is tried again by itself"
        yield Check("sources", Status.WARN, text, hint)
    if not paused:
        yield Check("sources", Status.OK, "none is paused")
