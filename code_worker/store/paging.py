"""Lists in pages, each read after the last row of the page before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select, literal, tuple_

from code_worker.errors import StoreError
from code_worker.store.ids import as_uuid

_Row = TypeVar("_Row")
_Key = TypeVar("_Key")
_Found = TypeVar("_Found")


def page_after(
    statement: Select[Any],
    by: Sequence[ColumnElement[Any]],
    last: Sequence[Any] | None,
    *,
    limit: int,
    newest_first: bool,
) -> Select[Any]:
    """Orders a statement by columns that are unique together, and restricts it to the page after a row.

    Args:
        statement: which rows.
        by: the columns; an index on them makes each page cost the same.
        last: the row's values of them; None for the first page. An OFFSET would read again, for each page, all that
            came before it, and skip or repeat rows where some are written meanwhile.
        limit: rows of a page.
        newest_first: in descending order.
    """
    if last is not None:
        # Rows compared as a whole: right where many share a moment, and one range of the index. The values with the
        # types of the columns: on SQLite times are text, and their form decides the order.
        here = tuple_(*by)
        there = tuple_(*(literal(value, column.type) for value, column in zip(last, by, strict=True)))
        statement = statement.where(here < there if newest_first else here > there)
    return statement.order_by(*(column.desc() if newest_first else column for column in by)).limit(limit)


def position(after: str | None, noun: str) -> tuple[str] | None:
    """Returns the id after which a list goes on.

    Raises:
        StoreError: it is no id.
    """
    if after is None:
        return None
    if (last := as_uuid(after)) is None:
        raise StoreError(f"{after!r} is no id of a {noun} to continue the list after")
    return (last,)


def pages(
    read: Callable[[_Key], Sequence[_Row]], key: Callable[[_Row], _Key], first: _Key, *, size: int = 1
) -> Iterator[Sequence[_Row]]:
    """Yields pages until one has fewer rows than `size`; each is a transaction: a slow reader holds none open.

    Args:
        read: reads the page after a key.
        key: of a row.
        first: is before all keys.
        size: the rows of a full page, for readers that must end although rows are written faster than they read.
            Unset: until a page is empty, so that what is written meanwhile is found as well.
    """
    last = first
    while page := read(last):
        yield page
        if len(page) < size:
            return
        last = key(page[-1])


def steps(read: Callable[[_Key], tuple[_Found, _Key | None]], first: _Key) -> Iterator[_Found]:
    """Yields what each step found, until one names no next step; steps may find nothing and go on all the same."""
    following: _Key | None = first
    while following is not None:
        found, following = read(following)
        yield found
