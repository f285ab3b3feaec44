"""The directory and settings of a demonstration, independent of the settings of the person who runs it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from code_worker.errors import ConfigurationError
from code_worker.system.files import locked

_MARK: Final = ".code-worker-demo"
_FOREIGN: Final = ("CODE_WORKER_", "AWS_")


class Place:
    """The directories of a demonstration below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.data = self.root / "data"
        self.images = self.root / "images"
        self.learned = self.root / "learned"
        self.release = self.root / "release"
        self.log = self.root / "worker.log"

    @property
    def environment(self) -> dict[str, str]:
        """Settings that every process of the demonstration shares."""
        return {
            "CODE_WORKER_DATA_DIR": str(self.data),
            "CODE_WORKER_FILES__ROOTS": f'["{self.images}", "{self.learned}"]',
        }


@contextmanager
def own_place(root: Path) -> Iterator[Place]:
    """Empties the directory of an earlier demonstration, or makes a new one, and holds it.

    Raises:
        ConfigurationError: it holds something else, or a demonstration runs in it.
    """
    place = Place(root)
    try:
        place.root.mkdir(parents=True, exist_ok=True)
        # The mark is what allows the deleting below: nothing is ever taken from a directory without it.
        if any(place.root.iterdir()) and not (place.root / _MARK).is_file():
            raise ConfigurationError(f"{root} holds something that no demo left: choose another with --directory")
        with locked(place.root / _MARK):
            for directory in (place.data, place.images, place.learned, place.release):
                shutil.rmtree(directory, ignore_errors=True)
            place.log.unlink(missing_ok=True)
            place.images.mkdir()
            place.learned.mkdir()
            yield place
    except BlockingIOError:
        raise ConfigurationError(f"a demo runs in {root} already: choose another with --directory") from None
    except (PermissionError, FileExistsError) as error:
        raise ConfigurationError(f"cannot use {root} for the demo: {error.strerror}") from error


@contextmanager
def own_environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """Within it this process and its children know these settings alone: no database or bucket of anybody's.

    Nor a proxy: all servers of a demonstration are on this machine, and a proxy would look for them on its own.
    """
    before = dict(os.environ)
    for name in before:
        if name.startswith(_FOREIGN) or name.lower().endswith("_proxy"):
            del os.environ[name]
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
