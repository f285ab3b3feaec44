"""From what was published or trained elsewhere to a release directory; nothing of it is unpickled."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from code_worker.errors import ArtifactError, ArtifactStorageError, ConfigurationError
from code_worker.logs import get_logger
from code_worker.plugins import HEAD_NAME
from code_worker.releases.builder import ReleaseFacts, build_from_parts
from code_worker.releases.estimator import read_estimator
from code_worker.releases.hashing import FileEntry, hash_file
from code_worker.releases.manifest import MANIFEST_NAME, Source, verify_files
from code_worker.releases.signing import check, signature_in
from code_worker.stops import raise_if_stop

if TYPE_CHECKING:
    from pydantic import SecretStr

    from code_worker.heads import EstimatorState, Head
    from code_worker.plugins import Plugins

__all__ = ["ImportOptions", "build_release"]

log = get_logger(__name__)

_HEAD_SUFFIXES = (".sav", ".joblib", ".pkl")
_CHECKPOINT_FILES = (
    *("config.json", "preprocessor_config.json"),
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
)
_HUB = "hf:"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """How a source is imported.

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
        return _copy_release(local, directory, options, keys)
    return _convert(local, uri, plugins, directory, options)


def _locate(source: str) -> tuple[Path, str]:
    if source.startswith(_HUB):
        from code_worker.encoder.hub import download  # the hub's client is slow to import

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
    _, sha256 = verify_files(source)
    try:
        shutil.copytree(source, directory, dirs_exist_ok=True)
        manifest, signature = (directory / MANIFEST_NAME).read_bytes(), signature_in(directory)
    except OSError as error:
        raise ArtifactStorageError(f"cannot copy {source}: {error}") from error
    check(manifest, signature, keys, str(source))
    return sha256


def _convert(local: Path, uri: str, plugins: Plugins, directory: Path, options: ImportOptions) -> str:
    from code_worker.encoder.checkpoint import load_checkpoint

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
    classes = {name: plugins.head_class(name) for name in plugins.heads()} if paths else {}
    found: list[_Found] = []
    for path in paths:
        try:
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
