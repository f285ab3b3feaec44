"""A client for the tests of an application: it records, answers what a test says, and needs no server."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import code_worker
from code_worker.errors import DatasetError, IdConflictError, UnknownHeadError
from code_worker.store.ids import keyed_id, uuid7
from code_worker.types import Job, Label, Labelled, Outcome, Provenance, RejectReason, Verdict
from code_worker.wire import checked_item, chunks

if TYPE_CHECKING:
    from code_worker.store.learning.labels import NewLabel
    from code_worker.wire import JobItem

Answer = str | RejectReason
_FUNCTIONS: Final[tuple[str, ...]] = ("enqueue", "enqueue_many", "label", "verdict")
_CLIENT: Final = "code_worker.client"
_PER_CALL: Final = 1024
_SCORES: Final = {Label.REAL: 0.02, Label.UNCERTAIN: 0.5, Label.FAKE: 0.98}


class FakeClient:
    """Takes what `code_worker.client.Client` takes, and refuses what that refuses before it asks a server.

    Attributes:
        jobs: what was enqueued, by id, in order; a key that comes twice is one job.
        labels: what was said of images, in order.
    """

    def __init__(self, verdicts: Mapping[str, Answer] | None = None, *, heads: Collection[str] = ()) -> None:
        """Begins without jobs.

        Args:
            verdicts: by URI, how its jobs are decided as soon as they are enqueued: `real`, `fake`, `uncertain`, or a
                `RejectReason`. All other jobs wait for `decide` or `reject`.
            heads: those of the champion, of which a job may name one; none: any name is taken.

        Raises:
            ValueError: a verdict that is none.
        """
        self.jobs: dict[str, Job] = {}
        self.labels: list[NewLabel] = []
        self._answers = {uri: _checked_answer(uri, answer) for uri, answer in (verdicts or {}).items()}
        self._heads = tuple(sorted(heads))
        self._verdicts: dict[str, Verdict] = {}

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
        """Records a job and returns its id.

        Raises:
            ValueError: an argument that is out of range.
            UnknownHeadError: `head` is none of the heads that the test names.
            IdConflictError: the key was used for a different job.
        """
        fields = {"head": head, "tenant": tenant, "content_type": content_type, "priority": priority, "key": key}
        return self._accept(self._with_known_head(checked_item({"uri": uri, "metadata": metadata or {}, **fields})))

    def enqueue_many(self, items: Iterable[str | Mapping[str, Any]], **common: Any) -> list[str]:
        """Records many jobs, as `Client.enqueue_many`.

        Raises:
            ValueError: an item that is out of range, named by its place from 0.
        """
        return [job for accepted in self.enqueue_stream(items, **common) for job in accepted]

    def enqueue_stream(self, items: Iterable[str | Mapping[str, Any]], **common: Any) -> Iterator[list[str]]:
        """Like `enqueue_many`, but yields the ids of each 1,024 items."""
        for group in chunks(enumerate(items), _PER_CALL):
            checked = [self._checked(place, item, common) for place, item in group]
            yield [self._accept(item) for item in checked]

    def _checked(self, place: int, item: object, common: Mapping[str, Any]) -> JobItem:
        fields = {"uri": item} if isinstance(item, str) else item
        if not isinstance(fields, Mapping):
            raise ValueError(f"a job is a URI or a mapping of its fields, not {type(item).__name__}")  # noqa: TRY004 - as `Client`
        try:
            return self._with_known_head(checked_item({**common, **fields}))
        except (ValueError, UnknownHeadError) as error:
            raise ValueError(f"item {place}: {error}") from None

    def _with_known_head(self, item: JobItem) -> JobItem:
        if item.head is not None and self._heads and item.head not in self._heads:
            raise UnknownHeadError(item.head, self._heads)
        return item

    def _accept(self, item: JobItem) -> str:
        job_id = uuid7() if item.key is None else keyed_id(item.tenant, item.key)
        job = Job(job_id, **item.model_dump())
        # As the ledger does: the same key with other fields is another job.
        if self.jobs.setdefault(job_id, job) != job:
            raise IdConflictError(f"key {item.key!r} was used for a different job: {job_id}")
        answer = self._answers.get(item.uri)
        if answer is not None and job_id not in self._verdicts:
            if isinstance(answer, RejectReason):
                self.reject(job_id, answer)
            else:
                self.decide(job_id, answer)
        return job_id

    def decide(self, job_id: str, label: str, *, score: float | None = None, head: str = "linear") -> Verdict:
        """Gives a job its verdict, or the next one after a second look; `score` fits the label unless given.

        Raises:
            ValueError: no label, or a score that is none.
            KeyError: no such job was enqueued.
        """
        said = _label(label)
        score = _SCORES[said] if score is None else score
        if not 0 <= score <= 1:
            raise ValueError(f"a score is from 0 to 1, not {score}")
        by = Provenance(release="r-fake", head=self.jobs[job_id].head or head)
        return self._give(job_id, outcome=Outcome.JUDGED, label=said, score=score, provenance=by)

    def reject(self, job_id: str, reason: RejectReason | str, detail: str = "") -> Verdict:
        """Gives a job the verdict that its image cannot be judged.

        Raises:
            ValueError: no reason.
            KeyError: no such job was enqueued.
        """
        return self._give(job_id, outcome=Outcome.REJECTED, reason=RejectReason(reason), detail=detail)

    def _give(self, job_id: str, **facts: Any) -> Verdict:
        job, before = self.jobs[job_id], self._verdicts.get(job_id)
        verdict = Verdict(
            job_id=job_id,
            uri=job.uri,
            tenant=job.tenant,
            content_type=job.content_type,
            metadata=job.metadata,
            revision=0 if before is None else before.revision + 1,
            supersedes=None if before is None else before.id,
            id=uuid7(),
            created_at=datetime.now(UTC),
            **facts,
        )
        self._verdicts[job_id] = verdict
        return verdict

    def verdict(self, job_id: str) -> Verdict | None:
        """The verdict that the test gave a job; None before, or when there is no such job."""
        return self._verdicts.get(job_id)

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
        """Records a statement on an image; its content hash is one of the URI, since nothing is fetched.

        This loads SQLAlchemy, for the checks of the statement.

        Raises:
            ValueError: an argument that is out of range.
            DatasetError: no such job.
        """
        from code_worker.store.learning.labels import NewLabel

        uri = self._uri_of(target)
        said = NewLabel(
            sha256=hashlib.sha256(uri.encode()).hexdigest(),
            label=label,
            by="test" if by is None else by,
            source="api",
            generator=generator,
            collection=collection,
            group=group,
            uri=uri,
            note=note,
            at=at,
        )
        new = all((one.sha256, one.by, one.content) != (said.sha256, said.by, said.content) for one in self.labels)
        self.labels.append(said)
        return Labelled(said.sha256, uri, new)

    def _uri_of(self, target: str) -> str:
        if target in self.jobs:
            return self.jobs[target].uri
        try:
            UUID(target)
        except ValueError:
            return target
        raise DatasetError(f"no job {target}")

    def close(self) -> None:
        """Does nothing: there is no connection."""


def _checked_answer(uri: str, answer: Answer) -> Answer:
    if isinstance(answer, RejectReason):
        return answer
    try:
        return _label(answer)
    except ValueError as error:
        raise ValueError(f"the verdict of {uri}: {error}") from None


def _label(said: str) -> Label:
    try:
        return Label(said)
    except ValueError:
        raise ValueError(f"{said!r} is no verdict: one of {', '.join(Label)}, or a RejectReason") from None


@contextmanager
def fake_client(verdicts: Mapping[str, Answer] | None = None, *, heads: Collection[str] = ()) -> Iterator[FakeClient]:
    """Within it `code_worker.enqueue`, `enqueue_many`, `verdict` and `label` of this process go to a `FakeClient`.

    Args:
        verdicts: see `FakeClient`.
        heads: see `FakeClient`.

    Raises:
        ValueError: a verdict that is none.
    """
    client = FakeClient(verdicts, heads=heads)
    package = vars(code_worker)
    before = {name: package[name] for name in _FUNCTIONS if name in package}
    # The last one counts, so that a fixture may be entered within another.
    _active.append(client)
    package.update(_STABLE)
    module = sys.modules.get(_CLIENT)
    default = getattr(module, "_default", None)
    if module is not None:
        # For anyone who imported the functions themselves, before.
        vars(module)["_default"] = lambda: client
    try:
        yield client
    finally:
        _active.remove(client)
        for name in _FUNCTIONS:
            # A name that was resolved meanwhile is the fake's; the
            # package resolves the real one when it is next asked for.
            package.pop(name, None)
        package.update(before)
        if module is not None:
            vars(module)["_default"] = default


def _stable(name: str) -> Callable[..., Any]:
    """A function that a module may keep which was first imported within a test: after it, it is the real one."""

    def call(*args: Any, **options: Any) -> Any:
        return getattr(_active[-1] if _active else import_module(_CLIENT), name)(*args, **options)

    call.__name__ = name
    return call


_active: list[FakeClient] = []
_STABLE: Final = {name: _stable(name) for name in _FUNCTIONS}
