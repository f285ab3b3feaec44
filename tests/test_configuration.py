"""Environment, file and mapping read text alike, and refuse in one line what they cannot read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pytest
from pydantic import BaseModel, Field, SecretStr
from pydantic.fields import FieldInfo

from code_worker.errors import ConfigurationError
from code_worker.settings import Settings, load_settings
from code_worker.settings.configuration import PREFIX, is_section, is_setting_variable, layers

KEY = "a-signing-key-of-more-than-32-characters"
Set = Callable[..., None]


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Set:
    """Sets variables of ours, named without the prefix."""

    def put(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(f"{PREFIX}{name}", value)

    return put


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | bytes], Path]:
    """Writes the file that the settings are read from."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "code_worker.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        monkeypatch.setenv("CODE_WORKER_CONFIG", str(path))
        return path

    return write


def fields(
    model: type[BaseModel] = Settings, above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    for name, field in model.model_fields.items():
        if is_section(field.annotation):
            yield from fields(field.annotation, (*above, name))
        else:
            yield (*above, name), field


def refusal(**given: Any) -> str:
    with pytest.raises(ConfigurationError) as refused:
        load_settings(**given)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def nested(names: tuple[str, ...], value: object) -> dict[str, Any]:
    for name in reversed(names):
        value = {name: value}
    assert isinstance(value, dict)
    return value


def value_of(settings: Settings, names: tuple[str, ...]) -> Any:
    value: Any = settings
    for name in names:
        value = getattr(value, name)
    return value


@pytest.mark.parametrize("empty", ["", " ", "\t\r\n"])
def test_an_empty_text_sets_nothing_whatever_the_setting(empty: str, variables: Set) -> None:
    variables(**{"__".join(names).upper(): empty for names, _ in fields()}, CONFIG=empty, S3=empty, NO_SETTING=empty)
    assert load_settings() == Settings()
    for names, _ in fields():
        assert load_settings(below=nested(names, empty)) == Settings(), names


def test_an_empty_variable_leaves_what_the_file_sets(toml: Callable[[str], Path], variables: Set) -> None:
    toml('data_dir = "/of/the/file"\nplugins_dir = " "\n[worker]\nmax_denied = "null"\n')
    variables(DATA_DIR="", PLUGINS_DIR="")
    settings = load_settings()
    assert (settings.data_dir, settings.plugins_dir) == (Path("/of/the/file"), None)
    assert settings.worker.max_denied is None


def test_null_empties_every_optional_setting_and_no_other(variables: Set, toml: Callable[[str], Path]) -> None:
    optional = [names for names, field in fields() if NoneType in get_args(field.annotation)]
    assert ("labels", "max_duplicates") in optional
    variables(**{"__".join(names).upper(): "null" for names in optional})
    settings = load_settings()
    assert [names for names in optional if value_of(settings, names) is not None] == []

    toml("".join(f'{".".join(names)} = "null"\n' for names in optional))
    assert load_settings() == settings
    variables(WORKER__CONCURRENCY="null")
    assert "CODE_WORKER_WORKER__CONCURRENCY: write a whole number from 1 to 1024" in refusal()


@pytest.mark.parametrize("null", ["NULL", "Null", " null "])
def test_null_is_read_in_any_letters(null: str, variables: Set) -> None:
    variables(LABELS__MAX_DUPLICATES=null)
    assert load_settings().labels.max_duplicates is None


@pytest.mark.parametrize(
    ("name", "texts", "said"),
    [
        ("WORKER__CONCURRENCY", ("4.5", "null", "eight", "0", "1025"), "write a whole number from 1 to 1024"),
        ("WORKER__BACKOFF_S", ("x", "0", "inf", "1e9"), "write a number above 0 to 86400"),
        ("WORKER__MAX_DENIED", ("0", "few"), "write a whole number from 1 to 1000000, or null"),
        ("TRAINING__EMA_DECAY", ("1", "x"), "write a number above 0 below 1, or null"),
        ("WORKER__STORE_EMBEDDINGS", ("perhaps", "2"), "write true or false"),
        ("S3__BUCKETS", ("[1, 2]",), "an entry of the list is no text"),
    ],
)
def test_a_wrong_value_is_answered_once_with_what_is_taken(
    name: str, texts: tuple[str, ...], said: str, variables: Set
) -> None:
    for text in texts:
        variables(**{name: text})
        assert refusal() == f"wrong settings: CODE_WORKER_{name}: {said}"


def test_a_value_where_a_table_belongs_and_names_of_variables_in_a_file_are_told(toml: Callable[[str], Path]) -> None:
    path = toml("worker = 3\n")
    assert refusal() == f"wrong settings: worker ({path}, line 1): is a table: [worker] and its settings below it"
    toml('CODE_WORKER_HEAD = "x"\ncode_worker_xyz = 1\n[worker]\nCODE_WORKER_WORKER__LEASE_S = 7\n')
    said = refusal()
    assert f'CODE_WORKER_HEAD ({path}, line 1) is no setting; in a file it is called "head"' in said
    assert f"code_worker_xyz ({path}, line 2) is no setting; names of variables are for the environment" in said
    assert "LEASE_S" in said
    assert 'in a file it is called "worker.lease_s"' in said


@pytest.mark.parametrize("text", [",", "a,,b", " , ", ",a"])
def test_an_empty_entry_between_commas_is_refused(text: str, variables: Set) -> None:
    """`$FIRST,$SECOND` with neither set would switch off what a list protects."""
    variables(SIGNING_KEYS=text, ROLES__OPERATORS=text)
    said = refusal()
    assert "CODE_WORKER_SIGNING_KEYS: an entry between commas is empty" in said
    assert "CODE_WORKER_ROLES__OPERATORS: an entry between commas is empty" in said


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("uploads", ("uploads",)),
        ("uploads,archive/2024", ("uploads", "archive/2024")),
        (" uploads , archive ,", ("uploads", "archive")),
        ('["uploads", "uploads/a,b"]', ("uploads", "uploads/a,b")),
        (" [ ] ", ()),
        ("[]", ()),
    ],
)
def test_a_list_is_written_with_commas_or_as_json(text: str, read: tuple[str, ...], variables: Set) -> None:
    variables(S3__BUCKETS=text, PLUGINS_ALLOWED=text, FILES__ROOTS=text)
    settings = load_settings()
    assert settings.s3.buckets == settings.plugins_allowed == read
    assert settings.files.roots == tuple(Path(each) for each in read)
    assert load_settings(below={"roles": {"operators": text}}).roles.operators == read


def test_signing_keys_are_lists_like_others(variables: Set) -> None:
    for text, keys in ((KEY, [KEY]), (f"{KEY},{KEY}2", [KEY, f"{KEY}2"]), (json.dumps([f"{KEY},x"]), [f"{KEY},x"])):
        variables(SIGNING_KEYS=text)
        assert [key.get_secret_value() for key in load_settings().signing_keys] == keys


@pytest.mark.parametrize("text", ["[uploads]", '["s3cret"', '["s3cret", ""]', '[" "]', "[1", "[" * 10_000])
def test_a_list_that_cannot_be_read_is_named_and_not_shown(text: str, variables: Set) -> None:
    variables(S3__BUCKETS=text)
    said = refusal()
    assert said.startswith("wrong settings: CODE_WORKER_S3__BUCKETS: ")
    assert "uploads" not in said
    assert "s3cret" not in said


def test_a_section_may_be_one_json_object_that_single_settings_add_to(variables: Set) -> None:
    variables(S3='{"region": "of-the-object", "buckets": "a,b"}', S3__REGION="of-its-own")
    settings = load_settings()
    assert (settings.s3.region, settings.s3.buckets) == ("of-its-own", ("a", "b"))
    variables(S3='{"regin": "x", "buckets": [""]}')
    assert refusal() == (
        "wrong settings: CODE_WORKER_S3 (regin) is no setting; did you mean CODE_WORKER_S3__REGION?; "
        "CODE_WORKER_S3 (buckets): an entry of the list is empty"
    )
    variables(S3="s3cret")
    assert (
        refusal() == "wrong settings: CODE_WORKER_S3: a table is written as a JSON object, or one setting at a time"
    )


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *(("SIGNING_KEY", "SIGNING_KEYS"), ("BROKR_URL", "BROKER_URL"), ("S3_BUCKETS", "S3__BUCKETS")),
        *(("S3__BUCKET", "S3__BUCKETS"), ("WORKER__CONCURENCY", "WORKER__CONCURRENCY"), ("HEAD__K", "HEAD")),
        *(("WROKER__CONCURRENCY", "WORKER__CONCURRENCY"), ("WROKER", "WORKER")),
        *(("RETENTION__JOB_DAYS", "RETENTION__JOBS_DAYS"), ("DATADIR", "DATA_DIR"), ("Config", None)),
    ],
)
def test_an_unknown_variable_is_refused_with_the_nearest_that_is_known(
    name: str, meant: str | None, variables: Set
) -> None:
    variables(**{name: "s3cret"})
    said = refusal()
    assert said.startswith(f"wrong settings: CODE_WORKER_{name} is no setting")
    assert meant is None or said.endswith(f"; did you mean CODE_WORKER_{meant}?")
    assert "s3cret" not in said


def test_unknown_keys_of_a_file_are_refused_with_their_lines(toml: Callable[[str], Path]) -> None:
    path = toml('signing_key = "s3cret"\n\n[s3]  # where\n"bukets" = ["a"]\n[wroker]\nconcurrency = 1\n')
    said = refusal()
    assert f"signing_key ({path}, line 1) is no setting; did you mean signing_keys?" in said
    assert f"s3.bukets ({path}, line 4) is no setting; did you mean s3.buckets?" in said
    assert f"wroker ({path}, line 5) is no setting; did you mean worker?" in said
    assert "s3cret" not in said


def test_a_wrong_value_of_a_file_is_named_with_its_line(toml: Callable[[str], Path], variables: Set) -> None:
    path = toml('[worker]\nconcurrency = "s3cret"\nlease_s = 30\n')
    assert f"worker.concurrency ({path}, line 2): " in refusal()
    variables(WORKER__CONCURRENCY="0")
    assert "wrong settings: CODE_WORKER_WORKER__CONCURRENCY: " in refusal()


def test_errors_of_a_programs_mapping_name_that_mapping() -> None:
    assert refusal(below={"worker": {"concurrency": 0}}).startswith(
        "wrong settings: worker.concurrency in app.conf.code_worker: "
    )
    assert refusal(below={"broker": {"key_prefx": "x"}}) == (
        "wrong settings: broker.key_prefx in app.conf.code_worker is no setting; did you mean broker.key_prefix?"
    )
    assert refusal(below={"S3": {"buckets": "a"}}).startswith(
        "wrong settings: S3 in app.conf.code_worker is no setting"
    )
    assert refusal(below=["s3"]) == "wrong settings: app.conf.code_worker is a mapping of names to values"


def test_what_a_program_sets_counts_below_file_and_environment(
    toml: Callable[[str], Path], variables: Set, tmp_path: Path
) -> None:
    toml('head = "of the file"\n[s3]\nregion = "of-the-file"\n')
    variables(S3__REGION="of-the-environment")
    below = {"head": "of the app", "s3": {"region": "of-the-app", "buckets": ["uploads"]}, "engine": "torch"}

    settings = load_settings(below=below, data_dir=tmp_path)
    assert (settings.head, settings.s3.region) == ("of the file", "of-the-environment")
    assert (settings.s3.buckets, settings.engine, settings.data_dir) == (("uploads",), "torch", tmp_path)
    assert load_settings().s3.buckets == ()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[s3\nregion = 1\n", r"code_worker.toml: not TOML: .*line 1, column 4"),
        (b"head = 'a'\nhead = 'b'\n", r"code_worker.toml: not TOML: .*line 2"),
        (b"a = " + b"9" * 5000, r"code_worker.toml: not TOML: "),
        ("head = 'ä'\nregion = 'ö'".encode("latin-1"), r"code_worker.toml, line 1: not UTF-8"),
        ("head = 'a'\n".encode("utf-16"), r"code_worker.toml, line 1: not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_in_one_line(
    data: bytes, said: str, toml: Callable[[bytes], Path]
) -> None:
    toml(data)
    assert re.search(said, refusal())


def test_a_file_that_is_away_or_a_directory_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODE_WORKER_CONFIG", str(tmp_path))
    assert refusal() == f"CODE_WORKER_CONFIG names {tmp_path}, which cannot be read: Is a directory"
    monkeypatch.setenv("CODE_WORKER_CONFIG", "/nowhere/x.toml")
    assert refusal() == "CODE_WORKER_CONFIG names /nowhere/x.toml, which is not there"


def test_a_file_with_a_byte_order_mark_is_read(toml: Callable[[bytes], Path]) -> None:
    toml(b"\xef\xbb\xbf" + b'head = "knn"\r\n')
    assert load_settings().head == "knn"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("PORT", "tcp://10.0.0.1:80"), ("SERVICE_HOST", "10.0.0.1"), ("SERVICE_PORT", "80")),
        *(("SERVICE_PORT_HTTP", "80"), ("PORT_80_TCP", "tcp://10.0.0.1:80"), ("PORT_80_TCP_PROTO", "tcp")),
        *(("PORT_80_TCP_ADDR", "10.0.0.1"), ("REDIS_SERVICE_HOST", "10.0.0.2"), ("REDIS_PORT", "tcp://10.0.0.2:1")),
        *(("PORT", "udp://[fd00::1]:53"), ("SERVICE_HOST", "fd00::1"), ("NAME", "/web/code-worker")),
        *(("ENV_PATH", "/usr/bin:/bin"), ("PORT_8080_TCP_ADDR", "172.17.0.5"), ("PORT_8080_TCP_PORT", "8080")),
        *(("BROKER_PORT_6379_TCP_PORT", "6379"), ("OWNER", "node-1"), ("SUPERVISOR_PID", "12"), ("FAILPOINT", "a.b")),
        *(("PORT_80_TCP_START", "tcp://[::1]:80"), ("PORT_80_TCP_PORT_END", "82"), ("SERVICE_HOST", "fe80::1%eth0")),
    ],
)
def test_what_kubernetes_and_supervisors_set_is_no_setting(name: str, text: str, variables: Set) -> None:
    variables(**{name: text})
    assert load_settings() == Settings()
    assert not is_setting_variable(f"{PREFIX}{name}", text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("PORT", "80"), ("BROKER_PORT", "6379"), ("SERVICE_PORT", "http"), ("SERVICE_HOST", "my host")),
        *(
            ("PORT", "redis://10.0.0.1/0"),
            ("PORT_80_TCP_ADDR", "s3cret"),
            ("PORT_80_TCP_PROTO", "yes"),
            ("NAME", "x"),
        ),
    ],
)
def test_what_only_looks_like_a_service_of_kubernetes_is_refused(name: str, text: str, variables: Set) -> None:
    variables(**{name: text})
    assert f"CODE_WORKER_{name} is no setting" in refusal()


def test_no_program_of_ours_reads_a_variable_that_settings_would_refuse() -> None:
    package = Path(layers.__code__.co_filename).parents[1]
    named = re.compile(r'_ENV(?:: Final)? = "(CODE_WORKER_\w+)"')
    found = {name for path in package.rglob("*.py") for name in named.findall(path.read_text(encoding="utf-8"))}
    assert len(found) >= 3
    assert [name for name in sorted(found) if is_setting_variable(name, "x")] == []


def test_two_spellings_of_one_variable_are_refused(variables: Set) -> None:
    variables(head="knn")
    assert load_settings().head == "knn"
    variables(HEAD="linear")
    assert refusal() == "wrong settings: CODE_WORKER_HEAD and CODE_WORKER_head are one setting: take one of them away"


class _Free(BaseModel):
    heads: dict[str, dict[str, object]] = Field(default_factory=dict)
    key: SecretStr | None = None


def test_a_table_of_free_names_takes_what_json_says_or_text(variables: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    variables(HEADS__SOFTKNN__K="5", HEADS__SOFTKNN__METRIC="cosine", HEADS__SOFTKNN__EXACT="true")
    variables(HEADS='{"softknn": {"k": 1, "weights": [1, 2]}, "other": {}}', KEY=" with spaces ")
    (environment, mapping) = layers(_Free, {"heads": {"softknn": {"k": "x", "": ""}}})
    options = {"k": 5, "metric": "cosine", "exact": True, "weights": [1, 2]}
    assert environment.values == {"heads": {"softknn": options, "other": {}}, "key": " with spaces "}
    assert mapping.values == {"heads": {"softknn": {"k": "x", "": ""}}}
    monkeypatch.setenv("CODE_WORKER_HEDS__K", "1")
    with pytest.raises(ConfigurationError, match="CODE_WORKER_HEDS__K is no setting"):
        layers(_Free, {})


PROGRAMS = {
    "a command": ("-m", "code_worker", "worker"),
    "worker's process": ("-m", "code_worker.stack.worker_process"),
    "beat's process": ("-m", "code_worker.stack.beat_process"),
    "worker of an app": ("-m", "celery", "-A", "theirs", "worker", "-P", "threads", "-Q", "code_worker.live"),
    "beat of an app": ("-m", "celery", "-A", "theirs", "beat"),
}


def test_every_program_ends_with_status_2_and_one_line(toml: Callable[[str], Path], tmp_path: Path) -> None:
    path = toml('[worker]\nconcurency = 1\nlease_s = "s3cret"\n')
    (tmp_path / "theirs.py").write_text(
        "from celery import Celery\nimport code_worker\n"
        "app = Celery('theirs', broker='memory://')\ncode_worker.install(app)\n"
    )
    search = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    started = {
        name: subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | {"PYTHONPATH": search, "CODE_WORKER_DATA_DIR": str(tmp_path / "data")},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, arguments in PROGRAMS.items()
    }
    for name, process in started.items():
        said, _ = process.communicate()
        assert process.returncode == 2, (name, said)
        told = [line for line in said.splitlines() if "worker.concurency" in line]
        assert f"worker.concurency ({path}, line 2) is no setting; did you mean worker.concurrency?" in told[-1], name
        assert "configuration.py" not in said, "no traceback of ours"
        assert "s3cret" not in said
