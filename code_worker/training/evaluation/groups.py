"""Groups of images that figures are given for: each generator, each source of real images, each variant, and all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from code_worker.data.examples import FAKE, REAL

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from code_worker.data.examples import Example

__all__ = ["UNNAMED", "Group", "group_images", "labels_of"]

UNNAMED = "(unnamed)"
"""Stands for generated images of which nobody says what made them, and real ones of no collection."""


@dataclass(frozen=True, slots=True)
class Group:
    """Some of the images.

    Attributes:
        kind: `overall`; `generator`: its images and all reals; `collection`: what came from one source of reals,
            generated or not; `variant`: what the data set itself calls so.
        name: of the generator, collection or variant; `all` overall.
        members: `(n,) bool`.
    """

    kind: str
    name: str
    members: NDArray[np.bool_]


def labels_of(examples: Sequence[Example]) -> NDArray[np.int8]:
    """`(n,) int8`."""
    return np.array([one.label for one in examples], np.int8)


def group_images(examples: Sequence[Example]) -> list[Group]:
    """Overall first, then generators, collections and variants, each by name; variants only where there are some."""
    labels = labels_of(examples)
    generators = _named([one.generator if one.label == FAKE else "" for one in examples])
    collections = _named([one.collection for one in examples])
    found = [Group("overall", "all", np.ones(len(labels), np.bool_))]
    found += (
        Group("generator", name, (labels == REAL) | (generators == name))
        for name in _distinct(generators[labels == FAKE])
    )
    found += (Group("collection", name, collections == name) for name in _distinct(collections[labels == REAL]))
    if any(one.variant is not None for one in examples):
        variants = _named([one.variant for one in examples])
        found += [Group("variant", name, variants == name) for name in _distinct(variants)]
    return found


def _named(names: Sequence[str | None]) -> NDArray[np.object_]:
    return np.array([UNNAMED if name is None else name for name in names], object)


def _distinct(names: NDArray[np.object_]) -> list[str]:
    return sorted(set(names.tolist()))
