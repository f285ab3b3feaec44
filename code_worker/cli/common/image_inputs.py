"""Images named on the command line: files, directories and buckets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from code_worker.cli.common.output import plural, say
from code_worker.errors import ConfigurationError, ImageRejectedError, TransientError
from code_worker.images.listing import LeftOut
from code_worker.images.local_files import local_path, storable
from code_worker.images.source import images_under

if TYPE_CHECKING:
    from code_worker.images.source import Sources
    from code_worker.settings import Settings


class Inputs:
    """The arguments of a scan; `left_out` takes what of directories and prefixes is not judged."""

    def __init__(self, paths: Sequence[str], *, every_file: bool, left_out: LeftOut | None = None) -> None:
        if any(not path.strip() for path in paths):
            raise ConfigurationError("an empty path names no image: is a variable of a script unset?")
        self._paths = paths
        self._every_file = every_file
        self.left_out = left_out or LeftOut()

    def allow(self, settings: Settings) -> Settings:
        """The settings, with what is named here allowed to be read: who runs a scan may read it anyway."""
        roots = {_root(local) for path in self._paths if (local := local_name(path)) is not None}
        files = settings.files.model_copy(update={"roots": (*settings.files.roots, *sorted(roots))})
        return settings.model_copy(update={"files": files})

    def uris(self, sources: Sources) -> Iterator[str]:
        """Every image in the order of the arguments, listed as the scan proceeds.

        Raises:
            ConfigurationError: a directory or prefix that cannot be listed.
        """
        for path in self._paths:
            if _is_collection(path):
                yield from self._listed(sources, path)
            else:
                yield path if _is_uri(path) else storable(str(Path(path).absolute()))

    def _listed(self, sources: Sources, path: str) -> Iterator[str]:
        place = path if _is_uri(path) else str(Path(path).absolute())
        try:
            if self._every_file:
                yield from sources.list(place)
            else:
                yield from images_under(sources, place, self.left_out, unjudged=True)
        except (ImageRejectedError, TransientError) as error:
            raise ConfigurationError(f"cannot list {path}: {error}") from error


def _is_uri(path: str) -> bool:
    return "://" in path


def _is_collection(path: str) -> bool:
    if path.startswith("s3://"):
        return path.endswith("/") or "/" not in path.removeprefix("s3://")
    local = local_name(path)
    return local is not None and Path(local).is_dir()


def local_name(path: str) -> str | None:
    """Returns what a path or a `file:` URI is called on this machine; None for what is elsewhere."""
    if not path.startswith("file:/"):
        return None if _is_uri(path) else path
    try:
        return local_path(path)
    except ImageRejectedError:
        return None


def _root(path: str) -> Path:
    """A directory itself, else the directory of the file that a link may lead to."""
    resolved = Path(path).resolve()
    return resolved if resolved.is_dir() else resolved.parent


def say_left_out(left_out: LeftOut, *, but: str = "") -> None:
    """Prints what a walk left out, on stderr; `but` says what would take it all the same."""
    for place, reason in left_out.lost:
        say(f"{place}: {reason}", err=True)
    for reason, count, names in left_out.passed_over:
        some = ", ".join(names) + (", …" if count > len(names) else "")
        say(f"{plural(count, 'other file')} passed over{but}: {reason}: {some}", err=True)
