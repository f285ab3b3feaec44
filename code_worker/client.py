"""The producer's side: enqueue images, look verdicts up, label; no model code, and no boto3 or numpy to enqueue."""

from __future__ import annotations

import os
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from code_worker.errors import (
    BrokerUnavailableError,
    CommitUnknownError,
    ConfigurationError,
    StoreUnavailableError,
    UnknownHeadError,
)
from code_worker.logs import get_logger
from code_worker.settings import Settings, load_settings
from code_worker.store import jobs, migrate, releases, verdicts
from code_worker.system.processes import call_if_alive
from code_worker.wire import chunks, queue_for

if TYPE_CHECKING:
    from datetime import datetime

    from code_worker.data.labelling import Labeller
    from code_worker.publisher import Publisher
    from code_worker.types import Labelled, Verdict

__all__ = [
    "Client",
    "enqueue",
    "enqueue_many",
    "label",
    "verdict",
]


log = get_logger(__name__)
_ROWS_PER_TRANSACTION = 1024
_REST_S = 30.0
_HEADS_FOR_S = 3.0
_INHERITED: list[object] = []


class Client:
    """Connection of one process to the ledger and the broker; safe to share between threads.

    Settings that are not given are those of the app in which `install` put our tasks in this process, if any, else
    those of environment and file.

    Raises:
        ConfigurationError: settings that cannot work.
        StoreError: the database has no tables yet, or those of another version.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings or (Settings.of_app or load_settings)()
        self._store = migrate.open_current(self._settings.resolved_database_url)
        self._publisher: Publisher | None = None
        self._labelling: Labeller | None = None
        self._rest_until = 0.0
        self._heads: tuple[str, ...] = ()
        self._heads_until = 0.0
        forget = weakref.WeakMethod(self._forget)
        os.register_at_fork(after_in_child=lambda: call_if_alive(forget))

    def enqueue(
        self,
        uri: str,
        *,
        head: str | None = None,
        tenant: str | None = None,
        content_type: str | None = None,
        priority: int = 4,
        metadata: Mapping[str, Any] | None = None,
        key: str | None = None,
    ) -> str:
        """Accepts one image to judge and returns the job's id; when this returns, the job is safe in SQL.

        Args:
            uri: `s3://bucket/key[?versionId=…]`, `file://…` or a path that the workers can read.
            head: head to judge with; unset: what plugins, policy and settings say.
            tenant: whose image it is; chooses the policy.
            content_type: kind of content (`avatar`, `listing`…); chooses the policy.
            priority: 0–3 backfill, 4–6 normal, 7–9 live.
            metadata: JSON object that is handed through to the verdict, at most 16 KiB.
            key: idempotency key: the same key (and tenant) twice is one job.

        Raises:
            ValueError: an argument that is out of range.
            UnknownHeadError: the champion has no such head; without a champion any name is taken, and so is that of
                a job that its key finds again.
            IdConflictError: the key was used for a different job.
            StoreUnavailableError: the database could not be reached; nothing was accepted.
            CommitUnknownError: the database did not say whether it accepted the job; its id is in `job_ids`. Enqueue
                it again with the same key, and it is the same job.
        """
        new = jobs.NewJob(uri, head, tenant, content_type, priority, metadata or {}, key)
        if self._with_unknown_heads([new]):
            raise UnknownHeadError(str(head), self._heads)
        ids = self._accept([new])
        self._publish(ids, [new])
        return ids[0]

    def enqueue_many(self, items: Iterable[str | Mapping[str, Any]], **common: Any) -> list[str]:
        """Accepts many images: URIs, or mappings with the arguments of `enqueue`; `common` holds for all.

        Raises:
            ValueError: an item that is out of range, named by its place from 0; those of earlier transactions stay
                accepted.
            CommitUnknownError: as `enqueue`, of one transaction.
        """
        return [job for accepted in self.enqueue_stream(items, **common) for job in accepted]

    def enqueue_stream(self, items: Iterable[str | Mapping[str, Any]], **common: Any) -> Iterator[list[str]]:
        """Like `enqueue_many`, but yields the ids of each transaction, in memory constant in their number.

        Ids come as soon as they are safe in SQL; their messages go out meanwhile, one transaction behind.
        """
        groups = (self._new_jobs(group, common) for group in chunks(enumerate(items), _ROWS_PER_TRANSACTION))
        # SQLite takes one writer at a time: a second thread would only wait for its lock.
        lag = 0 if self._store.dialect == "sqlite" else 1
        # One thread: messages go out in the order of acceptance. The lag bounds what waits for it in memory.
        with ThreadPoolExecutor(1, "code_worker-publish") as behind:
            publishing: deque[Future[None]] = deque()
            for new in groups:
                ids = self._accept(new)
                publishing.append(behind.submit(self._publish, ids, new))
                while len(publishing) > lag:
                    publishing.popleft().result()
                yield ids
            while publishing:
                publishing.popleft().result()

    def verdict(self, job_id: str) -> Verdict | None:
        """The live verdict of a job; None until it is decided, or when there is no such job."""
        return self._store.run(lambda session: verdicts.live(session, job_id), write=False)

    def label(
        self,
        target: str,
        label: str,
        *,
        generator: str | None = None,
        by: str | None = None,
        collection: str | None = None,
        group: str | None = None,
        note: str = "",
        at: datetime | None = None,
    ) -> Labelled:
        """Says that an image is real or generated, and keeps a copy of it; both are safe when this returns.

        This process fetches the image, so it needs the extra `worker` and may read only what the settings allow.

        Args:
            target: URI, path, id of a job, or content hash of an image of which a copy is kept.
            label: `real` or `fake`.
            generator: what made a fake one, if known.
            by: who says so; unset: the user that this process runs as.
            collection: where the image came from: a data set, a channel.
            group: record or post that the image belongs to, such as the id of a post or of the prompt that made it:
                its images are learned from together, or not at all.
            note: free text.
            at: when it was said; unset: now.

        Returns:
            Content hash and URI of the image, and whether this said anything new.

        Raises:
            ValueError: an argument that is out of range.
            DatasetError: no such job, no copy of such a hash, or other bytes than the job judged.
            ImageRejectedError: the image may not be read, is not there, or is no image.
            TransientError: its source failed; try again.
            StoreUnavailableError: the database could not be reached.
            CommitUnknownError: the database did not say whether it wrote the statement; saying it again is safe.
        """
        return self._labeller().label(
            target, label, generator=generator, by=by, collection=collection, group=group, note=note, at=at
        )

    def _new_jobs(
        self, group: Iterable[tuple[int, str | Mapping[str, Any]]], common: Mapping[str, Any]
    ) -> list[jobs.NewJob]:
        new: list[jobs.NewJob] = []
        places: list[int] = []
        for place, item in group:
            try:
                new.append(jobs.NewJob.of({**common, **_as_mapping(item)}))
            except ValueError as error:
                # Not its URI: errors end in logs.
                raise ValueError(f"item {place}: {error}") from None
            places.append(place)
        for wrong in self._with_unknown_heads(new):
            raise ValueError(f"item {places[wrong]}: {UnknownHeadError(str(new[wrong].head), self._heads)}")
        return new

    def _with_unknown_heads(self, new: Sequence[jobs.NewJob]) -> list[int]:
        """Places of jobs whose head the champion lacks, but for those that a key finds again: they are accepted."""
        asked = {job.head for job in new if job.head is not None}
        unknown = asked.difference(self._known_heads(asked) or asked)
        places = [place for place, job in enumerate(new) if job.head in unknown]
        keyed = [new[place].id for place in places if new[place].key is not None]
        if not keyed:
            return places
        before = self._store.run(lambda session: jobs.accepted_before(session, keyed), write=False)
        return [place for place in places if new[place].id not in before]

    def _known_heads(self, asked: set[str]) -> tuple[str, ...]:
        """The champion's, read again every few seconds by those who ask for one; empty where there is no champion."""
        # None is refused by what was read earlier: it may have come with a promotion since.
        if asked and (time.monotonic() >= self._heads_until or (self._heads and not asked <= set(self._heads))):
            known = self._store.run(releases.champions_heads, write=False)
            self._heads = known or ()
            self._heads_until = time.monotonic() + _HEADS_FOR_S
        return self._heads

    def _accept(self, new: list[jobs.NewJob]) -> list[str]:
        try:
            # The jobs have their ids already, so a transaction that runs again accepts the same ones.
            return self._store.run(partial(jobs.accept, jobs=new))
        except CommitUnknownError as error:
            raise _unknown(new) from error

    def _publish(self, ids: Sequence[str], new: Sequence[jobs.NewJob]) -> None:
        # Read and set without a lock: at worst two threads find the broker away, and wait for it each.
        if time.monotonic() < self._rest_until:
            return
        # Only now, after the commit: a worker that took the message sooner would find no row.
        by_queue: dict[str, list[str]] = {}
        for job_id, job in zip(ids, new, strict=True):
            by_queue.setdefault(queue_for(job.priority), []).append(job_id)
        published: list[str] = []
        try:
            for queue, members in by_queue.items():
                for group in chunks(members):
                    self._open_publisher().publish(queue, group)
                    # Noted even where a later group fails: these need not be published again.
                    published += group
        except (BrokerUnavailableError, ConfigurationError) as error:
            # The rows are safe, the sweeper of any worker publishes them; in bulk, waiting each time takes hours.
            self._rest_until = time.monotonic() + _REST_S
            log.warning("publish_postponed", error=str(error), jobs=len(ids) - len(published))
        try:
            self._store.run(lambda session: jobs.mark_published(session, published))
        except StoreUnavailableError as error:
            # Accepted all the same: unmarked, the sweeper publishes once more, and a claim is taken only once.
            log.warning("publish_not_noted", error=str(error), jobs=len(published))

    def _open_publisher(self) -> Publisher:
        if self._publisher is None:
            from code_worker.publisher import Publisher

            self._publisher = Publisher.for_producer(self._settings)
        return self._publisher

    def _labeller(self) -> Labeller:
        if self._labelling is None:
            from code_worker.data.labelling import Labeller

            self._labelling = Labeller(self._settings, self._store)
        return self._labelling

    def _forget(self) -> None:
        """In a forked child: the parent's connections are not ours to use, nor to close."""
        # Kept alive: collected, their sockets would say goodbye to servers that the parent still talks to.
        _INHERITED.extend((self._publisher, self._labelling))
        self._publisher = self._labelling = None
        # A new pool for this process, without a word on the old connections, which are the parent's.
        self._store.engine.dispose(close=False)

    def close(self) -> None:
        """Closes the connections."""
        if self._publisher is not None:
            self._publisher.close()
        if self._labelling is not None:
            self._labelling.close()
        self._store.close()


def _unknown(new: Sequence[jobs.NewJob]) -> CommitUnknownError:
    what = f"job {new[0].id} was" if len(new) == 1 else f"{len(new)} jobs from {new[0].id} on were"
    return CommitUnknownError(
        f"whether {what} accepted is unknown, the database's answer was lost: enqueue again with the same key, which "
        "makes no second job, or ask `code-worker jobs show` for the id",
        tuple(job.id for job in new),
    )


def _as_mapping(item: str | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(item, str):
        return {"uri": item}
    if not isinstance(item, Mapping):
        raise ValueError(f"a job is a URI or a mapping of its fields, not {type(item).__name__}")  # noqa: TRY004 - as all arguments
    return item


@lru_cache(maxsize=1)
def _default() -> Client:
    return Client()


def enqueue(uri: str, **options: Any) -> str:
    """`Client.enqueue` on a `Client()` that is made once per process."""
    return _default().enqueue(uri, **options)


def enqueue_many(items: Iterable[str | Mapping[str, Any]], **common: Any) -> list[str]:
    """`Client.enqueue_many` on the default client."""
    return _default().enqueue_many(items, **common)


def verdict(job_id: str) -> Verdict | None:
    """`Client.verdict` on the default client."""
    return _default().verdict(job_id)


def label(target: str, label: str, **options: Any) -> Labelled:
    """`Client.label` on the default client."""
    return _default().label(target, label, **options)
