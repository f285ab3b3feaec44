"""How long each stage took, over many verdicts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from code_worker.types import Verdict

__all__ = ["COLUMNS", "stage_timings"]

COLUMNS = ("stage", "images", "median_ms", "p95_ms", "p99_ms", "longest_ms")
_REUSED = "reused"


def stage_timings(verdicts: Iterable[Verdict]) -> list[dict[str, Any]]:
    """One row per stage, in the order in which an image goes through them; percentiles by nearest rank.

    An image whose embedding was known went through fewer stages; `reused` counts those.
    """
    taken: dict[str, list[float]] = {}
    for verdict in verdicts:
        for stage, value in verdict.timings_ms.items():
            taken.setdefault(stage, []).append(float(value))
    reused = taken.pop(_REUSED, [])
    rows = [_row(stage, sorted(values)) for stage, values in taken.items()]
    return [*rows, {"stage": _REUSED, "images": len(reused)}] if reused else rows


def _row(stage: str, values: list[float]) -> dict[str, Any]:
    def rank(share: float) -> float:
        return round(values[max(0, -(-int(share * 100) * len(values) // 100) - 1)], 3)

    return {
        "stage": stage,
        "images": len(values),
        "median_ms": rank(0.50),
        "p95_ms": rank(0.95),
        "p99_ms": rank(0.99),
        "longest_ms": round(values[-1], 3),
    }
