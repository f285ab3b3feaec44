"""What the log must not say, however it comes, and however much of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

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
        ("redis://:a/b,c@h/0;redis://:d/e;f@i", "redis://:***@h/0;redis://:***@i"),
        ("amqp://u:a'b/c\"d@h", "amqp://u:***@h"),
        ("redis://u:p%2Fa%40s%3Fs%23@h", "redis://u:***@h"),
        ("redis://h:6379/0,redis://:s3cret@i", "redis://h:6379/0,redis://:***@i"),
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


HOST = """
import sys
from celery import Celery
import code_worker
from code_worker.logs import get_logger
from code_worker.settings import Settings

app = Celery("theirs", broker="memory://", set_as_current=False)
code_worker.install(app, Settings(data_dir={directory!r}))
app.log.setup(loglevel="{level}", redirect_stdouts=True)
log = get_logger("code_worker.worker.judging.node")
log.info("batch_done", jobs=3, alone=False, text="two words", escape="a\\x1b[31mb", url="redis://:s3cret@h")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("background_part_broken", part="sweep")
from code_worker.store import migrate
from code_worker.store.engine import open_store
store = open_store("sqlite:///" + {directory!r} + "/a.db")
migrate.upgrade(store)
migrate.require_current(store)
"""


def test_in_a_worker_of_somebodys_app_our_events_are_lines_of_their_log(tmp_path: Path) -> None:
    program = HOST.format(directory=str(tmp_path), level="INFO")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, second, *rest = done.stderr.splitlines()
    line = "batch_done jobs=3 alone=False text='two words' escape='a\\x1b[31mb' url=redis://:***@h"
    assert re.fullmatch(r"\[[-\d]+ [:,\d]+: INFO/MainProcess\] " + re.escape(line), first)
    assert second.endswith("ERROR/MainProcess] background_part_broken part=sweep")
    assert rest[0] == "Traceback (most recent call last):"
    assert done.stderr.count("batch_done") == done.stderr.count("ZeroDivisionError") == 1
    assert done.stderr.count("initial") == 2, "each migration once, with the one before it"
    assert "setup plugin" not in done.stderr
    assert done.stderr.count("database_migrated") == 1


def test_their_level_holds_for_our_events(tmp_path: Path) -> None:
    program = HOST.format(directory=str(tmp_path), level="WARNING")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "batch_done" not in done.stderr
    assert "alembic" not in done.stderr
    assert "background_part_broken" in done.stderr


@pytest.mark.parametrize("part", ["x", "x://", "x://y:", "x://y:z/", "Signature="])
def test_megabytes_from_somebody_else_do_not_hold_the_log_up(part: str) -> None:
    began = time.thread_time()
    redact(part * (4_000_000 // len(part)))
    assert time.thread_time() - began < 20
