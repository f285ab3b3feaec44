"""Values that look right and are wrong are each told in one line, with what to write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from code_worker.doctor import examine
from code_worker.doctor.check import Status
from code_worker.errors import ConfigurationError
from code_worker.settings import Settings, load_settings
from code_worker.settings.configuration import is_section


def numbers(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every setting that is a number."""
    for name, field in model.model_fields.items():
        if is_section(field.annotation):
            yield from numbers(field.annotation, (*above, name))
        elif field.annotation in {int, float, int | None, float | None}:
            yield (*above, name)


def from_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> str:
    """What is said of a file of settings."""
    path = tmp_path / "settings.toml"
    path.write_text(text)
    monkeypatch.setenv("CODE_WORKER_CONFIG", str(path))
    with pytest.raises(ConfigurationError) as refused:
        load_settings()
    return str(refused.value)


def test_there_are_numbers_to_try() -> None:
    assert {("worker", "concurrency"), ("worker", "linger_ms"), ("retention", "jobs_days")} <= set(numbers(Settings))


@pytest.mark.parametrize("names", list(numbers(Settings)), ids=".".join)
@pytest.mark.parametrize("written", ["true", "false"])
def test_a_boolean_is_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], written: str
) -> None:
    said = from_file(tmp_path, monkeypatch, f"{'.'.join(names)} = {written}\n")
    assert said.startswith(f"wrong settings: {'.'.join(names)} ({tmp_path}/settings.toml, line 1): write a ")
    with pytest.raises(ConfigurationError, match="write a "):
        load_settings(below={names[0]: {names[1]: written == "true"}})


@pytest.mark.parametrize(
    ("written", "hint"),
    [
        ('s3.buckets = ["https://uploads.s3.example.com"]', "write the name of the bucket and no address"),
        ('s3.endpoint_url = "localhost:9000"', "an endpoint is http://host:port or https://host"),
        ('s3.buckets = ["up loads/2024"]', "a bucket's name has only letters, digits and . - _"),
        ('s3.buckets = ["/2024"]', "a bucket's name has only letters, digits and . - _"),
        ("s3.buckets = 3", 'write a list, such as ["a", "b"]'),
        ("s3.buckets = [3]", "an entry of the list is no text"),
        ("files.roots = [3]", "an entry of the list is no text"),
        ("heads = 3", "is a table: [heads] and its settings below it"),
        ("heads.knn = 3", "is a table: [heads.knn] and its settings below it"),
        ("device = 3", "write text, in quotes"),
        ("data_dir = 3", "write text, in quotes"),
        ("database_url = 3", "write text, in quotes"),
        ('schedule.retrain = "0 3 * * sun mon"', "several days are one field: `sun,mon`"),
        ('schedule.refit = "@daily"', "forms with @ are not read: write `0 0 * * *`"),
    ],
)
def test_a_value_that_looks_right_is_answered_with_the_right_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, hint: str
) -> None:
    said = from_file(tmp_path, monkeypatch, f"{written}\n")
    assert hint in said
    assert f"{tmp_path}/settings.toml, line 1" in said


def test_doctor_names_the_head_that_was_meant(tmp_path: Path) -> None:
    (found,) = examine(["plugins"], data_dir=tmp_path, head="kn")
    assert found.status is Status.FAIL
    assert found.hint.startswith("did you mean knn? If not, install its plugin")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"neighbors": 3}, "options of head 'knn': neighbors: Extra inputs are not permitted; it has "),
        ({"n_neighbors": 0}, "options of head 'knn': n_neighbors: Input should be greater than"),
    ],
)
def test_doctor_names_options_that_a_head_refuses(tmp_path: Path, options: dict[str, int], said: str) -> None:
    _, found = examine(["plugins"], data_dir=tmp_path, heads={"knn": options})
    assert found.status is Status.WARN
    assert said in found.message
    assert found.hint.startswith("mend [heads.knn]: a refit refuses them")


def test_an_access_point_stands_for_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    arn = "arn:aws:s3:eu-west-1:123456789012:accesspoint:uploads"
    monkeypatch.setenv("CODE_WORKER_S3__BUCKETS", f"{arn},{arn}/2024")
    assert load_settings().s3.buckets == (arn, f"{arn}/2024")


def test_a_bucket_may_be_written_as_the_address_that_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODE_WORKER_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("CODE_WORKER_S3__BUCKETS", "s3://uploads,archive/2024")
    monkeypatch.setenv("CODE_WORKER_S3__ANONYMOUS", "s3://uploads")
    s3 = load_settings().s3
    assert (s3.buckets, s3.anonymous) == (("uploads", "archive/2024"), ("uploads",))
