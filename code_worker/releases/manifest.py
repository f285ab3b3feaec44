"""A release's manifest: what it is made of, file by file, and the hash everything else hangs on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from code_worker.errors import ArtifactError, IntegrityError
from code_worker.plugins import HEAD_NAME
from code_worker.releases.integrity import (
    SIGNATURE_NAME,
    FileEntry,
    OnBytes,
    Sha256,
    digest_of,
    files_below,
    hash_file,
)
from code_worker.types import IMAGE_SIZE

FORMAT = 1
MANIFEST_NAME = "manifest.json"
# A manifest lists some dozen files; what is larger is none, and is not to be parsed.
MAX_MANIFEST_BYTES = 8 * 2**20
# No part may begin with a dot: `..` leads out, and hidden files are seen by nobody.
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_HEAD_NAME = f"^{HEAD_NAME.pattern}$"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Entry):
    """The source of a release; `files` holds the hashes of the files that were read."""

    uri: str
    files: dict[str, FileEntry] = Field(default_factory=dict)


class Preprocessing(_Entry):
    """The way from bytes to the encoder's input: the published inference transform."""

    crop: int = IMAGE_SIZE
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    color: Literal["RGB"] = "RGB"


class EncoderEntry(_Entry):
    """The encoder: a summary of its shape, and the hash of its files and preprocessing.

    Two releases with the same `sha256` give the same embeddings.
    """

    config: dict[str, JsonValue]
    sha256: Sha256
    files: tuple[str, ...] = Field(min_length=1)


class HeadEntry(_Entry):
    """One fitted head and the plugin that can load it.

    `plugin_head` is the name under which the plugin registered the class; a release may hold it more than once,
    fitted differently, under names of its own.
    """

    plugin_head: str = Field(pattern=_HEAD_NAME)
    target: str
    distribution: str
    distribution_version: str
    options: dict[str, JsonValue] = Field(default_factory=dict)
    one_class: bool = False
    sha256: Sha256
    files: tuple[str, ...]


class Thresholds(_Entry):
    """Label borders where no policy sets others: `score >= high` is fake, `score < low` real."""

    low: float = Field(0.5, ge=0, le=1)
    high: float = Field(0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> Thresholds:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class Manifest(_Entry):
    """All that a release is; every file but the manifest itself is listed in `files`."""

    format: Literal[1] = 1
    created_at: AwareDatetime
    source: Source
    encoder: EncoderEntry
    preprocessing: Preprocessing = Preprocessing()
    heads: dict[Annotated[str, Field(pattern=_HEAD_NAME)], HeadEntry] = Field(default_factory=dict)
    thresholds: Thresholds = Thresholds()
    default_head: str | None = None
    evaluation: dict[str, JsonValue] = Field(default_factory=dict)
    files: dict[str, FileEntry]
    toy: bool = False
    notes: str = ""

    @field_validator("files")
    @classmethod
    def _plain_names(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            _check_name(name)
        return files

    @model_validator(mode="after")
    def _parts_are_listed(self) -> Manifest:
        used = {*self.encoder.files, *(name for head in self.heads.values() for name in head.files)}
        if absent := sorted(used - self.files.keys()):
            raise ValueError(f"not in the file list: {', '.join(absent)}")
        if self.default_head is not None and self.default_head not in self.heads:
            raise ValueError(f"default head {self.default_head!r} is not among the heads")
        if encoder_digest(self.encoder.files, self.files, self.preprocessing) != self.encoder.sha256:
            raise ValueError("the encoder's sha256 is not that of its files")
        for name, head in self.heads.items():
            if head_digest(head.files, self.files, head.options) != head.sha256:
                raise ValueError(f"head {name!r}: sha256 is not that of its files")
        return self

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, two spaces, UTF-8, one final newline."""
        plain = self.model_dump(mode="json")
        # One spelling: the id is a hash of these bytes.
        text = json.dumps(plain, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
        return (text + "\n").encode()


def essence(manifest: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Returns what makes a release another one.

    All of a manifest but its time, and hashes of what was computed for it here.

    The probes are of this machine's arithmetic, and with them the list of all files.
    """
    return {name: value for name, value in manifest.items() if name not in {"created_at", "files"}}


def encoder_digest(names: Iterable[str], files: Mapping[str, FileEntry], preprocessing: Preprocessing) -> str:
    """Hash of what decides an embedding: the encoder's files and the preprocessing before it."""
    return digest_of({name: files[name].sha256 for name in names}, preprocessing.model_dump(mode="json"))


def head_digest(names: Iterable[str], files: Mapping[str, FileEntry], options: Mapping[str, JsonValue]) -> str:
    """Hash of what decides a score: the head's files and options."""
    return digest_of({name: files[name].sha256 for name in names}, options)


def _check_name(name: str) -> None:
    parts = name.split("/")
    if name in {MANIFEST_NAME, SIGNATURE_NAME} or not all(_PART.fullmatch(part) for part in parts):
        raise ValueError(f"file name {name!r} is not a plain relative path")


def release_id(manifest_sha256: str) -> str:
    """Id of the release with this manifest: short enough to type; the full hash is checked beside it."""
    return f"r-{manifest_sha256[:12]}"


def write_manifest(directory: Path, manifest: Manifest) -> str:
    """Writes `manifest.json` and returns its sha256."""
    content = manifest.to_bytes()
    (directory / MANIFEST_NAME).write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def parse_manifest(content: bytes, origin: str) -> Manifest:
    """The manifest in these bytes; `origin` names them in errors.

    Raises:
        ArtifactError: not JSON, an unknown format version, or fields that do not fit.
    """
    # Before json: nested lists of a hundred megabytes take minutes.
    if len(content) > MAX_MANIFEST_BYTES:
        raise ArtifactError(f"{origin}: manifest of {len(content)} bytes; at most {MAX_MANIFEST_BYTES} are read")
    try:
        plain = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{origin}: not a JSON manifest: {error}") from None
    # Before the fields: those of a later format may be others.
    version = plain.get("format") if isinstance(plain, dict) else None
    if version != FORMAT:
        raise ArtifactError(
            f"{origin}: manifest format {version!r}; this code_worker reads format {FORMAT}. "
            "Use the code_worker that wrote it, or import its source again."
        )
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise ArtifactError(f"{origin}: wrong manifest: {_problems(error)}") from None


def _problems(error: ValidationError) -> str:
    lines = [f"{'.'.join(map(str, item['loc'])) or 'manifest'}: {item['msg']}" for item in error.errors()]
    return "; ".join(lines[:5]) + ("; …" if len(lines) > 5 else "")


def read_manifest(directory: Path) -> tuple[Manifest, str]:
    """The manifest of a release directory and the sha256 of its bytes.

    Raises:
        ArtifactError: there is none, or see `parse_manifest`.
    """
    path = directory / MANIFEST_NAME
    if path.is_symlink() or not path.is_file():
        raise ArtifactError(f"{directory} is no release: it has no {MANIFEST_NAME}")
    with path.open("rb") as file:
        # One byte more than is allowed, so that a longer one is seen to be longer.
        content = file.read(MAX_MANIFEST_BYTES + 1)
    return parse_manifest(content, str(path)), hashlib.sha256(content).hexdigest()


def verify_files(directory: Path, on_bytes: OnBytes | None = None) -> tuple[Manifest, str]:
    """Compares every file with the manifest before anything of it is parsed; returns what `read_manifest` does.

    Raises:
        IntegrityError: names the files that are missing, that nobody listed, and whose bytes changed.
        ArtifactError: see `read_manifest`.
    """
    manifest, sha256 = read_manifest(directory)
    # Files that nobody listed are refused too: a head might read them.
    present = set(files_below(directory)) - {MANIFEST_NAME, SIGNATURE_NAME}
    listed = manifest.files.keys()
    problems = [*_named("missing", listed - present), *_named("not listed", present - listed)]
    changed = (name for name in listed & present if not _unchanged(directory / name, manifest.files[name], on_bytes))
    problems += _named("changed", changed)
    if problems:
        raise IntegrityError(f"{directory} is damaged: {'; '.join(problems)}")
    return manifest, sha256


def _unchanged(path: Path, expected: FileEntry, on_bytes: OnBytes | None) -> bool:
    # The size first: of a file that was cut short nothing need be hashed.
    return path.stat().st_size == expected.size and hash_file(path, on_bytes) == expected


def _named(what: str, names: Iterable[str]) -> list[str]:
    found = sorted(names)
    return [f"{what}: {', '.join(found)}"] if found else []
