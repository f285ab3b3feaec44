"""The words of the project as values: labels, outcomes, rejection reasons, jobs, verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

__all__ = [
    "EMBEDDING_DIM",
    "EMBEDDING_TOLERANCE",
    "IMAGE_SIZE",
    "SCORE_ROUNDING",
    "ImageFacts",
    "Job",
    "JobState",
    "Label",
    "Labelled",
    "Outcome",
    "Provenance",
    "RejectReason",
    "ShadowScore",
    "Verdict",
]


@dataclass(frozen=True, slots=True)
class Fetched:
    """The bytes of one object and the source's own version of it, where it has one."""

    data: bytes
    etag: str | None = None
    version_id: str | None = None


EMBEDDING_DIM = 192
IMAGE_SIZE = 224
EMBEDDING_TOLERANCE: Final = 2e-5
"""The promise: no number of an fp32 embedding is further from the published pipeline's, with any engine, the
processor, the number of threads or the rest of the batch. Embeddings end in a LayerNorm, so their numbers are of size
1, and 2e-5 is 335 units of float32's rounding (2⁻²⁴)."""
SCORE_ROUNDING: Final = 1e-6
"""The promise to heads that sum in float32 and declare no tolerance: so far the scores of unchanged code may move on
another processor before it counts as another head. It is 17 units of float32's rounding (2⁻²⁴)."""


class Label(StrEnum):
    """The label of a judged image; never a bare number."""

    REAL = "real"
    FAKE = "fake"
    UNCERTAIN = "uncertain"


class Outcome(StrEnum):
    """The outcome of a job."""

    JUDGED = "judged"
    REJECTED = "rejected"


class JobState(StrEnum):
    """The state of a job; `done` covers judged and rejected, the live verdict tells which."""

    ACCEPTED = "accepted"
    RUNNING = "running"
    DONE = "done"
    QUARANTINED = "quarantined"


class RejectReason(StrEnum):
    """The closed list of reasons why an image got no label."""

    EMPTY = "empty"
    TOO_LARGE_BYTES = "too_large_bytes"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_SMALL = "too_small"
    UNSUPPORTED_FORMAT = "unsupported_format"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    CHECKSUM_MISMATCH = "checksum_mismatch"
    CONTENT_CHANGED = "content_changed"
    NOT_FOUND = "not_found"
    ACCESS_DENIED = "access_denied"
    ARCHIVED = "archived"
    SOURCE_NOT_ALLOWED = "source_not_allowed"
    FETCH_TIMEOUT = "fetch_timeout"
    FETCH_TRUNCATED = "fetch_truncated"
    FETCH_FAILED = "fetch_failed"
    DECODE_TIMEOUT = "decode_timeout"
    QUARANTINED = "quarantined"
    MODEL_UNAVAILABLE = "model_unavailable"
    STORAGE_FULL = "storage_full"
    ID_CONFLICT = "id_conflict"
    INTERNAL = "internal"

    @property
    def retryable(self) -> bool:
        """True if the same job may end differently when tried again unchanged."""
        return self in _RETRYABLE


_RETRYABLE = frozenset(
    {
        RejectReason.CHECKSUM_MISMATCH,
        RejectReason.FETCH_TIMEOUT,
        RejectReason.FETCH_TRUNCATED,
        RejectReason.FETCH_FAILED,
        RejectReason.DECODE_TIMEOUT,
        RejectReason.QUARANTINED,
        RejectReason.MODEL_UNAVAILABLE,
        RejectReason.STORAGE_FULL,
        RejectReason.INTERNAL,
    }
)


@dataclass(frozen=True, slots=True)
class Job:
    """One request to judge one image.

    `attempts` counts claims including the present one that ended without a word from the worker (it died);
    `faults` counts transient faults that a worker reported. `revision` is the number the next verdict takes:
    0 for the first, one more for each replay.
    """

    id: str
    uri: str
    head: str | None = None
    tenant: str | None = None
    content_type: str | None = None
    priority: int = 4
    metadata: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    attempts: int = 0
    faults: int = 0
    revision: int = 0


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Facts of the judged image: content hash and header, plus the source's own version of the object."""

    sha256: str
    size_bytes: int
    format: str | None = None
    width: int | None = None
    height: int | None = None
    mode: str | None = None
    etag: str | None = None
    version_id: str | None = None


@dataclass(frozen=True, slots=True)
class Provenance:
    """By what it was judged: ids and hashes an appeal needs."""

    release: str | None = None
    manifest_sha256: str | None = None
    head: str | None = None
    head_sha256: str | None = None
    policy: str | None = None
    low: float | None = None
    high: float | None = None
    code_version: str | None = None
    head_plugin: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The immutable answer to one job: judged (label, score in [0,1], higher = generated) or rejected (reason)."""

    job_id: str
    uri: str
    outcome: Outcome
    label: Label | None = None
    score: float | None = None
    reason: RejectReason | None = None
    detail: str = ""
    facts: ImageFacts | None = None
    provenance: Provenance = field(default_factory=Provenance)
    tenant: str | None = None
    content_type: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    revision: int = 0
    supersedes: str | None = None
    id: str | None = None
    created_at: datetime | None = None

    @property
    def release(self) -> str | None:
        """Id of the release that judged it."""
        return self.provenance.release

    @property
    def head(self) -> str | None:
        """Name of the head that scored it."""
        return self.provenance.head

    @property
    def sha256(self) -> str | None:
        """Content hash of the bytes that were judged."""
        return self.facts.sha256 if self.facts else None


@dataclass(frozen=True, slots=True)
class ShadowScore:
    """A challenger's score of an image beside the champion's verdict; it never acts."""

    job_id: str
    revision: int
    sha256: str
    release: str
    head: str
    score: float
    label: Label
    champion: str
    champion_head: str
    champion_score: float
    champion_label: Label
    tenant: str | None = None
    content_type: str | None = None


@dataclass(frozen=True, slots=True)
class Labelled:
    """A labelled image: content hash, where it was, and whether the label said anything new."""

    sha256: str
    uri: str
    new: bool
