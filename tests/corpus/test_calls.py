"""Wrong arguments are refused by a typed error before anything is written, odd ones are kept as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from code_worker.client import Client
from code_worker.errors import CodeWorkerError, ImageRejectedError
from code_worker.settings import FileSettings, Settings
from code_worker.store.engine import Store
from code_worker.store.learning import labels as statements
from code_worker.store.learning.labels import LabelFilter, NewLabel
from code_worker.types import Labelled, RejectReason
from code_worker.wire import checked_item, parse_message
from tests.corpus.calls import jobs, labels, messages
from tests.corpus.table import expected
from tests.image_files import encoded, pixels


@pytest.fixture
def client(store: Store, tmp_path: Path) -> Iterator[Client]:
    """Of a ledger of either kind, with no broker: whatever is accepted is safe all the same."""
    photos = tmp_path / "photos"
    photos.mkdir()
    settings = Settings(
        data_dir=tmp_path / "data",
        database_url=store.url,  # type: ignore[arg-type]  # pydantic makes it a secret
        broker_url="redis://127.0.0.1:1/0",  # type: ignore[arg-type]  # as above
        files=FileSettings(roots=(photos,)),
    )
    with closing(Client(settings)) as made:
        yield made


def error_end(error: Exception) -> str:
    """What the table calls a refusal: the reason of an image's, else the name of the exception."""
    return error.reason.value if isinstance(error, ImageRejectedError) else type(error).__name__


def test_each_call_that_enqueues_ends_as_listed(client: Client) -> None:
    ends: dict[str, str] = {}
    for name, call in jobs().items():
        try:
            ids = call(client)
        except (CodeWorkerError, ValueError) as error:
            ends[name] = error_end(error)
        else:
            ends[name] = "accepted" if len(set(ids)) == len(ids) else "same_job"
    assert set(ends) == set(expected("job"))
    assert not {name: end for name, end in ends.items() if end not in expected("job")[name]}


def test_each_call_that_labels_ends_as_listed(client: Client, tmp_path: Path) -> None:
    ends: dict[str, str] = {}
    for number, (name, call) in enumerate(labels().items()):
        path = tmp_path / "photos" / f"{number}.png"
        path.write_bytes(encoded(pixels(8, 8, number), "PNG"))
        path.with_suffix(".txt").write_text("no image")
        try:
            done: Labelled = call(client, str(path))
        except (CodeWorkerError, ValueError, TypeError) as error:
            ends[name] = error_end(error)
        else:
            ends[name] = "recorded" if done.new else "nothing_new"
    assert set(ends) == set(expected("label"))
    assert not {name: end for name, end in ends.items() if end not in expected("label")[name]}


def test_a_flood_of_the_same_label_from_one_labeller_is_one_row(store: Store) -> None:
    for _ in range(20):
        same = [NewLabel(sha256="a" * 64, label="fake", by="bot", source="api") for _ in range(1_000)]
        store.run(lambda session, same=same: statements.add(session, same))  # type: ignore[misc]
    found = store.run(lambda session: statements.list_labels(session, LabelFilter(), limit=10))
    assert len(found) == 1


@pytest.mark.parametrize("name", expected("message"))
def test_a_message_ends_as_listed(name: str) -> None:
    try:
        _, items = parse_message(json.loads(messages()[name]))
        for item in items:
            checked_item(item)
    except (CodeWorkerError, ValueError) as error:
        end = error_end(error)
    else:
        end = "read"
    assert end in expected("message")[name]


def test_the_table_speaks_of_every_message_and_of_no_end_that_there_is_not() -> None:
    assert set(messages()) == set(expected("message"))
    ends = {end for kind in ("file", "source") for each in expected(kind).values() for end in each}
    assert ends <= {"judged", *(reason.value for reason in RejectReason)}
