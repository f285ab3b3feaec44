"""Pages of a list that grows while it is read."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest

from code_worker.store import audit, verdicts
from code_worker.store.engine import Store
from code_worker.store.learning import labels
from code_worker.store.learning.labels import NewLabel
from code_worker.store.paging import pages
from tests.store.acts import accept, judged, write


class Busy:
    """A store in which something is written after each transaction."""

    def __init__(self, store: Store, add: Callable[[Store, int], object]) -> None:
        self._store = store
        self._add = add
        self._rows = 0

    def run(self, work: Callable[[Any], Any], *, write: bool = True) -> Any:
        found = self._store.run(work, write=write)
        self.grow()
        return found

    def grow(self) -> None:
        self._rows += 1
        self._add(self._store, self._rows)


def add_verdict(store: Store, number: int) -> None:
    write(store, judged(accept(store, f"s3://b/{number}")[0]))


def add_label(store: Store, number: int) -> None:
    store.run(lambda session: labels.add(session, [NewLabel(f"{number:064x}", "real", "alice", "api")]))


def add_entry(store: Store, number: int) -> None:
    store.run(lambda session: audit.record(session, actor="a", action="policy.put", subject=str(number), details={}))


@pytest.mark.parametrize(
    ("stream", "add"),
    [(verdicts.stream, add_verdict), (labels.stream, add_label), (audit.stream, add_entry)],
    ids=["verdicts", "labels", "audit"],
)
def test_a_stream_ends_although_rows_are_written_while_it_is_read(
    store: Store, stream: Callable[..., Any], add: Callable[[Store, int], object]
) -> None:
    """An export of a busy system would never end if each short page were followed by another look."""
    busy = Busy(store, add)
    for _ in range(3):
        busy.grow()
    assert len(list(islice(stream(busy, page=2), 50))) == 5


def test_without_a_size_pages_end_with_an_empty_one() -> None:
    rows = [1, 2, 3]
    found = []
    for page in pages(lambda last: [row for row in rows if row > last][:2], lambda row: row, 0):
        found += page
        if len(rows) < 6:
            rows.append(len(rows) + 1)
    assert found == [1, 2, 3, 4, 5, 6]
