"""Groups of images that belong together; a group is put into one part of the labelled images once, and stays there.

Images of one group are those that a caller said belong together (a record, a post), and near-duplicates by perceptual
hash. The part of a new group is an HMAC of its key under a secret that is made once and lies in the database.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, cast

from sqlalchemy import delete, exists, select, update
from sqlalchemy.orm import Session

from code_worker.errors import StoreError
from code_worker.store.learning.kept_images import is_near, near
from code_worker.store.learning.label_rules import (
    SPLITS,
    Split,
    keyed_digest,
    split_of,
)
from code_worker.store.models import ImageGroupRow, KeptImageRow, LabelRow, SecretRow
from code_worker.store.sql import IN_LIST, insert_new, table_of
from code_worker.wire import chunks

_GROUPS = table_of(ImageGroupRow)
_KEPT = table_of(KeptImageRow)
_LABELS = table_of(LabelRow)
_SECRETS = table_of(SecretRow)
_NAME: Final = "split"
_BYTES: Final = 32
_KEY_PURPOSE: Final = b"code_worker group 1\0"
_LEFT_OUT: Final = "none"


@dataclass(frozen=True, slots=True)
class Place:
    """The group of an image, and the part that it is in; None: it is left out of all."""

    group: str
    split: Split | None


@dataclass(frozen=True, slots=True, order=True)
class _Group:
    """Ordered by age."""

    created_at: datetime
    id: str
    split: str = field(compare=False)


def places(session: Session, hashes: Iterable[str]) -> dict[str, Place]:
    """Returns where kept images belong, by content hash; what has no copy, or was not labelled yet, is absent."""
    # An inner join: without a group there is no part, and what has none is learned by nobody.
    found = dict[str, Place]()
    columns = (_KEPT.c.sha256, _KEPT.c.group_id, _GROUPS.c.split)
    statement = select(*columns).join(_GROUPS, _GROUPS.c.id == _KEPT.c.group_id)
    for some in chunks(dict.fromkeys(hashes), IN_LIST):
        for row in session.execute(statement.where(_KEPT.c.sha256.in_(some))):
            split = cast("Split", row.split) if row.split in SPLITS else None
            found[row.sha256] = Place(row.group_id, split)
    return found


def begin_with(session: Session, secret: bytes) -> None:
    """Makes a known value the secret, for what must come out the same everywhere: the demonstration, tests.

    Raises:
        StoreError: there is one already: groups were decided with it.
    """
    insert_new(session, SecretRow, [{"name": _NAME, "value": secret}], same=["name"])
    if _read_secret(session) != secret:
        raise StoreError("the secret that decides the hold-out is made once and cannot be replaced")


def lock(session: Session) -> None:
    """Lets one transaction at a time put images into groups: two near images at one moment must not part.

    Call it before anything else is written, so that no two transactions wait for each other.
    """
    _locked(session)


def place(session: Session, images: Mapping[str, str | None]) -> None:
    """Puts kept images that are in no group yet into one, for good.

    An image joins the oldest of the groups that it belongs to: the one of the name that the caller gave, and those of
    near-duplicates. If these are in different parts, it belongs to none and is left out of all; they stay. If there
    are none, it founds a group. An image that has a group stays there; a new name then stands for that group.

    Args:
        session: the unit of work.
        images: content hash → name of the record or post that it belongs to, if any; in the order to be decided.
    """
    groups = _Groups(session, _locked(session))
    known = {}
    for some in chunks(images, IN_LIST):
        statement = select(_KEPT.c.sha256, _KEPT.c.phash, _KEPT.c.group_id).where(_KEPT.c.sha256.in_(some))
        known.update({row.sha256: row for row in session.execute(statement)})
    for sha256, name in images.items():
        if (row := known.get(sha256)) is not None:
            groups.place(row.sha256, row.phash, name, group_id=row.group_id)


def forget(session: Session, hashes: Collection[str]) -> None:
    """Takes images out of their groups, before their rows go; groups that are empty then go too, and their names.

    Call it before anything else is written: it takes the lock of `lock`.
    """
    if _read_secret(session) is None:
        return
    _locked(session)
    for some in chunks(sorted(hashes), IN_LIST):
        mine = _KEPT.c.sha256.in_(some)
        left = list(session.scalars(select(_KEPT.c.group_id).distinct().where(mine, _KEPT.c.group_id.is_not(None))))
        session.execute(update(_KEPT).where(mine).values(group_id=None))
        used = exists().where(_KEPT.c.group_id == _GROUPS.c.id)
        empty = list(session.scalars(select(_GROUPS.c.id).where(_GROUPS.c.id.in_(left), ~used)))
        session.execute(delete(_GROUPS).where(_GROUPS.c.joins.in_(empty)))
        session.execute(delete(_GROUPS).where(_GROUPS.c.id.in_(empty)))


class _Groups:
    """Groups while one transaction alone changes them."""

    def __init__(self, session: Session, secret: bytes) -> None:
        self._session = session
        self._secret = secret

    def place(self, sha256: str, phash: str | None, name: str | None, *, group_id: str | None) -> None:
        named = None if name is None else self._named(name)
        if group_id is not None:
            home = self._get(group_id)
        else:
            around = [] if phash is None else self._near(phash)
            home = self._home(sha256, phash, name, sorted({*around, named} if named else around))
            self._enter(sha256, home)
        if name is not None and named is None and home is not None:
            self._note_name(name, home)

    def _home(self, sha256: str, phash: str | None, name: str | None, found: list[_Group]) -> _Group:
        if not found:
            return self._found(_of_name(name) if name else _of_pixels(phash) if phash else _of_bytes(sha256))
        if len({group.split for group in found}) == 1:
            return found[0]
        return self._apart(sha256)

    def _named(self, name: str) -> _Group | None:
        known = self._session.execute(
            select(_GROUPS.c.id, _GROUPS.c.joins).where(_GROUPS.c.id == _group_id(self._secret, _of_name(name)))
        ).one_or_none()
        return None if known is None else self._get(known.joins or known.id)

    def _get(self, group_id: str) -> _Group | None:
        columns = (_GROUPS.c.created_at, _GROUPS.c.id, _GROUPS.c.split)
        row = self._session.execute(select(*columns).where(_GROUPS.c.id == group_id)).one_or_none()
        return None if row is None else _Group(*row)

    def _near(self, phash: str) -> list[_Group]:
        """Groups with a near-duplicate; of an image with the same hash its own, which is where all near it belong."""
        if (group := self._equal(phash)) is not None:
            return [group]
        columns = (_KEPT.c.phash, _KEPT.c.group_id)
        statement = select(*columns).distinct().where(near(phash), _KEPT.c.group_id.is_not(None))
        found = {row.group_id for row in self._session.execute(statement) if is_near(row.phash, phash)}
        return [group for one in sorted(found) if (group := self._get(one)) is not None]

    def _equal(self, phash: str) -> _Group | None:
        # One is enough, and there may be thousands: somebody sends one picture over and over.
        same = select(_KEPT.c.group_id).where(_KEPT.c.phash == phash, _KEPT.c.group_id.is_not(None)).limit(1)
        known = self._session.scalar(same)
        return None if known is None else self._get(known)

    def _found(self, key: str, split: str | None = None) -> _Group:
        group_id = _group_id(self._secret, key)
        part = split or split_of(group_id, self._secret)
        self._write(group_id, part, joins=None)
        made = self._get(group_id)
        assert made is not None  # noqa: S101 - it was written just now, or is there
        return made

    def _apart(self, sha256: str) -> _Group:
        return self._found(f"apart:{sha256}", _LEFT_OUT)

    def _note_name(self, name: str, home: _Group) -> None:
        if (group_id := _group_id(self._secret, _of_name(name))) != home.id:
            self._write(group_id, home.split, joins=home.id)

    def _write(self, group_id: str, split: str, *, joins: str | None) -> None:
        row = {"id": group_id, "joins": joins, "split": split}
        insert_new(self._session, ImageGroupRow, [row], same=["id"])

    def _enter(self, sha256: str, home: _Group) -> None:
        self._session.execute(update(_KEPT).where(_KEPT.c.sha256 == sha256).values(group_id=home.id))


def _of_name(name: str) -> str:
    return f"name:{name}"


def _of_pixels(phash: str) -> str:
    return f"pixels:{phash}"


def _of_bytes(sha256: str) -> str:
    return f"bytes:{sha256}"


def _group_id(secret: bytes, key: str) -> str:
    """Keyed, so that the id of a post or record cannot be read back from the table without the secret."""
    return keyed_digest(secret, _KEY_PURPOSE, key).hex()


def _read_secret(session: Session) -> bytes | None:
    value = session.scalar(select(_SECRETS.c.value).where(_SECRETS.c.name == _NAME))
    return None if value is None else bytes(value)


def _locked(session: Session) -> bytes:
    """The secret, its row locked until the transaction ends; made by the first that comes."""
    statement = select(_SECRETS.c.value).where(_SECRETS.c.name == _NAME).with_for_update()
    if (value := session.scalar(statement)) is None:
        insert_new(session, SecretRow, [{"name": _NAME, "value": secrets.token_bytes(_BYTES)}], same=["name"])
        value = session.execute(statement).scalar_one()
    return bytes(value)
