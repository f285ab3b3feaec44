"""`doctor` prints what it finds while it goes on looking."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.fork_server import forking_python


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_line_is_printed_as_soon_as_its_part_has_ended(tmp_path: Path, form: list[str]) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "waits.py").write_text(f"from code_worker import hookimpl\nopen({str(fifo)!r}).read()\n")
    env = {**os.environ, "CODE_WORKER_DATA_DIR": str(tmp_path), "CODE_WORKER_PLUGINS_DIR": str(plugins)}
    code = "from code_worker.cli.main import main; main()"
    words = [forking_python(), "-c", code, "doctor", "python", "plugins", *form]
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        # The plugin is let go only now: a line that were held back would come when it has been given up.
        fifo.write_text("")
        rest = process.stdout.read()
    assert "code-worker 0" in first
    assert "no answer" not in rest
    assert "code_worker_heads" in rest
    assert process.returncode == 0
