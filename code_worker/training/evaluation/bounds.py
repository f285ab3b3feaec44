"""What a report must not fall short of: the bounds by which a pipeline stops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Bounds", "missed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Bounds of the figures at the deployed thresholds over all images; None: no bound."""

    min_balanced_accuracy: float | None = None
    max_fpr: float | None = None


def missed(report: Mapping[str, Any], bounds: Bounds, heads: Iterable[str]) -> list[str]:
    """A line for each bound that one of the heads misses under one of the conditions.

    A figure that the data cannot give, such as the false alarms where there are no reals, misses its bound.
    """
    wanted = set(heads)
    lines = []
    for row in report["results"]:
        if row["kind"] != "overall" or row["head"] not in wanted:
            continue
        where = f"under {row['condition']}, head {row['head']}"
        lines += _below(row["deployed"]["balanced_accuracy"], bounds.min_balanced_accuracy, where)
        lines += _above(row["deployed"]["fpr"], bounds.max_fpr, where)
    return lines


def _below(figure: Mapping[str, float] | None, bound: float | None, where: str) -> list[str]:
    if bound is None or (figure is not None and figure["value"] >= bound):
        return []
    if figure is None:
        return [f"balanced accuracy {where} cannot be told: it takes real and generated images"]
    return [f"balanced accuracy {where} is {figure['value']:.4f}, below {bound:g}"]


def _above(figure: Mapping[str, float] | None, bound: float | None, where: str) -> list[str]:
    if bound is None or (figure is not None and figure["value"] <= bound):
        return []
    if figure is None:
        return [f"false alarms {where} cannot be told: it takes real images"]
    return [f"false alarms {where} are {figure['value']:.4f} of real images, above {bound:g}"]
