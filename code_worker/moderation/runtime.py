"""A release ready to judge: encoder loop and heads, held together so that no verdict mixes two releases."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from code_worker.heads import Head
from code_worker.moderation.policy import DEFAULT_POLICY, Policy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Embedder", "Runtime"]


class Embedder(Protocol):
    """What turns crops into embeddings; in a worker the process's one encoder loop."""

    @property
    def failure(self) -> BaseException | None:
        """What ended the device for good; the process should then be replaced."""

    @property
    def busy(self) -> bool:
        """Whether crops wait or are being embedded at this moment."""

    def submit(self, crop: NDArray[np.uint8], priority: int = 4, turn: int = 0) -> Future[NDArray[np.float32]]:
        """Queues one `(224, 224, 3) uint8` crop; the future yields its `(192,) float32` embedding.

        Higher priorities come first, then lower turns.
        """

    def close(self) -> None:
        """Finishes what is queued and frees the device."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """Everything of one release that judging needs.

    Attributes:
        release: release id.
        manifest_sha256: hash of its manifest.
        encoder_sha256: hash of its encoder and precision; embeddings are kept under it, so that a refit reuses them.
        embedder: the encoder.
        heads: fitted heads by name.
        head_sha256: hash of each head's files.
        default_head: head used when nobody names one.
        default_policy: thresholds of the release, for jobs that no policy covers.
        head_plugins: distribution and version of what loaded each head.
        precision: arithmetic of the encoder; a verdict's code version names it when it is not fp32.
    """

    release: str
    manifest_sha256: str
    encoder_sha256: str
    embedder: Embedder
    heads: Mapping[str, Head]
    head_sha256: Mapping[str, str]
    default_head: str
    default_policy: Policy = DEFAULT_POLICY
    head_plugins: Mapping[str, str] = field(default_factory=dict)
    precision: str = "fp32"
