"""The report as one HTML page that needs nothing else, with the worst mistakes; also written for each retrain."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

import jinja2
import numpy as np
from PIL import Image

from code_worker.data.datasets.examples import FAKE, REAL
from code_worker.errors import DatasetError, ImageRejectedError, TransientError
from code_worker.images.decode import decode_crop
from code_worker.logs import get_logger
from code_worker.moderation.runtime import start_runtime
from code_worker.training.evaluation import plots
from code_worker.training.evaluation.evaluate import EvaluationPlan, evaluate, learned_lines, published_table
from code_worker.training.snapshot_embeddings import example_of

if TYPE_CHECKING:
    from code_worker.data.datasets.examples import Example
    from code_worker.releases.loading import LoadedRelease
    from code_worker.settings import LimitSettings
    from code_worker.training.evaluation.compare import Compared
    from code_worker.training.evaluation.evaluate import Evaluation, Scored
    from code_worker.training.run_context import RunContext
    from code_worker.training.snapshot import Snapshot

_MOST: Final = 12
_SIDE: Final = 112
_QUALITY: Final = 70


@dataclass(frozen=True, slots=True)
class Mistake:
    """An image on the wrong side of a threshold.

    Attributes:
        key: what a person finds it by.
        score: what the head gave it.
        origin: its generator or collection.
        sha256: of its bytes.
        picture: a data URI of the pixels that were judged; None without thumbnails, or where it cannot be read again.
    """

    key: str
    score: float
    origin: str
    sha256: str
    picture: str | None


def worst_mistakes(
    scored: Scored, thresholds: tuple[float, float], limits: LimitSettings, *, thumbnails: bool
) -> tuple[list[Mistake], list[Mistake]]:
    """False alarms (reals from `high` on) and misses (generated ones below `low`), worst first, at most 12 each."""
    low, high = thresholds
    labels, scores = scored.labels, scored.scores
    alarms = np.flatnonzero((labels == REAL) & (scores >= high))
    misses = np.flatnonzero((labels == FAKE) & (scores < low))
    alarms = alarms[np.argsort(-scores[alarms], kind="stable")][:_MOST]
    misses = misses[np.argsort(scores[misses], kind="stable")][:_MOST]
    picture = (lambda example: _thumbnail(example, limits)) if thumbnails else (lambda _: None)
    return _mistakes(scored, alarms.tolist(), picture), _mistakes(scored, misses.tolist(), picture)


def _mistakes(scored: Scored, rows: list[int], picture: Callable[[Example], str | None]) -> list[Mistake]:
    found = []
    for row in rows:
        one = scored.examples[row]
        origin = (one.collection if one.label == REAL else one.generator) or ""
        found.append(Mistake(one.key, float(scored.scores[row]), origin, one.sha256 or "", picture(one)))
    return found


def _thumbnail(example: Example, limits: LimitSettings) -> str | None:
    try:
        crop = decode_crop(example.read(), limits)
    except (DatasetError, ImageRejectedError, TransientError):
        # It was readable a moment ago; the page says what it can without the picture.
        return None
    buffer = io.BytesIO()
    small = Image.fromarray(crop).resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    small.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


_TEMPLATE: Final = "page.html.j2"
_MOST_SKIPPED: Final = 500
_NAMES: Final = {
    "n": "images",
    "real_accuracy": "real accuracy",
    "fake_accuracy": "fake accuracy",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "fpr": "FPR",
    "fnr": "FNR",
    "uncertain": "uncertain",
    "ap": "AP",
    "auroc": "AUROC",
    "tpr_at_1pct_fpr": "TPR at 1 % FPR",
    "tpr_at_5pct_fpr": "TPR at 5 % FPR",
    "eer": "EER",
    "ece": "ECE",
    "brier": "Brier",
}
_ABSOLUTE: Final = frozenset({"ece", "brier"})
"""Figures that are no shares and not shown in percent."""


@dataclass(frozen=True, slots=True)
class _Cell:
    """A figure as text, its interval, and its place on a bar from 0 to 100."""

    text: str
    interval: str = ""
    share: float | None = None


def render_page(
    evaluation: Evaluation,
    limits: LimitSettings,
    *,
    thumbnails: bool = True,
    missed: Sequence[str] = (),
    compared: Sequence[Compared] = (),
    against: str = "",
) -> str:
    """The page of an evaluation.

    Args:
        evaluation: what was measured.
        limits: what reading an image for its thumbnail may cost.
        thumbnails: show the worst mistakes, blurred until they are clicked on.
        missed: bounds that were missed, a line each.
        compared: the release compared with another.
        against: id of that other.
    """
    report = evaluation.report
    lead = evaluation.scored[0]
    deployed = report["plan"]["thresholds"]["deployed"]
    thresholds = (deployed["low"], deployed["high"])
    heads = list(report["release"]["heads"])
    said, warned = learned_lines(report["data"])
    alarms, misses = worst_mistakes(lead, thresholds, limits, thumbnails=thumbnails)
    return _environment().get_template(_TEMPLATE).render(
        report=report,
        lead=lead,
        names=_NAMES,
        thresholds=deployed,
        cards=_cards(_row(report, lead, "overall")),
        groups=_groups(report, lead),
        conditions=_conditions(report, heads),
        plots=_plots(evaluation, lead, thresholds),
        alarms=alarms,
        misses=misses,
        thumbnails=thumbnails,
        published={head: _published(report, head) for head in heads},
        rows=[_every_figure(row) for row in report["results"]],
        skipped=report["skipped"][:_MOST_SKIPPED],
        missed=missed,
        left_out=said,
        warned=warned,
        compared=_compared(compared, lead),
        against=against,
    )  # fmt: skip


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("code_worker.training.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _row(report: Mapping[str, Any], scored: Scored, kind: str) -> Mapping[str, Any]:
    return next(
        row
        for row in report["results"]
        if (row["condition"], row["head"], row["kind"]) == (scored.condition, scored.head, kind)
    )


def _cards(row: Mapping[str, Any]) -> list[tuple[str, _Cell]]:
    decided, ranking = row["deployed"], row["ranking"]
    return [
        ("balanced accuracy", _cell("balanced_accuracy", decided["balanced_accuracy"])),
        ("false alarms (reals called fake)", _cell("fpr", decided["fpr"])),
        ("fakes found at 1 % false alarms", _cell("tpr_at_1pct_fpr", ranking["tpr_at_1pct_fpr"])),
        ("area under the ROC curve", _cell("auroc", ranking["auroc"])),
    ]


def _groups(report: Mapping[str, Any], lead: Scored) -> list[dict[str, Any]]:
    """Rows of the first condition and head: overall, generators, collections, variants."""
    found = []
    for row in report["results"]:
        if (row["condition"], row["head"]) == (lead.condition, lead.head):
            figures = {**row["deployed"], **row["ranking"]}
            found.append(
                {
                    "kind": row["kind"],
                    "name": row["name"],
                    "n_real": row["n_real"],
                    "n_fake": row["n_fake"],
                    **{name: _cell(name, figure) for name, figure in figures.items()},
                }
            )
    return found


def _conditions(report: Mapping[str, Any], heads: Sequence[str]) -> list[dict[str, Any]]:
    """Overall rows, a line per condition and a group of columns per head."""
    overall = {(row["condition"], row["head"]): row for row in report["results"] if row["kind"] == "overall"}
    found = []
    for condition in report["plan"]["conditions"]:
        rows = [overall[condition, head] for head in heads]
        cells = {
            head: {
                "balanced_accuracy": _cell("balanced_accuracy", row["deployed"]["balanced_accuracy"]),
                "fpr": _cell("fpr", row["deployed"]["fpr"]),
                "auroc": _cell("auroc", row["ranking"]["auroc"]),
            }
            for head, row in zip(heads, rows, strict=True)
        }
        found.append({"condition": condition, "n": rows[0]["n"], "heads": cells})
    return found


def _plots(evaluation: Evaluation, lead: Scored, thresholds: tuple[float, float]) -> dict[str, str | None]:
    """SVG elements; the curves are there where both classes are."""
    beside = [one for one in evaluation.scored if one.condition == lead.condition]
    drawn: dict[str, str | None] = {
        "histogram": plots.histogram_plot(lead, thresholds),
        "map": plots.map_plot(evaluation.embedded, seed=evaluation.report["plan"]["seed"]),
        "roc": None,
        "precision_recall": None,
        "calibration": plots.calibration_plot(beside),
    }
    if len(set(lead.labels.tolist())) == 2:
        drawn |= {"roc": plots.roc_plot(beside), "precision_recall": plots.precision_recall_plot(beside)}
    return drawn


def _published(report: Mapping[str, Any], head: str) -> str:
    lines = [(key, *(_percent(share) for share in shares)) for key, *shares in published_table(report, head)]
    width = max((len(key) for key, *_ in lines), default=0)
    return "\n".join(f"{key + ':':<{width + 1}}  {real:>6} {fake:>6} {both:>6}" for key, real, fake, both in lines)


def _every_figure(row: Mapping[str, Any]) -> dict[str, Any]:
    cells = {f"{name} at 0.5": _cell(name, figure) for name, figure in row["published"].items()}
    cells |= {name: _cell(name, figure) for name, figure in row["ranking"].items()}
    return {**{name: row[name] for name in ("condition", "head", "kind", "name", "n_real", "n_fake")}, "cells": cells}


def _compared(compared: Sequence[Compared], lead: Scored) -> list[dict[str, Any]]:
    found = []
    for one in compared:
        if (one.condition, one.head) != (lead.condition, lead.head):
            continue
        changes = {}
        for name in ("real_accuracy", "fake_accuracy", "balanced_accuracy"):
            change = one.difference[name]
            changes[name] = (
                _Cell("–")
                if change is None
                else _Cell(f"{100 * change.value:+.1f}", f"{100 * change.low:+.1f} … {100 * change.high:+.1f}")
            )
        found.append({"kind": one.kind, "name": one.name, "n": one.n, **changes})
    return found


def _cell(name: str, figure: Mapping[str, float | None] | None) -> _Cell:
    if figure is None or figure["value"] is None:
        return _Cell("–")
    value, low, high = figure["value"], figure["low"], figure["high"]
    if name in _ABSOLUTE:
        return _Cell(f"{value:.3f}", "" if low is None or high is None else f"{low:.3f} … {high:.3f}")
    bounds = "" if low is None or high is None else f"{100 * low:.1f} … {100 * high:.1f}"
    return _Cell(f"{100 * value:.1f}", bounds, 100 * value)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.2f}"


METRICS: Final = "metrics.json"
PAGE: Final = "report.html"
log = get_logger(__name__)


def write_report(
    attempt: RunContext, release: LoadedRelease, taken: Snapshot, progress: Callable[[int], object]
) -> None:
    """Writes `report/metrics.json` and, where pictures can be drawn, `report/report.html` into the run's directory.

    The page shows no image: it lies on a disk where nobody expects any.

    Raises:
        DatasetError, ArtifactError: it cannot be computed.
    """
    directory = attempt.place.path / "report"
    if (directory / METRICS).is_file():
        return
    settings = attempt.settings
    runtime = start_runtime(release, settings, lazy=True)
    with closing(runtime.embedder):
        evaluation = evaluate(
            (example_of(member, attempt.parts.kept) for member in taken.holdout),
            runtime,
            settings.limits,
            EvaluationPlan(
                presets=("delivery",), resamples=settings.gate.bootstrap, threads=settings.worker.fetch_threads
            ),
            source=f"hold-out of snapshot {taken.id}",
            toy=release.manifest.toy,
            progress=progress,
        )
    directory.mkdir(exist_ok=True)
    if find_spec("matplotlib") and find_spec("jinja2"):
        page = render_page(evaluation, settings.limits, thumbnails=False)
        (directory / PAGE).write_text(page, encoding="utf-8")
    else:
        log.info("no_report_page", hint="pip install 'code-worker[training]'")
    # Last: a report that has figures is complete.
    figures = json.dumps(evaluation.report, indent=1, sort_keys=True)
    (directory / METRICS).write_text(f"{figures}\n", encoding="utf-8")
