"""The report of a retrain: what `code-worker validate` would say of the candidate on the hold-out."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from code_worker.logs import get_logger
from code_worker.moderation.load import start_runtime
from code_worker.training.encoded import example_of
from code_worker.training.evaluation.evaluate import Plan, evaluate

if TYPE_CHECKING:
    from code_worker.releases.loading import LoadedRelease
    from code_worker.training.attempt import Attempt
    from code_worker.training.snapshot import Snapshot

__all__ = ["write_report"]

METRICS: Final = "metrics.json"
PAGE: Final = "report.html"
log = get_logger(__name__)


def write_report(
    attempt: Attempt, release: LoadedRelease, taken: Snapshot, progress: Callable[[int], object]
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
            Plan(presets=("delivery",), resamples=settings.gate.bootstrap, threads=settings.worker.fetch_threads),
            source=f"hold-out of snapshot {taken.id}",
            toy=release.manifest.toy,
            progress=progress,
        )
    directory.mkdir(exist_ok=True)
    if find_spec("matplotlib") and find_spec("jinja2"):
        from code_worker.training.evaluation.page import render_page

        page = render_page(evaluation, settings.limits, thumbnails=False)
        (directory / PAGE).write_text(page, encoding="utf-8")
    else:
        log.info("no_report_page", hint="pip install 'code-worker[training]'")
    # Last: a report that has figures is complete.
    figures = json.dumps(evaluation.report, indent=1, sort_keys=True)
    (directory / METRICS).write_text(f"{figures}\n", encoding="utf-8")
