"""The one table of what must become of bad input, and the files that it speaks of."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tests.corpus.bombs import bombs
from tests.corpus.damage import damaged
from tests.corpus.foreign import foreign
from tests.corpus.pictures import pictures

JUDGED = "judged"
_TABLE = Path(__file__).with_name("expected.txt")


@cache
def expected(kind: str) -> dict[str, frozenset[str]]:
    """Name → the ends that are allowed, for one kind of input: `file`, `source`, `job`, `label` or `message`."""
    rows = [line.split() for line in _TABLE.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    table = {name: frozenset(ends.split("|")) for its_kind, name, ends in rows if its_kind == kind}
    assert len(table) == sum(row[0] == kind for row in rows), "a name stands twice in the table"
    return table


@cache
def files() -> dict[str, bytes]:
    """Name → file, all of them; made once per process."""
    parts = (pictures(), foreign(), damaged(), bombs())
    made = {name: data for part in parts for name, data in part.items()}
    assert len(made) == sum(map(len, parts)), "two files have one name"
    return made
