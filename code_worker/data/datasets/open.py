"""One door to every form of data set; which one a source has is told by its name and its files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from code_worker.data.datasets.examples import Example, Skipped, allow
from code_worker.data.datasets.hub import HUB_PREFIX, RealUrls, hub_examples, parquet_examples
from code_worker.data.datasets.manifests import manifest_examples
from code_worker.data.datasets.shards import SHARD_SUFFIXES, expand, shard_examples
from code_worker.data.datasets.trees import bucket_examples, tree_examples
from code_worker.data.datasets.urls import UrlSource
from code_worker.data.labelled_images import HOLDOUT, LABELS, labelled_examples
from code_worker.errors import DatasetError, nearest
from code_worker.images.listing import PREFIX_BYTES, has_image_suffix, is_hidden, looks_like_image
from code_worker.images.source import Sources
from code_worker.system.terminal import printable

if TYPE_CHECKING:
    from code_worker.settings import Settings
    from code_worker.store.engine import Store

_MANIFESTS: Final = (".jsonl", ".ndjson", ".csv")
_PARQUET: Final = ".parquet"
_ARCHIVES: Final = (".zip", ".7z", ".rar", ".tar.bz2", ".tar.xz", ".tar.zst")
_FORMS: Final = (
    "labels: (the labelled store), holdout: (its part that is never learned from), hf:owner/name, "
    "a directory of real/fake, 0_real/1_fake or gen_N directories "
    "(also s3://bucket/prefix/), shards (.tar, shard-{0000..0011}.tar, a directory of them), parquet files of the "
    "hub, or a manifest (.jsonl, .csv)"
)


@dataclass(frozen=True, slots=True)
class _Asked:
    """Arguments of a form beside the source's name."""

    settings: Settings
    skipped: list[Skipped]
    store: Store | None
    real_urls: int

    @property
    def max_bytes(self) -> int:
        return self.settings.limits.max_bytes

    def real(self) -> RealUrls | None:
        """Returns what fetches real images, if any may be fetched."""
        return RealUrls(UrlSource(max_bytes=self.max_bytes), self.real_urls) if self.real_urls else None


@dataclass(frozen=True, slots=True)
class _Form:
    read: Callable[[_Asked], Iterator[Example]]
    neighbours: bool = False


def open_examples(
    source: str,
    *,
    settings: Settings,
    skipped: list[Skipped],
    store: Store | None = None,
    limit: int | None = None,
    real_urls: int = 0,
) -> Iterator[Example]:
    """Labelled images of a data set, in an order that is the same every time; bytes are read only when asked for.

    Files that the source names may be read; what a manifest names elsewhere, only under the roots of the settings.

    Args:
        source: `labels:`, `holdout:`, `hf:owner/name[@revision][:split]`, a directory, `s3://bucket/prefix/`, shards,
            parquet files or a manifest.
        settings: Limits, sources, dataset storage, rule of labels.
        skipped: Takes, while it is read, what could not be used.
        store: The ledger for labels; None: the one of the settings is opened.
        limit: At most so many images.
        real_urls: At most so many real images of a hub data set are fetched by their URL, when they are read.

    Raises:
        DatasetError: nothing there, or of no known form; while it is read: not one usable image.
        ConfigurationError: a malformed name, or an extra that is not installed.
    """
    form = _form_of(source)
    return _usable(form.read(_Asked(settings, skipped, store, real_urls)), source, skipped, limit)


def siblings_are_neighbours(source: str) -> bool:
    """Returns whether the images of one record follow each other; where not, the whole list can be held in memory.

    Raises:
        DatasetError: as `open_examples`.
    """
    return _form_of(source).neighbours


def _usable(examples: Iterator[Example], source: str, skipped: list[Skipped], limit: int | None) -> Iterator[Example]:
    # The list may hold what was left out of a source before this one.
    before, found = len(skipped), 0
    for example in itertools.islice(examples, limit):
        found += 1
        yield example
    if not found:
        lost = [one for one in skipped[before:] if one.is_loss] or skipped[before:]
        why = f"; {len(lost)} skipped, the first: {lost[0].key}: {lost[0].reason}" if lost else ""
        raise DatasetError(f"{source} holds no usable image{why}")


def _form_of(source: str) -> _Form:
    if source in {LABELS, HOLDOUT}:
        return _Form(partial(_read_labels, source))
    if source.startswith(HUB_PREFIX):
        return _Form(partial(_read_hub, source), neighbours=True)
    if source.startswith("s3://"):
        if source.endswith((*SHARD_SUFFIXES, *_MANIFESTS, _PARQUET)):
            raise DatasetError(f"{source}: shards, manifests and parquet are read from this machine: copy it here")
        return _Form(partial(_read_bucket, source))
    path = Path(source)
    try:
        return _form_of_directory(path) if path.is_dir() else _form_of_files(source, path)
    except (OSError, ValueError) as error:  # a name that no file can have, a directory that may not be listed
        raise DatasetError(f"{source}: {getattr(error, 'strerror', None) or error}") from error


def _form_of_directory(path: Path) -> _Form:
    names = _visible(path)
    if shards := [entry for entry in names if _is_shard(entry)]:
        return _Form(partial(_read_shards, shards, _beside(names, shards)), neighbours=True)
    inner = list(filter(_is_parquet, _visible(path / "data"))) if (path / "data").is_dir() else []
    if parquet := [*filter(_is_parquet, names), *inner]:
        read = [*parquet, path / "data"] if inner else parquet
        return _Form(partial(_read_parquet, parquet, _beside(names, read)), neighbours=True)
    return _Form(partial(_read_tree, path))


def _visible(directory: Path) -> list[Path]:
    return sorted(entry for entry in directory.iterdir() if not is_hidden(entry.name))


def _beside(names: Sequence[Path], read: Sequence[Path]) -> list[Skipped]:
    """Returns what may hold images and lies beside the files that are read."""
    left = [entry for entry in names if entry not in set(read) and (entry.is_dir() or _is_image(entry))]
    kind = "parquet files" if _is_parquet(read[0]) else "shards"
    return [Skipped(printable(str(one)), f"it lies beside {kind} and is not read: name it") for one in left]


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == _PARQUET


def _form_of_files(source: str, path: Path) -> _Form:
    if path.suffix.lower() in _MANIFESTS and path.exists():
        return _Form(partial(_read_manifest, path))
    found = expand(source)
    if not any(one.exists() for one in found):
        near = nearest(source, ("labels:", "holdout:"))
        hint = f"; did you mean {near[0]}?" if near else "."
        raise DatasetError(f"{source}: there is no such file or directory{hint} A data set is one of: {_FORMS}")
    if all(_is_shard(one) for one in found):
        return _Form(partial(_read_shards, found, ()), neighbours=True)
    if all(map(_is_parquet, found)):
        return _Form(partial(_read_parquet, found, ()), neighbours=True)
    if source.lower().endswith(_ARCHIVES):
        raise DatasetError(f"{source} is an archive: unpack it and name its directory")
    raise DatasetError(f"{source} is no data set of a known form: {_FORMS}")


def _is_image(path: Path) -> bool:
    if has_image_suffix(path.name):
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return looks_like_image(file.read(PREFIX_BYTES))


def _is_shard(path: Path) -> bool:
    return path.name.lower().endswith(SHARD_SUFFIXES)


def _read_shards(paths: Sequence[Path], beside: Sequence[Skipped], asked: _Asked) -> Iterator[Example]:
    asked.skipped.extend(beside)
    return shard_examples(paths, max_bytes=asked.max_bytes, skipped=asked.skipped)


def _read_parquet(paths: Sequence[Path], beside: Sequence[Skipped], asked: _Asked) -> Iterator[Example]:
    asked.skipped.extend(beside)
    return parquet_examples(paths, max_bytes=asked.max_bytes, skipped=asked.skipped, real_urls=asked.real())


def _read_hub(source: str, asked: _Asked) -> Iterator[Example]:
    return hub_examples(source, max_bytes=asked.max_bytes, skipped=asked.skipped, real_urls=asked.real())


def _read_tree(path: Path, asked: _Asked) -> Iterator[Example]:
    with closing(Sources(allow(asked.settings, path.resolve()))) as sources:
        yield from tree_examples(path, sources, skipped=asked.skipped)


def _read_bucket(prefix: str, asked: _Asked) -> Iterator[Example]:
    with closing(Sources(asked.settings)) as sources:
        yield from bucket_examples(prefix, sources, skipped=asked.skipped)


def _read_manifest(path: Path, asked: _Asked) -> Iterator[Example]:
    from code_worker.data.kept_copies import open_kept

    with closing(Sources(allow(asked.settings, path.resolve().parent))) as sources:
        yield from manifest_examples(path, sources, open_kept(asked.settings), skipped=asked.skipped)


def _read_labels(source: str, asked: _Asked) -> Iterator[Example]:
    from code_worker.data.kept_copies import open_kept

    kept = open_kept(asked.settings)
    with _ledger(asked) as store:
        rule, holdout = asked.settings.labels, source == HOLDOUT
        yield from labelled_examples(store, kept, rule, skipped=asked.skipped, holdout=holdout)


@contextmanager
def _ledger(asked: _Asked) -> Iterator[Store]:
    if asked.store is not None:
        yield asked.store
        return
    from code_worker.store import migrate

    settings = asked.settings
    if (file := settings.database_file) is not None and not file.is_file():
        raise DatasetError(f"no labels: there is no database in {file.parent} (code-worker db upgrade)")
    with closing(migrate.open_current(settings.resolved_database_url)) as store:
        yield store
