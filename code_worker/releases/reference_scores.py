"""Proof that a head is still the head that was fitted: its scores of fixed embeddings, when saved and when loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from code_worker.errors import ArtifactError
from code_worker.heads import tolerance_of
from code_worker.system.processes import raise_if_stop
from code_worker.types import EMBEDDING_DIM, IMAGE_SIZE, SCORE_ROUNDING

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.random import Generator
    from numpy.typing import NDArray

    from code_worker.encoder.weights import EncoderWeights
    from code_worker.heads import Head


def seeded_crops(count: int, seed: int = 0, *, first: int = 0) -> NDArray[np.uint8]:
    """`(count, 224, 224, 3) uint8`: three photograph-like crops, then one synthetic, and so on.

    Crop i depends on `seed` and i alone: `first` continues a set where a shorter one ended.
    """
    crops = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for row, index in enumerate(range(first, first + count)):
        rng = np.random.default_rng((seed, index))
        crops[row] = _synthetic(rng) if index % 4 == 3 else _photograph_like(rng)
    return crops


def _photograph_like(rng: Generator) -> NDArray[np.uint8]:
    """Noise with the 1/f amplitude spectrum of natural images, colours correlated as in photographs."""
    slope = rng.uniform(0.8, 1.6)
    luminance = _pink(rng, slope)
    chroma = np.stack([_pink(rng, slope + 0.3) for _ in range(3)], axis=-1)
    contrast, brightness = rng.uniform(20, 70), rng.uniform(60, 190)
    grain = rng.normal(0, rng.uniform(0, 6), chroma.shape)
    return _to_bytes(brightness + contrast * (luminance[..., None] + 0.35 * chroma) + grain)


def _pink(rng: Generator, slope: float) -> NDArray[np.float64]:
    # (224, 113): the half of the spectrum that a real image has.
    frequency = np.hypot(np.fft.fftfreq(IMAGE_SIZE)[:, None], np.fft.rfftfreq(IMAGE_SIZE)[None])
    # No constant part: brightness is drawn for itself.
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE))) / frequency**slope
    field = np.fft.irfft2(spectrum, s=(IMAGE_SIZE, IMAGE_SIZE))
    return np.asarray(field / field.std())


def _synthetic(rng: Generator) -> NDArray[np.uint8]:
    """Returns what cameras do not make: flat areas, ramps, white noise, black padding."""
    kind = rng.integers(4)
    shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    if kind == 0:
        return np.broadcast_to(rng.integers(0, 256, 3, dtype=np.uint8), shape)
    if kind == 1:
        return rng.integers(0, 256, shape, dtype=np.uint8)
    rows, columns = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE] / (IMAGE_SIZE - 1)
    ramp = rng.uniform(-255, 255, 3) * rows[..., None] + rng.uniform(-255, 255, 3) * columns[..., None]
    filled = _to_bytes(ramp + rng.uniform(0, 255, 3))
    if kind == 3:
        filled[: int(rng.integers(1, IMAGE_SIZE // 2))] = 0
    return filled


def _to_bytes(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


GOLDEN_COUNT = 256
PROBES_NAME: Final = "probes.safetensors"
"""File of a release: `embeddings` `(n, 192) float32`, and per head `scores/NAME` `(n,) float64`."""
_FIXED_PROBES: Final = 64
_DRAWN_PROBES: Final = 16


def golden_embeddings(count: int = GOLDEN_COUNT, seed: int = 20_240) -> NDArray[np.float32]:
    """`(count, 192) float32`, the same for the same seed everywhere.

    Of the size that a final LayerNorm gives, from tightly packed to far apart: both sides of a border are met.
    """
    rng = np.random.default_rng(seed)
    # (count, 1): rows from 0.05 to 4 times a unit normal's size.
    spread = np.geomspace(0.05, 4.0, count)[:, None]
    return (rng.standard_normal((count, EMBEDDING_DIM)) * spread).astype(np.float32)


def checked_scores(name: str, head: Head, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scores of a head that keeps its contract.

    Raises:
        ArtifactError: the head failed, or its scores are of the wrong shape or outside [0, 1].
    """
    try:
        with np.errstate(all="ignore"):  # an application may have numpy raise on every underflow
            scores = np.asarray(head.score(embeddings))
    except (Exception, SystemExit) as error:  # a head is somebody else's code: if it raises, it cannot be used
        raise_if_stop(error)
        raise ArtifactError(f"head {name!r} cannot score: {type(error).__name__}: {error}") from error
    if scores.shape != (len(embeddings),):
        raise ArtifactError(f"head {name!r} returned scores of shape {scores.shape}, not ({len(embeddings)},)")
    if not bool(np.all((scores >= 0) & (scores <= 1))):
        raise ArtifactError(f"head {name!r} returned scores outside [0, 1]")
    return scores


def check_same_scores(fitted: Mapping[str, Head], loaded: Mapping[str, Head]) -> None:
    """Compares the scores of heads before saving and after loading, bit by bit.

    Raises:
        ArtifactError: names the first head that scores differently, and by how much.
    """
    embeddings = golden_embeddings()
    for name, head in fitted.items():
        before, after = (checked_scores(name, one, embeddings) for one in (head, loaded[name]))
        # Bit by bit: it is the same machine and the same code, so that nothing may differ.
        if not np.array_equal(before, after):
            worst = float(np.abs(before.astype(np.float64) - after).max())
            raise ArtifactError(
                f"head {name!r} scores differently once saved and loaded: by up to {worst:.3g} on "
                f"{GOLDEN_COUNT} embeddings; its save() or load() loses something"
            )


@dataclass(frozen=True, slots=True)
class Changed:
    """A head that no longer scores the probes of its release as it did when the release was made.

    Attributes:
        head: its name.
        difference: the largest between two scores of one probe.
        allowed: the head's tolerance.
        flipped: probes with a score on the other side of a border.
    """

    head: str
    difference: float
    allowed: float
    flipped: int

    @property
    def is_rounding(self) -> bool:
        """True if unchanged code may differ so much on another processor."""
        return self.difference <= SCORE_ROUNDING and not self.flipped


def probe_embeddings(weights: EncoderWeights) -> NDArray[np.float32]:
    """`(n, 192) float32` to recognise heads by: 64 that are always the same, and what this encoder makes of 16 crops.

    The crops are drawn, not anybody's images: a release's probes need never be erased.
    """
    from code_worker.encoder.torch_engine import Engine

    # On the CPU in float32, so that a release's probes do not depend on who made it.
    drawn = Engine(weights, device="cpu").embed(seeded_crops(_DRAWN_PROBES, 20_241))
    return np.concatenate((golden_embeddings(_FIXED_PROBES), drawn[np.isfinite(drawn).all(axis=1)]))


def write_probes(
    directory: Path,
    weights: EncoderWeights,
    heads: Mapping[str, Head],
    *,
    kept: Collection[str] = (),
    base: Path | None = None,
) -> None:
    """Writes the probes and each head's scores of them into a release directory.

    Args:
        directory: the release that is made.
        weights: its encoder, which is that of `base`.
        heads: its heads.
        kept: those that are taken over from the release `base`. Their scores are the ones recorded there, where there
            are some: the code that is here now may score otherwise than what the head was put in with.
        base: directory of that release.

    Raises:
        ArtifactError: a head that does not keep its contract, or probes of `base` that cannot be read.
    """
    from safetensors.numpy import save_file

    recorded = read_probes(base) if base is not None and kept and (base / PROBES_NAME).is_file() else {}
    embeddings = recorded["embeddings"].astype(np.float32) if recorded else probe_embeddings(weights)
    scores = {}
    for name, head in heads.items():
        then = recorded.get(f"scores/{name}") if name in kept else None
        scores[f"scores/{name}"] = checked_scores(name, head, embeddings).astype(np.float64) if then is None else then
    save_file({"embeddings": embeddings, **scores}, directory / PROBES_NAME)


def read_probes(directory: Path) -> Mapping[str, NDArray[np.float64]]:
    """The arrays of a release's probes by name, see `PROBES_NAME`.

    Raises:
        ArtifactError: the file cannot be read, or holds other arrays.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = directory / PROBES_NAME
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    embeddings = arrays.get("embeddings")
    if embeddings is None or embeddings.ndim != 2 or embeddings.shape[1] != EMBEDDING_DIM or not len(embeddings):
        raise ArtifactError(f"{path} holds no embeddings of {EMBEDDING_DIM} numbers")
    return arrays


def probe_scores_changed(
    name: str, head: Head, probes: Mapping[str, NDArray[np.float64]], borders: Collection[float] = (0.5,)
) -> Changed | None:
    """Compares a head's scores of the probes with those of the head that was put into the release.

    It changed if any is further off than its tolerance; then those on the other side of one of `borders` are counted.

    Raises:
        ArtifactError: the probes have no scores of this head, or it does not keep its contract, of which its
            `tolerance` is a part.
    """
    embeddings, then = probes["embeddings"].astype(np.float32), probes.get(f"scores/{name}")
    if then is None or then.shape != (len(embeddings),):
        raise ArtifactError(f"{PROBES_NAME} has no scores of head {name!r}")
    now = checked_scores(name, head, embeddings).astype(np.float64)
    try:
        allowed = tolerance_of(head)
    except ValueError as error:
        raise ArtifactError(f"head {name!r} {error}: mend its class") from None
    difference = float(np.abs(now - then).max())
    if difference <= allowed:
        return None
    # (borders, 1) against (n,): a flip at any border counts once.
    sides = np.array(sorted(borders))[:, None]
    flipped = int(np.count_nonzero(((then >= sides) != (now >= sides)).any(axis=0)))
    return Changed(name, difference, allowed, flipped)
