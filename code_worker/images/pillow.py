"""A copy of Pillow's own modules for this package alone: switches that a process sets for Pillow do not reach it.

`ImageFile.LOAD_TRUNCATED_IMAGES`, `Image.MAX_IMAGE_PIXELS`, `PngImagePlugin.MAX_TEXT_CHUNK`, `BmpImagePlugin.
USE_RAW_ALPHA`, `GifImagePlugin.LOADING_STRATEGY` and the like are variables of Pillow's modules. A host application
or a plugin may set them for itself, at any time and from any thread; the same bytes must give the same answer all the
same. So the Python modules of the installed Pillow are imported a second time, as a package of another name, and keep
the values that Pillow comes with. The compiled modules, which have no such switches, are the same ones. Pillow's
warnings about a file are dropped, as filters of warnings are the whole process's, too, and so are its log records.

Images opened by way of this module are no instances of `PIL.Image.Image`; `decode` hands out none of them.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from types import SimpleNamespace
from typing import TYPE_CHECKING, Final

import PIL

if TYPE_CHECKING:
    from types import ModuleType

    from PIL import (
        BmpImagePlugin,
        GifImagePlugin,
        Image,
        ImageFile,
        JpegImagePlugin,
        PngImagePlugin,
        TiffImagePlugin,
        WebPImagePlugin,
    )

__all__ = [
    "BmpImagePlugin",
    "GifImagePlugin",
    "Image",
    "ImageFile",
    "JpegImagePlugin",
    "PngImagePlugin",
    "TiffImagePlugin",
    "WebPImagePlugin",
]
_NAME: Final = f"{__package__}._pillow"
_COMPILED: Final = ("_imaging", "_webp")
_SILENT: Final = SimpleNamespace(warn=lambda *_, **__: None)
"""In place of the module `warnings`."""


def _copy() -> None:
    """Makes the installed Pillow importable as `_NAME`, once more from its source."""
    spec = spec_from_file_location(_NAME, PIL.__file__, submodule_search_locations=list(PIL.__path__))
    if spec is None or spec.loader is None:
        raise ImportError(f"Pillow cannot be imported from {PIL.__file__}")
    sys.modules[_NAME] = package = module_from_spec(spec)
    spec.loader.exec_module(package)
    # What Pillow says of a file is in its verdict; these loggers are below ours, and hear each chunk at level debug.
    logger = logging.getLogger(_NAME)
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
    for name in _COMPILED:
        sys.modules[f"{_NAME}.{name}"] = import_module(f"PIL.{name}")


def _module(name: str) -> ModuleType:
    module = import_module(f"{_NAME}.{name}")
    if hasattr(module, "warnings"):
        vars(module)["warnings"] = _SILENT
    return module


if not TYPE_CHECKING:
    _copy()
    Image = _module("Image")
    ImageFile = _module("ImageFile")
    BmpImagePlugin = _module("BmpImagePlugin")
    GifImagePlugin = _module("GifImagePlugin")
    JpegImagePlugin = _module("JpegImagePlugin")
    PngImagePlugin = _module("PngImagePlugin")
    TiffImagePlugin = _module("TiffImagePlugin")
    WebPImagePlugin = _module("WebPImagePlugin")
