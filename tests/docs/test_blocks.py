"""Every code block of the README and of docs/ is run, in the reader's order, against real servers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, Block, Reader, blocks_of
from tests.parity import ParitySet
from tests.servers import S3Server

PAGES = [page for page in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]) if blocks_of(page)]
STACK = "<!-- run: stack -->"
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


@pytest.fixture
def environment(tmp_path: Path, hub_cache: Path, object_store: S3Server) -> dict[str, str]:
    return {
        **object_store.environment,
        "CODE_WORKER_DATA_DIR": str(tmp_path / "data"),
        "CODE_WORKER_DEVICE": "cpu",
        "CODE_WORKER_S3__BUCKETS": '["uploads"]',
        "HF_HOME": str(hub_cache),
        "HOME": str(tmp_path),
    }


@pytest.fixture
def directory(tmp_path: Path, parity_set: ParitySet) -> Path:
    """Where the reader works: a checkout's root, with photos to judge."""
    photos = tmp_path / "here" / "photos"
    photos.mkdir(parents=True)
    for path in sorted(parity_set.images.values())[:PHOTOS]:
        shutil.copy(path, photos)
    return photos.parent


def before(page: Path) -> list[Block]:
    """What the page takes for granted: a stack that runs."""
    if STACK not in page.read_text(encoding="utf-8"):
        return []
    return [
        Block("stack", 1, "sh background", "code-worker up\n"),
        Block("stack", 2, "sh", "code-worker releases import hf:aimagelab/CoDE --promote\n"),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_the_page_runs(page: Path, directory: Path, environment: dict[str, str]) -> None:
    # The variable that the README exports once holds in every terminal that it opens afterwards.
    environment |= {"CODE_WORKER_CONFIG": str(directory / "code_worker.toml")} if page.name == "README.md" else {}
    with Reader(directory, environment) as reader:
        for block in [*before(page), *blocks_of(page)]:
            reader.run(block)
