"""`code-worker label`: one statement about one image."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict

import click

from code_worker.cli.arguments import json_option
from code_worker.cli.ledger import open_ledger, quiet_settings
from code_worker.cli.output import print_json, say
from code_worker.cli.who import who

__all__ = ["label"]


@click.command()
@click.argument("target", metavar="URI|JOB|HASH")
@click.argument("label_", metavar="real|fake", type=click.Choice(["real", "fake"]))
@click.option("--generator", help="What made a fake one, if you know.")
@click.option("--collection", help="Where the image came from: a data set, a channel.")
@click.option("--group", help="Record or post that the image belongs to: its images stay in one part of the labels.")
@click.option("--by", help="Who says so; unset: you.")
@click.option("--note", default="", help="Free text.")
@json_option
def label(
    *,
    target: str,
    label_: str,
    generator: str | None,
    collection: str | None,
    group: str | None,
    by: str | None,
    note: str,
    as_json: bool,
) -> None:
    """Say that an image is real or fake, and keep a copy of it.

    The image is named by a URI or path that the settings allow, by the job that judged it, or by the content hash of
    a copy that is kept. Saying the same again adds nothing; saying something else is another statement.

    Exit status: 0 it is said; 1 the image could not be read, or is no image; 2 wrong use or configuration.
    """
    if not target.strip():
        raise click.UsageError("an empty address names no image: is a variable of a script unset?")
    from code_worker.data.labelling import Labeller

    settings = quiet_settings()
    with open_ledger(settings) as store, closing(Labeller(settings, store)) as labeller:
        try:
            done = labeller.label(
                target,
                label_,
                by=who() if by is None else by,
                generator=generator,
                collection=collection,
                group=group,
                note=note,
                source="cli",
                actor=who(),
            )
        except ValueError as error:
            raise click.UsageError(str(error)) from None
    if as_json:
        print_json({**asdict(done), "label": label_})
    else:
        say(f"{'labelled' if done.new else 'said before:'} {label_}: {done.uri} ({done.sha256})")
