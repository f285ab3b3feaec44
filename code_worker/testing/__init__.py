"""For tests of others: a client without broker and database, and the conformance kit of heads.

Names are resolved on first use, so that an application's tests load no numpy for a client.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from code_worker.testing.conformance import CheckResult, assert_head_conforms, check_head
    from code_worker.testing.fakes import FakeClient, fake_client
    from code_worker.testing.trial import sample_embeddings

__all__ = [
    "CheckResult",
    "FakeClient",
    "assert_head_conforms",
    "check_head",
    "fake_client",
    "sample_embeddings",
]


_HOMES = {
    "CheckResult": "code_worker.testing.conformance",
    "FakeClient": "code_worker.testing.fakes",
    "assert_head_conforms": "code_worker.testing.conformance",
    "check_head": "code_worker.testing.conformance",
    "fake_client": "code_worker.testing.fakes",
    "sample_embeddings": "code_worker.testing.trial",
}


def __getattr__(name: str) -> Any:
    if (home := _HOMES.get(name)) is None:
        raise AttributeError(f"module 'code_worker.testing' has no attribute {name!r}")
    return getattr(import_module(home), name)
