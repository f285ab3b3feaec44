"""Releases that may judge, and the aliases (`champion` …) that say which one does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import RowMapping, Select, delete, insert, select, update
from sqlalchemy.orm import Session

from code_worker.errors import StoreError
from code_worker.store import audit
from code_worker.store.models import AliasMoveRow, AliasRow, ReleaseRow, db_now
from code_worker.store.sql import insert_into, insert_new, table_of

CHAMPION: Final = "champion"
CHALLENGER: Final = "challenger"
READY: Final = "ready"
"""Status of a release that may judge; any other says why it may not."""
_ACTIONS: Final = {CHAMPION: "release.promote", CHALLENGER: "release.challenge"}
_RELEASES = table_of(ReleaseRow)
_ALIASES = table_of(AliasRow)
_MOVES = table_of(AliasMoveRow)


@dataclass(frozen=True, slots=True)
class ReleaseInfo:
    """A registered release; `location` is under the artifact root."""

    id: str
    manifest_sha256: str
    location: str
    manifest: Mapping[str, Any]
    created_at: datetime
    source: str
    status: str


@dataclass(frozen=True, slots=True)
class Registered:
    """A release as the store knows it, with the aliases that point to it now."""

    info: ReleaseInfo
    aliases: tuple[str, ...]

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of its heads."""
        return tuple(sorted(self.info.manifest.get("heads", ())))

    def summary(self) -> dict[str, Any]:
        """Returns what a list shows."""
        manifest, info = self.info.manifest, self.info
        return {
            "id": info.id,
            "aliases": list(self.aliases),
            "created_at": info.created_at,
            "source": info.source,
            "heads": list(self.heads),
            "default_head": manifest.get("default_head"),
            "status": info.status,
            "toy": manifest.get("toy", False),
            "notes": manifest.get("notes", ""),
            "manifest_sha256": info.manifest_sha256,
            "location": info.location,
        }


@dataclass(frozen=True, slots=True)
class AliasMove:
    """One move of an alias; `undoes` is the number of the move that a rollback took back."""

    id: int
    alias: str
    release_id: str
    previous_id: str | None
    undoes: int | None
    at: datetime
    by: str
    reason: str


_MOVE_COLUMNS = tuple(_MOVES.c[name] for name in AliasMove.__dataclass_fields__)


def champions_heads(session: Session) -> tuple[str, ...] | None:
    """Names of the heads of the champion, sorted; None while there is no champion."""
    statement = (
        select(_RELEASES.c.manifest)
        .join(_ALIASES, _ALIASES.c.release_id == _RELEASES.c.id)
        .where(_ALIASES.c.name == CHAMPION)
    )
    manifest = session.scalar(statement)
    return None if manifest is None else tuple(sorted(manifest.get("heads", ())))


def add(
    session: Session,
    *,
    id: str,
    manifest_sha256: str,
    location: str,
    manifest: Mapping[str, Any],
    source: str,
    by: str,
    status: str = READY,
) -> bool:
    """Registers a release; returns False when it was registered before, which changes nothing.

    Raises:
        StoreError: the id is taken by a release with another manifest.
    """
    known = get(session, id)
    row = {
        "id": id,
        "manifest_sha256": manifest_sha256,
        "location": location,
        "manifest": dict(manifest),
        "source": source,
        "status": status,
    }
    insert_new(session, ReleaseRow, [row], same=["id"])
    # Read again: between the look and the insert somebody else may have registered the same id.
    written = get(session, id)
    if written is None or written.manifest_sha256 != manifest_sha256:
        raise StoreError(f"release {id} is registered with another manifest")
    if known is None:
        details = {"manifest_sha256": manifest_sha256, "source": audit.blank(source), "heads": _heads(manifest)}
        audit.record(session, actor=by, action="release.add", subject=id, details=details)
    return known is None


def note_signed(session: Session, release_id: str, *, by: str) -> None:
    """Records that somebody vouched for a release by a signature."""
    audit.record(session, actor=by, action="release.sign", subject=release_id)


def _heads(manifest: Mapping[str, Any]) -> dict[str, str | None]:
    return {name: entry.get("sha256") for name, entry in manifest.get("heads", {}).items()}


def get(session: Session, release_id: str) -> ReleaseInfo | None:
    """One release, or None."""
    row = session.execute(select(_RELEASES).where(_RELEASES.c.id == release_id)).mappings().one_or_none()
    return None if row is None else _info(row)


def registered(session: Session) -> set[str]:
    """Ids of all releases, also of those whose files were deleted."""
    return set(session.scalars(select(_RELEASES.c.id)))


def list_releases(session: Session, *, limit: int | None = None) -> list[ReleaseInfo]:
    """Releases, newest first."""
    newest = select(_RELEASES).order_by(_RELEASES.c.created_at.desc(), _RELEASES.c.id).limit(limit)
    return [_info(row) for row in session.execute(newest).mappings()]


def _info(row: RowMapping) -> ReleaseInfo:
    return ReleaseInfo(**row)


def retire(session: Session, release_id: str, status: str) -> bool:
    """Lets a release never be promoted again and says why; False while an alias points to it.

    What points an alias to it locks the same row first, so that no alias does when this has been committed.
    """
    session.execute(_lock_of(release_id))
    if session.scalar(select(_ALIASES.c.name).where(_ALIASES.c.release_id == release_id).limit(1)) is not None:
        return False
    session.execute(update(_RELEASES).where(_RELEASES.c.id == release_id).values(status=status))
    return True


def status_of(session: Session, release_id: str) -> str | None:
    """Status of a release, which stays until the transaction ends; None if it is not registered."""
    return session.scalar(_lock_of(release_id))


def _lock_of(release_id: str) -> Select[str]:
    """Status of a release, whose row stays as it is until commit; rows that refer to it can still be written."""
    return select(_RELEASES.c.status).where(_RELEASES.c.id == release_id).with_for_update(key_share=True)


def alias(session: Session, name: str, *, lock: bool = False) -> str | None:
    """Id of the release that the alias points to, or None; locked, it stays there until the transaction ends."""
    statement = select(_ALIASES.c.release_id).where(_ALIASES.c.name == name)
    return session.scalar(statement.with_for_update() if lock else statement)


def aliases(session: Session) -> dict[str, str]:
    """Release ids by alias."""
    return {row.name: row.release_id for row in session.execute(select(_ALIASES.c.name, _ALIASES.c.release_id))}


def move_alias(session: Session, name: str, release_id: str, *, by: str, reason: str) -> str | None:
    """Points an alias to a release and returns where it pointed before; moving it nowhere new is no move.

    A challenger that becomes the champion is no challenger any more.

    Raises:
        StoreError: no such release, or it was retired.
    """
    if get(session, release_id) is None:
        raise StoreError(f"no release {release_id}: see `code-worker releases list`")
    previous = _locked(session, name, release_id, by)
    if previous != release_id:
        _move(session, name, release_id, previous_id=previous, undoes=None, by=by, reason=reason)
    return previous


def challenge(session: Session, release_id: str, *, by: str, reason: str) -> str | None:
    """Makes a release the challenger and returns the one before.

    Raises:
        StoreError: no such release, it was retired, or it is the champion.
    """
    # Locked, so that it is not promoted at the same moment.
    # First the champion's row, then the challenger's: `_move` takes them in the same order at a promotion.
    champion = select(_ALIASES.c.release_id).where(_ALIASES.c.name == CHAMPION).with_for_update()
    if session.scalar(champion) == release_id:
        raise StoreError(f"{release_id} is the champion: it cannot be its own challenger")
    return move_alias(session, CHALLENGER, release_id, by=by, reason=reason)


def drop_alias(session: Session, name: str, *, by: str, reason: str = "") -> str | None:
    """Makes an alias point nowhere; returns where it pointed. Its moves stay in the history."""
    before = session.scalar(delete(_ALIASES).where(_ALIASES.c.name == name).returning(_ALIASES.c.release_id))
    if before is not None:
        details = {"alias": name, "reason": audit.blank(reason)}
        audit.record(session, actor=by, action="release.withdraw", subject=before, details=details)
    return before


def rollback(session: Session, name: str, *, by: str, reason: str, move: int | None = None) -> str:
    """Takes back the last move that still stands and returns the release that the alias points to now.

    A rollback is no move to be taken back in turn: rolling back twice goes two moves back, never to and fro.

    Args:
        session: the unit of work.
        name: the alias.
        by: who does it.
        reason: why.
        move: the move that is meant; it is taken back once, however often this is repeated after a lost answer.

    Raises:
        StoreError: no move is left to take back, its release was the first, the one before was retired, or it is not
            the one that is meant.
    """
    if move is not None:
        own = (_MOVES.c.undoes == move, _MOVES.c.by == by, _MOVES.c.reason == reason)
        if (done := session.scalar(select(_MOVES.c.release_id).where(*own))) is not None:
            return str(done)
    # Locked before the history is read: two rollbacks at once would take back the same move.
    now = session.scalar(select(_ALIASES.c.release_id).where(_ALIASES.c.name == name).with_for_update())
    last, before = last_move(session, name)
    if move not in {None, last}:
        raise StoreError(f"the {name} was moved by somebody else just now: look at it and try again")
    _move(session, name, before, previous_id=now, undoes=last, by=by, reason=reason)
    return before


def last_move(session: Session, name: str) -> tuple[int, str]:
    """Number of the last move of an alias that still stands, and the release that it pointed to before.

    Raises:
        StoreError: it pointed nowhere before.
    """
    # Without `IS NOT NULL` the list would hold NULLs, and NOT IN a list with a NULL is true of nothing.
    undone = select(_MOVES.c.undoes).where(_MOVES.c.alias == name, _MOVES.c.undoes.is_not(None))
    last = session.execute(
        select(_MOVES.c.id, _MOVES.c.previous_id)
        .where(_MOVES.c.alias == name, _MOVES.c.undoes.is_(None), _MOVES.c.id.not_in(undone))
        .order_by(_MOVES.c.id.desc())
        .limit(1)
    ).one_or_none()
    if last is None or last.previous_id is None:
        raise StoreError(f"no {name} before this one: nothing to roll back to")
    return last.id, last.previous_id


def moves(session: Session, name: str, *, limit: int | None = None) -> list[AliasMove]:
    """History of an alias, newest first."""
    newest = select(*_MOVE_COLUMNS).where(_MOVES.c.alias == name).order_by(_MOVES.c.id.desc()).limit(limit)
    return [AliasMove(**row) for row in session.execute(newest).mappings()]


def _locked(session: Session, name: str, release_id: str, by: str) -> str | None:
    """Returns where the alias points, its row locked until commit.

    A new alias is made, pointing to the release already.
    """
    made = insert_into(session, AliasRow).on_conflict_do_nothing(index_elements=["name"]).returning(_ALIASES.c.name)
    if session.scalar(made.values(name=name, release_id=release_id, updated_by=by)) is not None:
        return None
    return session.scalar(select(_ALIASES.c.release_id).where(_ALIASES.c.name == name).with_for_update())


def _move(
    session: Session, name: str, release_id: str, *, previous_id: str | None, undoes: int | None, by: str, reason: str
) -> None:
    # The alias is locked already, and the release after it, in this order everywhere. Its status is read anew: it may
    # have been retired since somebody made sure that it loads, and its files with it.
    if (status := session.scalar(_lock_of(release_id))) != READY:
        raise StoreError(f"{name} cannot be {release_id}: {status}")
    session.execute(
        update(_ALIASES)
        .where(_ALIASES.c.name == name)
        .values(release_id=release_id, updated_at=db_now(), updated_by=by)
    )
    session.execute(
        insert(_MOVES).values(
            alias=name, release_id=release_id, previous_id=previous_id, undoes=undoes, by=by, reason=reason
        )
    )
    if name == CHAMPION:
        session.execute(delete(_ALIASES).where(_ALIASES.c.name == CHALLENGER, _ALIASES.c.release_id == release_id))
    action = "release.rollback" if undoes is not None else _ACTIONS.get(name, "release.alias")
    details = {"alias": name, "before": previous_id, "reason": audit.blank(reason)}
    audit.record(session, actor=by, action=action, subject=release_id, details=details)
