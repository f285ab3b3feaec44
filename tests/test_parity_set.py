"""The reference set itself: it must be able to show a difference."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tests.parity import ParitySet


def test_both_classes_of_each_head_are_met(parity_set: ParitySet) -> None:
    for labels in (parity_set.linear, parity_set.knn, parity_set.svm_raw):
        assert len(np.unique(labels)) == 2


def test_embeddings_differ_between_images_in_every_dimension(parity_set: ParitySet) -> None:
    assert parity_set.embeddings.std(axis=0).min() > 0.1


def test_every_format_and_mode_is_there(parity_set: ParitySet) -> None:
    formats, modes = set(), set()
    for path in parity_set.images.values():
        with Image.open(path) as image:
            formats.add(image.format)
            modes.add(image.mode)
    assert formats == {"JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"}
    assert modes >= {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"}
