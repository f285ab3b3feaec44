"""Compares two reports on the same images, group by group, and a report with the bounds it must keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from code_worker.errors import DatasetError
from code_worker.training.evaluation.metrics import Threshold, figures
from code_worker.training.evaluation.robustness import group_images
from code_worker.training.gate.paired import Difference, paired_difference

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.data.datasets.examples import Example
    from code_worker.training.evaluation.evaluate import Evaluation, Scored


@dataclass(frozen=True, slots=True)
class Compared:
    """One group of images under both releases.

    Attributes:
        condition: key of the condition.
        head: name of the head.
        kind: of the group, see `groups.Group`.
        name: of the group.
        n: images that both have scored.
        first: figures of the first release at its thresholds.
        second: of the second at its own.
        difference: second minus first with 95 % intervals: `accuracy`, `balanced_accuracy`, `real_accuracy`,
            `fake_accuracy`; None where the group has no image of a class.
    """

    condition: str
    head: str
    kind: str
    name: str
    n: int
    first: dict[str, float | None]
    second: dict[str, float | None]
    difference: dict[str, Difference | None]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Regression:
    """Accuracy that a generator, or the reals, lost."""

    condition: str
    head: str
    name: str
    lost: Difference

    def __str__(self) -> str:
        lost = (
            f"{100 * -self.lost.value:.1f} points (95 %: {100 * -self.lost.high:.1f} to {100 * -self.lost.low:.1f})"
        )
        return f"{self.name} loses {lost} under {self.condition}, head {self.head}"


def compare(
    first: Evaluation,
    second: Evaluation,
    *,
    threshold_first: Threshold = 0.5,
    threshold_second: Threshold = 0.5,
) -> list[Compared]:
    """Compares what both have measured: the heads and conditions that are in either, on the images that are in both.

    Raises:
        DatasetError: there is no such head, condition or image.
    """
    found = []
    for one in first.scored:
        try:
            other = second.of(one.condition, one.head)
        except KeyError:
            continue
        rows_one, rows_other = _shared(one, other)
        if len(rows_one):
            found += compare_scores(
                [one.examples[row] for row in rows_one],
                one.scores[rows_one],
                other.scores[rows_other],
                condition=one.condition,
                head=one.head,
                threshold_first=threshold_first,
                threshold_second=threshold_second,
            )
    if not found:
        raise DatasetError("the two releases have no head, condition and image in common: nothing can be compared")
    return found


def compare_scores(
    examples: Sequence[Example],
    first: NDArray[np.float32],
    second: NDArray[np.float32],
    *,
    condition: str = "clean",
    head: str = "",
    threshold_first: Threshold = 0.5,
    threshold_second: Threshold = 0.5,
) -> list[Compared]:
    """Compares two rows of scores, `(n,) float32` each, of the same images, group by group."""
    labels = np.array([one.label for one in examples], np.int8)
    found = []
    for group in group_images(examples):
        kinds = labels[group.members]
        one, other = first[group.members], second[group.members]
        found.append(
            Compared(
                condition=condition,
                head=head,
                kind=group.kind,
                name=group.name,
                n=len(kinds),
                first=figures(kinds, one, threshold=threshold_first),
                second=figures(kinds, other, threshold=threshold_second),
                difference=paired_difference(
                    kinds,
                    one,
                    other,
                    threshold_a=threshold_first,
                    threshold_b=threshold_second,
                ),
            )
        )
    return found


def regressions(compared: Iterable[Compared], max_regression: float) -> list[Regression]:
    """Every generator, and the reals, that lose more accuracy than `max_regression`, as measured."""
    found = []
    for one in compared:
        if one.kind == "overall":
            name, change = "real images", one.difference["real_accuracy"]
        elif one.kind == "generator":
            name, change = f"generator {one.name}", one.difference["fake_accuracy"]
        else:
            continue
        # Shares of images: what is lost beyond the border by rounding alone is no loss.
        if change is not None and -change.value > max_regression + 1e-9:
            found.append(Regression(one.condition, one.head, name, change))
    return found


def _shared(first: Scored, second: Scored) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the images that both have, in the order of the first."""
    places = {(one.key, one.sha256): row for row, one in enumerate(second.examples)}
    rows = [
        (row, places[one.key, one.sha256])
        for row, one in enumerate(first.examples)
        if (one.key, one.sha256) in places
    ]
    shared = np.array(rows, np.int64).reshape(-1, 2)
    return shared[:, 0], shared[:, 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Bounds of the figures at the deployed thresholds over all images; None: no bound."""

    min_balanced_accuracy: float | None = None
    max_fpr: float | None = None


def missed_bounds(report: Mapping[str, Any], bounds: Bounds, heads: Iterable[str]) -> list[str]:
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
