"""`code-worker db`: create, upgrade, inspect, copy and restore the database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from code_worker.cli.common.database import has_database, missing_database, quiet_settings
from code_worker.cli.common.output import plural, print_json_lines, say
from code_worker.cli.common.progress import progress

if TYPE_CHECKING:
    from code_worker.store.backup import Undone
    from code_worker.store.engine import Store


@click.group()
def db() -> None:
    """Create, upgrade, inspect, copy and restore the database."""


@contextmanager
def _store() -> Iterator[Store]:
    from code_worker.store.engine import open_store

    with closing(open_store(quiet_settings().resolved_database_url, threads=1)) as store:
        yield store


def _revision() -> tuple[str | None, str]:
    """The database's revision, None while there is none, and its kind; what is not there stays so."""
    from code_worker.store import migrate

    # Opening SQLite's would make an empty one, and every other command would speak of its tables from then on.
    if migrate.is_missing(quiet_settings().resolved_database_url):
        return None, "sqlite"
    with _store() as store:
        return migrate.current(store), store.dialect


@db.command()
@click.option("--sql", is_flag=True, help="Print the SQL that makes an empty database current; change nothing.")
@click.option("--beside", is_flag=True, help="Make our tables in a database that another application migrates too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def upgrade(*, sql: bool, beside: bool, as_json: bool) -> None:
    """Bring the database to the revision that this version needs; does nothing when it is there, or newer."""
    from code_worker.store import migrate

    if sql:
        click.echo(migrate.script(quiet_settings().resolved_database_url), nl=False)
        return
    with _store() as store:
        before = migrate.upgrade(store, beside=beside)
        now = migrate.current(store)
    if as_json:
        newer = migrate.is_newer(now)
        print_json_lines([{"before": before, "revision": now, "changed": before != now, "newer": newer}])
    elif migrate.is_newer(now):
        say(f"{_newer(now, migrate.head())}: nothing to do")
    elif before == now:
        say(f"database is current ({now})")
    else:
        say(f"database upgraded from {before or 'empty'} to {now}")


@db.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def current(context: click.Context, *, as_json: bool) -> None:
    """Show the database's revision; exit status 1 when it is older than the one that this version needs."""
    from code_worker.store import migrate

    settings, (have, kind), need = quiet_settings(), _revision(), migrate.head()
    newer = migrate.is_newer(have)
    if as_json:
        found = {"dialect": kind, "revision": have, "needed": need, "current": have == need, "newer": newer}
        print_json_lines([found])
    elif newer:
        say(f"{kind} database: {_newer(have, need)}; it serves")
    elif migrate.is_unreleased(have):
        say(f"{kind} database: at revision {have}, of a version before the first release, and cannot be upgraded")
    elif have is None and not has_database(settings):
        say(f"{missing_database(settings)}; this version needs {need}: run `code-worker db upgrade`")
    else:
        hint = "" if have == need else f"; this version needs {need}: run `code-worker db upgrade`"
        say(f"{kind} database, revision {have or 'none'}{hint}")
    if have != need and not newer:
        context.exit(1)


def _newer(have: str | None, need: str) -> str:
    return f"the database is newer, at revision {have}; this version knows revisions up to {need}"


@db.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def backup(file: Path, *, as_json: bool) -> None:
    """Copy the SQLite database to FILE while everything runs; the copy is whole, checked and of one moment.

    For PostgreSQL use pg_dump. Kept copies of labelled images and releases are files of their own: copy them too.
    """
    from code_worker.store.backup import backup as copy

    size = copy(quiet_settings().resolved_database_url, file)
    if as_json:
        print_json_lines([{"file": str(file), "size_bytes": size}])
    else:
        say(f"{file}: {plural(size, 'byte')}")


@db.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--force", is_flag=True, help="Also while parts were heard of lately.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def restore(file: Path, *, force: bool, as_json: bool) -> None:
    """Make the SQLite database what it was in FILE, which `db backup` wrote; stop workers, trainer and beat before.

    The present one is copied beside it first; delete that copy later, since it keeps what is erased from now on.
    Erasures that the copy does not know are undone: each is listed with the command that asks for it again. What was
    unfinished then is published again by the sweeper.

    Exit status: 0 restored; 1 parts are running, or the copy is not whole; 2 FILE is no copy.
    """
    from code_worker.store.backup import aside_of
    from code_worker.store.backup import restore as bring_back
    from code_worker.worker.background import silence_s

    settings = quiet_settings()
    url = settings.resolved_database_url
    aside = aside_of(url, datetime.now(UTC))
    bring_back(url, file, aside, silence_s=None if force else silence_s(settings))
    kept = aside if aside.exists() else None
    if as_json:
        lost = list(_undone(kept, file))
        record = {"restored": str(file), "before": kept and str(kept), "undone": [asdict(one) for one in lost]}
        print_json_lines([record])
        return
    say(f"restored {file}")
    if kept:
        say(f"what was there before is in {kept} (delete it later: it keeps what is erased from now on)")
    count = 0
    for count, one in enumerate(_undone(kept, file), 1):
        _say_undone(one, first=count == 1)
    again = f"erase again, by the commands printed here ({plural(count, 'erasure')}), " if count else ""
    say(f"next: code-worker db upgrade, {again}then start the workers")


def _undone(before: Path | None, copy: Path) -> Iterator[Undone]:
    """Looked for once the copy is back: with many jobs and erasures it takes minutes."""
    from code_worker.store.backup import undone

    with progress("looking for erasures that are undone", counted=True) as advance:
        for one in undone(before, copy) if before else ():
            yield one
            advance(1)


def _say_undone(one: Undone, *, first: bool) -> None:
    if first:
        say("undone are these erasures, asked for since the copy was made:")
    say(f"  {one.id}  {one.scope}, {one.at}, by {one.by}{f': {one.why}' if one.why else ''}")
    for command in one.again or ("nothing that it erased is in the copy",):
        say(f"    {command}")
