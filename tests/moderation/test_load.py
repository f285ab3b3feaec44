"""Starting a release: what it sets for the process."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from threadpoolctl import threadpool_info

from code_worker.moderation.runtime import start_runtime
from code_worker.plugins import load_plugins
from code_worker.releases.loading import load_release
from code_worker.settings import Settings


def test_heads_multiply_on_one_thread_beside_the_streams_of_a_cpu(toy_release_dir: Path, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, device="cpu", engine="torch")
    loaded = load_release(toy_release_dir, load_plugins(settings))
    with closing(start_runtime(loaded, settings).embedder):
        threads = [pool["num_threads"] for pool in threadpool_info() if pool["internal_api"] == "openblas"]
    assert threads
    assert set(threads) == {1}
