"""What the log must not say, however it comes, and however much of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from code_worker.logs import redact


@pytest.mark.parametrize(
    ("said", "logged"),
    [
        ("at redis://:s3cret@h:1/0", "at redis://:***@h:1/0"),
        ("postgresql+psycopg://u:p@h/d, redis://a:b@c", "postgresql+psycopg://u:***@h/d, redis://a:***@c"),
        ("url='rediss://user:s3cret@h'", "url='rediss://user:***@h'"),
        ("postgresql+psycopg://u:pa/ss@h/db", "postgresql+psycopg://u:***@h/db"),
        ("no answer: redis://:p#a?s@s@h/0", "no answer: redis://:***@h/0"),
        (f"redis://:{'long' * 400}@h/0", "redis://:***@h/0"),
        ("https://b/k?X-Amz-Signature=abc&x=1", "https://b/k?X-Amz-Signature=***&x=1"),
        ("s3://bucket/key:with@signs", "s3://bucket/key:with@signs"),
    ],
)
def test_passwords_and_signatures_are_blanked(said: str, logged: str) -> None:
    assert redact(said) == logged


def test_what_nobody_catches_is_a_record_on_every_thread() -> None:
    program = (
        "import threading\n"
        "from code_worker.logs import configure_logging, log_uncaught\n"
        "configure_logging('info', 'json'); log_uncaught()\n"
        "thread = threading.Thread(target=lambda: 1 / 0); thread.start(); thread.join()\n"
        "raise LookupError('redis://:s3cret@h')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    on_thread, last = map(json.loads, ended.stderr.splitlines())
    assert on_thread["event"] == last["event"] == "uncaught_error"
    assert "ZeroDivisionError" in on_thread["exception"]
    assert "LookupError" in last["exception"]
    assert "s3cret" not in ended.stderr


@pytest.mark.parametrize("part", ["x", "x://", "x://y:", "x://y:z/", "Signature="])
def test_megabytes_from_somebody_else_do_not_hold_the_log_up(part: str) -> None:
    began = time.thread_time()
    redact(part * (4_000_000 // len(part)))
    assert time.thread_time() - began < 20
