"""Download from a hub that speaks the real protocol on loopback; the client runs in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from code_worker.encoder.download import download
from code_worker.errors import ArtifactError, ConfigurationError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLIENT = """
import json, sys
from code_worker.encoder.download import download
from code_worker.errors import CodeWorkerError
for source in sys.argv[1:]:
    try:
        path = download(source)
        found = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
        print(json.dumps([path.name, found]))
    except CodeWorkerError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


class Hub(BaseHTTPRequestHandler):
    """Two repositories, one with safetensors and one without; the others fail each in its own way."""

    published: ClassVar = ["config.json", "README.md", "sklearn/linear.sav", "flax_model.msgpack"]
    repositories: ClassVar = {
        "team/whole": [*published, "model.safetensors", "pytorch_model.bin"],
        "team/old": [*published, "pytorch_model.bin"],
    }
    refusals: ClassVar = {
        "team/gated": (403, "GatedRepo"),
        "team/absent": (404, "RepoNotFound"),
        "team/broken": (500, ""),
        "team/closed": (403, ""),
    }

    def log_message(self, *_: object) -> None:
        """Says nothing: the test's output is not a server's log."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) > 5:
            return self._describe("/".join(parts[2:4]), *parts[4:6])
        if parts[2:3] == ["resolve"]:
            return self._answer(200, f"content of {'/'.join(parts[4:])}".encode())
        return self._answer(404, b"", error="EntryNotFound")

    def _describe(self, repository: str, kind: str, revision: str) -> None:
        if repository in self.refusals:
            status, error = self.refusals[repository]
            return self._answer(status, b"", error=error)
        if revision not in ("main", COMMIT):
            return self._answer(404, b"", error="RevisionNotFound")
        files = self.repositories[repository]
        if kind == "revision":
            entries = [{"rfilename": name} for name in files]
            return self._answer(200, json.dumps({"id": repository, "sha": COMMIT, "siblings": entries}).encode())
        sizes = [(name, len(f"content of {name}")) for name in files]
        return self._answer(
            200,
            json.dumps([{"type": "file", "path": n, "size": size, "oid": _oid(n)} for n, size in sizes]).encode(),
        )

    def _answer(self, status: int, body: bytes, *, error: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{_oid(self.path)}"')
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _oid(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


@pytest.fixture
def hub_url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def ask(url: str, home: Path, *sources: str, offline: bool = False) -> list[list[object]]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, *sources],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_only_what_is_needed_is_downloaded_and_served_from_the_cache_afterwards(hub_url: str, tmp_path: Path) -> None:
    sources = ("hf:team/whole", f"hf:team/old@{COMMIT}")
    expected = [
        [COMMIT, ["config.json", "model.safetensors", "sklearn/linear.sav"]],
        [COMMIT, ["config.json", "pytorch_model.bin", "sklearn/linear.sav"]],
    ]
    assert ask(hub_url, tmp_path, *sources) == expected
    assert ask("http://127.0.0.1:9", tmp_path, *sources, offline=True) == expected


def test_each_refusal_says_what_to_do(hub_url: str, tmp_path: Path) -> None:
    answers = ask(
        hub_url,
        tmp_path,
        *("hf:team/gated", "hf:team/absent", "hf:team/whole@v9", "hf:team/broken", "hf:team/closed"),
    )
    said = [
        ("ConfigurationError", "is gated: accept its terms"),
        ("ConfigurationError", "does not exist"),
        ("ConfigurationError", "no branch, tag or commit 'v9'"),
        ("ArtifactStorageError", "the server answered 500"),
        ("ArtifactError", "the server answered 403"),
    ]
    for (kind, text), (expected_kind, expected_text) in zip(answers, said, strict=True):
        assert kind == expected_kind
        assert expected_text in str(text)


def test_a_hub_that_cannot_be_reached_is_said_with_the_way_round(tmp_path: Path) -> None:
    [[kind, text]] = ask("http://127.0.0.1:9", tmp_path, "hf:team/whole")
    assert kind == "ArtifactStorageError", "it may answer later"
    assert "ConnectError" in str(text)
    assert "hf download team/whole --local-dir DIR" in str(text)


def test_offline_mode_is_named_as_the_reason() -> None:
    with pytest.raises(ArtifactError, match="HF_HUB_OFFLINE is set"):
        download("hf:nobody-owns/this-name")


@pytest.mark.parametrize("source", ["hf:", "hf:CoDE", "hf:a/b/c", "hf:a/b@", "hf:a/b@x y", "hf:-a/b--c"])
def test_a_malformed_name_is_refused_before_anything_is_sent(source: str) -> None:
    with pytest.raises(ConfigurationError, match="is not a hub name"):
        download(source)
