"""Opens all that judging history again needs, and writes what comes of it into the ledger."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from code_worker.data.kept_copies import KeptImages, open_kept
from code_worker.errors import NoReleaseError, UnknownHeadError
from code_worker.images.source import Sources
from code_worker.logs import get_logger
from code_worker.moderation.policy import Policy, PolicyBook
from code_worker.moderation.pool import PriorityPool
from code_worker.moderation.rescore import Rejudged, Rescorer, RescoreTally
from code_worker.moderation.rescore import rescore as judge_again
from code_worker.moderation.runtime import start_runtime
from code_worker.plugins import load_plugins
from code_worker.releases.registry import open_registry
from code_worker.roles import Role, current_user, require
from code_worker.store import audit, embeddings, policies, verdicts
from code_worker.store.learning import kept_images

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from code_worker.moderation.runtime import Runtime
    from code_worker.plugins import Plugins
    from code_worker.settings import Settings
    from code_worker.store.engine import Store
    from code_worker.types import Job, Verdict

log = get_logger(__name__)
_ACTION: Final = "verdict.rescore"
PAGE: Final = 500
"""Jobs looked at, and verdicts written, in one transaction."""


def rescore(
    settings: Settings,
    store: Store,
    wanted: verdicts.RescoreFilter,
    *,
    release: str | None = None,
    head: str | None = None,
    limit: int | None = None,
    dry_run: bool = False,
    by: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[str, RescoreTally]:
    """Judges history again with a release (the champion, if none is named); returns its id and what came of it.

    Verdicts that this release, head and policy gave already stay as they are, so that it may be begun again at any
    time. New ones have the next revision and name the old ones, which stay. `dry_run` writes nothing.

    Raises:
        NotAllowedError: `by` (unset: the user of this process) is no operator, and it is no dry run.
        NoReleaseError, ArtifactError, PluginError: the release cannot judge.
        UnknownHeadError: it has no such head.
        SourceCredentialsError: a source refuses everything; what was judged before is written.
        StoreError: the ledger does not answer; what was judged before is written.
    """
    by = current_user() if by is None else by
    if not dry_run:
        require(settings.roles, by, Role.OPERATOR, "judge history again")
    plugins = load_plugins(settings)
    registry = open_registry(settings, store=store, plugins=plugins)
    if (release := release or registry.champion()) is None:
        raise NoReleaseError("no champion to judge with; name a release (code-worker releases list)")
    loaded = registry.load_to_judge(release)
    if head is not None and head not in loaded.heads:
        raise UnknownHeadError(head, tuple(sorted(loaded.heads)))
    runtime = start_runtime(loaded, settings, lazy=True)
    keep = settings.worker.store_embeddings
    if not dry_run:
        _record(store, by, release, {"since": wanted.since.isoformat(), "tenant": wanted.tenant, "head": head})

    def write(rejudged: Rejudged) -> Collection[str]:
        return _written(rejudged) if dry_run else _write(store, rejudged, runtime.encoder_sha256, keep=keep)

    with (
        closing(runtime.embedder),
        closing(Sources(settings)) as sources,
        PriorityPool(settings.worker.fetch_threads) as pool,
    ):
        rescorer = _rescorer(settings, store, runtime, plugins, sources=sources, pool=pool, head=head)
        tally = judge_again(_pages(store, wanted), rescorer, write, limit=limit, progress=progress)
    log.info("history_rescored", release=release, dry_run=dry_run, **tally.to_dict())
    return release, tally


def _record(store: Store, by: str, release: str, details: dict[str, str | None]) -> None:
    """Before the first new verdict: what follows is many transactions."""
    told: list[audit.Entry] = []

    def record(session: Session) -> None:
        before = audit.last(session, action=_ACTION) if told else None
        # Done again after a commit whose answer was lost, it finds its entry there.
        if before is None or before.hash != told[-1].hash:
            told.append(audit.record(session, actor=by, action=_ACTION, subject=release, details=details))

    store.run(record)


def _rescorer(
    settings: Settings,
    store: Store,
    runtime: Runtime,
    plugins: Plugins,
    *,
    sources: Sources,
    pool: PriorityPool,
    head: str | None,
) -> Rescorer:
    rows = store.run(policies.in_force, write=False)
    return Rescorer(
        runtime,
        PolicyBook(Policy(row.id, row.low, row.high, row.head, row.tenant, row.content_type) for row in rows),
        sources=sources,
        pool=pool,
        limits=settings.limits,
        known=lambda encoder, hashes: store.run(
            lambda session: embeddings.known(session, encoder, hashes), write=False
        ),
        copies=_Copies(store, open_kept(settings)),
        select_head=plugins.select_head,
        head=head,
    )


class _Copies:
    """The dataset storage, and the ledger's list of what is in it."""

    def __init__(self, store: Store, kept: KeptImages) -> None:
        self._store = store
        self._kept = kept

    def among(self, hashes: Sequence[str]) -> Collection[str]:
        """See `Copies`."""
        if not hashes:
            return ()
        return self._store.run(lambda session: kept_images.kept(session, hashes), write=False).keys()

    def read(self, sha256: str) -> bytes:
        """See `Copies`."""
        return self._kept.read(sha256)


def _pages(store: Store, wanted: verdicts.RescoreFilter) -> Iterator[list[tuple[Job, Verdict]]]:
    # A transaction per page: judging a page takes minutes, and none may stay open for so long.
    last: verdicts.Position | None = None
    while True:
        found = store.run(
            lambda session, after=last: verdicts.page(session, wanted, after=after, limit=PAGE),  # type: ignore[misc]
            write=False,
        )
        if found.judged:
            yield found.judged
        if (last := found.last) is None:
            return


def _written(rejudged: Rejudged) -> set[str]:
    return {new.job_id for _, new in rejudged.pairs}


def _write(store: Store, rejudged: Rejudged, encoder_sha256: str, *, keep: bool) -> Collection[str]:
    # Ids before the transaction, so that its second run, after a lost answer, finds the rows of the first.
    new = [replace(verdict, id=store.new_id()) for _, verdict in rejudged.pairs]

    def write(session: Session) -> Collection[str]:
        written = verdicts.replace_live(session, new)
        if keep:
            # Only beside a verdict that names the image: by the job an erasure finds the embedding.
            named = {one.sha256: [one.job_id] for one in new if one.sha256 and one.job_id in written}
            vectors = {sha256: vector for sha256, vector in rejudged.embeddings.items() if sha256 in named}
            embeddings.keep(session, encoder_sha256, vectors, jobs=named)
        return written

    return store.run(write) if new or rejudged.embeddings else ()
