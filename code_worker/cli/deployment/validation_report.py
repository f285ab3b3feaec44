"""Output of `code-worker validate`: tables, metrics.json, and the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from rich.table import Table

from code_worker.cli.common.output import console, say
from code_worker.cli.common.release_runtime import list_skipped
from code_worker.data.datasets.examples import Skipped
from code_worker.errors import ConfigurationError
from code_worker.system.terminal import printable

if TYPE_CHECKING:
    from code_worker.training.evaluation.compare import Compared
    from code_worker.training.gate.paired import Difference

METRICS: Final = "metrics.json"
PAGE: Final = "report.html"
_GROUP_FIGURES: Final = {
    "real acc": ("deployed", "real_accuracy"),
    "fake acc": ("deployed", "fake_accuracy"),
    "acc": ("deployed", "accuracy"),
    "balanced": ("deployed", "balanced_accuracy"),
    "AP": ("ranking", "ap"),
    "AUROC": ("ranking", "auroc"),
    "TPR@1%": ("ranking", "tpr_at_1pct_fpr"),
    "TPR@5%": ("ranking", "tpr_at_5pct_fpr"),
    "EER": ("ranking", "eer"),
    "ECE": ("ranking", "ece"),
    "Brier": ("ranking", "brier"),
}
_WITH_INTERVAL: Final = frozenset({"real acc", "fake acc", "balanced", "AUROC"})
_ABSOLUTE: Final = frozenset({"ECE", "Brier"})


def prepare_directory(directory: Path) -> None:
    """Makes the directory, and looks for what draws the page, before the long work and not after it.

    Raises:
        ConfigurationError: it cannot be made or written to, or the page cannot be drawn here.
    """
    if absent := [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]:
        raise ConfigurationError(
            f"--out draws a page with {' and '.join(absent)}: pip install 'code-worker[training]'"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f".{METRICS}").touch()
        (directory / f".{METRICS}").unlink()
    except OSError as error:
        raise ConfigurationError(f"--out {directory}: {error.strerror}") from error


def write_reports(directory: Path, report: Mapping[str, Any], page: str) -> None:
    """Writes `metrics.json` and `report.html`, each whole or not at all.

    Raises:
        ConfigurationError: the directory cannot be written to.
    """
    contents = {METRICS: json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n", PAGE: page}
    try:
        for name, text in contents.items():
            beside = directory / f".{name}"
            beside.write_text(text, encoding="utf-8")
            beside.replace(directory / name)
    except OSError as error:
        raise ConfigurationError(f"--out {directory}: {error.strerror}") from error
    say(f"wrote {directory / METRICS} and {directory / PAGE}", err=True)


def print_report(report: Mapping[str, Any], compared: Sequence[Compared] = ()) -> None:
    """Tables on stdout; what was skipped on stderr."""
    release, data, plan = report["release"], report["data"], report["plan"]
    deployed = plan["thresholds"]["deployed"]
    toy = ", a toy" if release["toy"] else ""
    say(f"release {release['id']}{toy} on {data['source']}: {data['real']} real, {data['fake']} fake")
    say(f"real below {deployed['low']:g}, fake from {deployed['high']:g} (policy {deployed['policy']}); percent")
    say_learned(data)
    for head in release["heads"]:
        for condition in plan["conditions"]:
            say("", f"{head}, {condition}")
            console().print(_groups(report, head, condition))
    for head in release["heads"]:
        if lines := published_lines(report, head):
            say("", f"{head} at 0.5, in the published form (real fake all)")
            say(*lines)
    if compared:
        say("", f"compared with {report['compared']['against']}: points gained or lost, with 95 % intervals")
        console().print(_comparison(compared))
    list_skipped([Skipped(**one) for one in (*report["skipped"], *report["passed_over"])])


def say_learned(data: Mapping[str, Any]) -> None:
    """Says which images were left out, on stdout, and what nobody recorded, in red on stderr."""
    from code_worker.training.evaluation.evaluate import learned_lines

    said, warned = learned_lines(data)
    for line in said:
        say(line)
    for line in warned:
        click.secho(printable(line), fg="red", err=True)


def published_lines(report: Mapping[str, Any], head: str) -> list[str]:
    """`key: real  fake  all`, a line for each condition and generator, rounded as the published script rounds."""
    from code_worker.training.evaluation.evaluate import published_table

    return [
        f"{key}: {'  '.join('-' if share is None else str(round(share, 2)) for share in shares)}"
        for key, *shares in published_table(report, head)
    ]


def _groups(report: Mapping[str, Any], head: str, condition: str) -> Table:
    table = _table("group", "n", "real", "fake", *_GROUP_FIGURES)
    for row in report["results"]:
        if (row["head"], row["condition"]) == (head, condition):
            name = row["name"] if row["kind"] == "overall" else f"{row['kind']} {row['name']}"
            cells = (_cell(title, row[part][figure]) for title, (part, figure) in _GROUP_FIGURES.items())
            table.add_row(name, *(str(row[count]) for count in ("n", "n_real", "n_fake")), *cells)
    return table


def _comparison(compared: Sequence[Compared]) -> Table:
    table = _table("head", "condition", "group", "n", "real acc", "fake acc", "balanced")
    for one in compared:
        changes = (_change(one.difference[f"{name}_accuracy"]) for name in ("real", "fake", "balanced"))
        name = one.name if one.kind == "overall" else f"{one.kind} {one.name}"
        table.add_row(one.head, one.condition, name, str(one.n), *changes)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        words = column in {"head", "condition", "group"}
        table.add_column(column, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    return table


def _cell(title: str, figure: Mapping[str, float | None] | None) -> str:
    if figure is None or figure["value"] is None:
        return "-"
    if title in _ABSOLUTE:
        return f"{figure['value']:.3f}"
    text = f"{100 * figure['value']:.1f}"
    if title in _WITH_INTERVAL and figure["low"] is not None and figure["high"] is not None:
        text += f" [{100 * figure['low']:.0f}–{100 * figure['high']:.0f}]"
    return text


def _change(change: Difference | None) -> str:
    return "-" if change is None else f"{100 * change.value:+.1f} [{100 * change.low:+.1f} {100 * change.high:+.1f}]"
