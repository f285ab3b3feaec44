"""What an application may set for its whole process: each switch by name, and all of them at once."""

from __future__ import annotations

import decimal
import locale
import os
import random
import socket
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import BmpImagePlugin, GifImagePlugin, Image, ImageFile, PngImagePlugin, TiffImagePlugin

PILLOW: dict[str, tuple[Any, Any]] = {
    "LOAD_TRUNCATED_IMAGES": (ImageFile, True),
    "MAXBLOCK": (ImageFile, 100),
    "SAFEBLOCK": (ImageFile, 10),
    "MAX_IMAGE_PIXELS": (Image, 10),
    "MAX_TEXT_CHUNK": (PngImagePlugin, 10),
    "MAX_TEXT_MEMORY": (PngImagePlugin, 10),
    "LOADING_STRATEGY": (GifImagePlugin, GifImagePlugin.LoadingStrategy.RGB_ALWAYS),
    "READ_LIBTIFF": (TiffImagePlugin, True),
    "MAX_SAMPLESPERPIXEL": (TiffImagePlugin, 1),
    "USE_RAW_ALPHA": (BmpImagePlugin, True),
}
"""Variable of Pillow's → its module, and what it is set to."""

Switch = tuple[Callable[[], object], Callable[[], object]]


def _matmul_by_backend(precision: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = precision  # type: ignore[attr-defined]  # torch has no types here


def _context(precision: int) -> None:
    decimal.getcontext().prec = precision


def switches() -> dict[str, Switch]:
    """Name → what sets a switch, and what sets it back to the state of this moment."""
    mask, threads, filters = os.umask(0o022), torch.get_num_threads(), list(warnings.filters)
    os.umask(mask)
    numbers, written, digits = np.geterr(), locale.setlocale(locale.LC_ALL), decimal.getcontext().prec
    wait_s, drawn = socket.getdefaulttimeout(), random.getstate()

    def put_filters_back() -> None:
        warnings.filters[:] = filters  # type: ignore[index]  # a list, as the module's own reset takes it
        warnings._filters_mutated()  # type: ignore[attr-defined]  # what `catch_warnings` calls

    return {
        "float64": (
            lambda: torch.set_default_dtype(torch.float64),
            lambda: torch.set_default_dtype(torch.float32),
        ),
        "float16": (
            lambda: torch.set_default_dtype(torch.float16),
            lambda: torch.set_default_dtype(torch.float32),
        ),
        "device": (lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None)),
        "matmul": (
            lambda: torch.set_float32_matmul_precision("medium"),
            lambda: torch.set_float32_matmul_precision("highest"),
        ),
        "matmul by backend": (lambda: _matmul_by_backend("bf16"), lambda: _matmul_by_backend("ieee")),
        "deterministic": (
            lambda: torch.use_deterministic_algorithms(mode=True),
            lambda: torch.use_deterministic_algorithms(mode=False),
        ),
        "autocast": (
            lambda: torch.set_autocast_enabled("cpu", True),
            lambda: torch.set_autocast_enabled("cpu", False),
        ),
        "gradients": (lambda: torch.set_grad_enabled(mode=False), lambda: torch.set_grad_enabled(mode=True)),
        "anomalies": (
            lambda: torch.autograd.set_detect_anomaly(mode=True),
            lambda: torch.autograd.set_detect_anomaly(mode=False),
        ),
        "denormals": (lambda: torch.set_flush_denormal(True), lambda: torch.set_flush_denormal(False)),
        "threads": (lambda: torch.set_num_threads(threads + 1), lambda: torch.set_num_threads(threads)),
        "numpy errors": (lambda: np.seterr(all="raise"), lambda: np.seterr(**numbers)),
        "numpy printing": (lambda: np.set_printoptions(precision=1, threshold=1), np.set_printoptions),
        "torch printing": (
            lambda: torch.set_printoptions(precision=1, threshold=1),  # type: ignore[no-untyped-call]  # as above
            lambda: torch.set_printoptions(profile="default"),  # type: ignore[no-untyped-call]  # as above
        ),
        "decimals": (lambda: _context(2), lambda: _context(digits)),
        "locale": (_comma_for_point, lambda: locale.setlocale(locale.LC_ALL, written)),
        "umask": (lambda: os.umask(0o777), lambda: os.umask(mask)),
        "warnings": (lambda: warnings.simplefilter("error"), put_filters_back),
        "sockets": (lambda: socket.setdefaulttimeout(0.001), lambda: socket.setdefaulttimeout(wait_s)),
        "seeds": (_seed, lambda: random.setstate(drawn)),
    }


def _comma_for_point() -> None:
    """A locale that writes 0,5, where the system has one."""
    for name in ("de_DE.UTF-8", "fr_FR.UTF-8", "C"):
        try:
            locale.setlocale(locale.LC_ALL, name)
        except locale.Error:
            continue
        return


def _seed() -> None:
    random.seed(1)
    np.random.seed(1)  # numpy's old generator, which is the process's, is what is meant
    torch.manual_seed(1)


def set_all() -> None:
    """Sets every switch of torch's, numpy's, Pillow's and Python's but the filters of warnings.

    Of two that exclude each other the later holds. Warnings as errors would stop Celery and its kind themselves.
    """
    for name, (module, value) in PILLOW.items():
        setattr(module, name, value)
    for name, (turn_on, _) in switches().items():
        # Sockets without time, and files that nobody may open, are broken for the application, too.
        if name not in {"warnings", "float16", "sockets", "umask"}:
            turn_on()
    socket.setdefaulttimeout(60)
    os.umask(0)
