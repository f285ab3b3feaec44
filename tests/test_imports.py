"""What importing costs: the producer's side loads no model code, in an interpreter that has seen nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "PIL",
    "boto3",
    "botocore",
    "joblib",
    "numpy",
    "safetensors",
    "scipy",
    "sklearn",
    "timm",
    "torch",
    "torchvision",
)
REPORT = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"


def modules_after(statement: str) -> set[str]:
    """Top-level modules loaded in a clean interpreter by the statement."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{statement}\n{REPORT}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import code_worker",
        "import code_worker; code_worker.Head; code_worker.HeadSpec; code_worker.hookimpl",
        "import code_worker; code_worker.Job; code_worker.Verdict; code_worker.RejectReason",
        "import code_worker.errors, code_worker.types, code_worker.settings, code_worker.logs, code_worker.queues",
        "import code_worker.cli.main",
    ],
)
def test_a_light_import_loads_no_model_code(statement: str) -> None:
    assert modules_after(statement).isdisjoint(HEAVY)


def test_importing_the_package_alone_loads_neither_celery_nor_sqlalchemy() -> None:
    assert modules_after("import code_worker").isdisjoint(
        {"celery", "kombu", "sqlalchemy", "redis", "pydantic", "click"}
    )


def test_a_heavy_import_would_be_noticed() -> None:
    assert "numpy" in modules_after("import numpy")
