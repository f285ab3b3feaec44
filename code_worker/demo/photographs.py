"""Real pixels for the demonstration: the two photographs that scikit-learn ships, cut again and again."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from code_worker.errors import ConfigurationError

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

__all__ = ["Photographs"]

_NAMES: Final = ("china.jpg", "flower.jpg")


class Photographs:
    """Crops of the photographs.

    Raises:
        ConfigurationError: scikit-learn is not installed, or came without its photographs.
    """

    def __init__(self) -> None:
        from PIL import Image  # only the demonstration's images need it here

        # Found, not imported: two files are wanted, and the import takes a second.
        spec = find_spec("sklearn")
        home = Path(spec.origin or "").parent / "datasets" / "images" if spec else Path()
        paths = [home / name for name in _NAMES]
        if not all(path.is_file() for path in paths):
            raise ConfigurationError(
                "the demo cuts its images from scikit-learn's photographs: pip install scikit-learn"
            )
        self._pixels = [np.asarray(Image.open(path).convert("RGB")) for path in paths]

    def crop(self, rng: Generator) -> NDArray[np.uint8]:
        """A `(height, width, 3) uint8` piece of one photograph, 232 to 427 pixels high and wide, perhaps mirrored."""
        whole = self._pixels[rng.integers(len(self._pixels))]
        height, width = (int(rng.integers(232, side + 1)) for side in (whole.shape[0], min(whole.shape[1], 427)))
        top = int(rng.integers(whole.shape[0] - height + 1))
        left = int(rng.integers(whole.shape[1] - width + 1))
        piece = whole[top : top + height, left : left + width]
        return np.ascontiguousarray(piece[:, ::-1] if rng.random() < 0.5 else piece)
