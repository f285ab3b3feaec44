"""Labels in the ledger: statements about images, added and never changed, and what follows from them."""

from __future__ import annotations

import hashlib
import json
from bisect import insort
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import chain, groupby
from operator import attrgetter
from typing import Any, Final

from sqlalchemy import RowMapping, Select, func, select
from sqlalchemy.orm import Session

from code_worker.store.engine import Store
from code_worker.store.erasure import personal
from code_worker.store.ids import uuid7
from code_worker.store.learning.label_rules import (
    REVIEW,
    ResolvedLabel,
    Said,
    latest_of_each,
    resolve_image,
    review_of,
)
from code_worker.store.models import ImportedRow, LabelRow
from code_worker.store.paging import page_after, pages, position
from code_worker.store.sql import IN_LIST, database_time, insert_new, is_plain, table_of
from code_worker.wire import MAX_URI_LENGTH, chunks

_LABELS = table_of(LabelRow)
_ROWS = table_of(ImportedRow)
_MAX_NAME: Final = 200
_LIMITS: Final = {
    **dict.fromkeys(("by", "generator", "collection", "group"), _MAX_NAME),
    "source": 300,
    "note": 2000,
}
RESERVED: Final = frozenset({"all images", "fake", "mean", "new images", "old fakes", "real"})
"""What the gate and the training call other groups of images; a generator of that name would escape both."""
_HEX: Final = frozenset("0123456789abcdef")
_PAGE: Final = 5000
_CLOCKS_DIFFER: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class NewLabel:
    """A statement to add; its id is made here, so that a transaction that runs twice writes one row.

    Attributes:
        sha256: of the image's bytes.
        label: `real` or `fake`.
        by: who says so.
        source: by which way: `api`, `cli`, `file:NAME`.
        generator: what made a fake one, if known.
        collection: where the image came from, if known.
        uri: where the image was.
        job_id: job it was labelled by.
        note: free text.
        at: when it was said; None: now.
        group: record or post that the image belongs to, if any; no part of what is said, see `image_groups`.
        from_file: it was read from a file, which may be read again: said without a time, it is said only once.

    Raises:
        ValueError: a field that cannot be stored, a generator of a real image, a time to come; the text names it.
    """

    sha256: str
    label: str
    by: str
    source: str
    generator: str | None = None
    collection: str | None = None
    uri: str | None = None
    job_id: str | None = None
    note: str = ""
    at: datetime | None = None
    group: str | None = None
    from_file: bool = False
    id: str = field(default_factory=uuid7)

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or not _HEX.issuperset(self.sha256):
            raise ValueError(f"{self.sha256!r} is no content hash: 64 lower-case hexadecimal digits")
        if self.label not in {"real", "fake"}:
            raise ValueError(f"a label is real or fake, not {self.label!r}")
        if self.label == "real" and self.generator is not None:
            raise ValueError(f"a real image has no generator, yet {self.generator!r} is named")
        if self.generator in RESERVED:
            raise ValueError(f"no generator can be called {self.generator!r}: reports name a group of images so")
        for name, limit in _LIMITS.items():
            _check_text(name, getattr(self, name), limit)
        if self.uri is not None:
            _check_text("uri", self.uri, MAX_URI_LENGTH)
        if self.at is not None and self.at.tzinfo is None:
            raise ValueError(f"at: {self.at} has no time zone")
        if self.at is not None and self.at > datetime.now(UTC) + _CLOCKS_DIFFER:
            raise ValueError(f"at: {self.at} is in the future; nothing said later could ever follow it")

    @property
    def content(self) -> tuple[str, str | None, str | None]:
        """Returns what is said."""
        return self.label, self.generator, self.collection


def generator_name(name: str | None) -> str | None:
    """A generator's name among groups of images; one that was labelled before its name was reserved gets another."""
    return f"generator {name}" if name in RESERVED else name


def _check_text(name: str, value: str | None, limit: int) -> None:
    if value is None:
        return
    if not is_plain(value):
        raise ValueError(f"{name} holds a NUL or half a surrogate pair, which cannot be stored")
    if len(value) > limit or (not value and name != "note"):
        raise ValueError(f"{name} must have 1 to {limit} characters, not {len(value)}")


@dataclass(frozen=True, slots=True)
class Statement:
    """A label as it was written; `at` is when it was said, `created_at` when it was written here."""

    id: str
    sha256: str
    label: str
    generator: str | None
    collection: str | None
    by: str
    source: str
    uri: str | None
    job_id: str | None
    note: str
    at: datetime
    created_at: datetime
    group: str | None = None


@dataclass(frozen=True, slots=True)
class LabelFilter:
    """A filter of labels; what is None does not matter. Times are of writing: `since` included, `until` not."""

    label: str | None = None
    generator: str | None = None
    collection: str | None = None
    by: str | None = None
    source: str | None = None
    sha256: str | None = None
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Conflict:
    """An image of which its labellers' latest statements differ, and all that they ever said of it, in order."""

    sha256: str
    statements: tuple[Statement, ...]

    def resolved(self, rule: str, trusted: Sequence[str] = ()) -> ResolvedLabel | None:
        """Returns what a rule makes of it, as `resolve` would; None where it leaves it undecided."""
        names = [name for name in Said.__dataclass_fields__ if name != "id"]
        said = [Said(*(getattr(statement, name) for name in names)) for statement in self.statements]
        return resolve_image(said, rule, trusted)


_COLUMNS: Final = tuple(_LABELS.c[name] for name in Statement.__dataclass_fields__)
_SAID: Final = tuple(_LABELS.c[name] for name in Said.__dataclass_fields__)
_EQUAL: Final = ("label", "generator", "collection", "by", "source", "sha256")


def add(session: Session, labels: Sequence[NewLabel]) -> int:
    """Adds statements that say something new, in the order given, and returns how many rows that made.

    Nothing new is said by who repeats their own latest statement; unless, outside a file, somebody contradicted it
    meanwhile: then it is upheld, by another row. A statement with a time is the same whenever it is read again; one
    from a file without times, whenever it is read from a file of that name. After a commit whose answer was lost
    the retried transaction finds its rows written and counts none. Nothing is said of an image that is being erased,
    nor by a job that is gone.
    """
    # Asked before the first write: it takes the erasure's lock, which comes before those of groups and audit.
    there = personal.left(
        session, jobs=(new.job_id for new in labels if new.job_id), images=(new.sha256 for new in labels)
    )
    labels = [
        new for new in labels if new.sha256 in there.images and (new.job_id is None or new.job_id in there.jobs)
    ]
    known: dict[str, list[Said]] = {}
    for said in _said_of(session, {new.sha256 for new in labels}):
        known.setdefault(said.sha256, []).append(said)
    now = database_time(session)
    rows = []
    for new in labels:
        before = known.setdefault(new.sha256, [])
        if not _says_nothing_new(new, before):
            rows.append(_row(new, before, now))
            insort(before, _as_said(new, now), key=attrgetter("at", "id"))
        elif new.job_id is not None:
            # Said before, perhaps by another tenant's job: erasing that one must not take what this one says.
            personal.note_labelled(session, new.sha256, new.job_id)
    # By the unique key, as all bulk inserts: two importers of one file wait for each other instead of deadlocking.
    rows.sort(key=lambda row: str(row["fingerprint"]))
    return len(insert_new(session, LabelRow, rows, same=["fingerprint"], fresh="id"))


def _said_of(session: Session, hashes: Iterable[str]) -> Iterator[Said]:
    for some in chunks(sorted(hashes), IN_LIST):
        statement = select(*_SAID).where(_LABELS.c.sha256.in_(some)).order_by(_LABELS.c.at, _LABELS.c.id)
        yield from (Said(*row) for row in session.execute(statement))


def _says_nothing_new(new: NewLabel, before: Sequence[Said]) -> bool:
    if any(said.id == new.id for said in before):
        return True
    own = [said for said in before if said.by == new.by]
    if new.at is not None:
        return any((said.content, said.at) == (new.content, new.at) for said in own)
    if not own or own[-1].content != new.content or (own[-1].source == REVIEW) != (new.source == REVIEW):
        return False
    later = before[before.index(own[-1]) + 1 :]
    return new.from_file or all(said.label == new.label for said in later)


def _row(new: NewLabel, before: Sequence[Said], now: datetime) -> dict[str, Any]:
    columns = ("id", "sha256", "label", "generator", "collection", "by", "source", "uri", "job_id", "note", "group")
    return {
        **{name: getattr(new, name) for name in columns},
        "fingerprint": _fingerprint(new, before),
        "at": new.at or now,
        "created_at": now,
    }


def _fingerprint(new: NewLabel, before: Sequence[Said]) -> str:
    """Of the statement; two processes that add the same one at the same moment make the same one."""
    if new.at is not None:
        mark = ["at", new.at.timestamp()]
    elif new.from_file:
        mark = ["source", new.source]
    else:
        mark = ["after", next((said.id for said in reversed(before) if said.by == new.by), "")]
    return hashlib.sha256(json.dumps([new.sha256, new.by, *new.content, *mark]).encode()).hexdigest()


def _as_said(new: NewLabel, now: datetime) -> Said:
    return Said(new.sha256, *new.content, new.by, new.at or now, now, new.source, new.id)


def imported(session: Session, keys: Iterable[str]) -> dict[str, str]:
    """Content hashes of the images of those file rows that were read before, by the row's key."""
    found: dict[str, str] = {}
    for some in chunks(dict.fromkeys(keys), IN_LIST):
        rows = session.execute(select(_ROWS.c.key, _ROWS.c.sha256).where(_ROWS.c.key.in_(some)))
        found.update((row.key, row.sha256) for row in rows)
    return found


def note_imported(session: Session, rows: Mapping[str, str]) -> None:
    """Remembers which image (content hash) a file's row turned out to be, by the row's key; not of erased ones."""
    there = personal.left(session, images=rows.values()).images
    values = [{"key": key, "sha256": rows[key]} for key in sorted(rows) if rows[key] in there]
    insert_new(session, ImportedRow, values, same=["key"])


def list_labels(
    session: Session,
    wanted: LabelFilter | None = None,
    *,
    after: str | None = None,
    limit: int,
    newest_first: bool = True,
) -> list[Statement]:
    """A page in the order of ids, which is that of writing; `after` is the id of the last one of the page before.

    Raises:
        StoreError: `after` is no id.
    """
    statement = select(*_COLUMNS).where(*_conditions(wanted or LabelFilter()))
    last = position(after, "label")
    statement = page_after(statement, [_LABELS.c.id], last, limit=limit, newest_first=newest_first)
    return [_statement(row) for row in session.execute(statement).mappings()]


def stream(store: Store, wanted: LabelFilter | None = None, *, page: int = 1000) -> Iterator[Statement]:
    """Every statement asked for, oldest first, in constant memory; a transaction per page."""

    def read(after: str | None) -> list[Statement]:
        one = partial(list_labels, wanted=wanted, after=after, limit=page, newest_first=False)
        return store.run(one, write=False)

    return chain.from_iterable(pages(read, lambda statement: statement.id, None, size=page))


def _conditions(wanted: LabelFilter) -> Iterator[Any]:
    for name in _EQUAL:
        if (value := getattr(wanted, name)) is not None:
            yield _LABELS.c[name] == value
    if wanted.since is not None:
        yield _LABELS.c.created_at >= wanted.since
    if wanted.until is not None:
        yield _LABELS.c.created_at < wanted.until


def _statement(row: RowMapping) -> Statement:
    return Statement(**row)


def resolve(
    session: Session,
    *,
    rule: str,
    trusted: Sequence[str] = (),
    ignored: Collection[str] = (),
    since: datetime | None = None,
) -> list[ResolvedLabel]:
    """One label for every image that the rule decides, by content hash; the others are absent.

    Of each labeller only the latest statement counts. One scan in order, for any number of labels.

    Args:
        session: the unit of work.
        rule: `latest`, `majority`, `unanimous` or `trusted`, as in the settings.
        trusted: labellers by falling trust, for the rule `trusted`.
        ignored: labellers whose statements do not count.
        since: only images of which something was written here since then; all that was said of them counts.

    Raises:
        ValueError: no such rule.
    """
    # Without the id: making UUIDs of a million of them would take a quarter of the time.
    statement = select(*_SAID[:-1]).order_by(_LABELS.c.sha256, _LABELS.c.id)
    if ignored:
        statement = statement.where(_LABELS.c.by.not_in(sorted(ignored)))
    if since is not None:
        statement = statement.where(
            _LABELS.c.sha256.in_(select(_LABELS.c.sha256).where(_LABELS.c.created_at >= since))
        )
    resolved = (resolve_image(said, rule, trusted) for said in _by_image(session, statement))
    return [label for label in resolved if label is not None]


def _by_image(session: Session, statement: Select[Any]) -> Iterator[list[Said]]:
    with closing(session.execute(statement.execution_options(yield_per=_PAGE))) as rows:
        for _, some in groupby((Said(*row) for row in rows), key=attrgetter("sha256")):
            # They come in the order of ids, which decides where times are equal.
            yield sorted(some, key=attrgetter("at"))


def conflicts(
    session: Session, *, ignored: Collection[str] = (), after: str | None = None, limit: int | None = None
) -> list[Conflict]:
    """Images on which labellers differ now and that no reviewer settled, by content hash.

    Who took a statement back contradicts nobody.

    Args:
        session: the unit of work.
        ignored: labellers whose statements do not count.
        after: content hash of the last one of the page before.
        limit: at most so many.
    """
    who = [_LABELS.c.by.not_in(sorted(ignored))] if ignored else []
    disputed = (
        select(_LABELS.c.sha256)
        .where(*who)
        .group_by(_LABELS.c.sha256)
        # A coarse sieve in SQL, by all that was ever said; who took a statement back is told apart below.
        .having(func.min(_LABELS.c.label) != func.max(_LABELS.c.label), func.count(_LABELS.c.by.distinct()) > 1)
    )
    if after is not None:
        disputed = disputed.where(_LABELS.c.sha256 > after)
    statement = select(*_COLUMNS).where(_LABELS.c.sha256.in_(disputed), *who).order_by(_LABELS.c.sha256, _LABELS.c.id)
    found: list[Conflict] = []
    with closing(session.execute(statement.execution_options(yield_per=_PAGE))) as rows:
        for sha256, some in groupby(map(_statement, rows.mappings()), key=attrgetter("sha256")):
            statements = sorted(some, key=attrgetter("at", "id"))
            if review_of(statements) is None and len({said.label for said in latest_of_each(statements)}) > 1:
                found.append(Conflict(sha256, tuple(statements)))
                if len(found) == limit:
                    break
    return found
