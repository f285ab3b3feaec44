"""Files below a directory: each is there whole or not at all."""

from __future__ import annotations

import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from code_worker.system.files import flush, make_private, whole_file

_DRAFTS: Final = ".incomplete"
_ABANDONED_AFTER_S: Final = 24 * 3600.0


class LocalBlobs:
    """See `Blobs`."""

    def __init__(self, root: Path, *, private: bool) -> None:
        """Touches nothing yet; files are readable by their owner alone, or as the process's umask says."""
        self.root = root
        self._private = private
        self._swept = False

    @property
    def address(self) -> str:
        """See `Blobs.address`."""
        return str(self.root)

    def path(self, name: str) -> Path:
        """Returns where a file or directory lies if there is one."""
        return self.root / name

    def drafts(self) -> Path:
        """Returns the directory for what is being written; it is on the same file system, so a rename is atomic.

        At the first call it is swept of what killed writers have left there. A day is longer than any write.
        """
        drafts = self.root / _DRAFTS
        if not self._swept:
            self._swept = True
            for path in drafts.glob("*"):
                # Another process may be sweeping too.
                with suppress(FileNotFoundError):
                    if path.stat().st_mtime < time.time() - _ABANDONED_AFTER_S:
                        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        make_private(drafts)
        return drafts

    def unfinished(self) -> Iterator[Path]:
        """Files that are being written, or that a killed writer left."""
        return (self.root / _DRAFTS).glob("*.partial")

    def put(self, name: str, data: bytes) -> None:
        """See `Blobs.put`."""
        target = self.path(name)
        make_private(target.parent)
        with whole_file(target, private=self._private, beside=self.drafts()) as draft:
            draft.write_bytes(data)

    def get(self, name: str, limit: int = -1) -> bytes | None:
        """See `Blobs.get`."""
        try:
            with self.path(name).open("rb") as file:
                return file.read(limit)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def size(self, name: str) -> int | None:
        """See `Blobs.size`."""
        try:
            found = self.path(name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def names(self, prefix: str = "") -> Iterator[str]:
        """See `Blobs.names`."""
        for top in self.root.glob(f"{prefix}*"):
            if top.name != _DRAFTS:
                files = (top,) if top.is_file() else (path for path in top.rglob("*") if path.is_file())
                yield from (path.relative_to(self.root).as_posix() for path in files)

    def delete(self, name: str, *, first: str = "") -> bool:
        """See `Blobs.delete`."""
        target = self.path(name)
        if not target.exists():
            return False
        if first:
            self.path(first).unlink(missing_ok=True)
        if name.endswith("/"):
            shutil.rmtree(target)
        else:
            with suppress(FileNotFoundError):  # another process was faster
                target.unlink()
        # An erasure that was confirmed must not be undone by a loss of power.
        flush(target.parent)
        return True
