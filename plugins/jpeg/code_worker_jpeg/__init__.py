"""Decodes one rectangle of a JPEG to the pixels that Pillow's full decode would give, in a fraction of the time.

It calls the libjpeg-turbo that Pillow has loaded, so the pixels are those of the same library. What it does not claim
to do exactly it declines: other samplings than 4:4:4, 4:2:2, 4:2:0 and 4:4:0, CMYK, arithmetic coding, a file that is
cut short, and anything that makes libjpeg warn.
"""

from __future__ import annotations

from PIL import Image

from code_worker_jpeg._region import bind, decode_region

__all__ = ["__version__", "decode_region"]

__version__ = "0.1.0"

# Raises ImportError where Pillow has another libjpeg or keeps it to itself; takes microseconds.
bind(Image.core.__file__)
