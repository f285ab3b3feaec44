"""Labelling: a copy outlives its source, and a label is about the bytes that were meant."""

from __future__ import annotations

import os
import uuid
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from code_worker.client import Client
from code_worker.data.kept_copies import open_kept
from code_worker.data.labelling import Labeller
from code_worker.demo.toy_images import Photographs
from code_worker.errors import (
    CommitUnknownError,
    DatasetError,
    ImageRejectedError,
    StorageError,
    StoreUnavailableError,
)
from code_worker.roles import current_user
from code_worker.settings import S3Settings
from code_worker.store.engine import Store, open_store
from code_worker.store.ids import uuid7
from code_worker.store.learning import image_groups, kept_images
from code_worker.types import ImageFacts
from tests.data.label_acts import Place, sha256_of
from tests.faults.proxy import TcpProxy
from tests.image_files import encoded
from tests.servers import S3Server
from tests.store.acts import accept, claim, judged, rejected, write


@pytest.fixture
def place(sqlite_store: Store, tmp_path: Path) -> Place:
    return Place(tmp_path, sqlite_store)


def test_labelling_keeps_a_copy_and_says_who_what_and_where(store: Store, tmp_path: Path) -> None:
    place = Place(tmp_path, store)
    path = place.image("a.png")
    at = datetime(2024, 1, 2, tzinfo=UTC)
    done = place.labeller.label(path, "fake", by="alice", generator="sdxl", collection="ads", note="hands", at=at)
    assert (done.sha256, done.uri, done.new) == (sha256_of(path), path, True)
    (said,) = place.statements()
    assert (said.sha256, said.label, said.generator, said.collection) == (done.sha256, "fake", "sdxl", "ads")
    assert (said.by, said.source, said.uri, said.note, said.at) == ("alice", "api", path, "hands", at)
    noted = store.run(lambda session: kept_images.kept(session, [done.sha256]))[done.sha256]
    assert (noted.format, noted.width, noted.height, noted.uri) == ("png", 8, 8, path)
    assert noted.size_bytes == Path(path).stat().st_size


def test_the_copy_outlives_the_source(place: Place) -> None:
    path = place.image("a.png")
    data = Path(path).read_bytes()
    done = place.labeller.label(path, "real", by="alice")
    Path(path).unlink()
    assert open_kept(place.settings).read(done.sha256) == data
    assert place.labeller.label(done.sha256.upper(), "fake", by="bob").uri == path
    with pytest.raises(ImageRejectedError, match="not_found"):
        place.labeller.label(path, "fake", by="carol")


def test_saying_the_same_again_adds_nothing(place: Place) -> None:
    path = place.image("a.png")
    news = [place.labeller.label(path, label, by="alice").new for label in ("real", "real", "fake", "real")]
    assert news == [True, False, True, True]


def test_unless_told_otherwise_the_user_of_the_process_says_it(place: Place) -> None:
    place.labeller.label(place.image("a.png"), "real")
    assert place.statements()[0].by == current_user() != ""


def test_a_relative_path_is_recorded_absolute(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place.image("a.png")
    monkeypatch.chdir(place.photos)
    assert place.labeller.label("a.png", "real").uri == path


def test_a_path_whose_name_is_no_text_is_recorded_as_a_uri(place: Place) -> None:
    path = os.fsdecode(os.fsencode(place.photos) + b"/\xff\xfe.png")
    Path(place.image("a.png")).rename(path)
    done = place.labeller.label(path, "real", by="alice")
    assert done.uri == f"{place.photos.as_uri()}/%FF%FE.png"
    assert place.labeller.label(done.uri, "real", by="alice").new is False


@pytest.mark.parametrize(
    ("content", "why"), [(b"not an image, only words", "unsupported_format"), (b"", "empty"), (None, "not_found")]
)
def test_what_is_no_image_gets_no_label_and_no_copy(place: Place, content: bytes | None, why: str) -> None:
    path = place.photos / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageRejectedError, match=why):
        place.labeller.label(str(path), "real")
    assert (place.statements(), place.copies()) == ([], set())


@pytest.mark.parametrize("uri", ["s3://not-allowed/a.png", "/etc/hostname", "https://example.com/a.png"])
def test_only_allowed_sources_are_read(place: Place, uri: str) -> None:
    with pytest.raises(ImageRejectedError, match="source_not_allowed"):
        place.labeller.label(uri, "real")


def test_a_wrong_argument_is_refused_before_anything_is_fetched(place: Place) -> None:
    for wrong in ({"label": "maybe"}, {"label": "real", "generator": "sdxl"}, {"label": "fake", "by": "\0"}):
        with pytest.raises(ValueError, match=r"real or fake|no generator|NUL"):
            place.labeller.label("/nowhere.png", **wrong)


def test_an_unknown_hash_says_how_to_name_the_image(place: Place) -> None:
    with pytest.raises(DatasetError, match=f"no copy of image {'0' * 64} is kept: label it by its URI or by a job"):
        place.labeller.label("0" * 64, "real")


def test_a_storage_without_its_database_is_still_known(place: Place, store: Store) -> None:
    path = place.image("a.png")
    place.labeller.label(path, "real", by="alice")
    other = Labeller(place.settings, store)
    assert other.label(sha256_of(path), "fake", by="bob").new
    assert store.run(lambda session: kept_images.kept(session, [sha256_of(path)]))[sha256_of(path)].format == "png"


def test_a_storage_that_fails_is_not_the_images_fault(place: Place) -> None:
    path = place.image("a.png")
    settings = place.settings.model_copy(update={"datasets": path})
    with pytest.raises(StorageError, match="cannot keep a copy"):
        Labeller(settings, place.store).label(path, "real")
    assert place.statements() == []


def judge(place: Place, path: str, **facts: object) -> str:
    """A job whose verdict is about the file as it is now."""
    (job_id,) = accept(place.store, path)
    claim(place.store, [job_id])
    found = ImageFacts(sha256_of(path), 1, **facts)  # type: ignore[arg-type]
    write(place.store, replace(judged(job_id, uri=path), facts=found))
    return job_id


def test_a_job_names_the_image_that_it_judged(place: Place) -> None:
    path = place.image("a.png")
    job_id = judge(place, path)
    done = place.labeller.label(job_id.upper(), "fake", by="alice")
    assert (done.sha256, done.uri) == (sha256_of(path), path)
    assert place.statements()[0].job_id == job_id


def test_a_job_whose_image_was_replaced_is_refused(place: Place) -> None:
    path = place.image("a.png")
    job_id, before = judge(place, path), sha256_of(path)
    place.image("a.png", seed=1)
    with pytest.raises(DatasetError, match=f"{path} holds other bytes now .{sha256_of(path)}.* meant .{before}"):
        place.labeller.label(job_id, "fake")
    assert (place.statements(), place.copies()) == ([], set())


def test_a_job_whose_image_was_kept_needs_no_source(place: Place) -> None:
    path = place.image("a.png")
    job_id = judge(place, path)
    place.labeller.label(path, "fake", by="alice")
    before = sha256_of(path)
    Path(path).unlink()
    assert place.labeller.label(job_id, "real", by="bob").sha256 == before


def test_a_job_without_facts_names_what_lies_at_its_uri(place: Place) -> None:
    path = place.image("a.png")
    waiting, refused = accept(place.store, path, path)
    claim(place.store, [refused])
    write(place.store, rejected(refused))
    assert place.labeller.label(waiting, "fake", by="alice").sha256 == sha256_of(path)
    assert place.labeller.label(refused, "fake", by="bob").sha256 == sha256_of(path)


def test_an_unknown_job_is_named(place: Place) -> None:
    job_id = uuid7()
    with pytest.raises(DatasetError, match=f"no job has the id {job_id}; a file of that name is written ./{job_id}"):
        place.labeller.label(job_id, "fake")


def test_an_image_in_s3_is_kept_in_s3(place: Place, s3_server: S3Server) -> None:
    client, bucket = s3_server.client(), f"uploads-{uuid.uuid4().hex[:8]}"
    for name in (bucket, f"{bucket}-kept"):
        client.create_bucket(Bucket=name)
    path = place.image("a.png")
    client.put_object(Bucket=bucket, Key="ü.png", Body=Path(path).read_bytes())
    s3 = S3Settings(
        endpoint_url=s3_server.url,
        region="us-east-1",
        access_key_id="test",
        secret_access_key="test",
        path_style=True,
        buckets=(bucket,),
    )
    settings = place.settings.model_copy(update={"s3": s3, "datasets": f"s3://{bucket}-kept/copies"})
    labeller = Labeller(settings, place.store)
    done = labeller.label(f"s3://{bucket}/ü.png", "real")
    labeller.close()
    (kept,) = client.list_objects_v2(Bucket=f"{bucket}-kept")["Contents"]
    assert kept["Key"].startswith("copies/")
    assert kept["Key"].endswith(f"/{done.sha256}")


def test_the_client_labels(place: Place) -> None:
    client = Client(place.settings)
    path = place.image("a.png")
    done = client.label(path, "fake", generator="sdxl", by="alice")
    assert (done.new, client.label(path, "fake", generator="sdxl", by="alice").new) == (True, False)
    client.close()
    assert place.statements()[0].source == "api"


def test_a_copy_is_never_kept_without_a_row_that_names_it(
    lossy_postgres: tuple[TcpProxy, str], postgres_store: Store, tmp_path: Path
) -> None:
    proxy, url = lossy_postgres
    with closing(open_store(url)) as store:
        place = Place(tmp_path, store)
        first, second = place.image("a.png"), place.image("b.png", 2)
        proxy.cut_at_answer_to(b"INTO labels")
        with pytest.raises(StoreUnavailableError):
            place.labeller.label(first, "fake", by="rob")
        assert proxy.cut.is_set()
        with pytest.raises(StoreUnavailableError):
            place.labeller.label(second, "fake", by="rob")
    hashes = place.copies()
    assert hashes == {sha256_of(first)}, "of the second nothing could be noted, and nothing was kept"
    assert set(postgres_store.run(lambda session: kept_images.kept(session, hashes))) == hashes


def test_a_label_whose_answer_is_lost_may_be_said_again(lossy_postgres: tuple[TcpProxy, str], tmp_path: Path) -> None:
    proxy, url = lossy_postgres
    with closing(open_store(url)) as store:
        place = Place(tmp_path, store)
        path = place.image("a.png")
        place.labeller.find(path)
        proxy.cut_at_answer_to(b"INTO labels", b"COMMIT")
        with pytest.raises(CommitUnknownError, match="all of it was written, or nothing"):
            place.labeller.label(sha256_of(path), "fake", by="rob")
        assert proxy.cut.is_set()
        proxy.refuse(refusing=False)
        assert not place.labeller.label(path, "fake", by="rob").new
        assert len(place.statements()) == 1


def test_a_label_whose_answer_is_lost_for_a_moment_is_told_as_new(
    lossy_postgres: tuple[TcpProxy, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, url = lossy_postgres
    monkeypatch.setattr("code_worker.store.engine.time.sleep", lambda _: proxy.refuse(refusing=False))
    with closing(open_store(url)) as store:
        place = Place(tmp_path, store)
        sha256 = place.labeller.find(place.image("a.png")).image.sha256
        proxy.cut_at_answer_to(b"INTO labels", b"COMMIT")
        assert place.labeller.label(sha256, "fake", by="rob").new
        assert proxy.cut.is_set()
        assert len(place.statements()) == 1


def places(place: Place, *hashes: str) -> list[image_groups.Place]:
    found = place.store.run(lambda session: image_groups.places(session, hashes), write=False)
    return [found[sha256] for sha256 in hashes]


def saved(place: Place, name: str, image: Image.Image, kind: str, **options: Any) -> str:
    (place.photos / name).write_bytes(encoded(image, kind, **options))
    return str(place.photos / name)


def test_a_copy_in_another_form_and_size_is_in_the_same_part(store: Store, tmp_path: Path) -> None:
    place, picture = Place(tmp_path, store), Image.fromarray(Photographs().crop(np.random.default_rng(1)))
    half = picture.resize((picture.width // 2, picture.height // 2))
    files = [
        saved(place, "a.png", picture, "PNG"),
        saved(place, "a.jpg", picture, "JPEG", quality=60),
        saved(place, "half.webp", half, "WEBP", quality=75),
    ]
    (place.photos / "more.png").write_bytes((place.photos / "a.png").read_bytes() + b"bytes of the labeller's choice")
    files.append(str(place.photos / "more.png"))
    hashes = [place.labeller.label(path, "real", by="alice").sha256 for path in files]
    assert len(set(hashes)) == 4
    assert len(set(places(place, *hashes))) == 1


def test_a_real_image_and_what_was_made_of_it_are_together_if_the_caller_says_so(place: Place) -> None:
    pictures = [Image.fromarray(Photographs().crop(np.random.default_rng(seed))) for seed in range(12)]
    files = [saved(place, f"{number}.png", picture, "PNG") for number, picture in enumerate(pictures)]
    hashes = [place.labeller.label(path, "fake", by="alice", group="prompt 17").sha256 for path in files]
    assert len(set(places(place, *hashes))) == 1
    assert {said.group for said in place.statements()} == {"prompt 17"}
    alone = saved(place, "alone.png", Image.fromarray(Photographs().crop(np.random.default_rng(99))), "PNG")
    other = place.labeller.label(alone, "real", by="alice").sha256
    assert places(place, other)[0].group != places(place, hashes[0])[0].group


def test_an_image_that_cannot_be_decoded_is_labelled_and_in_a_group_of_its_own(place: Place) -> None:
    path = place.image("a.png", side=64)
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])
    done = place.labeller.label(path, "real", by="alice")
    assert places(place, done.sha256)[0].split is not None


@pytest.mark.parametrize("group", ["", "x" * 201, "nul\0"])
def test_a_group_that_cannot_be_stored_is_refused_before_anything_is_fetched(place: Place, group: str) -> None:
    with pytest.raises(ValueError, match="group"):
        place.labeller.label("/nowhere/a.png", "real", by="alice", group=group)
