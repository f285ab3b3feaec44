"""What generators and shards are called in published data sets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from code_worker.data.examples import FAKE, REAL

__all__ = [
    "PUBLISHED_GENERATORS",
    "PUBLISHED_VARIANTS",
    "generator_slug",
    "label_of",
    "numbered_generator",
]

PUBLISHED_GENERATORS: Final = ("deepfloyd-if", "sd-1.4", "sd-2.1", "sd-xl")
"""D³'s gen_0 to gen_3, where a record does not say otherwise in its `model_gen*` fields."""
PUBLISHED_VARIANTS: Final = ("augm", "no_augm")
"""The two forms of D³'s test set, in the order in which they are published."""

_LABELS: Final[Mapping[str, int]] = {"0": REAL, "real": REAL, "1": FAKE, "fake": FAKE, "generated": FAKE}
_SD_XL: Final = re.compile(r"(?:stable-diffusion-xl|sd-?xl)(?:-base)?(?:-1\.0)?")
_SD: Final = re.compile(r"(?:stable-diffusion|sd)-?v?(\d)[-.](\d)(?:-base)?")


def numbered_generator(number: int) -> str:
    """Generator of D³'s column or member `gen_N`; `gen_N` itself beyond the published four."""
    return PUBLISHED_GENERATORS[number] if number < len(PUBLISHED_GENERATORS) else f"gen_{number}"


def generator_slug(model: str) -> str | None:
    """One spelling for a model that is named in several: `CompVis/stable-diffusion-v1-4` is `sd-1.4`.

    A model that is not one of D³'s keeps the last part of its name, in lower case; None if nothing is left of it.
    """
    slug = re.sub(r"[^a-z0-9.]+", "-", model.rstrip("/").rpartition("/")[2].lower()).strip("-.")
    if "deepfloyd" in model.lower():
        return PUBLISHED_GENERATORS[0]
    if _SD_XL.fullmatch(slug):
        return PUBLISHED_GENERATORS[3]
    if match := _SD.fullmatch(slug):
        return f"sd-{match[1]}.{match[2]}"
    return slug or None


def label_of(value: object) -> int:
    """Label that a word or number of a data set stands for: real or 0, fake, generated or 1.

    Raises:
        ValueError: it is something else.
    """
    label = None if isinstance(value, float | bool) else _LABELS.get(str(value).strip().lower())
    if label is None:
        raise ValueError(f"label is {str(value)[:40]!r}; it must be real (or 0) or fake (or 1)")
    return label
