"""Champion and challenger side by side: how often they agree, where they do not, and who was right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from code_worker.types import Label

if TYPE_CHECKING:
    from code_worker.store.shadow import Disagreement, Tally

__all__ = ["Scope", "ShadowReport", "WhoWasRight", "summarise", "who_was_right"]


@dataclass(frozen=True, slots=True)
class Scope:
    """Images of one tenant and content type (None: the jobs named none).

    Attributes:
        tenant: whose.
        content_type: of which kind.
        images: how many both scored.
        agreement: share of them that both call the same.
        shift: mean of the challenger's scores minus the champion's.
    """

    tenant: str | None
    content_type: str | None
    images: int
    agreement: float
    shift: float


@dataclass(frozen=True, slots=True)
class WhoWasRight:
    """Of images that somebody labelled: whose label is the human one. `uncertain` is never right."""

    images: int
    both: int
    only_champion: int
    only_challenger: int
    neither: int


@dataclass(frozen=True, slots=True)
class ShadowReport:
    """What a challenger said beside the champion.

    Attributes:
        release: the challenger.
        champions: images by the release that judged them.
        images: how many both scored.
        agreement: share of them that both call the same; None without images.
        shift: mean of the challenger's scores minus the champion's; None without images.
        confusion: images by the champion's label, then by the challenger's.
        scopes: the same by tenant and content type, the most frequent first.
        labelled: who was right where somebody knows.
        disagreements: images on which they differ most.
    """

    release: str
    champions: Mapping[str, int]
    images: int
    agreement: float | None
    shift: float | None
    confusion: Mapping[Label, Mapping[Label, int]]
    scopes: Sequence[Scope]
    labelled: WhoWasRight
    disagreements: Sequence[Disagreement]

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def summarise(
    release: str, tallies: Sequence[Tally], labelled: WhoWasRight, disagreements: Sequence[Disagreement]
) -> ShadowReport:
    """The report over counts by champion, scope and labels."""
    whole = _scope(None, None, tallies) if tallies else None
    champions = {one.champion: _images(tallies, champion=one.champion) for one in tallies}
    scopes = [
        _scope(*names, [one for one in tallies if (one.tenant, one.content_type) == names])
        for names in dict.fromkeys((one.tenant, one.content_type) for one in tallies)
    ]
    return ShadowReport(
        release=release,
        champions=champions,
        images=whole.images if whole else 0,
        agreement=whole.agreement if whole else None,
        shift=whole.shift if whole else None,
        confusion={was: {now: _images(tallies, champion_label=was, label=now) for now in Label} for was in Label},
        scopes=sorted(scopes, key=lambda scope: (-scope.images, scope.tenant or "", scope.content_type or "")),
        labelled=labelled,
        disagreements=disagreements,
    )


def _images(tallies: Iterable[Tally], **wanted: str) -> int:
    return sum(one.images for one in tallies if all(getattr(one, name) == value for name, value in wanted.items()))


def _scope(tenant: str | None, content_type: str | None, tallies: Sequence[Tally]) -> Scope:
    images = _images(tallies)
    agreed = sum(one.images for one in tallies if one.label == one.champion_label)
    shift = sum(one.shift for one in tallies)
    return Scope(tenant, content_type, images, agreed / images, shift / images)


def who_was_right(said: Mapping[str, tuple[Label, Label]], truth: Mapping[str, str]) -> WhoWasRight:
    """Compares what champion and challenger said (by content hash) with what people say, `real` or `fake`."""
    counts = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
    for sha256, (champion, challenger) in said.items():
        if (right := truth.get(sha256)) is not None:
            counts[champion == right, challenger == right] += 1
    return WhoWasRight(
        images=sum(counts.values()),
        both=counts[True, True],
        only_champion=counts[True, False],
        only_challenger=counts[False, True],
        neither=counts[False, False],
    )
