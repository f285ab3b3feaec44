"""OpenVINO, imported without the part of it that reports.

Merely imported, `openvino` tells a web analytics service so and counts in `~/intel`. Where its package for that is
missing it has a stub; so it is missing for as long as the import takes.
"""

from __future__ import annotations

import sys
from typing import Final

__all__ = ["openvino"]

_REPORTING: Final = "openvino_telemetry"

# Whoever imported either before us has decided for themselves.
if hidden := not {"openvino", _REPORTING} & sys.modules.keys():
    sys.modules[_REPORTING] = None  # type: ignore[assignment]  # how Python notes that there is no such module
try:
    import openvino
finally:
    if hidden:
        del sys.modules[_REPORTING]
