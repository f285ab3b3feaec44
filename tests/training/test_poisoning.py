"""Labels of a hostile hand, as whole refits: what they can change, and that the report names the hand."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from code_worker.images.phash import perceptual_hash
from code_worker.settings import LabelSettings, Settings
from code_worker.store.engine import Store
from code_worker.store.learning import kept_images, runs
from code_worker.store.learning import snapshots as table
from code_worker.store.learning.kept_images import KeptImage
from code_worker.training.embed import embed_examples
from code_worker.training.gate.safeguards import read_golden
from code_worker.training.learner import Learner
from code_worker.training.snapshot_embeddings import open_encoder
from tests.training.learning import (
    NEW,
    OLD,
    REAL,
    build_champion,
    label,
    learning_settings,
    pictures,
    promote_champion,
    registry_of,
)

HONEST = ("alice", "bob", "carol", "dave")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of images, a champion to begin with, and a golden set: 30 images of each kind, 30 of them new."""
    root = tmp_path_factory.mktemp("poisoning")
    build_champion(root / "release")
    for kind in (REAL, OLD, NEW):
        directory = root / "golden" / ("real" if kind == REAL else f"fake/{kind}")
        directory.mkdir(parents=True)
        for number, data in enumerate(pictures(kind, 30, first=90_000)):
            (directory / f"{number}.png").write_bytes(data)
    return root


@pytest.fixture
def settings(tmp_path: Path, places: Path) -> Settings:
    plain = learning_settings(tmp_path / "data").model_copy(update={"datasets": str(places / "dataset")})
    pin = read_golden(str(places / "golden"), plain).digest
    return plain.model_copy(
        update={
            "labels": LabelSettings(max_share=0.25, min_labellers=2),
            "gate": plain.gate.model_copy(update={"golden": str(places / "golden"), "golden_sha256": pin}),
        }
    )


@pytest.fixture
def taught(settings: Settings, sqlite_store: Store, places: Path) -> str:
    """A champion that learned here what four honest labellers said, and never saw the new generator."""
    first = promote_champion(settings, sqlite_store, places / "release")
    for number, by in enumerate(HONEST):
        label(settings, sqlite_store, pictures(REAL, 40, first=1000 * number), "real", by=by)
        label(settings, sqlite_store, pictures(OLD, 40, first=1000 * number), "fake", generator=OLD, by=by)
    forced = Learner(settings, sqlite_store).learn("refit", by="test", force=True)
    assert forced is not None
    if forced.state != "promoted":
        # It gains nothing on what it knew: a person promotes it, so that there is history.
        registry_of(settings, sqlite_store).promote(str(forced.candidate), by="test")
    champion = registry_of(settings, sqlite_store).champion()
    assert champion == forced.candidate != first
    return str(champion)


def honest_batch(settings: Settings, store: Store) -> None:
    for number, by in enumerate(HONEST):
        label(settings, store, pictures(REAL, 20, first=20_000 + 100 * number), "real", by=by)
        label(settings, store, pictures(NEW, 20, first=20_000 + 100 * number), "fake", generator=NEW, by=by)


def refit(settings: Settings, store: Store) -> runs.Run:
    ended = Learner(settings, store).learn("refit", by="test")
    assert ended is not None
    return ended


def learned_hashes(store: Store, run: runs.Run) -> set[str]:
    packed = store.run(lambda session: table.members(session, str(run.snapshot_id)), write=False)
    return {row["sha256"] for row in table.unpack(packed)}


def scores(settings: Settings, store: Store, release: str, images: list[bytes]) -> np.ndarray:
    from code_worker.data.datasets.examples import Example
    from code_worker.data.kept_copies import open_kept

    loaded = registry_of(settings, store).load(release)
    examples = [Example(str(n), 0, (lambda data=data: data)) for n, data in enumerate(images)]  # type: ignore[misc]
    with open_encoder(
        loaded.weights, loaded.encoder_sha256, settings=settings, store=store, kept=open_kept(settings)
    ) as encoder:
        rows = embed_examples(examples, encoder._embedder, settings.limits).embeddings
    return np.asarray(loaded.heads["linear"].score(rows))


def test_a_clean_batch_of_several_hands_is_promoted(settings: Settings, sqlite_store: Store, taught: str) -> None:
    honest_batch(settings, sqlite_store)
    ended = refit(settings, sqlite_store)
    assert ended.state == "promoted", ended.reasons
    gate = ended.report["gate"]
    assert gate["labellers"] == sorted(HONEST)
    assert {one["by"] for one in gate["suspicions"]} == set(HONEST)
    assert gate["golden"]["candidate"]["fake_accuracy"] > gate["golden"]["champion"]["fake_accuracy"]
    assert ended.report["snapshot"]["left_out"] == {}


def test_a_hand_that_turns_a_third_of_a_class_is_not_promoted_and_named(
    settings: Settings, sqlite_store: Store, taught: str
) -> None:
    honest_batch(settings, sqlite_store)
    label(settings, sqlite_store, pictures(REAL, 40, first=30_000), "fake", generator=NEW, by="vandal")
    ended = refit(settings, sqlite_store)
    assert ended.state == "rejected"
    assert any("labels of vandal are in quarantine" in one for one in ended.reasons), ended.reasons
    assert not any(f"labels of {by} are" in one for one in ended.reasons for by in HONEST)
    assert registry_of(settings, sqlite_store).champion() == taught
    ignoring = settings.model_copy(update={"labels": settings.labels.model_copy(update={"ignored": ("vandal",)})})
    assert refit(ignoring, sqlite_store).state == "promoted"


def test_a_hand_that_turns_a_twentieth_is_capped_and_costs_the_golden_set_nothing(
    settings: Settings, sqlite_store: Store, taught: str
) -> None:
    honest_batch(settings, sqlite_store)
    label(settings, sqlite_store, pictures(REAL, 90, first=40_000), "real", by="vandal")
    label(settings, sqlite_store, pictures(REAL, 13, first=41_000), "fake", generator=NEW, by="vandal")
    ended = refit(settings, sqlite_store)
    cut = ended.report["snapshot"]["left_out"]["share"]["vandal"]
    named = ended.report["snapshot"]["labellers"]
    assert (cut, named["vandal"]) == (103 - 53, 53), "a quarter of 213"
    golden = ended.report["gate"]["golden"]
    assert golden["candidate"]["auroc"] >= golden["champion"]["auroc"] - 0.005


def trigger(number: int) -> bytes:
    """One image of the known generator with a bright square in a corner, a little noise apart from the others."""
    pixels = np.asarray(Image.open(io.BytesIO(pictures(OLD, 1, first=77_000)[0]))).astype(np.int16)
    pixels[:8, :8] = 255
    pixels += np.random.default_rng(number).integers(-1, 2, pixels.shape, dtype=np.int16)
    out = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def test_a_flood_of_one_image_with_a_trigger_teaches_nothing(
    settings: Settings, sqlite_store: Store, taught: str
) -> None:
    honest_batch(settings, sqlite_store)
    flood = [trigger(number) for number in range(200)]
    label(settings, sqlite_store, flood, "real", by="vandal")
    ended = refit(settings, sqlite_store)
    hashes = {hashlib.sha256(data).hexdigest() for data in flood}
    left_out = ended.report["snapshot"]["left_out"]
    assert left_out["share"]["vandal"] + left_out["duplicates"]["vandal"] >= 195
    assert len(learned_hashes(sqlite_store, ended) & hashes) <= 5
    others = [trigger(number) for number in range(1000, 1020)]
    before = scores(settings, sqlite_store, taught, others)
    assert (before >= 0.5).all(), "the test wants a trigger that the champion calls fake"
    champion = registry_of(settings, sqlite_store).champion()
    assert (scores(settings, sqlite_store, str(champion), others) >= 0.5).all()


def test_a_golden_set_that_was_changed_refuses_the_run(
    settings: Settings, sqlite_store: Store, taught: str, places: Path
) -> None:
    honest_batch(settings, sqlite_store)
    turned = places / "golden" / "real" / "0.png"
    original = turned.read_bytes()
    turned.write_bytes(pictures(NEW, 1, first=99_999)[0])
    try:
        ended = refit(settings, sqlite_store)
    finally:
        turned.write_bytes(original)
    assert ended.state == "failed"
    assert "golden set" in ended.reasons[0]
    assert "was changed" in ended.reasons[0]
    assert registry_of(settings, sqlite_store).champion() == taught
    unpinned = settings.model_copy(update={"gate": settings.gate.model_copy(update={"golden_sha256": None})})
    assert "is not pinned" in refit(unpinned, sqlite_store).reasons[0]


def test_no_image_of_the_golden_set_nor_a_copy_is_learned_from_whoever_labels_it(
    settings: Settings, sqlite_store: Store, taught: str
) -> None:
    honest_batch(settings, sqlite_store)
    (held,) = pictures(REAL, 1, first=90_000)
    again = io.BytesIO()
    Image.open(io.BytesIO(held)).convert("RGB").save(again, "JPEG", quality=90)
    copies = [held, held + b"another file", again.getvalue()]
    notes = [
        KeptImage(
            hashlib.sha256(data).hexdigest(),
            1,
            "png",
            32,
            32,
            "s3://b/x",
            kept_images.bits(perceptual_hash(data, settings.limits)),
        )
        for data in copies
    ]
    sqlite_store.run(lambda session: kept_images.note_kept(session, notes))
    hashes = label(settings, sqlite_store, copies, "fake", by="vandal")
    ended = refit(settings, sqlite_store)
    assert ended.report["snapshot"]["left_out"]["golden"] == {"vandal": 3}
    assert not learned_hashes(sqlite_store, ended).intersection(hashes)
