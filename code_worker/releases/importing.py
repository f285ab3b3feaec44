"""From what was published or trained elsewhere to a release directory; nothing of it is unpickled."""

from __future__ import annotations

import bz2
import lzma
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from code_worker.errors import ArtifactError, ArtifactStorageError, ConfigurationError, UnsafeArtifactError
from code_worker.heads import EstimatorState
from code_worker.logs import get_logger
from code_worker.plugins import HEAD_NAME
from code_worker.releases.building import ReleaseFacts, build_from_parts
from code_worker.releases.integrity import FileEntry, check, hash_file, signature_in
from code_worker.releases.manifest import MANIFEST_NAME, Source, verify_files
from code_worker.releases.pickled import Array, Instance, Name, read_pickle
from code_worker.system.files import is_lfs_pointer
from code_worker.system.processes import raise_if_stop

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pydantic import SecretStr

    from code_worker.heads import Head
    from code_worker.plugins import Plugins

ESTIMATORS: Final = frozenset(
    {
        Name("sklearn.linear_model._logistic", "LogisticRegression"),
        Name("sklearn.neighbors._classification", "KNeighborsClassifier"),
        Name("sklearn.svm._classes", "OneClassSVM"),
    }
)
MAX_BYTES: Final = 4 * 2**30
MAX_INFLATION: Final = 64
"""A compressed file may hold this many times its own size; embeddings compress by a few percent."""
_MAX_TEXT: Final = 1000
_MAX_NESTED: Final = 100


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def read_estimator(path: Path) -> EstimatorState:
    """State of the `LogisticRegression`, `KNeighborsClassifier` or `OneClassSVM` that `path` holds.

    Arrays are read-only views of the file's bytes, in the file's byte order: copy what is kept.

    Raises:
        UnsafeArtifactError: the file asks for anything but those classes and numpy arrays; nothing was executed.
        ArtifactError: the file is missing, damaged, or compressed in a form that is not read.
    """
    if is_lfs_pointer(path):
        raise ArtifactError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in its repository")
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ArtifactError(f"{path}: {size} bytes are more than the {MAX_BYTES} that an estimator may have")
        # Whole in memory, which the limit above bounds: what is parsed cannot change meanwhile.
        content = _decompressed(path.read_bytes())
        return _state(read_pickle(content, ESTIMATORS))
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
    except UnsafeArtifactError as error:
        raise UnsafeArtifactError(f"{path}: {error}") from error
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def _decompressed(content: bytes) -> bytes:
    decompressor: _Decompressor
    if content.startswith((b"\x1f\x8b", b"\x78")):
        # 32 added to the window: takes both the gzip and the zlib header.
        decompressor = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    elif content.startswith(b"BZh"):
        decompressor = bz2.BZ2Decompressor()
    elif content.startswith((b"\xfd7zXZ", b"\x5d\x00")):
        # A dictionary of gigabytes can be asked for in a few bytes of header.
        decompressor = lzma.LZMADecompressor(memlimit=2**28)
    elif content.startswith(b"\x04\x22\x4d\x18"):
        raise ArtifactError("compressed with lz4: write it again with joblib.dump(estimator, path, compress=0)")
    else:
        return content
    limit = MAX_INFLATION * len(content) + 2**20
    try:
        # With a limit on the output: a file of zeros inflates a thousandfold.
        inflated = decompressor.decompress(content, limit)
    except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as error:
        raise ArtifactError(f"damaged compressed file: {error}") from error
    if not decompressor.eof:
        raise ArtifactError(f"cut short, or more than {limit} bytes once decompressed")
    return inflated


def _state(found: object) -> EstimatorState:
    if not isinstance(found, Instance) or found.state is None:
        raise ArtifactError("holds no fitted estimator")
    arrays: dict[str, NDArray[Any]] = {}
    params: dict[str, Any] = {}
    for name, value in found.state.items():
        if not isinstance(name, str):
            raise ArtifactError("an attribute of the estimator has no name")
        if isinstance(value, Array) and value.value is not None:
            arrays[name] = value.value
        elif _is_plain(value):
            params[name] = value
        else:
            raise ArtifactError(f"attribute {name[:100]!r} of the estimator is neither a plain value nor an array")
    # Attributes change between versions of scikit-learn: heads look at it before they read any.
    version = params.pop("_sklearn_version", None)
    return EstimatorState(found.name.qualname, version if isinstance(version, str) else "", params, arrays)


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list, dict)):
        members = [*value, *value.values()] if isinstance(value, dict) else value
        return len(value) <= _MAX_NESTED and all(_is_plain_leaf(member) for member in members)
    return _is_plain_leaf(value)


def _is_plain_leaf(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= _MAX_TEXT
    if isinstance(value, int):
        # Larger ones have no form in the manifest's JSON that every reader keeps exact.
        return abs(value) < 2**63
    return value is None or isinstance(value, float)


log = get_logger(__name__)

_HEAD_SUFFIXES = (".sav", ".joblib", ".pkl")
_CHECKPOINT_FILES = (
    *("config.json", "preprocessor_config.json"),
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
)
_HUB = "hf:"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """Options of an import.

    Attributes:
        heads_dir: directory of head files; unset: `sklearn/` beside the checkpoint.
        head_names: file name of a head → name it gets in the release, for files that no rule names.
        skip_unknown_heads: leave out head files that cannot be taken, with a warning, instead of refusing the source.
        averaged: take the averaged weights (`state_dict_ema`) of a training checkpoint.
        default_head: see `ReleaseFacts`.
        notes: see `ReleaseFacts`.
    """

    heads_dir: Path | None = None
    head_names: Mapping[str, str] = field(default_factory=dict)
    skip_unknown_heads: bool = False
    averaged: bool = False
    default_head: str | None = None
    notes: str = ""


@dataclass(frozen=True, slots=True)
class _Found:
    """A head file that the registered head `plugin_head` takes."""

    path: Path
    plugin_head: str
    head: Head


def build_release(
    source: str,
    plugins: Plugins,
    directory: Path,
    options: ImportOptions | None = None,
    *,
    keys: Sequence[SecretStr] = (),
) -> str:
    """Writes the release that `source` describes into the new directory; returns the manifest's sha256.

    `source` is a directory in the published form, `hf:owner/name[@revision]`, a timm checkpoint file, or a release
    directory, which is verified and copied as it is; where there are keys, one of them must have signed it.

    Raises:
        SignatureError: a release directory that none of the keys signed.
        ConfigurationError: the source does not exist, or options that do not fit it.
        ArtifactError: a checkpoint or head that cannot be represented exactly, or that nothing here can read.
        UnsafeArtifactError: a head file that asked for something it may not have; nothing of it was executed.
    """
    options = options or ImportOptions()
    local, uri = _locate(source)
    if (local / MANIFEST_NAME).is_file():
        # Never converted anew: its id is the hash of its manifest.
        return _copy_release(local, directory, options, keys)
    return _convert(local, uri, plugins, directory, options)


def _locate(source: str) -> tuple[Path, str]:
    if source.startswith(_HUB):
        from code_worker.encoder.download import download  # the hub's client is slow to import

        local = download(source)
        return local, f"{source.partition('@')[0]}@{local.name}"
    local = Path(source).expanduser().absolute()
    if not local.exists():
        raise ConfigurationError(
            f"{source} does not exist; give a directory, a checkpoint file, or hf:owner/name (e.g. hf:aimagelab/CoDE)"
        )
    return local, local.name


def _copy_release(source: Path, directory: Path, options: ImportOptions, keys: Sequence[SecretStr]) -> str:
    if options != ImportOptions():
        raise ConfigurationError(f"{source} is a finished release: its heads and notes are part of its id")
    # Before the copy, so that a damaged source is named and not the copy; `add` verifies that again.
    _, sha256 = verify_files(source)
    try:
        shutil.copytree(source, directory, dirs_exist_ok=True)
        manifest, signature = (directory / MANIFEST_NAME).read_bytes(), signature_in(directory)
    except OSError as error:
        raise ArtifactStorageError(f"cannot copy {source}: {error}") from error
    check(manifest, signature, keys, str(source))
    return sha256


def _convert(local: Path, uri: str, plugins: Plugins, directory: Path, options: ImportOptions) -> str:
    from code_worker.encoder.published import load_checkpoint

    heads_dir = options.heads_dir or (local / "sklearn" if local.is_dir() else None)
    paths = _head_files(heads_dir, required=options.heads_dir is not None)
    named = _name_heads(_recognise(paths, plugins, skip=options.skip_unknown_heads), options)
    weights = load_checkpoint(local, state="state_dict_ema" if options.averaged else "state_dict")
    facts = ReleaseFacts(
        source=Source(uri=uri, files=_source_files(local, [found.path for found in named.values()])),
        plugin_heads={name: found.plugin_head for name, found in named.items()},
        default_head=options.default_head,
        notes=options.notes,
    )
    return build_from_parts(directory, weights, {name: found.head for name, found in named.items()}, plugins, facts)


def _head_files(directory: Path | None, *, required: bool) -> list[Path]:
    if directory is None or not directory.is_dir():
        if required:
            raise ConfigurationError(f"{directory} is not a directory of head files")
        return []
    return sorted(path for path in directory.iterdir() if path.suffix in _HEAD_SUFFIXES and path.is_file())


def _recognise(paths: Sequence[Path], plugins: Plugins, *, skip: bool) -> list[_Found]:
    # Only for files that are there: importing a head's plugin may take seconds.
    classes = {name: plugins.head_class(name) for name in plugins.heads()} if paths else {}
    found: list[_Found] = []
    for path in paths:
        try:
            # Each file is offered to every head; a head answers None to a class that is not its own.
            found.append(_take(path, classes))
        except ArtifactError as error:
            if not skip:
                raise
            log.warning("head_file_left_out", file=path.name, why=str(error))
    return found


def _take(path: Path, classes: Mapping[str, type[Head]]) -> _Found:
    estimator = read_estimator(path)
    offers = ((name, _offered(name, head_class, estimator)) for name, head_class in classes.items())
    takers = [_Found(path, name, head) for name, head in offers if head is not None]
    if not takers:
        raise ArtifactError(
            f"{path.name}: no installed head takes a {estimator.class_name}; install the plugin that does, "
            "or leave it out with --skip-unknown-heads"
        )
    if len(takers) > 1:
        raise ArtifactError(
            f"{path.name}: more than one head takes it: {', '.join(one.plugin_head for one in takers)}"
        )
    return takers[0]


def _offered(name: str, head_class: type[Head], estimator: EstimatorState) -> Head | None:
    try:
        return head_class.from_estimator(estimator)
    except ArtifactError:
        raise
    except (Exception, SystemExit) as error:  # a head is somebody else's code and may raise anything at all
        raise_if_stop(error)
        raise ArtifactError(
            f"head {name!r} failed over a {estimator.class_name}: {type(error).__name__}: {error}"
        ) from error


def _name_heads(found: Iterable[_Found], options: ImportOptions) -> dict[str, _Found]:
    """A name per head: the one asked for, else the registered one.

    Where several files belong to one registered head, the published name of the one that was fitted on everything
    tells it (`linear_tot_…`); the others, fitted on one generator each, need a name.
    """
    by_head: dict[str, list[_Found]] = {}
    named: dict[str, _Found] = {}
    for one in found:
        if (name := options.head_names.get(one.path.name)) is None:
            by_head.setdefault(one.plugin_head, []).append(one)
        else:
            _add(named, name, one)
    if absent := options.head_names.keys() - {one.path.name for one in named.values()}:
        raise ConfigurationError(f"no head file is called {', '.join(sorted(absent))}")
    for plugin_head, members in by_head.items():
        chosen = members if len(members) == 1 else [one for one in members if "_tot_" in one.path.name]
        rest = [one.path.name for one in members if one not in chosen or len(chosen) > 1]
        if len(chosen) != 1 or (rest and not options.skip_unknown_heads):
            raise ArtifactError(
                f"more than one file is a {plugin_head!r} head: name {', '.join(rest)} "
                f"(e.g. --head {rest[0]}={plugin_head}-2), or leave them out with --skip-unknown-heads"
            )
        _add(named, plugin_head, chosen[0])
    return dict(sorted(named.items()))


def _add(named: dict[str, _Found], name: str, one: _Found) -> None:
    if not HEAD_NAME.fullmatch(name):
        raise ConfigurationError(f"head name {name!r}: use lower case letters, digits, '-' and '_'")
    if name in named:
        raise ConfigurationError(f"two head files would be called {name!r}: {named[name].path.name}, {one.path.name}")
    named[name] = one


def _source_files(local: Path, heads: Iterable[Path]) -> dict[str, FileEntry]:
    shards = sorted(local.glob("model-*-of-*.safetensors")) if local.is_dir() else []
    checkpoint = [*(local / name for name in _CHECKPOINT_FILES), *shards] if local.is_dir() else [local]
    read = {path.name: path for path in checkpoint if path.is_file()}
    read |= {f"{path.parent.name}/{path.name}": path for path in heads}
    return {name: hash_file(path) for name, path in read.items()}
