"""OpenVINO, imported without its telemetry."""

from __future__ import annotations

from code_worker.telemetry import silent_import

__all__ = ["openvino"]

with silent_import():
    import openvino
