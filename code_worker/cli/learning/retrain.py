"""`code-worker retrain` and `refit`: learn from the labelled images, here and now or in the trainer."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from code_worker.cli.common.arguments import JSON_OBJECT, json_option
from code_worker.cli.common.database import open_ledger, quiet_settings
from code_worker.cli.common.output import console, plural, print_facts, print_json, print_table, who
from code_worker.cli.learning.runs import run_record, say_run
from code_worker.roles import Role, require
from code_worker.store.learning.label_rules import SPLITS

if TYPE_CHECKING:
    from code_worker.settings import Settings
    from code_worker.training.learner import RunPlan

_STAGES: Final = {
    "snapshot": "freezing the labelled images",
    "train": "training the encoder",
    "refit": "fitting the heads",
    "embed": "embedding images",
    "report": "measuring the candidate",
    "gate": "comparing with the champion",
    "promote": "promoting",
}


@contextmanager
def run_progress(kind: str) -> Iterator[Callable[[str, Mapping[str, Any]], None]]:
    """A bar that goes when the run ends; yields what hears its stages."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console(stderr=True),
        transient=True,
        disable=not console(stderr=True).is_terminal,
        redirect_stdout=False,
    )
    with bar:
        task = bar.add_task(kind, total=None)

        def hear(stage: str, said: Mapping[str, Any]) -> None:
            done, total = said.get("done", said.get("step")), said.get("total", said.get("steps"))
            bar.update(
                task, description=f"{kind}: {_sentence(stage, said)}", completed=done or 0, total=total, refresh=True
            )

        yield hear


def _sentence(stage: str, said: Mapping[str, Any]) -> str:
    parts = [_STAGES.get(stage, stage)]
    if (epoch := said.get("epoch")) is not None:
        parts.append(f"epoch {epoch}")
    if (rate := said.get("images_per_s")) is not None:
        parts.append(f"{rate:.0f} images/s")
    if (left_s := said.get("eta_s")) is not None:
        parts.append(f"{left_s / 60:.0f} min left" if left_s >= 60 else f"{left_s:.0f} s left")
    return ", ".join(parts)


def _options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of both commands."""
    for decorate in (
        json_option,
        click.option("--enqueue", is_flag=True, help="Let the trainer do it, and return at once."),
        click.option(
            "--force", is_flag=True, help="Although fewer images are labelled than the minimum numbers want."
        ),
        click.option("--dry-run", is_flag=True, help="Print what would be learned from, and write nothing."),
    ):
        command = decorate(command)
    return command


@click.command()
@_options
def retrain(**asked: bool) -> None:
    """Train the encoder on the labelled images, fit every head again, and promote the result if it is better.

    A run that an earlier process left behind is finished instead. Ctrl-C leaves it to the next process, which goes
    on from the last checkpoint. Exit status: 0 promoted, or nothing to do yet; 1 rejected or failed; 2 wrong use.
    """
    _learn("retrain", **asked)


@click.command()
@click.option(
    "--head",
    "heads",
    multiple=True,
    metavar="NAME",
    help="Fit this head alone, and keep the champion's others as they are; may be repeated. Needs --challenge.",
)
@click.option("--options", type=JSON_OBJECT, help="Options of the one --head, as a JSON object.")
@click.option(
    "--challenge", is_flag=True, help="Make the result the challenger, without the gate and without new labels."
)
@_options
def refit(*, heads: tuple[str, ...], options: dict[str, Any] | None, challenge: bool, **asked: bool) -> None:
    """Fit every head again on the labelled images, with the champion's encoder; promote the result if it is better.

    Takes seconds where embeddings are kept. Otherwise as `code-worker retrain`.
    """
    if heads and not challenge:
        raise click.UsageError("the gate compares what judges by default, which stays: say --head with --challenge")
    if options is not None and len(heads) != 1:
        raise click.UsageError("--options belong to one head: name it with --head")
    named = {name: options or {} for name in heads} if heads else None
    _learn("refit", **asked, heads=named, challenge=challenge)


def _learn(kind: str, *, dry_run: bool, enqueue: bool, as_json: bool, **asked: Any) -> None:
    if enqueue and dry_run:
        raise click.UsageError("--dry-run says what a run would do, --enqueue starts one: choose")
    settings = quiet_settings()
    if enqueue:
        _enqueue(kind, settings, asked)
        return
    if dry_run:
        _print_plan(kind, settings, asked, as_json=as_json)
        return
    sys.exit(_run_here(kind, settings, asked, as_json=as_json))


def _enqueue(kind: str, settings: Settings, asked: dict[str, Any]) -> None:
    from code_worker.publisher import Publisher
    from code_worker.wire import REFIT, RETRAIN, TRAIN_QUEUE

    require(settings.roles, who(), Role.OPERATOR, f"start a {kind}")
    publisher = Publisher.for_producer(settings)
    try:
        task = {"retrain": RETRAIN, "refit": REFIT}[kind]
        # A trainer of before an option was there does what it can, as long as nobody asks for the option.
        given = {name: value for name, value in asked.items() if value not in (None, False)}
        publisher.call(task, TRAIN_QUEUE, arguments={"by": who(), **given})
    finally:
        publisher.close()
    click.echo(f"{kind} is queued for the trainer; see `code-worker runs list`")


def _run_here(kind: str, settings: Settings, asked: dict[str, Any], *, as_json: bool) -> int:
    from code_worker.training.learner import Learner

    # As Ctrl-C does: the run is left in order, and its training process ends with a checkpoint.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with open_ledger(settings) as store, run_progress(kind) as listen:
            run = Learner(settings, store, listen=listen).learn(kind, by=who(), **asked)
    finally:
        signal.signal(signal.SIGTERM, before)
    if run is None:
        return 0
    if as_json:
        print_json(run_record(run))
    else:
        say_run(run)
    return 0 if run.state in {"promoted", "skipped"} else 1


def _print_plan(kind: str, settings: Settings, asked: dict[str, Any], *, as_json: bool) -> None:
    from code_worker.training.learner import Learner

    with open_ledger(settings) as store:
        plan = Learner(settings, store).plan(kind, **asked)
    if as_json:
        print_json(plan.to_dict())
        return
    counts = plan.snapshot
    rows = [_split_row(name, counts[name]) for name in SPLITS]
    print_table(rows, ("split", "real", "fake", "new_real", "new_fake", "generators"), empty="")
    print_facts(_facts(plan))


def _split_row(name: str, part: dict[str, Any]) -> dict[str, Any]:
    generators = ", ".join(f"{generator} {count}" for generator, count in part["generators"].items())
    return {"split": name, **part, "generators": generators}


def _facts(plan: RunPlan) -> dict[str, Any]:
    counts = plan.snapshot
    left = {why: sum(by.values()) for why, by in counts["left_out"].items()}
    left_out = (
        f"{counts['undecided']} undecided by the rule, {counts['unkept']} without a kept copy, "
        f"{plural(left.get('split', 0), 'near image')} of different parts, "
        f"{left.get('share', 0)} over a labeller's share"
    )
    training = plan.training
    steps = (
        None
        if training is None
        else ", ".join(f"{name} {value}" for name, value in training.items() if value is not None)
    )
    return {
        "contradicted": f"{plural(counts['contradicted'], 'image')}, decided by the rule",
        "left out": left_out,
        "champion": plan.champion or "none",
        "heads": ", ".join(plan.heads),
        "training": steps,
        "under way": plan.running,
        "verdict": "would wait: " + "; ".join(plan.missing) if plan.missing else f"would {plan.kind}",
    }
