"""Writes down what the programs of a test do to the world: put on the path of a process, it is imported first.

A line of JSON for each name that is looked up, each address that is connected to, each place that is written to, and
each fork with the number of the process's threads at that moment.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Final

_WRITES: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_LOOKUPS: Final = {"socket.getaddrinfo": 0, "socket.gethostbyname": 0, "socket.gethostbyaddr": 0}
_ADDRESSES: Final = {"socket.connect": 1, "socket.sendto": 1}
_PLACES: Final = {"os.mkdir": 0, "os.rename": 1, "os.link": 1, "os.symlink": 1, "sqlite3.connect": 0}
_log: Final = os.open(os.environ["WATCHED_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def _hear(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, str | bytes) and isinstance(flags, int) and flags & _WRITES:
            _note("write", path)
    elif event in _PLACES:
        _note("write", arguments[_PLACES[event]])
    elif event in _LOOKUPS:
        _note("lookup", arguments[_LOOKUPS[event]])
    elif event in _ADDRESSES:
        _note("connect", arguments[_ADDRESSES[event]])
    elif event in {"os.fork", "os.forkpty"}:
        _note("fork", len(list(Path("/proc/self/task").iterdir())) if sys.platform == "linux" else 1)


def _note(what: str, value: object) -> None:
    shown = os.fsdecode(value) if isinstance(value, bytes) else value
    line = {"what": what, "value": shown, "program": sys.argv[:2] if hasattr(sys, "argv") else []}
    os.write(_log, (json.dumps(line, default=str) + "\n").encode())


sys.addaudithook(_hear)
