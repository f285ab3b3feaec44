"""The starter as a release: a miniature encoder that learned toy generators, with heads fitted on given crops.

Encoder, recipe, curve and figures lie in `starter/`; `bench/starter.py` made them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from code_worker.releases.building import build_toy_release

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from code_worker.encoder.weights import EncoderWeights
    from code_worker.plugins import Plugins

STARTER_NOTE: Final = (
    "TOY: a miniature encoder trained on photographs that toy generators changed; "
    "its verdicts say nothing about images of real generators."
)
_HOME: Final = Path(__file__).with_name("starter")


def starter_weights() -> EncoderWeights:
    """The trained miniature: 48-pixel crops, 128 of the 192 numbers."""
    from code_worker.encoder.weights import read_weights

    return read_weights(_HOME)


def build_starter_release(
    directory: Path, crops: NDArray[np.uint8], labels: NDArray[np.int8], plugins: Plugins
) -> str:
    """Writes a release of the starter into the new directory; returns the manifest's sha256.

    Args:
        directory: where to.
        crops: `(n, 224, 224, 3) uint8` to fit the heads on.
        labels: `(n,) int8`, 0 real, 1 generated; both must occur.
        plugins: where the heads come from.
    """
    return build_toy_release(directory, crops, labels, plugins, weights=starter_weights(), note=STARTER_NOTE)
