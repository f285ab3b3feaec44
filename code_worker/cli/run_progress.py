"""Where a run stands, on stderr while it works; silent when that is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from code_worker.cli.output import console

__all__ = ["run_progress"]

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
