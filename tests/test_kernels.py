"""Each library computes with the kernels that `make test-kernels` told it to, or a run would stand for no other."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import faiss
import pytest
import scipy.linalg  # noqa: F401 - loads an OpenBLAS of its own
import torch
from numpy._core._multiarray_umath import __cpu_features__
from threadpoolctl import threadpool_info

from code_worker.encoder.openvino_engine import OpenVinoEngine
from code_worker.encoder.weights import random_weights
from tests import kernels
from tests.parity import MEAN  # noqa: F401 - sets the number of torch's threads for all tests

pytestmark = pytest.mark.numeric
ASKED = kernels.asked()
TOLD = ASKED.environment() if ASKED else {}
OF_OPENVINO = {"AVX": "jit_sse42_f32", "AVX2": "jit_avx2_f32", "AVX512_CORE": "jit_avx512_f32"}
"""Its kernels of additions and activations; for AVX alone it has none."""


def printed(capfd: pytest.CaptureFixture[str]) -> str:
    """What libraries in C have printed so far."""
    ctypes.CDLL(None).fflush(None)
    return capfd.readouterr().out


def test_torch_uses_the_kernels_that_it_was_told_to() -> None:
    capability = torch.backends.cpu.get_cpu_capability().lower()
    assert TOLD.get("ATEN_CPU_CAPABILITY", capability) == capability


def test_onednn_of_torch_does_so(capfd: pytest.CaptureFixture[str]) -> None:
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON), torch.inference_mode():
        torch.nn.functional.conv2d(torch.ones(2, 3, 224, 224), torch.ones(192, 3, 16, 16), stride=16)
    used = re.findall(r"exec,cpu,convolution,\w+:(\w+)", printed(capfd))[-1].upper()
    assert TOLD.get("ONEDNN_MAX_CPU_ISA", used) == used


def test_mkl_of_torch_does_so(capfd: pytest.CaptureFixture[str]) -> None:
    with torch.backends.mkl.verbose(torch.backends.mkl.VERBOSE_ON):
        torch.ones(200, 192) @ torch.ones(192, 200)
    used = re.findall(r"SGEMM.* CNR:(\w+)", printed(capfd))[-1]
    assert TOLD.get("MKL_CBWR", used) == used


def test_every_openblas_does_so() -> None:
    libraries = [library for library in threadpool_info() if library["internal_api"] == "openblas"]
    assert len(libraries) >= 2
    for library in libraries:
        assert TOLD.get("OPENBLAS_CORETYPE", library["architecture"]) == library["architecture"], library


def test_numpy_and_faiss_do_so() -> None:
    assert not any(__cpu_features__[name] for name in TOLD.get("NPY_DISABLE_CPU_FEATURES", "").split())
    level = faiss.SIMDConfig.get_level_name()
    assert TOLD.get("FAISS_SIMD_LEVEL", level) == level


def test_openvino_does_so() -> None:
    model: Any = OpenVinoEngine(random_weights(7, depth=2), streams=1)._model
    nodes = [node.get_rt_info() for node in model.get_runtime_model().get_ops()]
    elementwise = [node for node in nodes if node["layerType"].value in {"Eltwise", "Subgraph"}]
    used = {node["primitiveType"].value for node in elementwise} & set(OF_OPENVINO.values())
    assert len(used) == 1
    assert not TOLD or used == {OF_OPENVINO[TOLD["ONEDNN_MAX_CPU_ISA"]]}


def test_as_many_threads_compute_as_were_asked_for() -> None:
    assert not ASKED or torch.get_num_threads() == kernels.threads()
    assert not ASKED or {library["num_threads"] for library in threadpool_info()} == {ASKED.threads}
