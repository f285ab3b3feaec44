"""Every code block of the README and of docs/ is run, in the reader's order, against real servers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, Reader, blocks_of
from tests.parity import ParitySet
from tests.servers import S3Server

PAGES = [page for page in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]) if blocks_of(page)]
README = ROOT / "README.md"
ON_A_STACK = [page for page in PAGES if "<!-- run: stack -->" in page.read_text(encoding="utf-8")]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PHOTOS = 3


@pytest.fixture(scope="module")
def hub_cache(parity_set: ParitySet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's cache as a download of `hf:aimagelab/CoDE` leaves it."""
    home = tmp_path_factory.mktemp("hub")
    repository = home / "hub" / "models--aimagelab--CoDE"
    shutil.copytree(parity_set.directory, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    return home


@pytest.fixture(scope="module")
def object_store(parity_set: ParitySet) -> Iterator[S3Server]:
    """A server of its own, with two images in the bucket `uploads`."""
    with S3Server() as server:
        client = server.client()
        client.create_bucket(Bucket="uploads")
        for name, path in zip(("a.jpg", "b.jpg"), sorted(parity_set.images.values()), strict=False):
            client.put_object(Bucket="uploads", Key=name, Body=path.read_bytes())
        client.close()
        yield server


@pytest.fixture(scope="module")
def storage(hub_cache: Path, object_store: S3Server) -> dict[str, str]:
    """Settings that every reader has: the object store, and a hub that is a directory."""
    return {
        **object_store.environment,
        "CODE_WORKER_DEVICE": "cpu",
        "CODE_WORKER_S3__BUCKETS": '["uploads"]',
        "HF_HOME": str(hub_cache),
    }


@pytest.fixture
def environment(tmp_path: Path, storage: dict[str, str]) -> dict[str, str]:
    return {**storage, "CODE_WORKER_DATA_DIR": str(tmp_path / "data"), "HOME": str(tmp_path)}


def place(root: Path, parity_set: ParitySet) -> Path:
    """Where a reader works: a checkout's root, with photos to judge."""
    photos = root / "here" / "photos"
    photos.mkdir(parents=True)
    for path in sorted(parity_set.images.values())[:PHOTOS]:
        shutil.copy(path, photos)
    return photos.parent


@pytest.fixture(scope="module")
def reader_of_the_readme(
    storage: dict[str, str], parity_set: ParitySet, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Reader]:
    """Somebody who has done what the README says, and has its stack running."""
    root = tmp_path_factory.mktemp("readme")
    directory = place(root, parity_set)
    # The variable that the README exports once holds in every terminal that is opened afterwards.
    more = {"CODE_WORKER_CONFIG": str(directory / "code_worker.toml"), "CODE_WORKER_DATA_DIR": str(root / "data")}
    with Reader(directory, {**storage, **more, "HOME": str(root)}) as reader:
        for block in blocks_of(README):
            reader.run(block)
        yield reader


@pytest.mark.slow(reason="starts the whole stack, and reads the longest page")
@pytest.mark.parametrize("page", [README, *ON_A_STACK], ids=lambda page: page.name)
def test_every_block_of_the_readme_and_of_pages_that_follow_it_runs(reader_of_the_readme: Reader, page: Path) -> None:
    for block in blocks_of(page) if page != README else []:
        reader_of_the_readme.run(block)


@pytest.mark.slow(reason="a page whose commands load the encoder one after the other")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in (README, *ON_A_STACK)], ids=lambda page: page.name
)
def test_every_block_of_the_page_runs(
    page: Path, tmp_path: Path, parity_set: ParitySet, environment: dict[str, str]
) -> None:
    with Reader(place(tmp_path, parity_set), environment) as reader:
        for block in blocks_of(page):
            reader.run(block)
