"""The table of docs/reliability.md: rows that ran are merged into those that are there."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

__all__ = ["FAILED", "Line", "lines_of", "merge_into"]

FAILED = "**failed**"
_BEGIN, _END = "<!-- rows -->", "<!-- end of rows -->"
_HEAD = "| row | injection | expected | on | seen | date |\n| --- | --- | --- | --- | --- | --- |\n"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table: a row of the matrix as it went on one database and broker."""

    id: str
    injection: str
    expected: str
    on: str
    seen: str
    date: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.id, _cell(self.injection), _cell(self.on)


def lines_of(text: str) -> list[Line]:
    """The table's lines as they stand on the page."""
    _, _, rest = text.partition(_BEGIN)
    table, _, _ = rest.partition(_END)
    cells = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in table.splitlines() if line.startswith("| ")]
    return [Line(*(cell.strip() for cell in each)) for each in cells[2:] if len(each) == len(fields(Line))]


def merge_into(page: Path, ran: Iterable[Line], known: Collection[tuple[str, str]]) -> None:
    """Replaces the lines that ran and keeps the others, but for those that no test of their row speaks of any more.

    `known` are the rows, with their injections, of all tests that were collected.
    """
    text = page.read_text(encoding="utf-8")
    alive = {(row, _cell(injection)) for row, injection in known}
    seen_here = {row for row, _ in known}
    kept = {
        line.key: line
        for line in lines_of(text)
        if line.id not in seen_here or (line.id, _cell(line.injection)) in alive
    }
    now: dict[tuple[str, str, str], Line] = {}
    for line in ran:
        # Several tests may show one line; a failure of one is not made good by the next.
        if line.key not in now or not now[line.key].seen.startswith(FAILED):
            now[line.key] = line
    kept.update(now)
    table = "".join(
        f"| {' | '.join(_cell(value) for value in astuple(line))} |\n" for line in sorted_lines(kept.values())
    )
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    page.write_text(f"{before}{_BEGIN}\n\n{_HEAD}{table}\n{_END}{after}", encoding="utf-8")


def sorted_lines(lines: Iterable[Line]) -> list[Line]:
    """By the number in the row's name, then by text; names without one last."""

    def place(line: Line) -> tuple[int, str, str, str]:
        number = re.search(r"\d+", line.id)
        return (int(number[0]) if number else 10**6, line.id, line.injection, line.on)

    return sorted(lines, key=place)


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\|", " ".join(text.split()))
