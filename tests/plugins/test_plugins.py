"""Plugins by entry point and by file: found, checked, and loud when something is wrong with them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from code_worker import hookimpl
from code_worker.errors import PluginError, UnknownHeadError
from code_worker.heads import HeadSpec
from code_worker.plugins import InstalledPlugin, Plugins, find_plugins, load_plugins
from code_worker.settings import Settings
from code_worker.types import Job

FILE = """
from code_worker import HeadSpec, hookimpl

@hookimpl
def code_worker_register_heads():
    return [HeadSpec({name!r}, "somewhere:SomeHead", "a test")]
"""


OFFER = FILE.format(name="x")
PLUGIN = "from code_worker import hookimpl\n"


def from_files(directory: Path, **sources: str) -> Plugins:
    directory.mkdir(exist_ok=True)
    for stem, source in sources.items():
        (directory / f"{stem}.py").write_text(source, encoding="utf-8")
    return load_plugins(Settings(plugins_dir=directory))


def refusal(directory: Path, source: str) -> str:
    with pytest.raises(PluginError) as caught:
        from_files(directory, broken=source)
    assert str(directory / "broken.py") in str(caught.value)
    return str(caught.value)


def test_the_built_in_heads_come_by_entry_point() -> None:
    plugins = load_plugins(Settings())
    assert {"linear", "knn", "svm"} <= set(plugins.heads())
    provider = plugins.provider("knn")
    assert provider.name == "code_worker_heads"
    assert provider.distribution == "code-worker"
    assert provider.hooks == ("code_worker_register_heads",)
    assert provider.heads == ("linear", "knn", "svm")
    assert plugins.head_class("knn").__name__ == "NearestNeighbourHead"


def test_loading_plugins_imports_no_head() -> None:
    script = (
        "import sys\nfrom code_worker.plugins import load_plugins\nfrom code_worker.settings import Settings\n"
        "load_plugins(Settings()).heads()\nprint({'numpy', 'safetensors', 'sklearn', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_file_in_the_plugins_directory_is_a_plugin(tmp_path: Path) -> None:
    plugins = from_files(tmp_path, mine=FILE.format(name="mine-2"), _part="raise SystemExit", notes=PLUGIN)
    assert "mine-2" in plugins.heads()
    provider = plugins.provider("mine-2")
    assert (provider.name, provider.distribution, provider.path) == ("mine", "mine", tmp_path / "mine.py")
    assert provider.version.startswith("sha256:")
    assert [each.name for each in plugins.installed()][-2:] == ["mine", "notes"]
    assert "code_worker_plugin_mine" in sys.modules


def test_tests_and_helpers_beside_a_plugin_are_no_plugins_and_can_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    sources = {
        "mine": f"{PLUGIN}from pick_helper import pick\n@hookimpl\ndef code_worker_select_head(job):\n"
        "    from _late_helper import later\n    return later(pick())\n",
        "pick_helper": "def pick(): return 'knn'\n",
        "_late_helper": "def later(name): return name\n",
        "test_mine": f"{PLUGIN}raise SystemExit\n",
        "mine_test": f"{PLUGIN}raise SystemExit\n",
        "conftest": f"{PLUGIN}raise SystemExit\n",
    }
    plugins = from_files(tmp_path, **sources)
    assert [one.name for one in plugins.installed() if one.path] == ["mine"]
    assert plugins.select_head(Job("1", "a"), ["knn"]) == "knn"
    found = {one.plugin.name: (one.state, one.why) for one in find_plugins(Settings(plugins_dir=tmp_path))}
    assert found.pop("mine") == found.pop("code_worker_heads") == ("in use", "")
    assert found == {
        "_late_helper": ("passed over", "its name begins with _: a part of others"),
        "conftest": ("passed over", "its name is that of a test"),
        "mine_test": ("passed over", "its name is that of a test"),
        "pick_helper": ("passed over", "it names no hook"),
        "test_mine": ("passed over", "its name is that of a test"),
    }


def test_a_helper_never_takes_the_place_of_an_installed_module(tmp_path: Path) -> None:
    from_files(tmp_path, json="raise SystemExit", mine=f"{PLUGIN}import json\nassert json.dumps\n")


def test_a_broken_plugin_does_not_hide_the_others_from_who_looks(tmp_path: Path) -> None:
    with pytest.raises(PluginError):
        from_files(tmp_path, a_broken=f"{PLUGIN}1 / 0", b=FILE.format(name="b"), c=FILE.format(name="b"))
    states = {one.plugin.name: one for one in find_plugins(Settings(plugins_dir=tmp_path))}
    assert states["b"].state == "in use"
    assert states["b"].plugin.heads == ("b",)
    assert "ZeroDivisionError: division by zero" in states["a_broken"].why
    assert "head 'b' is offered by" in states["c"].why
    assert {states["a_broken"].state, states["c"].state} == {"refused"}


def test_an_unknown_head_is_refused_with_those_there_are() -> None:
    with pytest.raises(UnknownHeadError, match=r"unknown head 'nope'; known: .*knn, linear, svm"):
        load_plugins(Settings()).head_class("nope")


def test_a_head_whose_module_is_missing_names_it(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="head 'mine': cannot import 'somewhere:SomeHead'"):
        from_files(tmp_path, mine=FILE.format(name="mine")).head_class("mine")


def test_a_head_whose_module_calls_exit_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    sources = {"mine": OFFER.replace("somewhere:", "quitting_part:"), "quitting_part": "raise SystemExit(3)"}
    with pytest.raises(PluginError, match="head 'x': cannot import 'quitting_part:SomeHead': SystemExit: 3"):
        from_files(tmp_path, **sources).head_class("x")


def test_two_providers_of_one_head_are_both_named(tmp_path: Path) -> None:
    with pytest.raises(
        PluginError, match=r"head 'knn' is offered by 'code_worker_heads' of code-worker .* and by .*a\.py"
    ):
        from_files(tmp_path / "one", a=FILE.format(name="knn"))
    with pytest.raises(PluginError, match=r"head 'x' is offered by .*a\.py and by .*b\.py; remove one or rename"):
        from_files(tmp_path / "two", a=FILE.format(name="x"), b=FILE.format(name="x"))


def test_two_heads_that_would_share_their_settings_are_both_named(tmp_path: Path) -> None:
    with pytest.raises(
        PluginError, match=r"heads 'soft-two' of .*a\.py and 'soft_two' of .*b\.py would share .*HEADS__SOFT_TWO__"
    ):
        from_files(tmp_path, a=FILE.format(name="soft-two"), b=FILE.format(name="soft_two"))


def test_two_plugins_of_one_name_are_both_named(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"two plugins are called 'code_worker_heads': .*code-worker .*\.py"):
        from_files(tmp_path, code_worker_heads=FILE.format(name="x"))


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        (f"{PLUGIN}import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        (f"{PLUGIN}def broken(:", "SyntaxError"),
        (f"{PLUGIN}1 / 0", "ZeroDivisionError"),
        (f"{PLUGIN}import sys; sys.exit(3)", "SystemExit: 3"),
        (OFFER.replace("return", "return {}[0],"), "KeyError: 0"),
        (
            OFFER.replace("return", "return None;"),
            "TypeError: code_worker_register_heads must return a list of HeadSpec",
        ),
    ],
)
def test_a_broken_file_is_named_with_the_cause(source: str, cause: str, tmp_path: Path) -> None:
    assert f"cannot be loaded: {cause}" in refusal(tmp_path, source)
    assert "code_worker_plugin_broken" not in sys.modules or "@hookimpl" in source


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            OFFER.replace("register_heads", "registr_heads"),
            "which is no hook; did you mean code_worker_register_heads?",
        ),
        (
            OFFER.replace("code_worker_register_heads", "code_worker_xyzzy"),
            "no hook; hooks: code_worker_register_heads, ",
        ),
        (OFFER.replace("code_worker_register_heads", "register"), "unknown hook 'register'"),
        (OFFER.replace("@hookimpl", ""), "code_worker_register_heads without @hookimpl"),
        (
            OFFER.replace("heads()", "heads(settings, more=1)"),
            "broken.py: code_worker_register_heads has no argument settings; it takes none",
        ),
        (
            "from code_worker import hookimpl\n@hookimpl\ndef code_worker_select_head(jobs, heads): ...\n",
            "broken.py: code_worker_select_head has no argument jobs; it may take job and heads",
        ),
    ],
)
def test_a_hook_that_would_never_be_called_is_refused(source: str, said: str, tmp_path: Path) -> None:
    assert said in refusal(tmp_path, source)


@pytest.mark.parametrize("name", ["", "Knn", "-a", "a b", "a/b", "a" * 65, "naïve"])
def test_a_head_needs_a_name_that_is_safe_everywhere(name: str, tmp_path: Path) -> None:
    assert "offers a head called" in refusal(tmp_path, FILE.format(name=name))


def test_an_offer_that_is_no_head_spec_is_refused(tmp_path: Path) -> None:
    source = OFFER.replace('HeadSpec(\'x\', "somewhere:SomeHead", "a test")', "'mine'")
    assert "offers a value of type str where a HeadSpec is expected" in refusal(tmp_path, source)


@pytest.mark.parametrize("answer", ["None", "HeadSpec('a', object, 'a')"])
def test_an_offer_that_is_no_list_is_refused(answer: str, tmp_path: Path) -> None:
    source = (
        "from code_worker import HeadSpec, hookimpl\n\n@hookimpl\ndef code_worker_register_heads():\n"
        f"    return {answer}\n"
    )
    assert "code_worker_register_heads must return a list of HeadSpec, not " in refusal(tmp_path, source)


def test_a_plugins_directory_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"CODE_WORKER_PLUGINS_DIR names .*none, which is not a directory"):
        load_plugins(Settings(plugins_dir=tmp_path / "none"))


class Chooser:
    def __init__(self, answer: object) -> None:
        self.answer = answer

    @hookimpl
    def code_worker_select_head(self, job: Job, heads: tuple[str, ...]) -> object:
        return self.answer if job.tenant == "acme" else None


def test_the_head_is_chosen_by_the_first_plugin_with_an_opinion() -> None:
    plugins = Plugins()
    for number, answer in enumerate(("linear", "knn", None)):
        plugins.add(InstalledPlugin(f"p{number}", "1", f"p{number}"), Chooser(answer))
    assert plugins.select_head(Job("1", "a", tenant="acme"), ["knn", "linear"]) == "knn"
    assert plugins.select_head(Job("2", "a"), ["knn", "linear"]) is None


def test_an_answer_that_is_no_name_is_refused() -> None:
    plugins = Plugins()
    plugins.add(InstalledPlugin("p", "1", "p"), Chooser(7))
    plugins.add(InstalledPlugin("q", "1", "q"), Chooser(Plugins))
    with pytest.raises(PluginError, match="answered the class Plugins, not the name of a head"):
        plugins.select_head(Job("1", "a", tenant="acme"), ["knn"])
    plugins.add(InstalledPlugin("r", "1", "r"), Chooser(7))
    with pytest.raises(PluginError, match="answered a value of type int, not the name of a head"):
        plugins.select_head(Job("1", "a", tenant="acme"), ["knn"])


def test_a_plugin_may_wrap_the_choice_of_others(tmp_path: Path) -> None:
    wrapper = f"""{PLUGIN}
@hookimpl(wrapper=True)
def code_worker_select_head(job, heads):
    chosen = yield
    return chosen if chosen in heads else None
"""
    plugins = from_files(tmp_path, wrapper=wrapper)
    plugins.add(InstalledPlugin("p", "1", "p"), Chooser("gone"))
    assert plugins.select_head(Job("1", "a", tenant="acme"), ["knn"]) is None
    assert plugins.select_head(Job("1", "a", tenant="acme"), ["gone"]) == "gone"


def test_the_offer_of_heads_cannot_be_wrapped(tmp_path: Path) -> None:
    said = refusal(tmp_path, OFFER.replace("@hookimpl", "@hookimpl(wrapper=True)").replace("return", "yield"))
    assert "wraps code_worker_register_heads" in said
    assert "wrapper=True is for code_worker_select_head" in said


def test_a_choice_that_fails_names_the_plugin(tmp_path: Path) -> None:
    source = f"{PLUGIN}@hookimpl\ndef code_worker_select_head(job):\n    return {{}}[job.tenant]\n"
    plugins = from_files(tmp_path, a=source, b=source.replace("{}", "{'acme': None}"))
    with pytest.raises(PluginError, match=r"of plugin .*a\.py \(line \d+\) failed: KeyError: 'acme'"):
        plugins.select_head(Job("1", "a", tenant="acme"), ["knn"])


def test_a_choice_that_calls_exit_names_the_plugin(tmp_path: Path) -> None:
    source = f"{PLUGIN}import sys\n@hookimpl\ndef code_worker_select_head(job):\n    sys.exit('no licence')\n"
    with pytest.raises(PluginError, match=r"of plugin .*a\.py \(line \d+\) failed: SystemExit: no licence"):
        from_files(tmp_path, a=source).select_head(Job("1", "a"), ["knn"])


def test_the_same_object_cannot_be_two_plugins() -> None:
    plugins, plugin = Plugins(), Chooser("knn")
    plugins.add(InstalledPlugin("a", "1", "a"), plugin)
    with pytest.raises(PluginError, match="'b' of b 1 cannot be registered"):
        plugins.add(InstalledPlugin("b", "1", "b"), plugin)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("object", "head 'x': <class 'object'> is not a subclass of code_worker.Head"),
        ("5", "head 'x': 5 is not a subclass of code_worker.Head"),
        ("Half", "head 'x': <class '.*Half'> is abstract: it lacks load, save, score"),
    ],
)
def test_what_is_no_whole_head_is_refused_at_load_with_its_plugin(target: str, said: str, tmp_path: Path) -> None:
    half = "from code_worker import Head\nclass Half(Head):\n    def fit(self, embeddings, labels): return self\n"
    assert re.search(rf"broken\.py: {said}", refusal(tmp_path, half + OFFER.replace('"somewhere:SomeHead"', target)))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("pathlib:Path", "not a subclass"),
        ("code_worker:Head", "abstract"),
        ("pathlib.Path", "`module:Class` is expected"),
    ],
)
def test_a_target_that_is_no_whole_head_is_refused_where_it_is_used(target: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=said):
        HeadSpec("x", target).head_class()
    plugins = from_files(tmp_path, mine=OFFER.replace("somewhere:SomeHead", target))
    with pytest.raises(PluginError, match=rf"plugin .*mine\.py: head 'x': '{target}' .*{said}"):
        plugins.head_class("x")
