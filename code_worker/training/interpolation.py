"""How far to go from the champion's weights to the trained ones: new traces learned, old ones not forgotten.

Weights on the line between a model and what was fine-tuned from it keep most of what either can do (Wortsman et al.,
Robust fine-tuning of zero-shot models, CVPR 2022, arXiv 2109.01903, eq. 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SHARES", "choose_share", "mixed"]

SHARES: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the trained weights that are tried; 0 is the champion's encoder, the measure of what is forgotten."""
_FEWEST: Final = 10


def mixed(champion: Mapping[str, Tensor], trained: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """`(1 − share) · champion + share · trained`, tensor by tensor; the ends are exactly theirs."""
    if share in {0.0, 1.0}:
        return dict(trained if share else champion)
    return {name: champion[name].to(tensor).lerp(tensor, share) for name, tensor in trained.items()}


def choose_share(
    confidence: Mapping[float, Mapping[str, float]], images: Mapping[str, int], *, max_forgetting: float
) -> float:
    """The share of the trained weights that tells best, on average over groups, and forgets little of any.

    Heads are fitted anew for every share. A group that is too small to say anything is not asked.

    Args:
        confidence: share → group (`real`, `fake`, generators) → mean probability of what is right; with share 0.
        images: how many of the validation part each group has.
        max_forgetting: what a group may lose against share 0.

    Returns:
        A share above 0; where all of those forget more, the one that forgets least.
    """
    before = confidence[0.0]
    asked = [group for group in before if images.get(group, _FEWEST) >= _FEWEST]
    lost = {
        share: max(before[group] - after[group] for group in asked)
        for share, after in confidence.items()
        if share > 0
    }
    allowed = [share for share, worst in lost.items() if worst <= max_forgetting]
    if not allowed:
        return min(lost, key=lambda share: lost[share])
    return max(allowed, key=lambda share: sum(confidence[share][group] for group in asked))
