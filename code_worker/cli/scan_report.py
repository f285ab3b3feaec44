"""What a scan prints: a row per image as soon as it is judged, and a line that sums up."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.text import Text

from code_worker.cli.output import console, plural, print_json
from code_worker.cli.records import SCAN_FIELDS, judgement, verdict_record, write_csv_row
from code_worker.data.label_files.tables import csv_line
from code_worker.terminal import printable
from code_worker.types import Label, Outcome

if TYPE_CHECKING:
    from rich.console import Console

    from code_worker.types import Verdict

__all__ = ["Form", "Tally", "printer"]

_STYLES = {Label.REAL: "green", Label.FAKE: "red", Label.UNCERTAIN: "yellow"}
_VERDICT_WIDTH = 18


class Form(Enum):
    """How rows are printed."""

    TABLE = auto()
    JSON = auto()
    CSV = auto()


class Tally:
    """Counts what a scan found."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._by_label: Counter[str] = Counter()
        self.rejected = 0

    def begin(self) -> None:
        """The release is loaded: from now on it is judging that takes the time."""
        self._began = time.perf_counter()

    def add(self, verdict: Verdict) -> None:
        """Counts one verdict."""
        if verdict.outcome is Outcome.REJECTED:
            self.rejected += 1
        else:
            self._by_label[str(verdict.label)] += 1

    def summary(self) -> str:
        """One line: how many of what, and how fast."""
        total = self._by_label.total() + self.rejected
        seconds = time.perf_counter() - (self._began or 0.0)
        found = [f"{count} {label}" for label, count in sorted(self._by_label.items())]
        found += [f"{self.rejected} rejected"] if self.rejected else []
        parts = [plural(total, "image"), ", ".join(found)] if total else ["no image found"]
        parts += [f"{total / seconds:.1f} images/s"] if total else []
        return " · ".join(parts)


def printer(form: Form, *, raw: bool = False) -> Callable[[Verdict], None]:
    """What prints one verdict; a header, where there is one, is printed now."""
    if form is Form.JSON:
        return lambda verdict: print_json(_record(verdict))
    if form is Form.CSV:
        sys.stdout.write(csv_line(SCAN_FIELDS))
        return partial(_write_row, raw=raw)
    out = console()
    out.print(_line("verdict", "score", "head", "image"), style="bold")
    return lambda verdict: _print_row(out, verdict)


def _record(verdict: Verdict) -> dict[str, Any]:
    whole = verdict_record(verdict)
    return {name: whole[name] for name in SCAN_FIELDS}


def _write_row(verdict: Verdict, *, raw: bool) -> None:
    write_csv_row(_record(verdict), SCAN_FIELDS, sys.stdout, raw=raw)


def _print_row(out: Console, verdict: Verdict) -> None:
    score = "" if verdict.score is None else f"{verdict.score:.3f}"
    row = Text(printable(_line(judgement(verdict), score, verdict.head or "", verdict.uri)))
    row.stylize(_STYLES.get(verdict.label, "magenta") if verdict.label else "magenta", 0, _VERDICT_WIDTH)
    if verdict.detail:
        row.append(printable(f"  {verdict.detail}"), style="dim")
    out.print(row, soft_wrap=True)


def _line(verdict: str, score: str, head: str, image: str) -> str:
    return f"{verdict:<{_VERDICT_WIDTH}}  {score:>5}  {head:<8}  {image}"
