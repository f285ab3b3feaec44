"""Rows of others that name something erased: labels and notes on copies by an address, unreadable messages."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from code_worker.store import erasing, erasures, letters, personal

if TYPE_CHECKING:
    from collections.abc import Callable

    from code_worker.store.engine import Session, Store
    from code_worker.store.erasures import Receipt
    from code_worker.store.scopes import Scope
    from code_worker.store.turns import Turn

__all__ = ["Mentions"]

_SCANNED: Final = 5000
"""Rows of a table that is read through, in one transaction."""
_LETTERS: Final = 4
"""Messages of 64 KiB, each of thousands of words that may be an address, read in one transaction."""


class Mentions:
    """Takes out what names something erased, while the turn is this process's; all of it may be done again."""

    def __init__(self, store: Store, turn: Turn) -> None:
        self._store = store
        self._turn = turn

    def _read(self, work: Callable[[Session], Any]) -> Any:
        return self._store.run(work, write=False)

    def erase_addresses(self, receipt: Receipt) -> int:
        """Takes addresses of erased jobs out of labels and notes on copies; returns how many named one."""
        if not self._read(partial(erasures.targets, erasure_id=receipt.id, kind=erasures.URI, limit=1)):
            return 0
        count = 0
        after: str | None = ""
        while after is not None:
            some, after = self._turn.write(partial(self._labels, receipt=receipt, after=after))
            count += some
        last: str | None = ""
        while last is not None:
            work = partial(erasing.erase_copy_addresses, erasure_id=receipt.id, limit=_SCANNED)
            some, last = self._turn.write(partial(work, after=last))
            count += some
        return count

    @staticmethod
    def _labels(session: Session, *, receipt: Receipt, after: str) -> tuple[int, str | None]:
        page = partial(erasing.erase_addresses, after=after, limit=_SCANNED, actor=receipt.by)
        done, following = page(session, receipt.id)
        erasures.count(session, receipt.id, done.counts)
        return done.counts["addresses"], following

    def is_named(self, kind: str, value: str) -> bool:
        """Whether an unreadable message or, of an image, a snapshot of the labelled ones names it."""
        if kind == erasures.IMAGE and self._read(partial(erasing.snapshots_with, hashes={value})):
            return True
        after: str | None = ""
        while after is not None:
            page = partial(letters.is_named, kind=kind, value=value, after=after, limit=_LETTERS)
            found, after = self._read(page)
            if found:
                return True
        return False

    def erase_letters(self, receipt: Receipt, scope: Scope) -> int:
        """Takes what was erased out of unreadable messages.

        Returns:
            How many named something, of those that were there when the erasure was asked for: messages of a tenant
            that goes on sending them have no end.
        """
        # Whoever is writing one is done after this, and it is read.
        self._turn.write(personal.keep_out)
        count = 0
        after: str | None = ""
        while after is not None:
            page = partial(letters.naming, erasure_id=receipt.id, scope=scope, after=after, limit=_LETTERS)
            found, after = self._read(page)
            if found:
                self._turn.write(partial(self._rewrite, erasure_id=receipt.id, found=found))
            count += sum(scope.until is None or one.at <= scope.until for one in found)
        return count

    @staticmethod
    def _rewrite(session: Session, *, erasure_id: str, found: list[letters.Naming]) -> None:
        erasures.count(session, erasure_id, {"dead_letters": letters.rewrite(session, found)})
