"""What a plugin's `sys.exit` is, and what a signal's is."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from typing import Any, NoReturn

import pytest

from code_worker.system.processes import raise_if_stop


def stop(*_: object) -> None:
    sys.exit(143)


class Stopper:
    def stop(self, *_: object) -> None:
        sys.exit(143)

    def __call__(self, *_: object) -> None:
        self.stop()


@pytest.fixture
def on_signal() -> Iterator[Callable[[Any], None]]:
    """Installs a handler of SIGUSR1."""
    before = signal.getsignal(signal.SIGUSR1)
    yield lambda handler: signal.signal(signal.SIGUSR1, handler)
    signal.signal(signal.SIGUSR1, before)


def raised(plugin: Callable[[], object]) -> BaseException:
    """What a plugin raises, as it is caught."""
    try:
        plugin()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - as every plugin is called
        return error
    raise AssertionError("nothing was raised")


def waits_for_a_signal() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)
    while True:
        signal.pause()


@pytest.mark.parametrize(
    "plugin",
    [
        lambda: sys.exit(3),
        lambda: argparse.ArgumentParser().parse_args(["--no-such-option"]),
        lambda: {}["a"],
    ],
    ids=["exit", "argparse", "error"],
)
def test_what_a_plugin_raises_is_its_failure(plugin: Callable[[], object]) -> None:
    raise_if_stop(raised(plugin))


@pytest.mark.parametrize(
    "handler", [stop, Stopper().stop, Stopper(), partial(stop, 1)], ids=["function", "method", "object", "partial"]
)
def test_the_handler_of_a_signal_ends_the_process_out_of_a_plugin(
    handler: object, on_signal: Callable[[Any], None]
) -> None:
    on_signal(handler)
    with pytest.raises(SystemExit, match="143"):
        raise_if_stop(raised(waits_for_a_signal))


@pytest.mark.parametrize("module", ["code_worker.stack.worker_process", "celery.apps.worker", "billiard.common"])
def test_an_end_that_is_ours_or_celerys_passes(module: str) -> None:
    names: dict[str, Any] = {"__name__": module}
    exec("def end(*_): raise SystemExit(0)", names)
    with pytest.raises(SystemExit):
        raise_if_stop(raised(names["end"]))


class Mode(Enum):
    FAST = "fast"

    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        sys.exit(f"no such mode: {value}")


def test_a_plugin_that_exits_below_a_look_up_of_an_enum_has_failed() -> None:
    """What the system does with a signal is an enum of Python's: its class's code is no handler."""
    raise_if_stop(raised(lambda: Mode("slow")))


def test_a_plugins_file_is_not_ours_though_it_is_named_after_us() -> None:
    names: dict[str, Any] = {"__name__": "code_worker_plugin_mine"}
    exec("def end(*_): raise SystemExit(0)", names)
    raise_if_stop(raised(names["end"]))
