"""Imports OpenVINO without its telemetry.

`import openvino` sends an event to Google Analytics and keeps a counter in `~/intel`. Where the package
`openvino_telemetry` is not installed, OpenVINO uses a stub that does nothing. So that package is hidden during the
import, and OpenVINO keeps the stub for as long as the process lives.
"""

from __future__ import annotations

import sys
from typing import Final

__all__ = ["openvino"]

_TELEMETRY: Final = "openvino_telemetry"

# If the process imported either one before, that stays as it is.
if hidden := not {"openvino", _TELEMETRY} & sys.modules.keys():
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # an import then raises ImportError
try:
    import openvino
finally:
    if hidden:
        del sys.modules[_TELEMETRY]
