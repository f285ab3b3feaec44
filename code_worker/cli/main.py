"""Entry point of `code-worker`: a group that imports a command only when it is used."""

from __future__ import annotations

import errno
import os
import sys
from importlib import import_module
from typing import Any

import click

from code_worker._version import __version__
from code_worker.cli.common.interrupts import noted_interrupts
from code_worker.errors import ArtifactError, ArtifactStorageError, CodeWorkerError, ConfigurationError, nearest
from code_worker.logs import redact
from code_worker.system.terminal import printable

_OUTPUT_FAILS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE})
_COMMANDS = {
    "audit": ("code_worker.cli.operations.audit:audit", "Show who changed what, and check that record."),
    "beat": ("code_worker.cli.operations.up:beat", "Run the scheduler (one per deployment, supervised)."),
    "bench": ("code_worker.cli.operations.bench:bench", "Measure what this machine can judge, and what limits it."),
    "calibrate": ("code_worker.cli.deployment.calibrate:calibrate", "Set thresholds by labelled images."),
    "data": ("code_worker.cli.learning.data:data", "Look into labelled data sets, and pack them into shards."),
    "db": ("code_worker.cli.operations.db:db", "Create, upgrade, inspect, copy and restore the database."),
    "demo": ("code_worker.cli.operations.demo:demo", "Run the whole main job on a toy set and print what happened."),
    "doctor": (
        "code_worker.cli.operations.doctor:doctor",
        "Check each part of an installation, with a hint for each fault.",
    ),
    "enqueue": ("code_worker.cli.moderation.enqueue:enqueue", "Enqueue images: URIs, a prefix, or a list."),
    "erase": ("code_worker.cli.moderation.erase:erase", "Erase all that is kept of a job, an image or a tenant."),
    "erasures": (
        "code_worker.cli.moderation.erase:erasures",
        "Show receipts of erasures; say whether something was erased.",
    ),
    "heads": ("code_worker.cli.deployment.releases:heads", "List the heads that plugins offer."),
    "jobs": ("code_worker.cli.moderation.jobs:jobs", "List, show and retry jobs."),
    "label": ("code_worker.cli.learning.labels:label", "Say that an image is real or fake."),
    "labels": (
        "code_worker.cli.learning.labels:labels",
        "Import, list and export labels, and show where they conflict.",
    ),
    "plugins": ("code_worker.cli.operations.plugins:plugins", "List, create and check plugins."),
    "policies": (
        "code_worker.cli.deployment.policies:policies",
        "Show and set thresholds per tenant and content type.",
    ),
    "refit": ("code_worker.cli.learning.retrain:refit", "Fit the heads again on labelled images; promote if better."),
    "releases": (
        "code_worker.cli.deployment.releases:releases",
        "Import, verify, promote, watch and roll back releases.",
    ),
    "rescore": (
        "code_worker.cli.moderation.rescore:rescore",
        "Judge history again, with another release, head or policy.",
    ),
    "retrain": (
        "code_worker.cli.learning.retrain:retrain",
        "Train the encoder on labelled images; promote if better.",
    ),
    "runs": ("code_worker.cli.learning.runs:runs", "List and show retrains and refits."),
    "scan": ("code_worker.cli.moderation.scan:scan", "Judge images now, in this process, with no broker."),
    "schedule": ("code_worker.cli.learning.runs:schedule", "Show when retrains and refits are due."),
    "shadow": ("code_worker.cli.deployment.shadow:shadow", "Compare the challenger with the champion."),
    "trainer": (
        "code_worker.cli.operations.up:trainer",
        "Run what retrains and refits (one per deployment, supervised).",
    ),
    "up": ("code_worker.cli.operations.up:up", "Run the whole stack on this machine."),
    "validate": (
        "code_worker.cli.deployment.validate:validate",
        "Measure a release on labelled images, and hold it to bounds.",
    ),
    "verdicts": ("code_worker.cli.moderation.verdicts:verdicts", "List, show and export verdicts."),
    "worker": ("code_worker.cli.operations.up:worker", "Run a moderation worker."),
}


class LazyGroup(click.Group):
    """Knows its commands by name and help line; imports one when it is called."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; click's own errors quote words that somebody's list may have brought."""
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            error.message = printable(error.message)  # type: ignore[misc]  # raised anew, it would lose its class
            raise

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command, sorted."""
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)  # noqa: S101 - a wrong table above is our own bug
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the first word names; an unknown one is refused with those that are spelt alike."""
        name = args[0]
        if name not in _COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            near = " or ".join(f"'{each}'" for each in nearest(name, sorted(_COMMANDS), 3))
            ctx.fail(f"No such command '{name}'.{f' Did you mean {near}?' if near else ''}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command list, from the table: `--help` imports nothing."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in sorted(_COMMANDS.items())])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="code-worker")
def cli() -> None:
    """Tell real images from generated ones, at scale.

    Exit status: 0 done; 1 some images were rejected, a check failed, or the output is full or was closed; 2 wrong use
    or configuration, or a release that cannot be loaded here.
    """


def _open_what_is_closed() -> None:
    """Python has no stream where a shell closed it (`>&-`); what is written there is to be lost, and fail nothing."""
    # The interpreter sets a stream to None where its descriptor was closed at the start.
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: PTH123, SIM115 - for the process's life
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - for the process's life
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - for the process's life


def main() -> None:
    """Runs the command line; our own errors end as one line on stderr, never as a traceback."""
    _open_what_is_closed()
    try:
        with noted_interrupts():
            try:
                cli(prog_name="code-worker")
            finally:
                sys.stdout.flush()  # what a command left in it fails here, and not when Python ends
    # Before OSError, of which it is a kind.
    except PermissionError as error:
        place = error.filename or "a file"
        click.echo(printable(f"code-worker: this user may not use {place}: {error.strerror}"), err=True)
        sys.exit(2)
    except OSError as error:
        # Of a file it names the file; where the output goes to is full or gone, and a traceback would go there, too.
        if error.filename is not None or error.errno not in _OUTPUT_FAILS:
            raise
        if error.errno != errno.EPIPE:  # who closed it has seen enough
            click.echo(f"code-worker: cannot write the output: {error.strerror}", err=True)
        # Python writes what is left of it once more at its end, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except CodeWorkerError as error:
        click.echo(printable(f"code-worker: {redact(str(error))}"), err=True)
        # What is only away may come back; a release or file that cannot be used stays so.
        lasts = isinstance(error, ConfigurationError | ArtifactError) and not isinstance(error, ArtifactStorageError)
        # A supervisor may start again after 1; after 2 somebody has to do something first.
        sys.exit(2 if lasts else 1)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "code_worker":
            raise
        click.echo(
            f"code-worker: this command needs {error.name}: pip install 'code-worker[worker,embedded]'", err=True
        )
        sys.exit(2)
