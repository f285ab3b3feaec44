"""Groups of images: one part for all of a group, decided once; what is between two parts belongs to none."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from sqlalchemy import func, select, text

from code_worker.errors import StoreError
from code_worker.images.phash import perceptual_hash
from code_worker.settings import LimitSettings
from code_worker.store.engine import Session, Store, open_store
from code_worker.store.learning import image_groups, kept_images
from code_worker.store.learning.image_groups import Place
from code_worker.store.learning.kept_images import NEAR_BITS, KeptImage, bits, is_near, near
from code_worker.store.models import ImageGroupRow, KeptImageRow, SecretRow
from code_worker.store.sql import table_of
from tests.image_files import encoded, pixels

HASH = 0x9A3C_55F0_1234_ABCD
FAR = HASH ^ 0xFFFF_FFFF_0000_0000
BETWEEN = HASH ^ 0xFC00_0000_0000_0000
"""Six bits from HASH; six more give what is near to this one and not to the other."""
BEYOND = BETWEEN ^ 0x0000_FC00_0000_0000


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def keep(session: Session, images: Mapping[str, int | None]) -> None:
    rows = [KeptImage(sha256, 1, "png", 8, 8, "s3://b/x", bits(phash)) for sha256, phash in images.items()]
    kept_images.note_kept(session, rows)


def put(store: Store, name: str, phash: int | None = None, group: str | None = None) -> str:
    """Keeps an image and puts it into a group; returns its content hash."""
    sha256 = sha256_of(name)

    def work(session: Session) -> None:
        image_groups.lock(session)
        keep(session, {sha256: phash})
        image_groups.place(session, {sha256: group})

    store.run(work)
    return sha256


def found(store: Store, *hashes: str) -> list[Place]:
    places = store.run(lambda session: image_groups.places(session, hashes), write=False)
    return [places[sha256] for sha256 in hashes]


def splits(store: Store, *hashes: str) -> list[str | None]:
    return [place.split for place in found(store, *hashes)]


def named_in(store: Store, split: str, *, first: int = 0) -> str:
    """A name whose group is in this part, found as nobody without the ledger could: by trying."""
    for number in range(first, first + 200):
        if splits(store, put(store, f"try {number}", group=f"name {number}")) == [split]:
            return f"name {number}"
    raise AssertionError(f"none of 200 names is in {split}")


def test_images_of_one_name_are_together_and_names_are_split_as_stated(store: Store) -> None:
    def work(session: Session) -> None:
        keep(session, {sha256_of(f"{n}"): None for n in range(600)})
        image_groups.place(session, {sha256_of(f"{n}"): f"post {n // 3}" for n in range(600)})

    store.run(work)
    placed = found(store, *(sha256_of(f"{n}") for n in range(600)))
    assert all(placed[n] == placed[n - n % 3] for n in range(600))
    assert len({place.group for place in placed}) == 200
    counts = Counter(place.split for place in placed)
    # Of 200 groups: 40 ± 6 and 20 ± 4, one standard deviation of a binomial; five of them must hold.
    assert 3 * 12 < counts["holdout"] < 3 * 68
    assert 0 < counts["validation"] < 3 * 41


def test_thousands_of_files_with_the_same_pixels_are_on_one_side(sqlite_store: Store) -> None:
    """Whoever appends bytes until the hash of the file is to their liking chooses nothing."""
    picture = encoded(pixels(48, 48), "JPEG")
    variants = [picture + str(number).encode() for number in range(2000)]
    hashes = {hashlib.sha256(one).hexdigest(): perceptual_hash(one, LimitSettings()) for one in variants}

    def work(session: Session) -> None:
        keep(session, hashes)
        image_groups.place(session, dict.fromkeys(hashes))

    sqlite_store.run(work)
    assert len(set(found(sqlite_store, *hashes))) == 1


def test_a_near_duplicate_follows_whatever_name_it_is_given(store: Store) -> None:
    first = put(store, "first", HASH)
    again = put(store, "again", HASH ^ 0b111111, "a post of its own")
    sibling = put(store, "sibling", FAR, "a post of its own")
    assert len(set(found(store, first, again, sibling))) == 1


def test_seven_bits_and_more_are_another_image(store: Store) -> None:
    first, other = put(store, "first", HASH), put(store, "other", HASH ^ 0b1111111)
    assert len({place.group for place in found(store, first, other)}) == 2


def test_every_near_hash_is_found_by_its_bands(sqlite_store: Store) -> None:
    import random  # drawn with a seed, for this test alone

    draw = random.Random(5)
    close = [HASH ^ sum(1 << bit for bit in draw.sample(range(64), NEAR_BITS)) for _ in range(300)]
    sqlite_store.run(lambda session: keep(session, {sha256_of(f"{n}"): one for n, one in enumerate(close)}))
    statement = select(table_of(KeptImageRow).c.phash).where(near(str(bits(HASH))))
    met = sqlite_store.run(lambda session: list(session.scalars(statement)), write=False)
    assert len(met) == 300
    assert all(is_near(one, str(bits(HASH))) for one in met)


def test_what_is_between_two_parts_is_left_out_and_both_stay(store: Store) -> None:
    held, learned = named_in(store, "holdout"), named_in(store, "train", first=200)
    one, other = put(store, "one", HASH, held), put(store, "other", BEYOND, learned)
    assert splits(store, one, other) == ["holdout", "train"]
    between = put(store, "between", BETWEEN)
    assert splits(store, one, other, between) == ["holdout", "train", None]
    named = put(store, "named", HASH ^ 1, learned)
    assert splits(store, named, put(store, "of that name", FAR, learned)) == [None, "train"]


def test_an_image_stays_where_it_is_and_lends_its_part_to_a_new_name(store: Store) -> None:
    held, learned = named_in(store, "holdout"), named_in(store, "train", first=200)
    image = put(store, "image", HASH, held)
    assert put(store, "image", HASH, learned) == image
    assert splits(store, image) == ["holdout"]
    put(store, "image", HASH, "a name nobody knows")
    assert splits(store, put(store, "sibling", FAR, "a name nobody knows")) == ["holdout"]


def test_nobody_without_the_secret_can_tell_a_part(store: Store) -> None:
    """The same images in an installation with another secret: their parts agree no oftener than chance has it."""
    hashes = [put(store, f"{n}", group=f"post {n}") for n in range(150)]
    first = splits(store, *hashes)
    groups, kept, secret = (table_of(row) for row in (ImageGroupRow, KeptImageRow, SecretRow))

    def begin_anew(session: Session) -> None:
        session.execute(groups.delete())
        session.execute(kept.delete())
        session.execute(secret.delete())
        image_groups.begin_with(session, b"another secret of 32 bytes......")

    store.run(begin_anew)
    again = splits(store, *(put(store, f"{n}", group=f"post {n}") for n in range(150)))
    same = sum(one == other for one, other in zip(first, again, strict=True))
    assert 150 * 0.3 < same < 150 * 0.8  # 0.7² + 0.1² + 0.2² = 0.54, six standard deviations each way
    assert len(again) == len(hashes)


@pytest.mark.parametrize("change", ["image_groups SET split = 'train'", "secrets SET name = 'other'"])
def test_the_database_refuses_to_change_what_was_decided(store: Store, change: str) -> None:
    put(store, "image", HASH)
    with pytest.raises(StoreError, match="are immutable"):
        store.run(lambda session: session.execute(text(f"UPDATE {change}")))


def test_a_secret_that_decided_something_cannot_be_replaced(store: Store) -> None:
    put(store, "image", HASH)
    with pytest.raises(StoreError, match="made once and cannot be replaced"):
        store.run(lambda session: image_groups.begin_with(session, bytes(32)))


def test_the_secret_is_made_once_however_many_come_first(store: Store) -> None:
    count = 4
    gate = threading.Barrier(count)

    def first(number: int) -> str:
        with closing(open_store(store.url)) as own:
            gate.wait()
            return put(own, f"image {number}", HASH ^ (1 << number))

    with ThreadPoolExecutor(count) as pool:
        hashes = list(pool.map(first, range(count)))
    assert store.run(lambda session: session.scalar(select(func.count()).select_from(SecretRow)), write=False) == 1
    assert len(set(found(store, *hashes))) == 1, "near images that came at one moment are together"


def rows(store: Store) -> int:
    counted = select(func.count()).select_from(ImageGroupRow)
    return store.run(lambda session: session.scalar(counted), write=False) or 0


def remove(store: Store, hashes: Iterable[str]) -> None:
    listed, kept = list(hashes), table_of(KeptImageRow)

    def work(session: Session) -> None:
        image_groups.forget(session, listed)
        session.execute(kept.delete().where(kept.c.sha256.in_(listed)))

    store.run(work)


def test_a_group_goes_with_its_last_image_and_its_names_with_it(store: Store) -> None:
    first, again = put(store, "first", HASH), put(store, "again", HASH, "a post")
    other = put(store, "other", FAR, "another post")
    assert rows(store) == 3
    before = found(store, first, other)
    remove(store, [first])
    assert rows(store) == 3
    assert found(store, again, other) == before
    remove(store, [again, other])
    assert rows(store) == 0, "nothing is left of what was erased"
    assert found(store, put(store, "first", HASH), put(store, "other", FAR, "another post")) == before
