"""What a comparison found, as people read it and as it is kept: changes of groups, and losses not excluded."""

from __future__ import annotations

from dataclasses import dataclass

from code_worker.training.paired import Difference

__all__ = ["Change", "Loss"]


@dataclass(frozen=True, slots=True)
class Change:
    """Candidate minus champion on one group under one condition.

    Attributes:
        condition: as the images are, or after a transform; with the policy's name where one decided.
        group: `real`, a generator, or images of all kinds.
        figure: accuracy, or balanced_accuracy of images of both classes.
        n: images.
        champion: its figure.
        candidate: its figure.
        difference: of the two, with its 95 % interval.
        gains: images that only the candidate judges rightly; of images of both classes, groups that gained.
        losses: images that only the champion does, or groups that lost.
        p: of the one-sided exact test of what was asked: whether a group is worse, or all images are better.
        proven: of a group, the loss that is proven at the level of all these tests; 0 where none is.
        detectable: of a group, the loss of which more than is allowed would have been proven with a chance of 80 %,
            were as much gained besides as changed both ways; None where even the loss of all others would not.
    """

    condition: str
    group: str
    figure: str
    n: int
    champion: float
    candidate: float
    difference: Difference
    gains: int
    losses: int
    p: float
    proven: float = 0.0
    detectable: float | None = None

    def __str__(self) -> str:
        return (
            f"{self.group}, {self.condition}: {self.figure.replace('_', ' ')} {self.champion:.3f} → "
            f"{self.candidate:.3f} on {self.n} images ({self.difference.value:+.3f}, "
            f"95 % interval {self.difference.low:+.3f} to {self.difference.high:+.3f}, "
            f"{self.gains} gained, {self.losses} lost, p {self.p:.2g})"
        )


@dataclass(frozen=True, slots=True)
class Loss:
    """What the reals, or the old fakes of all generators, may have lost.

    Attributes:
        condition: as the images are, or after a transform.
        group: `real` or `old fakes`.
        n: images.
        effective: independent ones of equal weight that would tell as much.
        value: mean change, each generator weighted alike.
        low: its lower limit.
        error: chance that a larger loss gives this limit.
        margin: loss that must be excluded.
        needed: images that would do if they changed as little; None if more than a million.
    """

    condition: str
    group: str
    n: int
    effective: float
    value: float
    low: float
    error: float
    margin: float
    needed: int | None

    @property
    def excluded(self) -> bool:
        """Whether a loss of the margin is excluded."""
        return self.low > -self.margin

    def __str__(self) -> str:
        told = f"{self.n} images"
        if round(self.effective) < self.n:
            told += f", which tell as much as {self.effective:.0f} of equal weight"
        needed = f", about {self.needed} would tell" if self.needed and self.needed > self.effective else ""
        return (
            f"{self.group}, {self.condition}: {self.value:+.3f} on {told}{needed}, "
            f"and a loss of {-self.low:.3f} is not excluded; {self.margin:g} is allowed"
        )
