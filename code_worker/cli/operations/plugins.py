"""`code-worker plugins`: what is installed, a new one, and whether one keeps the rules."""

from __future__ import annotations

import re
import sys
import threading
import traceback
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from code_worker.cli.common.arguments import JSON_OBJECT, json_option
from code_worker.cli.common.database import open_ledger, quiet_settings
from code_worker.cli.common.output import moment, plural, print_json, print_json_lines, print_table, say
from code_worker.errors import ConfigurationError, NoReleaseError, PluginError, UnknownHeadError
from code_worker.settings import load_settings

if TYPE_CHECKING:
    from code_worker.plugins import Plugins
    from code_worker.testing.conformance import CheckResult
    from code_worker.types import Job


# Narrower than a head's name: a class, a module and a distribution are named after it.
_NEW_NAME: Final = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")


@click.group()
def plugins() -> None:
    """List, create and check plugins.

    A plugin is code that runs with your rights: install only what you trust.
    """


@plugins.command("list")
@json_option
def list_(*, as_json: bool) -> None:
    """List every plugin that is there: packages by entry point, and files of CODE_WORKER_PLUGINS_DIR.

    What is not in use is listed with the reason. Exit status: 0; 2 when one is refused, which stops every program.
    """
    from code_worker.plugins import find_plugins  # imports strangers' code

    rows = [{**asdict(one.plugin), "state": one.state, "why": one.why} for one in find_plugins(quiet_settings())]
    if as_json:
        print_json_lines(rows)
    else:
        shown = [{**row, "hooks": " ".join(row["hooks"]), "heads": " ".join(row["heads"])} for row in rows]
        columns = ("name", "version", "distribution", "state", "heads", "hooks", "path", "why")
        print_table(shown, columns, empty="no plugin is installed")
    if any(row["state"] == "refused" for row in rows):
        sys.exit(2)


@plugins.command()
@json_option
def seen(*, as_json: bool) -> None:
    """List the plugins that workers had when they started, by host, with versions and from when to when.

    The version of a single file is the beginning of its sha256. What is installed here: `code-worker plugins list`.
    """
    from code_worker.store import workers

    with open_ledger() as store:
        rows = [asdict(one) for one in store.run(workers.plugins_seen, write=False)]
    if as_json:
        print_json_lines(rows)
        return
    shown = [
        {
            **row,
            "hooks": " ".join(row["hooks"]),
            "first_seen": moment(row["first_seen"]),
            "last_seen": moment(row["last_seen"]),
        }
        for row in rows
    ]
    columns = ("host", "name", "version", "distribution", "first_seen", "last_seen", "hooks")
    print_table(shown, columns, empty="no worker has started yet")


@plugins.command("select-head")
@click.option("--heads", default="", metavar="A,B", help="Heads of the release; unset: those of the champion.")
@click.option("--uri", default="s3://bucket/image.jpg", show_default=True, help="Of the job.")
@click.option("--tenant", help="Of the job.")
@click.option("--content-type", help="Of the job.")
@click.option("--priority", type=click.IntRange(0, 9), default=4, show_default=True, help="Of the job.")
@click.option("--metadata", type=JSON_OBJECT, default="{}", help="Of the job, as a JSON object.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="Seconds after which the plugins must have answered.",
)
@json_option
def select_head(*, heads: str, timeout_s: float, as_json: bool, **job: Any) -> None:
    """Ask the plugins which head they would choose for a job like this; nothing is enqueued or written.

    Exit status: 0; 2 when a plugin fails, does not answer in time, or names a head that the release lacks.
    """
    from code_worker.types import Job

    names = tuple(filter(None, heads.split(","))) or _champions_heads()
    chosen = _chosen(_load(), Job(id="sample", **job), names, timeout_s)
    if chosen is not None and chosen not in names:
        raise UnknownHeadError(chosen, names)
    if as_json:
        print_json({"chosen": chosen, "heads": list(names)})
    else:
        click.echo(chosen or "no plugin has an opinion: the policy, CODE_WORKER_HEAD or the release decides")


def _chosen(loaded: Plugins, job: Job, names: tuple[str, ...], timeout_s: float) -> str | None:
    """Returns what the plugins choose, on a thread that is left behind when it does not answer."""
    answer: Future[str | None] = Future()

    def ask() -> None:
        try:
            answer.set_result(loaded.select_head(job, names))
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            answer.set_exception(error)

    thread = threading.Thread(target=ask, name="select-head", daemon=True)
    thread.start()
    try:
        return answer.result(timeout_s)
    except TimeoutError:
        if answer.done():
            raise
        stack = sys._current_frames().get(thread.ident or 0)  # noqa: SLF001 - the only way to see where a thread is
        who = loaded.chooser_in(traceback.walk_stack(stack)) if stack else "a plugin"
        raise PluginError(
            f"code_worker_select_head of {who} has not answered in {timeout_s:g} s: in a worker it would hold up "
            "its batch until the watchdog ends the process; give what it waits for a time limit of its own"
        ) from None


def _champions_heads() -> tuple[str, ...]:
    from code_worker.store import releases

    with open_ledger() as store:
        found = store.run(releases.champions_heads, write=False)
    if found is None:
        raise NoReleaseError("no champion whose heads could be chosen from: name some with --heads linear,knn")
    return found


def _load() -> Plugins:
    from code_worker.plugins import load_plugins  # imports strangers' code

    return load_plugins(load_settings())


@plugins.command("new")
@click.argument("name")
@click.option(
    "--dir",
    "parent",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(),
    help="Where to put its directory; unset: here.",
)
def new(name: str, parent: Path) -> None:
    """Write a plugin to start from, with a head called NAME and a test that passes."""
    from code_worker.cli.scaffold import write_plugin  # only this command needs it
    from code_worker.plugins import HEAD_NAME

    if _NEW_NAME.fullmatch(name) is None or HEAD_NAME.fullmatch(name) is None:
        raise ConfigurationError(
            f"{name!r} cannot name a new plugin: begin with a lower case letter, go on with lower case letters and "
            "digits, put a single '-' or '_' between words only, and use at most 64 characters"
        )
    loaded = _load()
    if name in loaded.heads():
        raise ConfigurationError(f"there is a head called {name!r} already, of plugin {loaded.provider(name)}")
    directory = write_plugin(name, parent)
    click.echo(f"wrote {directory}")
    click.echo(f"next: pip install -e '{directory}[test]' && pytest {directory} && code-worker plugins check {name}")


@plugins.command("check")
@click.argument("name")
@click.option("--options", type=JSON_OBJECT, default="{}", help="Options of the head, as a JSON object.")
@json_option
def check(*, name: str, options: dict[str, Any], as_json: bool) -> None:
    """Run the conformance kit on the head NAME, or on every head of the plugin NAME.

    Each check is a line as it ends. A head that cannot be fitted, or whose scores are no scores, is not tried any
    further. Options of CODE_WORKER_HEADS are used where --options does not name them.

    Exit status: 0 all checks passed; 1 some failed; 2 no such head, plugin or option, or it cannot be loaded.
    """
    from code_worker.testing.conformance import each_check

    loaded, passed = _load(), True
    heads = _heads_of(loaded, name)
    for head, chosen in _options_of(loaded, heads, options).items():
        for result in each_check(loaded.head_class(head), chosen):
            passed = passed and result.passed
            if as_json:
                print_json_lines([{"head": head, **asdict(result)}])
            else:
                _say_result(head, result)
    if not heads and not as_json:
        say(f"plugin {name} loads; it offers no head to check")
    if not passed:
        sys.exit(1)


def _say_result(head: str, result: CheckResult) -> None:
    state = "passed" if result.passed else "FAILED"
    say(f"{head}  {result.name:<18}  {f'{state}, with a warning' if result.warning else state}")
    for name in ("expected", "seen", "fix", "warning"):
        if text := getattr(result, name):
            say(f"    {name}: {text}")
    if result.left_out:
        say(f"    {plural(result.left_out, 'other check')} not run, since they rest on this one: mend it first")


def _options_of(loaded: Plugins, heads: tuple[str, ...], options: dict[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Options of these heads, as a fit would have them: those given here before those of the settings."""
    from code_worker.training.refit import plan_heads

    named = {head.replace("-", "_") for head in heads}
    ours = {name: chosen for name, chosen in load_settings().heads.items() if name.replace("-", "_") in named}
    plans = plan_heads(loaded, None, ours, dict.fromkeys(heads, options))
    return {head: plan.options for head, plan in plans.items()}


def _heads_of(loaded: Plugins, name: str) -> tuple[str, ...]:
    if name in loaded.heads():
        return (name,)
    for plugin in loaded.installed():
        if plugin.name == name:
            return plugin.heads
    known = tuple(sorted({*loaded.heads(), *(plugin.name for plugin in loaded.installed())}))
    hint = UnknownHeadError(name, known).hint
    raise ConfigurationError(f"no head and no plugin is called {name!r}; known: {', '.join(known)}{hint}")
