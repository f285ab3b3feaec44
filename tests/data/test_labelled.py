"""The labelled store as a data set."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from PIL import Image

from code_worker.data.datasets.examples import FAKE, REAL, Skipped
from code_worker.data.datasets.open import open_examples
from code_worker.data.kept_copies import KeptImages, LocalKept, open_kept
from code_worker.data.labelled_images import group_old_images
from code_worker.errors import DatasetError, StorageError
from code_worker.settings import LabelSettings, Settings
from code_worker.store.engine import Store
from code_worker.store.learning import image_groups, kept_images
from code_worker.store.learning.kept_images import KeptImage
from code_worker.store.learning.label_rules import is_holdout
from code_worker.store.learning.labels import NewLabel, add
from tests.data.label_acts import Place
from tests.image_files import encoded, pixels


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
    found = {one.sha256 for one in open_examples("holdout:", settings=settings, skipped=[], store=store)}
    assert found == {sha256 for sha256 in hashes if is_holdout(sha256)}
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


def keep_as_before(settings: Settings, store: Store, data: bytes, said: str = "real") -> str:
    """A kept copy and its label as they were written before there were groups."""
    sha256 = open_kept(settings).put(data)
    label(store, sha256, said)
    row = KeptImage(sha256, len(data), "png", 64, 64, "s3://b/x")
    store.run(lambda session: kept_images.note_kept(session, [row]))
    return sha256


def group_old(settings: Settings, store: Store, kept: KeptImages | None = None) -> int:
    """Puts old images into groups; returns how many times it was asked whether to go on."""
    asked: list[None] = []
    limits = settings.limits
    group_old_images(store, kept or open_kept(settings), limits, threads=2, check=lambda: asked.append(None))
    return len(asked)


def places(store: Store, *hashes: str) -> list[image_groups.Place]:
    found = store.run(lambda session: image_groups.places(session, hashes), write=False)
    return [found[sha256] for sha256 in hashes]


def test_what_was_labelled_before_there_were_groups_is_looked_at_once_and_keeps_its_part(
    store: Store, settings: Settings
) -> None:
    olds = [keep_as_before(settings, store, encoded(pixels(64, 64, seed), "PNG")) for seed in range(3)]
    olds += [keep_as_before(settings, store, data) for data in (b"no image", b"another")]
    store.run(image_groups.lock)
    before = [place.split for place in places(store, *olds)]
    assert ["holdout" if is_holdout(sha256) else "learned" for sha256 in olds] == [
        split if split == "holdout" else "learned" for split in before
    ]
    assert group_old(settings, store) == 1
    assert group_old(settings, store) == 0, "none is read again"
    assert [(place.split == "holdout") for place in places(store, *olds)] == [split == "holdout" for split in before]
    noted = store.run(lambda session: kept_images.kept(session, olds), write=False)
    assert [noted[sha256].phash is None for sha256 in olds] == [False, False, False, True, True]


def test_a_copy_of_an_old_image_is_in_its_part(sqlite_store: Store, tmp_path: Path) -> None:
    place, picture = Place(tmp_path, sqlite_store), pixels(96, 96)
    found = []
    for side, wanted in (("holdout", True), ("learned", False)):
        data = next(
            one
            for number in range(99)
            if is_holdout(hashlib.sha256(one := encoded(picture, "PNG") + bytes([number])).hexdigest()) is wanted
        )
        old = keep_as_before(place.settings, sqlite_store, data)
        group_old(place.settings, sqlite_store)
        path = place.photos / f"{side}.jpg"
        path.write_bytes(encoded(picture, "JPEG", quality=70))
        copy = place.labeller.label(str(path), "real", by="bob").sha256
        found.append((places(sqlite_store, old)[0].split == "holdout", places(sqlite_store, copy)[0]))
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).rotate(90)
    assert [(held, place.split == "holdout") for held, place in found] == [(True, True), (False, False)]


def test_an_old_image_labelled_again_by_its_hash_is_near_its_copies_too(sqlite_store: Store, tmp_path: Path) -> None:
    place = Place(tmp_path, sqlite_store)
    old = keep_as_before(place.settings, sqlite_store, encoded(pixels(96, 96), "PNG"))
    place.labeller.label(old, "real", by="bob")
    (noted,) = sqlite_store.run(lambda session: kept_images.kept(session, [old]), write=False).values()
    assert noted.phash is not None
    group_old(place.settings, sqlite_store)
    path = place.photos / "copy.jpg"
    path.write_bytes(encoded(pixels(96, 96), "JPEG", quality=80))
    copy = place.labeller.label(str(path), "real", by="bob").sha256
    assert len(set(places(sqlite_store, old, copy))) == 1


def test_a_storage_that_fails_ends_it_and_the_next_time_goes_on(store: Store, settings: Settings) -> None:
    (old,) = (keep_as_before(settings, store, encoded(pixels(64, 64), "PNG")),)
    with pytest.raises(StorageError):
        group_old(settings, store, LocalKept(Path("/dev/null/dataset")))
    assert group_old(settings, store) == 1
    assert places(store, old)[0].split is not None
