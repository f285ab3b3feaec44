"""Alternating rounds: figures of several contestants, taken by turns, and the ratios within each round."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["alternate", "compared", "machine", "print_table", "ratios", "rows_of", "spread", "write_json"]


def alternate(names: Sequence[str], rounds: int, measure: Callable[[str], float]) -> dict[str, list[float]]:
    """One figure per contestant and round; every other round goes backwards, so that none is always first."""
    figures: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            figures[name].append(measure(name))
    return figures


def spread(values: Sequence[float], digits: int = 2) -> dict[str, float]:
    """Median and range."""
    return {
        "median": round(statistics.median(values), digits),
        "least": round(min(values), digits),
        "most": round(max(values), digits),
    }


def ratios(ours: Sequence[float], others: Sequence[float]) -> list[float]:
    """Ours over the other's, round by round: a machine that slows down slows both."""
    return [own / other for own, other in zip(ours, others, strict=True)]


def compared(rates: Mapping[str, Sequence[float]], ours: str, bars: Mapping[str, float]) -> dict[str, Any]:
    """Rates of each, and for each but `ours` how many times as fast ours is, with the bar where there is one."""
    found: dict[str, Any] = {}
    for name, values in rates.items():
        found[name] = {"per_s": spread(values, 1)}
        if name != ours:
            times = spread(ratios(rates[ours], values))
            bar = bars.get(name)
            found[name] |= {
                "ours_is_times": times,
                "bar": bar,
                "met": None if bar is None else times["median"] >= bar,
            }
    return found


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}


def print_table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns as wide as their widest cell."""
    cells = [[str(cell) for cell in row] for row in [titles, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)


def rows_of(label: str, found: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    """One row per contestant of `compared`."""
    for name, figures in found.items():
        times, bar = figures.get("ours_is_times"), figures.get("bar")
        verdict = "" if bar is None else f"≥ {bar}: {'met' if figures['met'] else 'MISSED'}"
        yield label, name, _range(figures["per_s"]), "" if times is None else _range(times), verdict


def _range(figures: Mapping[str, float]) -> str:
    return f"{figures['median']} ({figures['least']} to {figures['most']})"


def write_json(path: Path | None, found: Mapping[str, Any]) -> None:
    """Writes the figures where asked to, with what they were taken on."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), **found}, indent=1) + "\n", encoding="utf-8")
