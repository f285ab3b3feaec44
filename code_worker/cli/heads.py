"""`code-worker heads`: which heads there are and where they come from."""

from __future__ import annotations

import click

from code_worker.cli.arguments import json_option
from code_worker.cli.output import print_json_lines, print_table
from code_worker.settings import load_settings

__all__ = ["heads"]


@click.group()
def heads() -> None:
    """List the heads that plugins offer."""


@heads.command("list")
@json_option
def list_(*, as_json: bool) -> None:
    """List every head with the plugin that offers it."""
    from code_worker.plugins import load_plugins  # imports strangers' code

    plugins = load_plugins(load_settings())
    rows = [
        {
            "name": name,
            "summary": spec.summary,
            "plugin": (provider := plugins.provider(name)).name,
            "distribution": provider.distribution,
            "version": provider.version,
        }
        for name, spec in plugins.heads().items()
    ]
    if as_json:
        print_json_lines(rows)
        return
    print_table(rows, ("name", "summary", "plugin", "distribution", "version"), empty="no plugin offers a head")
