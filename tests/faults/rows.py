"""Rows of the fault matrix: the marker, what a test saw, and the choice and report that `make faults` makes of them.

    @row("F5", injection="the proxy swallows what old connections carry", expected="resumed within 30 s")
    def test_…(seen: Seen) -> None:
        seen(resumed_s=12.3, lost=0)

`{name}` in a text is replaced by the test's parameter of that name. `unmet="reason"` marks a row whose bar the
product does not meet: the report says so. Row tests may lie anywhere below tests/.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.faults.report import FAILED, Line, merge_into

__all__ = ["Bar", "Seen", "bar", "fault_rng", "fault_seed", "row", "seen"]

row = pytest.mark.row
_FIGURES = pytest.StashKey[dict[str, Any]]()
_OUTCOME = pytest.StashKey[str]()
_ALL_ROWS = pytest.StashKey[set[tuple[str, str]]]()
_POSTGRES_FIXTURES = {"postgres_url", "postgres_store", "migrated_postgres_url"}
_UNITS = {"s": "s", "ms": "ms", "mb": "MB", "per_s": "/s", "percent": "%"}


Bar = Callable[[float], float]


class Seen(Protocol):
    """Notes figures of a run for the report."""

    def __call__(self, **figures: object) -> None:
        """A name may end in a unit: `resumed_s=1.5` reads "resumed 1.5 s"."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--fault-seed", type=int, help="rerun the schedule of faults that this seed gives")
    group.addoption("--rows", default="", help="only these rows of the fault matrix, such as 'F3 F5'")
    group.addoption("--broker-rows", action="store_true", help="only rows that have a broker, for another Celery")
    group.addoption("--fault-report", type=Path, help="page whose table the rows that ran are merged into")
    group.addoption("--soak-minutes", type=float, default=30.0, help="length of the soak (row F33)")


def choose_rows(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the rows that were asked for, in place."""
    config.stash[_ALL_ROWS] = {(line.id, line.injection) for item in items if (line := _line_of(item))}
    wanted = {name.upper() for name in re.split(r"[\s,]+", config.getoption("--rows")) if name}
    with_broker: bool = config.getoption("--broker-rows")
    kept = [item for item in items if _is_wanted(item, wanted, with_broker=with_broker)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _is_wanted(item: pytest.Item, rows: Collection[str], *, with_broker: bool) -> bool:
    if with_broker and "redis_server" not in getattr(item, "fixturenames", ()):
        return False
    mark = item.get_closest_marker("row")
    return not rows or (mark is not None and mark.args[0].upper() in rows)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if call.excinfo is not None:
        item.stash.setdefault(_OUTCOME, call.excinfo.exconly().strip().splitlines()[0])
    return report  # type: ignore[return-value]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (page := session.config.getoption("--fault-report")) is None:
        return
    ran = [line for item in session.items if _FIGURES in item.stash and (line := _line_of(item))]
    merge_into(page, ran, known=session.config.stash[_ALL_ROWS])


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> Seen:
    """Notes figures for the report; ask for it in every test that is a row."""
    figures: dict[str, Any] = {}
    request.node.stash[_FIGURES] = figures

    def note(**more: object) -> None:
        figures.update(more)
        print(f"seen: {_said(more)}")

    return note


@pytest.fixture
def fault_seed(request: pytest.FixtureRequest) -> int:
    """Seed of a test's schedule of faults, printed; `--fault-seed` gives the same schedule again."""
    given: int | None = request.config.getoption("--fault-seed")
    seed = random.SystemRandom().randrange(2**32) if given is None else given
    print(f"again: --fault-seed {seed}")
    return seed


@pytest.fixture
def bar(request: pytest.FixtureRequest) -> Bar:
    """Seconds to hold a row to: the bar itself when the report is written, else far more.

    A machine that tests share may be slow, and stand still meanwhile.
    """
    strict = request.config.getoption("--fault-report") is not None
    return lambda seconds: seconds if strict else 3 * seconds + 60


@pytest.fixture
def fault_rng(fault_seed: int) -> random.Random:
    """Randomness for a schedule of faults."""
    return random.Random(fault_seed)


def _line_of(item: pytest.Item) -> Line | None:
    if (mark := item.get_closest_marker("row")) is None:
        return None
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    injection, expected = (mark.kwargs[name].format(**parameters) for name in ("injection", "expected"))
    figures = _said(item.stash.get(_FIGURES, {}))
    if (failed := item.stash.get(_OUTCOME, None)) is not None:
        result = f"{FAILED}: {failed[:200]}"
    elif unmet := mark.kwargs.get("unmet"):
        result = f"**not met**: {unmet}"
    else:
        result = "as expected"
    told = f"{result}; {figures}" if figures else result
    return Line(mark.args[0], injection, expected, _where(item), told, f"{datetime.now(UTC):%Y-%m-%d}")


def _said(figures: dict[str, Any]) -> str:
    return ", ".join(_figure(name, value) for name, value in figures.items())


def _figure(name: str, value: object) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    for ending, unit in sorted(_UNITS.items(), key=lambda each: -len(each[0])):
        if name.endswith(f"_{ending}"):
            return f"{name.removesuffix(f'_{ending}').replace('_', ' ')} {text} {unit}"
    return f"{name.replace('_', ' ')} {text}"


def _where(item: pytest.Item) -> str:
    """Which database and broker a row ran on, as far as it touched one."""
    fixtures: Sequence[str] = getattr(item, "fixturenames", ())
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    values = {str(value) for value in parameters.values() if isinstance(value, str)}
    parts = []
    if {"postgresql", "postgres"} & values or _POSTGRES_FIXTURES & set(fixtures):
        parts.append("PostgreSQL")
    elif "sqlite" in values or {"sqlite_store", "sqlite_url"} & set(fixtures):
        parts.append("SQLite")
    if "redis_server" in fixtures:
        from celery import __version__

        parts.append(f"Celery {__version__}")
    return ", ".join(parts) or "–"
