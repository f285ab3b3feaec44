"""`code-worker db`: create, upgrade and inspect the database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import click

from code_worker.cli.ledger import quiet_settings
from code_worker.cli.output import print_json_lines

if TYPE_CHECKING:
    from code_worker.store.engine import Store

__all__ = ["db"]


@click.group()
def db() -> None:
    """Create, upgrade and inspect the database."""


@contextmanager
def _store() -> Iterator[Store]:
    from code_worker.store.engine import open_store  # noqa: PLC0415 - SQLAlchemy, only once a command runs

    with closing(open_store(quiet_settings().resolved_database_url, threads=1)) as store:
        yield store


@db.command()
@click.option("--sql", is_flag=True, help="Print the SQL that makes an empty database current; change nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def upgrade(*, sql: bool, as_json: bool) -> None:
    """Bring the database to the revision that this version needs; does nothing when it is there."""
    from code_worker.store import migrate  # noqa: PLC0415 - Alembic, as above

    if sql:
        click.echo(migrate.script(quiet_settings().resolved_database_url), nl=False)
        return
    with _store() as store:
        before = migrate.upgrade(store)
        now = migrate.current(store)
    if as_json:
        print_json_lines([{"before": before, "revision": now, "changed": before != now}])
    elif before == now:
        click.echo(f"database is current ({now})")
    else:
        click.echo(f"database upgraded from {before or 'empty'} to {now}")


@db.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def current(context: click.Context, *, as_json: bool) -> None:
    """Show the database's revision; exit status 1 when it is not the one that this version needs."""
    from code_worker.store import migrate  # noqa: PLC0415 - Alembic, as above

    with _store() as store:
        have, need, kind = migrate.current(store), migrate.head(), store.dialect
    if as_json:
        print_json_lines([{"dialect": kind, "revision": have, "needed": need, "current": have == need}])
    else:
        hint = "" if have == need else f"; this version needs {need}: run `code-worker db upgrade`"
        click.echo(f"{kind} database, revision {have or 'none'}{hint}")
    if have != need:
        context.exit(1)
