"""Measures how far a release on this device is from the reference: float32 on the CPU, nothing folded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from code_worker.errors import ConfigurationError
from code_worker.releases.reference_scores import checked_scores, seeded_crops

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.heads import Head
    from code_worker.releases.loading import LoadedRelease

    Embed = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


MAX_FLIPS_PER_10000 = 1.0
"""Of the crops that were compared; what these prove of others is `HeadReport.at_most_per_10000`."""
_CHUNK = 16
_CHANCE = 0.05


@dataclass(frozen=True, slots=True)
class HeadReport:
    """One head on the same crops through both encoders.

    Attributes:
        score_error: largest difference between the two scores of a crop.
        flips: crops on different sides of 0.5.
        flips_per_10000: the same as a rate.
        at_most_per_10000: what such a result proves at 95 % of all crops like these; see `flips_at_most`.
        deterministic: whether scoring the same embeddings twice gave the same bits.
    """

    score_error: float
    flips: int
    flips_per_10000: float
    at_most_per_10000: float
    deterministic: bool


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Measurements of `verify`.

    Attributes:
        release: release id.
        files: how many files were compared with the manifest when it was loaded.
        engine: what ran the encoder, `torch` or `openvino`.
        device: device the encoder ran on.
        precision: its arithmetic.
        kernels: `plain`, or how a worker's warm-up prepared them on this device.
        images: how many crops were encoded.
        embedding_error: largest absolute difference in any of their numbers.
        heads: report per head.
    """

    release: str
    files: int
    engine: str
    device: str
    precision: str
    kernels: str
    images: int
    embedding_error: float
    heads: Mapping[str, HeadReport]

    @property
    def passed(self) -> bool:
        """True if every head is deterministic and flipped at most 1 label in 10,000 of the crops compared."""
        return all(head.deterministic and head.flips_per_10000 <= MAX_FLIPS_PER_10000 for head in self.heads.values())

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {**asdict(self), "passed": self.passed}


def verify(
    loaded: LoadedRelease,
    *,
    engine: str = "auto",
    device: str = "auto",
    precision: str = "fp32",
    compile_kernels: bool = False,
    images: int = 256,
    seed: int = 0,
    on_images: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Encodes seeded crops (photograph-like and synthetic) with the reference and as a worker would, and compares.

    `compile_kernels` prepares them as a worker does: fused kernels round differently, so they are what is compared.
    `on_images` hears how many more crops are done. The files' hashes were compared when `loaded` was.

    Raises:
        ConfigurationError: no images, or a device or precision that this machine lacks.
        ArtifactError: a head that does not keep its contract.
    """
    from code_worker.encoder.engines import open_engine
    from code_worker.encoder.torch_engine import Engine

    if images < 1:
        raise ConfigurationError(f"{images} images: at least one is needed")
    # Nothing folded: the arithmetic of the published network, layer by layer.
    reference = Engine(loaded.weights, device="cpu", precision="fp32", fold=False)
    tested = open_engine(
        loaded.weights,
        engine=engine,
        device=device,
        precision=precision,
        compile_kernels=compile_kernels,
        streams=1,
        largest_batch=_CHUNK,
    )
    tested.warm_up()
    expected, found = _embed_both(reference.embed, tested.embed, images, seed, on_images)
    return VerifyReport(
        release=loaded.id,
        files=len(loaded.manifest.files),
        engine=tested.name,
        device=str(tested.device),
        precision=tested.precision,
        kernels=tested.kernels,
        images=images,
        embedding_error=float(np.abs(expected - found).max()),
        heads={name: _compare(name, head, expected, found) for name, head in loaded.heads.items()},
    )


def _embed_both(
    reference: Embed, tested: Embed, images: int, seed: int, on_images: Callable[[int], None] | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    expected, found = [], []
    for start in range(0, images, _CHUNK):
        # In chunks, both encoders on the same crops: memory does not grow with the number of images.
        crops = seeded_crops(min(_CHUNK, images - start), seed, first=start)
        expected.append(reference(crops))
        found.append(tested(crops))
        if on_images is not None:
            on_images(len(crops))
    return np.concatenate(expected), np.concatenate(found)


def _compare(name: str, head: Head, expected: NDArray[np.float32], found: NDArray[np.float32]) -> HeadReport:
    wanted, got = (checked_scores(name, head, embeddings) for embeddings in (expected, found))
    # At 0.5, the published border; policies have borders of their own.
    flips = int(np.count_nonzero((wanted >= 0.5) != (got >= 0.5)))
    return HeadReport(
        score_error=float(np.abs(wanted - got).max()),
        flips=flips,
        flips_per_10000=flips * 10_000 / len(found),
        at_most_per_10000=10_000 * flips_at_most(flips, len(found)),
        deterministic=bool(np.array_equal(got, checked_scores(name, head, found))),
    )


def flips_at_most(flips: int, images: int) -> float:
    """The share of crops that flip, at most, with 95 % confidence, where `flips` of `images` drawn at random did.

    The one-sided limit of Clopper and Pearson (Biometrika 26, 1934): the share at which so few flips or fewer have a
    chance of 5 %. Without any it is 1 − 0.05^(1/n), a little less than 3/n (the rule of three).
    """
    low, high = flips / images, 1.0
    # Bisection: the chance falls as the share rises.
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _chance_of_at_most(flips, images, middle) > _CHANCE else (low, middle)
    return high


def _chance_of_at_most(flips: int, images: int, share: float) -> float:
    """Cumulative binomial probability, 0 < share < 1; by logarithms, as the coefficients exceed every float."""
    terms = (
        math.lgamma(images + 1)
        - math.lgamma(k + 1)
        - math.lgamma(images - k + 1)
        + k * math.log(share)
        + (images - k) * math.log1p(-share)
        for k in range(flips + 1)
    )
    return math.fsum(map(math.exp, terms))
