"""`python -m tests.kernels`: the numeric tests on every set of kernels that this processor has.

Libraries choose their kernels by the processor; each can be told to choose as for a lesser one, so that one machine
stands for several. tests/test_kernels.py fails where a library did not do as it was told. Nobody can tell MLAS, by
which OpenVINO multiplies by constant weights. Below AVX OpenVINO does not compile a model.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from numpy._core._multiarray_umath import __cpu_dispatch__

from code_worker.system.machine import usable_cores

__all__ = ["SETS", "Kernels", "asked", "possible", "threads"]

ROOT = Path(__file__).parents[1]
_NAME = "TEST_KERNELS"


def _cpuinfo(field: str) -> str:
    """The first processor's, as Linux says it; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


@dataclass(frozen=True, slots=True)
class Kernels:
    """What the libraries are told, and which flags of the processor that needs.

    Each field is for the library of its name: `onednn` for torch's and OpenVINO's, `mkl` for torch's, `openblas` for
    those of numpy, scipy and faiss.
    """

    needs: frozenset[str]
    aten: str
    onednn: str
    mkl: str
    openblas: str
    numpy: str
    faiss: str
    threads: int

    def environment(self) -> dict[str, str]:
        # Beside COMPATIBLE, MKL has AUTO alone on processors of others than Intel.
        mkl = self.mkl if self.mkl == "COMPATIBLE" or _cpuinfo("vendor_id") == "GenuineIntel" else "AUTO"
        # From the least to the most; X86_V2 is what numpy was built for and cannot be disabled.
        kept = __cpu_dispatch__.index(self.numpy) + 1 if self.numpy in __cpu_dispatch__ else 0
        return {
            "ATEN_CPU_CAPABILITY": self.aten,
            "ONEDNN_MAX_CPU_ISA": self.onednn,
            "MKL_CBWR": mkl,
            "OPENBLAS_CORETYPE": self.openblas,
            "NPY_DISABLE_CPU_FEATURES": " ".join(__cpu_dispatch__[kept:]),
            "FAISS_SIMD_LEVEL": self.faiss,
            "OMP_NUM_THREADS": str(self.threads),
            "OPENBLAS_NUM_THREADS": str(self.threads),
            "OMP_WAIT_POLICY": "PASSIVE",  # sets run beside each other, and a waiting thread would hold a core
        }


_SEVERAL = min(2, usable_cores())
_AVX2 = frozenset({"avx2", "fma"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
SETS = {
    "baseline": Kernels(frozenset({"avx"}), "default", "AVX", "COMPATIBLE", "Nehalem", "X86_V2", "NONE", 1),
    "avx2": Kernels(_AVX2, "avx2", "AVX2", "AVX2", "Haswell", "X86_V3", "AVX2", _SEVERAL),
    "avx512": Kernels(_AVX512, "avx512", "AVX512_CORE", "AVX512", "SkylakeX", "X86_V4", "AVX512", _SEVERAL),
    "avx512-one-thread": Kernels(_AVX512, "avx512", "AVX512_CORE", "AVX512", "SkylakeX", "X86_V4", "AVX512", 1),
}


def asked() -> Kernels | None:
    """The set that this process was started with; None where nobody asked for one."""
    return SETS[os.environ[_NAME]] if _NAME in os.environ else None


def threads() -> int:
    """How many threads a test computes with: beside servers and other tests two that wait for each other crawl."""
    kernels = asked()
    return kernels.threads if kernels else 1


def possible() -> list[str]:
    """Names of the sets that this processor can run."""
    flags = set(_cpuinfo("flags").split())
    return [name for name, kernels in SETS.items() if kernels.needs <= flags]


def _run(name: str | None) -> bool:
    files = [path for top in ("tests", "plugins") for path in sorted((ROOT / top).rglob("test_*.py"))]
    marked = [str(path) for path in files if "mark.numeric" in path.read_text(encoding="utf-8")]
    told = {_NAME: name, **SETS[name].environment()} if name else {}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "numeric", "-p", "no:cacheprovider", *marked]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=os.environ | told, capture_output=True, text=True, check=False)
    took = f"{name or 'as the libraries choose'}, {time.monotonic() - started:.0f} s"
    if done.returncode:
        print(f"{took}, failed with status {done.returncode}:\n{done.stdout}{done.stderr}", flush=True)
    else:
        print(f"{took}: {done.stdout.splitlines()[-1]}", flush=True)
    return not done.returncode


def main() -> int:
    """0 if the tests pass on every set."""
    with ThreadPoolExecutor(2) as pool:
        return int(not all([*pool.map(_run, possible() or [None])]))


if __name__ == "__main__":
    sys.exit(main())
