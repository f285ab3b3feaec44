"""What the tests of labelling need: a place with images that may be read, and a labeller over a real ledger."""

from __future__ import annotations

import hashlib
from pathlib import Path

from code_worker.data.labelling import Labeller
from code_worker.settings import FileSettings, Settings
from code_worker.store.engine import Store
from code_worker.store.learning import labels
from code_worker.store.learning.labels import LabelFilter, Statement
from tests.image_files import encoded, pixels


class Place:
    """A directory `photos` that may be read, and a dataset storage beside it."""

    def __init__(self, root: Path, store: Store) -> None:
        self.store = store
        self.photos = root / "photos"
        self.photos.mkdir()
        self.settings = Settings(
            data_dir=root / "data", files=FileSettings(roots=(self.photos,)), database_url=store.url
        )
        self.labeller = Labeller(self.settings, store)

    def image(self, name: str, seed: int = 0, *, side: int = 8) -> str:
        """Writes a small PNG; returns the path."""
        path = self.photos / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(pixels(side, side, seed), "PNG"))
        return str(path)

    def statements(self) -> list[Statement]:
        """All that was said, in the order of writing."""
        return self.store.run(
            lambda session: labels.list_labels(session, LabelFilter(), limit=1000, newest_first=False)
        )

    def copies(self) -> set[str]:
        """Content hashes of the kept copies."""
        root = Path(self.settings.resolved_datasets)
        return {path.name for path in root.glob("??/??/*")}


def sha256_of(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
