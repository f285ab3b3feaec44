"""Arithmetic as torch comes with it, whatever the process has set for its own models."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch

__all__ = ["exact_arithmetic"]


class _Precision:
    """Has float32 multiplied in float32 while any thread wants it so; the setting is one for the whole process.

    TF32 and bfloat16 in its place move embeddings by 1e-3 and more. An application's own products are exact, and
    slower, meanwhile; afterwards its setting holds again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._restore: Callable[[], None] | None = None

    def enter(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._restore = _multiply_exactly()

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._restore is not None:
                self._restore()
                self._restore = None


def _multiply_exactly() -> Callable[[], None] | None:
    """Sets the precision of products; what puts it back, or None where nothing was changed."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]  # no types here
    before = [backend.fp32_precision for backend in backends]
    try:
        named = torch.get_float32_matmul_precision()
    except RuntimeError:  # set backend by backend, to what no name stands for
        named = None
    if named == "highest":
        return None
    torch.set_float32_matmul_precision("highest")

    def restore() -> None:
        if named is not None:
            torch.set_float32_matmul_precision(named)
            return
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision

    return restore


_PRECISION: Final = _Precision()


@contextmanager
def exact_arithmetic(device: str) -> Iterator[None]:
    """No autocast, and float32 multiplied in float32, while the block runs.

    Args:
        device: `cpu` or `cuda`: the kind of device that the block computes on.
    """
    _PRECISION.enter()
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        _PRECISION.leave()
