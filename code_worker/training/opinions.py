"""What two releases say of the same labelled images, and in which groups these are compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from code_worker.data.examples import FAKE, REAL
from code_worker.training.metrics import Threshold
from code_worker.training.snapshot import UNNAMED
from code_worker.training.spending import Spending, spend

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.training.noise import Noise
    from code_worker.training.safeguards import GoldenOpinions
    from code_worker.training.trust import Suspicion

__all__ = ["CrossFitted", "GateInputs", "Opinion", "PolicyRule", "generator_names"]


@dataclass(frozen=True, slots=True, eq=False)
class Opinion:
    """What one release says of the hold-out.

    Attributes:
        release: its id.
        head: the head that decides.
        threshold: where it decides.
        scores: condition (`clean` and transforms) → head → `(n,) float32`.
    """

    release: str
    head: str
    threshold: Threshold
    scores: Mapping[str, Mapping[str, NDArray[np.float32]]]

    def deciding(self, condition: str) -> NDArray[np.float32]:
        """Scores of the head that decides."""
        return self.scores[condition][self.head]


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """Where production decides: a head and thresholds that a policy in force names.

    Attributes:
        name: for reports, such as `tenant acme`.
        head: the head it judges by.
        low: below it real.
        high: from it on fake.
    """

    name: str
    head: str
    low: float
    high: float


@dataclass(frozen=True, slots=True, eq=False)
class CrossFitted:
    """More images that no side learned from: scored by heads that were fitted without them.

    Attributes:
        labels: `(m,) int8`.
        generators: what made each fake, if known; None for reals.
        candidate: condition → `(m,) float32`, scores of the head that decides.
        champion: the same of the champion.
        group_of: names the group of each image; empty: each is by itself.
    """

    labels: NDArray[np.int8]
    generators: tuple[str | None, ...]
    candidate: Mapping[str, NDArray[np.float32]]
    champion: Mapping[str, NDArray[np.float32]]
    group_of: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class GateInputs:
    """The hold-out and two opinions of it.

    Attributes:
        labels: `(n,) int8`.
        generators: what made each fake, if known; None for reals.
        new: `(n,) bool`, labelled since the last champion that learned here.
        candidate: what wants to be promoted.
        champion: what judges now; None if nothing does.
        noise: wrong labels, the smaller estimate of the two releases' embeddings.
        unseen: new generators whose labels nobody could check: the champion's encoder does not tell them from reals.
        old: generators that the champion knows; None: those with images that are not new, or else all.
        min_holdout: images of each class below which nothing is decided.
        labellers: who labelled what is new.
        min_labellers: how many these must be.
        suspicions: how much new labels disagree with their neighbours, by labeller.
        golden: the golden set, if there is one.
        owed: the champion must go, for it learned from what was erased; no worse than it is good enough.
        more: further images on which a loss would show.
        policies: where production decides beside the champion's own thresholds.
        spending: what this comparison may err; None: it is the first with this champion.
        group_of: names the group of each image; empty: each is by itself. Of one class and generator a group has one
            image.
        unrecorded: nobody recorded what the champion learned from; these images may be among it.
    """

    labels: NDArray[np.int8]
    generators: tuple[str | None, ...]
    new: NDArray[np.bool_]
    candidate: Opinion
    champion: Opinion | None
    noise: tuple[Noise, ...] = ()
    unseen: tuple[str, ...] = ()
    old: frozenset[str] | None = None
    min_holdout: int = 1
    labellers: tuple[str, ...] = ()
    min_labellers: int = 1
    suspicions: tuple[Suspicion, ...] = ()
    golden: GoldenOpinions | None = None
    owed: bool = False
    more: CrossFitted | None = None
    policies: tuple[PolicyRule, ...] = ()
    spending: Spending | None = None
    group_of: tuple[str, ...] = ()
    unrecorded: bool = False

    def spends(self, error: float) -> Spending:
        """What this comparison may err."""
        return self.spending or spend((), len(self.labels), error)

    def names(self) -> NDArray[np.object_]:
        """`(n,)` generator of each fake, `unnamed` if nobody named one; of reals None."""
        return generator_names(self.labels, self.generators)

    def old_generators(self) -> frozenset[str]:
        """Generators that the champion knows, which must not be lost."""
        if self.old is not None:
            return self.old
        names = self.names()
        known = {str(name) for name in names[(self.labels == FAKE) & ~self.new]}
        return frozenset(known or {str(name) for name in names[self.labels == FAKE]})

    def groups(self) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        """The reals, and the fakes of each generator: nobody may pay for what others gain."""
        yield "real", self.labels == REAL
        names = self.names()
        for name in sorted({str(name) for name in names[self.labels == FAKE]}):
            yield name, (self.labels == FAKE) & (names == name)


def generator_names(labels: NDArray[np.int8], generators: tuple[str | None, ...]) -> NDArray[np.object_]:
    """`(n,)` generator of each fake, `unnamed` if nobody named one; of reals None."""
    pairs = zip(labels, generators, strict=True)
    return np.array([name or UNNAMED if label == FAKE else None for label, name in pairs], dtype=object)
