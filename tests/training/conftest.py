from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from code_worker.moderation.runtime import Runtime
from tests.toy_release import write_toy_release
from tests.training.labelled_noise import running


@pytest.fixture(scope="session")
def shallow_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy release one block deep: linear, knn and svm tell two noises apart."""
    return write_toy_release(tmp_path_factory.mktemp("shallow") / "release", depth=1)


@pytest.fixture(scope="module")
def shallow_runtime(shallow_release: Path) -> Iterator[Runtime]:
    with running(shallow_release) as runtime:
        yield runtime
