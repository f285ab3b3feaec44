"""The labelled store as a data set."""

from __future__ import annotations

from pathlib import Path

import pytest

from code_worker.data.datasets.examples import FAKE, REAL, Skipped
from code_worker.data.datasets.open import open_examples
from code_worker.data.kept_copies import open_kept
from code_worker.errors import DatasetError
from code_worker.settings import LabelSettings, Settings
from code_worker.store.engine import Session, Store
from code_worker.store.learning import image_groups, kept_images
from code_worker.store.learning.kept_images import KeptImage
from code_worker.store.learning.labels import NewLabel, add


@pytest.fixture
def settings(tmp_path: Path, store: Store) -> Settings:
    return Settings(data_dir=tmp_path / "data", database_url=store.url, labels=LabelSettings(rule="unanimous"))


def label(store: Store, sha256: str, said: str, *, by: str = "alice", generator: str | None = None) -> None:
    new = NewLabel(sha256, said, by, "api", generator=generator, collection="queue")
    store.run(lambda session: add(session, [new]))


def test_decided_images_are_read_from_their_copies_and_undecided_ones_told(store: Store, settings: Settings) -> None:
    kept = open_kept(settings)
    made = {name: kept.put(name.encode()) for name in ("real", "fake", "disputed")}
    label(store, made["real"], "real")
    label(store, made["fake"], "fake", generator="sdxl")
    label(store, made["disputed"], "real")
    label(store, made["disputed"], "fake", by="bob")
    label(store, "0" * 64, "real")
    skipped: list[Skipped] = []
    examples = list(open_examples("labels:", settings=settings, skipped=skipped, store=store))
    assert [example.key for example in examples] == sorted(["0" * 64, made["real"], made["fake"]])
    by_key = {example.key: example for example in examples}
    fake, real = by_key[made["fake"]], by_key[made["real"]]
    assert (fake.label, fake.generator, fake.collection, fake.sha256) == (FAKE, "sdxl", "queue", made["fake"])
    assert (real.label, real.generator) == (REAL, None)
    assert (fake.read(), real.read()) == (b"fake", b"real")
    with pytest.raises(DatasetError, match="no copy"):
        by_key["0" * 64].read()
    assert skipped == [
        Skipped(made["disputed"], "its labels contradict each other, and the rule 'unanimous' leaves it out")
    ]


def test_of_the_holdout_only_what_is_never_learned_from_is_read(store: Store, settings: Settings) -> None:
    kept = open_kept(settings)
    hashes = [kept.put(str(number).encode()) for number in range(60)]
    for sha256 in hashes:
        label(store, sha256, "real")
    copyless = "0" * 64
    label(store, copyless, "real")
    rows = [KeptImage(sha256, 1, "png", 8, 8, "s3://b/x") for sha256 in hashes]

    def place(session: Session) -> None:
        image_groups.begin_with(session, bytes(32))
        kept_images.note_kept(session, rows)
        image_groups.place(session, dict.fromkeys(hashes))

    store.run(place)
    places = store.run(lambda session: image_groups.places(session, [*hashes, copyless]), write=False)
    found = {one.sha256 for one in open_examples("holdout:", settings=settings, skipped=[], store=store)}
    assert found == {sha256 for sha256, place in places.items() if place.split == "holdout"}
    assert 0 < len(found) < 60


def test_the_database_of_the_settings_is_opened_when_none_is_given(store: Store, settings: Settings) -> None:
    label(store, open_kept(settings).put(b"x"), "real")
    (example,) = open_examples("labels:", settings=settings, skipped=[])
    assert example.read() == b"x"


def test_no_labels_and_no_database_are_said_in_words(store: Store, settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="labels: holds no usable image"):
        list(open_examples("labels:", settings=settings, skipped=[], store=store))
    nothing = Settings(data_dir=tmp_path / "never")
    with pytest.raises(DatasetError, match="there is no database in"):
        list(open_examples("labels:", settings=nothing, skipped=[]))
