"""The locks: hashed, complete for what they serve, and free of any index address."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
LOCKS = sorted(REQUIREMENTS.glob("*.txt"))
PIN = re.compile(r"^(?P<name>[a-z0-9][a-z0-9._-]*)==(?P<version>[^\s;\\]+)(?P<marker> ; [^\\]+)? \\$")
HASH = re.compile(r"^    --hash=sha256:[0-9a-f]{64}(?P<more> \\)?$")


def pins(path: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := PIN.match(line):
            found.setdefault(canonicalize_name(match["name"]), set()).add(match["version"])
    return found


def project() -> dict[str, object]:
    loaded = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert isinstance(loaded, dict)
    return loaded


def declared(*extras: str) -> list[Requirement]:
    table = project()
    base, optional = table["dependencies"], table["optional-dependencies"]
    assert isinstance(base, list)
    assert isinstance(optional, dict)
    names = [*base, *(name for extra in extras for name in optional[extra])]
    return [wanted for name in names if (wanted := Requirement(name)).name != "code-worker"]


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_line_of_a_lock_is_a_pin_or_its_hash(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines
    assert [line for line in lines if not PIN.match(line) and not HASH.match(line)] == []


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_pin_is_followed_by_a_hash(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [
        line for line, after in zip(lines, [*lines[1:], ""], strict=True) if PIN.match(line) and not HASH.match(after)
    ] == []


@pytest.mark.parametrize("path", sorted([*LOCKS, *REQUIREMENTS.glob("*.in")]), ids=lambda path: path.name)
def test_no_requirements_file_names_an_index_or_a_host(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|file:|//|--(?:extra-)?index-url|--find-links|--trusted-host| @ ", text)


def test_the_development_lock_holds_every_extra_within_its_bounds() -> None:
    optional = project()["optional-dependencies"]
    assert isinstance(optional, dict)
    locked = pins(REQUIREMENTS / "lock.txt")
    for wanted in declared(*optional):
        versions = locked.get(canonicalize_name(wanted.name), set())
        assert versions, f"{wanted.name} is not locked: make lock"
        assert all(wanted.specifier.contains(version) for version in versions), wanted


def test_the_production_lock_is_the_worker_alone_at_the_same_versions() -> None:
    worker, everything = pins(REQUIREMENTS / "worker.txt"), pins(REQUIREMENTS / "lock.txt")
    assert {canonicalize_name(wanted.name) for wanted in declared("worker")} <= set(worker)
    assert {name: versions for name, versions in worker.items() if not versions <= everything[name]} == {}
    assert not {"pytest", "moto", "mypy", "ruff", "transformers"} & set(worker)


def test_the_lock_of_the_demonstration_is_what_it_needs_at_the_same_versions() -> None:
    demo, everything = pins(REQUIREMENTS / "demo.txt"), pins(REQUIREMENTS / "lock.txt")
    needed = {canonicalize_name(wanted.name) for wanted in declared("worker", "training", "embedded", "s3-server")}
    assert needed | {"hatchling"} <= set(demo)
    assert {name: versions for name, versions in demo.items() if not versions <= everything[name]} == {}
    assert not {"pytest", "mypy", "ruff", "transformers", "datasets", "openvino", "cfn-lint"} & set(demo)


def installer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", REQUIREMENTS / "install.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules["install"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_installer_sees_every_pin_once_and_leaves_no_package_out() -> None:
    install = installer()
    found = list(install.pins(REQUIREMENTS / "lock.txt"))
    assert "".join(f"{pin.text.strip()}\n" for pin in found) == (REQUIREMENTS / "lock.txt").read_text(
        encoding="utf-8"
    )


def test_uv_takes_packages_from_where_pip_would(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSL_CERT_FILE", "UV_DEFAULT_INDEX", "UV_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("UV_FIND_LINKS", "/of/the/user")
    told = (
        ":env:.index-url='https://env.example/simple'\n"
        "global.cert='/etc/ssl/of the house.pem'\n"
        "global.extra-index-url='\\nhttps://one.example/simple\\nhttps://two.example/simple'\n"
        "global.find-links='/wheels /more'\n"
        "global.index-url='https://global.example/simple'\n"
        "global.timeout='60'\n"
        "install.index-url='https://install.example/simple'\n"
    )
    found = installer().uv_environment(told)
    assert {name: value for name, value in found.items() if os.environ.get(name) != value} == {
        "UV_DEFAULT_INDEX": "https://env.example/simple",
        "UV_INDEX": "https://one.example/simple https://two.example/simple",
        "SSL_CERT_FILE": "/etc/ssl/of the house.pem",
    }
    assert found["UV_FIND_LINKS"] == "/of/the/user"
    monkeypatch.delenv("UV_FIND_LINKS")
    assert installer().uv_environment(told)["UV_FIND_LINKS"] == "/wheels,/more"


def wheel(directory: Path) -> str:
    """A wheel of one module; its pin."""
    path = directory / "cw_tiny-1.0-py3-none-any.whl"
    information = "cw_tiny-1.0.dist-info"
    with ZipFile(path, "w") as archive:
        archive.writestr("cw_tiny.py", "ANSWER = 42\n")
        archive.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: cw-tiny\nVersion: 1.0\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    return f"cw-tiny==1.0 --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_where_uv_fails_pip_installs_and_demands_hashes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path), "TARGET": str(tmp_path / "there")}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    install = installer()
    pin = install.Pin("cw-tiny", "1.0", wheel(tmp_path))
    failing = tmp_path / "uv"
    failing.write_text("#!/bin/sh\necho nothing for this machine\nexit 2\n", encoding="utf-8")
    failing.chmod(0o755)
    assert install.install([pin], failing) == ""
    assert (tmp_path / "there" / "cw_tiny.py").read_text(encoding="utf-8") == "ANSWER = 42\n"
    said = capfd.readouterr()
    assert "nothing for this machine" in said.err
    assert "installed in" in said.out
    other = install.Pin("cw-tiny", "1.0", f"cw-tiny==1.0 --hash=sha256:{64 * '0'}")
    assert "DO NOT MATCH THE HASHES" in install.install([other], None)


def test_the_size_that_the_installer_announces_is_no_less_than_what_it_installs() -> None:
    install = installer()
    for lock, announced_gb in install.DISK_GB.items():
        needed = [pin for pin in install.pins(REQUIREMENTS / f"{lock}.txt") if pin.name != "triton" and pin.installed]
        assert 0 < sum(map(install.size_gb, needed)) <= announced_gb, lock


def test_the_older_celery_is_locked_beside_the_newer_one() -> None:
    assert pins(REQUIREMENTS / "celery-5.6.txt") == {"celery": {"5.6.3"}, "kombu": {"5.6.2"}, "redis": {"6.4.0"}}
    assert pins(REQUIREMENTS / "lock.txt")["celery"] == {"5.7.0"}


def test_the_running_interpreter_is_one_the_project_supports() -> None:
    assert Requirement(f"python{project()['requires-python']}").specifier.contains(
        ".".join(map(str, sys.version_info[:3]))
    )
