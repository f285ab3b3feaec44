"""`code-worker releases` and `heads`: import, verify, promote, watch and roll back what judges."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from code_worker.cli.common.arguments import json_option
from code_worker.cli.common.database import open_ledger, quiet_settings
from code_worker.cli.common.output import plural, print_json, print_json_lines, print_table, say, who
from code_worker.cli.common.progress import progress
from code_worker.errors import ConfigurationError, IntegrityError, NoReleaseError
from code_worker.settings import load_settings

if TYPE_CHECKING:
    from code_worker.releases.registry import Registry
    from code_worker.releases.verify import VerifyReport
    from code_worker.settings import Settings
    from code_worker.store.engine import Store
    from code_worker.store.releases import Registered


@click.group()
def heads() -> None:
    """List the heads that plugins offer."""


@heads.command("list")
@json_option
def list_heads(*, as_json: bool) -> None:
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


_TAKES_OVER = "running workers take it over within seconds"
_NO_RELEASE = "no release yet: code-worker releases import hf:aimagelab/CoDE --promote (or a directory)"


@contextmanager
def _registry(settings: Settings, *, create: bool = False) -> Iterator[Registry]:
    from code_worker.plugins import load_plugins
    from code_worker.releases.registry import open_registry

    plugins = load_plugins(settings)
    with _create_ledger(settings) if create else open_ledger(settings) as store:
        yield open_registry(settings, store=store, plugins=plugins)


@contextmanager
def _create_ledger(settings: Settings) -> Iterator[Store]:
    """The first thing a new user does may be an import: the data directory's own database is made on the way."""
    from code_worker.store import migrate
    from code_worker.store.engine import open_store

    if settings.database_url is None:
        with closing(open_store(settings.resolved_database_url)) as store:
            migrate.upgrade(store)
    with open_ledger(settings) as store:
        yield store


def _warn_of_stale(settings: Settings, champion: str) -> None:
    from code_worker.store import policies

    with open_ledger(settings) as store:
        stale = store.run(lambda session: policies.stale(session, champion), write=False)
    if stale:
        what = plural(len(stale), f"policy ({stale[0].scope}) was", "policies were")
        click.echo(f"{what} calibrated on another release: `code-worker calibrate --after-promote`", err=True)


@click.group()
def releases() -> None:
    """Import, verify, promote, watch and roll back releases: encoder, heads and thresholds deployed as one."""


@releases.command("import")
@click.argument("source")
@click.option("--promote", is_flag=True, help="Make it the champion at once.")
@click.option("--note", default="", help="Free text for the manifest.")
@click.option(
    "--heads", "heads_dir", type=click.Path(path_type=Path), help="Directory of head files (.sav, .joblib)."
)
@click.option("--head", "named", multiple=True, metavar="FILE=NAME", help="Call the head of this file NAME.")
@click.option("--default-head", help="Head for jobs that nobody chose one for.")
@click.option("--skip-unknown-heads", is_flag=True, help="Leave out head files that cannot be taken.")
@click.option("--averaged", is_flag=True, help="Take a training checkpoint's averaged weights (EMA).")
@json_option
def import_(
    source: str,
    *,
    promote: bool,
    note: str,
    heads_dir: Path | None,
    named: tuple[str, ...],
    default_head: str | None,
    skip_unknown_heads: bool,
    averaged: bool,
    as_json: bool,
) -> None:
    """Import SOURCE as a release.

    SOURCE is a directory in the published form, hf:owner/name[@revision] (the published weights are
    hf:aimagelab/CoDE), a timm training checkpoint, or a release directory. Nothing of it is unpickled.
    """
    from code_worker.releases.importing import ImportOptions

    options = ImportOptions(
        heads_dir=heads_dir,
        head_names=_names(named),
        skip_unknown_heads=skip_unknown_heads,
        averaged=averaged,
        default_head=default_head,
        notes=note,
    )
    with _registry(quiet_settings(), create=True) as registry:
        before = {one.info.id for one in registry.list()}
        with progress(f"importing {source}"):
            release = registry.import_(source, options, by=who())
            if promote:
                registry.promote(release, by=who(), reason="promoted on import")
        _say_imported(registry.show(release), new=release not in before, promoted=promote, as_json=as_json)


def _names(named: tuple[str, ...]) -> dict[str, str]:
    pairs = [item.partition("=") for item in named]
    if wrong := [item for item, (file, _, name) in zip(named, pairs, strict=True) if not (file and name)]:
        raise ConfigurationError(f"--head {wrong[0]}: write FILE=NAME")
    return {file: name for file, _, name in pairs}


def _say_imported(release: Registered, *, new: bool, promoted: bool, as_json: bool) -> None:
    if as_json:
        print_json(release.summary())
        return
    name = release.info.id
    heads = ", ".join(release.heads) or "none"
    say(f"{'imported' if new else 'here already:'} {name} from {release.info.source}; heads: {heads}")
    if promoted:
        click.echo(f"{name} is the champion; {_TAKES_OVER}")
    elif release.heads:
        click.echo(f"make it live with: code-worker releases promote {name}")
    else:
        click.echo("it has no head, so it cannot be promoted: import it again with --heads DIR")


@releases.command("list")
@json_option
def list_(*, as_json: bool) -> None:
    """List releases, newest first; the champion judges, a challenger runs in its shadow."""
    settings = quiet_settings()
    with _registry(settings) as registry:
        rows = [release.summary() for release in registry.list()]
    if as_json:
        print_json_lines(rows)
        return
    for row in rows:
        row["heads"], row["alias"] = ", ".join(row["heads"]), ", ".join(row["aliases"])
        row["created"] = f"{row['created_at']:%Y-%m-%d %H:%M}"
    print_table(rows, ("id", "alias", "created", "source", "heads", "notes"), empty=_NO_RELEASE)


@releases.command()
@click.argument("release")
def show(release: str) -> None:
    """Print where a release stands, and its manifest, as JSON."""
    with _registry(quiet_settings()) as registry:
        found = registry.show(release)
    print_json({**found.summary(), "manifest": found.info.manifest})


@releases.command()
@click.argument("release")
@click.option("--reason", default="", help="Why, for the history.")
def promote(release: str, reason: str) -> None:
    """Make RELEASE the champion, after proving that it loads here."""
    settings = quiet_settings()
    with _registry(settings) as registry, progress(f"loading {release}"):
        before = registry.promote(release, by=who(), reason=reason)
    _warn_of_stale(settings, release)
    if before == release:
        click.echo(f"{release} is the champion already")
    else:
        click.echo(f"{release} is the champion{f' (was {before})' if before else ''}; {_TAKES_OVER}")


@releases.command("drop-head")
@click.argument("release")
@click.argument("head")
@click.option("--default-head", help="Head for jobs that nobody chose one for; unset: as before.")
def drop_head(release: str, head: str, default_head: str | None) -> None:
    """Make a release like RELEASE without HEAD; every other head stays as it is, file by file.

    Nothing judges with it until it is promoted; RELEASE stays.
    """
    from code_worker.store import policies

    settings = quiet_settings()
    with _registry(settings) as registry, progress(f"leaving {head} out of {release}"):
        made = registry.drop_head(release, head, default_head=default_head, by=who())
    with open_ledger(settings) as store:
        named = [row.scope for row in store.run(policies.in_force, write=False) if row.head == head]
    click.echo(f"{made} is {release} without {head}; make it live with: code-worker releases promote {made}")
    for scope in named:
        say(f"the policy of {scope} names {head}: change it first, or its jobs are rejected", err=True)


@releases.command()
@click.argument("release")
def sign(release: str) -> None:
    """Sign RELEASE with the first of the configured keys, after you made sure where it is from.

    What is imported or trained while a key is configured is signed by itself.
    """
    with _registry(quiet_settings()) as registry:
        registry.sign(release, by=who())
    click.echo(f"{release} is signed")


@releases.command()
@click.option("--reason", default="", help="Why, for the history.")
def rollback(reason: str) -> None:
    """Make the previous champion the champion again."""
    settings = quiet_settings()
    with _registry(settings) as registry, progress("loading the previous champion"):
        before = registry.champion()
        release = registry.rollback(by=who(), reason=reason)
    _warn_of_stale(settings, release)
    click.echo(f"{release} is the champion again (was {before}); {_TAKES_OVER}")


@releases.command()
@click.argument("release", required=False)
@click.option("--none", "withdraw", is_flag=True, help="Let no release score in shadow.")
@click.option("--reason", default="", help="Why, for the history.")
def challenge(release: str | None, *, withdraw: bool, reason: str) -> None:
    """Let RELEASE score live traffic in the champion's shadow, after proving that it loads here.

    It never acts: see what it would have said with `code-worker shadow report`.
    """
    if withdraw == (release is not None):
        raise click.UsageError("name a release, or say --none: exactly one of them")
    with _registry(quiet_settings()) as registry:
        if release is None:
            before = registry.withdraw(by=who(), reason=reason)
            click.echo(f"{before} is no longer the challenger" if before else "there is no challenger")
            return
        with progress(f"loading {release}"):
            before = registry.challenge(release, by=who(), reason=reason)
    if before == release:
        click.echo(f"{release} is the challenger already")
    else:
        click.echo(
            f"{release} is the challenger{f' (was {before})' if before else ''}; it scores in shadow and never acts: "
            "code-worker shadow report"
        )


@releases.command()
@click.argument("release", required=False)
@click.option("--device", help="Device to test; unset: that of the settings.")
@click.option(
    "--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="Arithmetic; unset: that of the settings."
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "torch", "openvino"]),
    help="Encoder's engine; unset: that of the settings.",
)
@click.option(
    "--images",
    default=256,
    show_default=True,
    type=click.IntRange(1),
    help="Crops to compare: without a flip n prove at 95 % that at most 3/n flip, 30,000 that 1 in 10,000 does.",
)
@json_option
def verify(
    release: str | None, *, device: str | None, precision: str | None, engine: str | None, images: int, as_json: bool
) -> None:
    """Check RELEASE (the champion, if none is named): hashes, then its answers on this device.

    The encoder runs over seeded crops here and in float32 on the CPU; exit status 1 when a file differs from the
    manifest, or when labels flip, of 10,000 crops and more when over 1 in 10,000 does.
    """
    from code_worker.releases.verify import verify as compare

    settings = quiet_settings()
    with _registry(settings) as registry:
        if (wanted := release or registry.champion()) is None:
            raise NoReleaseError("no champion to verify; name a release (code-worker releases list)")
        try:
            with progress(f"checking the files of {wanted}"):
                loaded = registry.load(wanted)
        except IntegrityError as error:  # what this command is there to find
            say(f"code-worker: {error}", err=True)
            sys.exit(1)
    with progress(f"comparing encoders of {wanted}", total=images) as advance:
        report = compare(
            loaded,
            device=device or settings.device,
            precision=precision or settings.precision,
            engine=engine or settings.engine,
            compile_kernels=settings.worker.compile is not False,
            images=images,
            on_images=advance,
        )
    if as_json:
        print_json(report.to_dict())
    else:
        _say_report(report)
    sys.exit(0 if report.passed else 1)


def _say_report(report: VerifyReport) -> None:
    click.echo(f"{report.release}: {plural(report.files, 'file matches', 'files match')} the manifest")
    click.echo(
        f"{report.engine} on {report.device} in {report.precision}, {report.kernels} kernels, against the reference "
        f"on {plural(report.images, 'crop')}: embeddings differ by at most {report.embedding_error:.2g}"
    )
    rows = [
        {
            "head": name,
            "score_error": f"{head.score_error:.2g}",
            "labels_flipped": f"{head.flips} of {report.images}",
            "at_most": f"{head.at_most_per_10000:.3g} in 10,000",
            "deterministic": "yes" if head.deterministic else "NO",
        }
        for name, head in report.heads.items()
    ]
    print_table(rows, ("head", "score_error", "labels_flipped", "at_most", "deterministic"), empty="no heads")
    click.echo("at_most: what these crops prove of all that are like them, at 95 %; more --images prove more")
    if not report.passed:
        click.echo(
            "FAILED: labels flip, more than 1 in 10,000 of these crops, or a head is not deterministic", err=True
        )
