"""Every exception the package raises on purpose, in one tree.

```
CodeWorkerError
├── ConfigurationError          wrong settings or wrong use; the caller must change something (exit status 2)
│   ├── NotAllowedError         the actor's role does not reach so far
│   ├── UnknownHeadError        a head that no plugin registered, or that the release lacks
│   ├── PluginError             a plugin that cannot be loaded, or two that claim one name
│   └── NoReleaseError          nothing installed to judge with
├── ArtifactError               a checkpoint, head file or release that must not be used (exit status 2)
│   ├── UnsafeArtifactError     a pickle that asked for something it may not have
│   ├── IntegrityError          bytes that differ from the manifest's sha256
│   ├── SignatureError          a release that no holder of a key of ours signed
│   └── ArtifactStorageError    the storage of releases or the hub is full, closed or away (exit status 1)
├── DatasetError                labelled images, a shard or a tree that cannot be used as they are
│   └── StorageError            the dataset storage is full, closed or away; no image's fault
├── TrainingError               a run that failed, with the reason that is recorded
│   ├── DivergedError           the loss or a weight is not finite; names the step
│   ├── RunActiveError          another run works already; one at a time
│   ├── RunLostError            another process took the run over; this one writes nothing more
│   └── RunStoppedError         this process was told to stop; the run goes on in the next
├── StoreError                  a rule of the ledger was broken
│   ├── IdConflictError         one idempotency key, two different jobs
│   ├── StoreRefusedError       a row that breaks a rule, or that the database cannot hold
│   └── StoreUnavailableError   the database did not answer, after every retry
│       ├── CommitUnknownError  nor whether it had committed: ask, or repeat the call
│       └── StoreFullError      nor will it until somebody frees its disk
├── BrokerUnavailableError      published later by the sweeper; the job is safe in SQL
├── MessageError                a broker message that is not ours to read
├── ImageRejectedError          this image gets a `rejected` verdict, with a reason of the closed list
└── TransientError              not this image's fault: try again later
    ├── SourceCredentialsError  nor any image's: pause the whole source and alarm
    └── SourcePausedError       the source is left alone while it fails
```

A worker knows two dispositions: `ImageRejectedError` becomes a verdict, `TransientError` puts the job back.
Anything else is a bug and propagates.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from code_worker.types import RejectReason

__all__ = [
    "ArtifactError",
    "ArtifactStorageError",
    "BrokerUnavailableError",
    "CodeWorkerError",
    "CommitUnknownError",
    "ConfigurationError",
    "DatasetError",
    "DivergedError",
    "IdConflictError",
    "ImageRejectedError",
    "IntegrityError",
    "MessageError",
    "NoReleaseError",
    "NotAllowedError",
    "PluginError",
    "RunActiveError",
    "RunLostError",
    "RunStoppedError",
    "SignatureError",
    "SourceCredentialsError",
    "SourcePausedError",
    "StorageError",
    "StoreError",
    "StoreFullError",
    "StoreRefusedError",
    "StoreUnavailableError",
    "TrainingError",
    "TransientError",
    "UnknownHeadError",
    "UnsafeArtifactError",
    "nearest",
]


def nearest(name: str, known: Iterable[str], count: int = 1, *, cutoff: float = 0.6) -> list[str]:
    """Returns up to `count` known names that are spelt like `name`, nearest first; case, `-` and `_` are the same."""
    spelt = {one.lower().replace("_", "-"): one for one in known}
    return [spelt[near] for near in get_close_matches(name.lower().replace("_", "-"), spelt, count, cutoff)]


class CodeWorkerError(Exception):
    """Base of every error raised on purpose; its text says what happened, to what, and what to do."""


class ConfigurationError(CodeWorkerError):
    """Settings or arguments that cannot work."""


class NotAllowedError(ConfigurationError):
    """Somebody whose role does not reach so far; nothing was done."""


class UnknownHeadError(ConfigurationError):
    """A head name that no plugin registered or that the release in use was not fitted with."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        self.name = name
        self.known = known
        super().__init__(f"unknown head {name!r}; known: {', '.join(known) or 'none'}{self.hint}")

    @property
    def hint(self) -> str:
        """Asks whether the nearest of the known names was meant; empty when none is near. `-` and `_` differ."""
        near = nearest(self.name, self.known)
        return f"; did you mean {near[0]!r}?" if near else ""


class PluginError(ConfigurationError):
    """A plugin that cannot be imported or registered; the text names the plugin and its file."""


class NoReleaseError(ConfigurationError):
    """No release is installed, or the alias asked for points nowhere."""


class ArtifactError(CodeWorkerError):
    """A model file that cannot be represented exactly, is damaged, or is of an unknown form."""


class UnsafeArtifactError(ArtifactError):
    """A pickle that names something outside the allow-list; nothing of it was executed."""


class IntegrityError(ArtifactError):
    """A file whose bytes are not those that the manifest recorded."""


class SignatureError(ArtifactError):
    """A release without a signature, or with one that no configured key made, where keys are configured."""


class ArtifactStorageError(ArtifactError):
    """The storage of releases, or the hub, cannot be written or read; the same call may work later."""


class DatasetError(CodeWorkerError):
    """Images to learn from or to measure on that are missing, unreadable, too few or of one class only."""


class StorageError(DatasetError):
    """The dataset storage cannot be written or read: full, closed to us, or away; no single image is to blame."""


class TrainingError(CodeWorkerError):
    """A retrain or refit that cannot go on; its text becomes the run's recorded reason."""


class DivergedError(TrainingError):
    """A loss or gradient that is not finite, or a loss beyond chance; `step` is the one at which it was noticed."""

    def __init__(self, detail: str, step: int) -> None:
        self.step = step
        super().__init__(f"the training diverged at step {step}: {detail}")


class RunActiveError(TrainingError):
    """A retrain or refit is under way; only one runs at a time."""


class RunLostError(TrainingError):
    """A run that another process took over, or that has ended: nothing of it may be written here any more."""


class RunStoppedError(TrainingError):
    """A run that this process leaves because it was told to stop; the next process goes on with it."""


class StoreError(CodeWorkerError):
    """The ledger refused: an illegal state change, a missing row, a migration that is due."""


class IdConflictError(StoreError):
    """An idempotency key that was used before for a different job."""


class StoreRefusedError(StoreError):
    """A row that breaks a rule of the database or that it cannot hold; the same row again is refused again."""


class StoreUnavailableError(StoreError):
    """The database could not be reached, only reads, or was busy throughout every retry of the transaction."""


class CommitUnknownError(StoreUnavailableError):
    """The connection ended before the answer to a commit came, and none later: all was written, or nothing.

    Attributes:
        job_ids: of a call that enqueues: the ids that the jobs have if they were accepted.
    """

    def __init__(self, detail: str, job_ids: tuple[str, ...] = ()) -> None:
        self.job_ids = job_ids
        super().__init__(detail)


class StoreFullError(StoreUnavailableError):
    """The database's disk is full (`storage_full`): reading works, writing does not."""


class BrokerUnavailableError(CodeWorkerError):
    """The broker could not be reached in time; accepted jobs stay in SQL and the sweeper publishes them."""


class MessageError(CodeWorkerError):
    """A broker message of an unknown version or with wrong fields."""


class ImageRejectedError(CodeWorkerError):
    """An image that cannot be judged: recorded as a `rejected` verdict, never retried by itself."""

    def __init__(self, reason: RejectReason, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason.value}: {detail}" if detail else reason.value)


class TransientError(CodeWorkerError):
    """A fault that time may cure; `reason` is what the verdict will say if it never does.

    `detail` may name the object. `cause` never does: it is for logs, and for what is kept of a whole source.
    """

    cause: str = ""

    def __init__(self, reason: RejectReason, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason.value}: {detail}" if detail else reason.value)


class SourceCredentialsError(TransientError):
    """Credentials or settings with which nothing can be read: `source` (e.g. `s3://bucket`) is paused meanwhile."""

    def __init__(self, source: str, detail: str = "") -> None:
        self.source = source
        super().__init__(RejectReason.FETCH_FAILED, detail)


class SourcePausedError(TransientError):
    """A source that is left alone for `wait_s` more; nothing was tried."""

    def __init__(self, source: str, wait_s: float, why: str) -> None:
        self.source = source
        self.wait_s = wait_s
        super().__init__(RejectReason.FETCH_FAILED, f"{source} is left alone for a while: {why}")
