"""`code-worker validate`: how good a release is on labelled images, and whether that is good enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from code_worker.cli.common.arguments import SHARE
from code_worker.cli.common.database import open_ledger, quiet_settings
from code_worker.cli.common.output import plural, print_json
from code_worker.cli.common.progress import progress
from code_worker.cli.common.release_runtime import list_skipped, open_measured
from code_worker.cli.deployment.validation_report import prepare_directory, print_report, write_reports
from code_worker.errors import CodeWorkerError, DatasetError

if TYPE_CHECKING:
    from code_worker.cli.common.release_runtime import Measured
    from code_worker.data.datasets.examples import Example, Skipped
    from code_worker.settings import Settings
    from code_worker.store.engine import Store
    from code_worker.training.evaluation.compare import Compared
    from code_worker.training.evaluation.evaluate import Evaluation, EvaluationPlan

PRESETS: Final = ("clean", "d3", "delivery", "sidbench")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """Arguments of the command line."""

    source: str
    release: str | None
    heads: tuple[str, ...]
    presets: tuple[str, ...]
    tenant: str | None
    content_type: str | None
    out: Path | None
    limit: int | None
    real_urls: int
    bootstrap: int
    seed: int
    min_balanced_accuracy: float | None
    max_fpr: float | None
    max_regression: float | None
    against: str | None
    thumbnails: bool
    as_json: bool

    @property
    def is_own(self) -> bool:
        """True if the images are of the labelled store, from which releases are taught."""
        return self.source in {"labels:", "holdout:"}


@click.command()
@click.argument("source")
@click.option("--release", metavar="ID|DIR", help="Release to measure; unset: the champion.")
@click.option("--head", "heads", multiple=True, help="Head to measure; unset: all. May be given again.")
@click.option(
    "--preset",
    "presets",
    multiple=True,
    type=click.Choice(PRESETS),
    help="What is done to the images; unset: nothing, or d3 where all are of a variant.",
)
@click.option("--tenant", help="Measure at the thresholds in force for this tenant.")
@click.option("--content-type", help="Measure at the thresholds in force for this content type.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory for metrics.json and report.html.")
@click.option("--limit", type=click.IntRange(1), help="At most so many images.")
@click.option("--real-urls", type=click.IntRange(0), default=0, help="Fetch so many reals of a hub data set by URL.")
@click.option(
    "--bootstrap", type=click.IntRange(0), default=1000, show_default=True, help="Resamples; 0: no interval."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the bootstrap and the map.")
@click.option("--min-balanced-accuracy", type=SHARE, help="Fail below this.")
@click.option("--max-fpr", type=SHARE, help="Fail if more than this share of reals is called fake.")
@click.option("--max-regression", type=SHARE, help="Fail if a generator or the reals lose more than --against has.")
@click.option("--against", metavar="ID|DIR", help="Release to compare with, on the same images.")
@click.option("--thumbnails/--no-thumbnails", default=True, help="Show the worst mistakes on the page, blurred.")
@click.option("--json", "as_json", is_flag=True, help="Print metrics.json instead of tables.")
def validate(**words: Any) -> None:
    """Measure a release on the labelled images of SOURCE (see `code-worker data --help` for what that may be).

    Prints figures for each generator and source of real images, with 95 % intervals, and what was skipped. Bounds
    hold for every condition, at the thresholds in use, for the heads named, else for the one that judges. Of
    `labels:` and `holdout:` what a release learned from is left out; where nobody recorded what that was, it is said.

    Exit status: 0 done; 1 a bound is missed (each is printed), or nothing could be measured; 2 wrong use.
    """
    asked = _Asked(**words)
    if asked.max_regression is not None and asked.against is None:
        raise click.UsageError("--max-regression needs --against RELEASE")
    settings = quiet_settings()
    if asked.out is not None:
        prepare_directory(asked.out)
    skipped: list[Skipped] = []
    try:
        examples, learned = _fair(asked, settings, _read(asked, settings, skipped))
        asked = replace(asked, presets=asked.presets or _preset_of(examples))
        evaluation, judging = _measure(asked, settings, examples, skipped)
        compared = _compared(asked, settings, examples, evaluation)
    except CodeWorkerError:
        # What is wrong with the data may be why nothing could be measured.
        list_skipped(skipped)
        raise
    missed = _missed(asked, evaluation.report, compared, judging)
    evaluation = _with_bounds(asked, _with_learned(evaluation, learned), compared, missed)
    _publish(asked, settings, evaluation, compared, missed)
    raise SystemExit(1 if missed else 0)


def _read(asked: _Asked, settings: Settings, skipped: list[Skipped]) -> tuple[Example, ...]:
    from code_worker.data.datasets.open import open_examples

    found = []
    with progress(f"reading {asked.source}", counted=True) as advance:
        for example in open_examples(
            asked.source,
            settings=settings,
            skipped=skipped,
            # Of your own images some may not count.
            limit=None if asked.is_own else asked.limit,
            real_urls=asked.real_urls,
        ):
            found.append(example)
            advance(1)
    return tuple(found)


def _fair(
    asked: _Asked, settings: Settings, examples: tuple[Example, ...]
) -> tuple[tuple[Example, ...], dict[str, Any] | None]:
    """The images that no release learned from, and what the report says of the others; None: they are not your own.

    Raises:
        DatasetError: none is left.
    """
    if not asked.is_own:
        return examples, None
    from code_worker.training.snapshot import learned_by

    with open_ledger(settings) as store:
        wanted = [_release_id(store, asked.release)]
        if asked.against is not None:
            wanted.append(_release_id(store, asked.against))
        releases = [release for release in wanted if release is not None]
        found = store.run(lambda session: learned_by(session, releases), write=False)
    fair = tuple(example for example in examples if example.sha256 not in found.images)
    if examples and not fair:
        raise DatasetError(
            f"{asked.source}: {' or '.join(releases)} learned from all of it: {plural(len(examples), 'image')}"
        )
    learned = {"left_out": len(examples) - len(fair), "unknown": list(found.unknown)}
    return fair[: asked.limit], learned


def _release_id(store: Store, release: str | None) -> str | None:
    from code_worker.releases.integrity import hash_file
    from code_worker.releases.manifest import MANIFEST_NAME, release_id
    from code_worker.store.releases import CHAMPION, alias

    if release is None:
        return store.run(lambda session: alias(session, CHAMPION), write=False)
    manifest = Path(release) / MANIFEST_NAME
    return release_id(hash_file(manifest).sha256) if manifest.is_file() else release


def _preset_of(examples: Sequence[Example]) -> tuple[str, ...]:
    """A data set that comes in variants, as D³'s test set does, is measured in each of them."""
    in_variants = bool(examples) and all(one.variant is not None for one in examples)
    return ("d3",) if in_variants else PRESETS[:1]


def _measure(
    asked: _Asked, settings: Settings, examples: Sequence[Example], skipped: Sequence[Skipped]
) -> tuple[Evaluation, tuple[str, ...]]:
    """The evaluation, and the heads that bounds hold for."""
    with open_measured(settings, asked.release) as measured:
        plan = _plan(asked, measured, asked.heads)
        decides = plan.deployed.head if plan.deployed and plan.deployed.head in measured.runtime.heads else None
        judging = asked.heads or (decides or measured.runtime.default_head,)
        return _evaluate(asked, settings, measured, plan, examples, skipped=skipped), judging


def _compared(
    asked: _Asked, settings: Settings, examples: Sequence[Example], evaluation: Evaluation
) -> list[Compared]:
    """The release beside `--against`, which must have a head in common with it."""
    if asked.against is None:
        return []
    from code_worker.training.evaluation.compare import compare

    with open_measured(settings, asked.against) as measured:
        shared = tuple(head for head in evaluation.report["release"]["heads"] if head in measured.runtime.heads)
        before = _evaluate(asked, settings, measured, _plan(asked, measured, shared, resamples=0), examples)
    return compare(
        before,
        evaluation,
        threshold_first=_thresholds(before),
        threshold_second=_thresholds(evaluation),
    )


def _plan(
    asked: _Asked, measured: Measured, heads: tuple[str, ...], *, resamples: int | None = None
) -> EvaluationPlan:
    from code_worker.training.evaluation.evaluate import EvaluationPlan

    return EvaluationPlan(
        heads=heads,
        presets=asked.presets,
        deployed=measured.policies.find(asked.tenant, asked.content_type, measured.runtime.default_policy),
        resamples=asked.bootstrap if resamples is None else resamples,
        seed=asked.seed,
    )


def _evaluate(
    asked: _Asked,
    settings: Settings,
    measured: Measured,
    plan: EvaluationPlan,
    examples: Sequence[Example],
    *,
    skipped: Sequence[Skipped] = (),
) -> Evaluation:
    from code_worker.training.evaluation.evaluate import evaluate
    from code_worker.training.evaluation.robustness import conditions

    variants = {one.variant for one in examples if one.variant is not None}
    passes = len({one.transform for one in conditions(plan.presets, variants)})
    with progress(f"measuring {measured.loaded.id}", total=passes * len(examples)) as advance:
        return evaluate(
            examples,
            measured.runtime,
            settings.limits,
            replace(plan, threads=settings.worker.fetch_threads),
            source=asked.source,
            toy=measured.loaded.manifest.toy,
            skipped=skipped,
            known=measured.known,
            keep=measured.keep,
            progress=advance,
        )


def _thresholds(evaluation: Evaluation) -> tuple[float, float]:
    deployed = evaluation.report["plan"]["thresholds"]["deployed"]
    return deployed["low"], deployed["high"]


def _missed(
    asked: _Asked, report: dict[str, Any], compared: Sequence[Compared], judging: tuple[str, ...]
) -> list[str]:
    from code_worker.training.evaluation.compare import Bounds, missed_bounds, regressions

    bounds = Bounds(min_balanced_accuracy=asked.min_balanced_accuracy, max_fpr=asked.max_fpr)
    lines = missed_bounds(report, bounds, judging)
    if asked.max_regression is not None:
        of_judging = [one for one in compared if one.head in judging]
        lost = regressions(of_judging, asked.max_regression)
        lines += [f"{one}; {100 * asked.max_regression:g} may be lost" for one in lost]
        lines += [f"{asked.against} has no head {head} to compare with" for head in _absent(compared, judging)]
    return lines


def _absent(compared: Sequence[Compared], judging: tuple[str, ...]) -> list[str]:
    return [head for head in judging if head not in {one.head for one in compared}]


def _with_bounds(
    asked: _Asked, evaluation: Evaluation, compared: Sequence[Compared], missed: Sequence[str]
) -> Evaluation:
    added = {
        "bounds": {
            "min_balanced_accuracy": asked.min_balanced_accuracy,
            "max_fpr": asked.max_fpr,
            "max_regression": asked.max_regression,
            "missed": list(missed),
        },
        "compared": {"against": asked.against, "groups": [one.to_dict() for one in compared]},
    }
    return replace(evaluation, report={**evaluation.report, **added})


def _with_learned(evaluation: Evaluation, learned: dict[str, Any] | None) -> Evaluation:
    data = {**evaluation.report["data"], "learned": learned}
    return replace(evaluation, report={**evaluation.report, "data": data})


def _publish(
    asked: _Asked, settings: Settings, evaluation: Evaluation, compared: Sequence[Compared], missed: Sequence[str]
) -> None:
    if asked.as_json:
        print_json(evaluation.report)
    else:
        print_report(evaluation.report, compared)
    if asked.out is not None:
        from code_worker.training.evaluation.page import render_page  # matplotlib, for pages alone

        with progress("drawing the page"):
            page = render_page(
                evaluation,
                settings.limits,
                thumbnails=asked.thumbnails,
                missed=missed,
                compared=compared,
                against=asked.against or "",
            )
        write_reports(asked.out, evaluation.report, page)
    for line in missed:
        click.echo(f"missed: {line}", err=True)
