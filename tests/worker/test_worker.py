"""One worker process against real servers: what it does with good jobs, bad ones and strange messages."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from celery import Celery
from celery.utils.nodenames import gethostname
from sqlalchemy import text

from code_worker.broker import celery_config
from code_worker.store.jobs.claims import NewJob
from code_worker.types import Label, Outcome, RejectReason
from code_worker.wire import MODERATE, NORMAL
from code_worker.worker.app import create_app
from tests.faults.rows import Seen, row
from tests.fork_server import CHILDREN_ENV
from tests.servers import S3Server
from tests.worker.harness import Deployment, decided, jpeg, promote_release, wait_until


def _sqlite(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'worker.db'}"


def test_each_bad_input_gets_its_own_reason_and_good_ones_their_label(
    deploy: Callable[..., Deployment], tmp_path: Path, s3_server: S3Server, bucket: str
) -> None:
    deployment = deploy(_sqlite(tmp_path))
    files = tmp_path / "files"
    (files / "good.jpg").write_bytes(jpeg(1))
    (files / "text.jpg").write_text("not an image")
    (files / "cut.jpg").write_bytes(jpeg(2, 600)[:2000])
    (files / "empty.png").touch()
    (tmp_path / "secret.jpg").write_bytes(jpeg(3))
    s3_server.client().put_object(Bucket=bucket, Key="good.jpg", Body=jpeg(4))
    cases: dict[str, RejectReason | None] = {
        str(files / "good.jpg"): None,
        f"s3://{bucket}/good.jpg": None,
        str(files / "text.jpg"): RejectReason.UNSUPPORTED_FORMAT,
        str(files / "cut.jpg"): RejectReason.TRUNCATED,
        str(files / "empty.png"): RejectReason.EMPTY,
        str(files / "gone.jpg"): RejectReason.NOT_FOUND,
        str(tmp_path / "secret.jpg"): RejectReason.SOURCE_NOT_ALLOWED,
        f"s3://{bucket}/gone.jpg": RejectReason.NOT_FOUND,
        "s3://other-bucket/a.jpg": RejectReason.SOURCE_NOT_ALLOWED,
        "http://169.254.169.254/latest": RejectReason.SOURCE_NOT_ALLOWED,
    }
    client = deployment.client()
    ids = client.enqueue_many(cases, priority=8)
    # As from a producer that asked before this champion was promoted: now it would be refused there.
    asked = NewJob(str(files / "good.jpg"), head="nope", priority=8)
    (unknown_head,) = client._accept([asked])
    client._publish([unknown_head], [asked])
    worker = deployment.worker()
    verdicts = decided(deployment.client(), [*ids, unknown_head])
    assert {verdict.uri: verdict.reason for verdict in verdicts[:-1]} == cases
    assert all(verdict.label in {Label.REAL, Label.FAKE} for verdict in verdicts if verdict.outcome is Outcome.JUDGED)
    assert verdicts[-1].reason is RejectReason.MODEL_UNAVAILABLE
    assert worker.terminate() == 0


def test_a_producer_that_reaches_only_the_broker_sends_uris(
    deploy: Callable[..., Deployment], tmp_path: Path
) -> None:
    deployment = deploy(_sqlite(tmp_path))
    (tmp_path / "files" / "a.jpg").write_bytes(jpeg(5))
    deployment.worker("--concurrency", "6")
    item = {"uri": str(tmp_path / "files" / "a.jpg"), "tenant": "acme", "key": "post-1", "metadata": {"post": 1}}
    store = deployment.store()

    def rows() -> list[tuple[str, str]]:
        with store.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(text("select uri, tenant from verdicts")).all()]

    with Celery("producer", set_as_current=False) as app:
        app.config_from_object(celery_config(deployment.settings))
        for uri in (item["uri"], item["uri"]):
            app.send_task(MODERATE, args=({"v": 1, "items": [{**item, "uri": uri}]},), queue=NORMAL)
        # Messages are taken side by side: the other URI must not come to own the key.
        wait_until(rows, 120, "the first verdict")
        other = {**item, "uri": "s3://other/thing.jpg"}
        app.send_task(MODERATE, args=({"v": 1, "items": [other]},), queue=NORMAL)
        unkeyed = {"v": 1, "items": [{"uri": item["uri"], "tenant": "twice"}, {"uri": "a", "tenant": "\ud800"}]}
        for _ in range(2):
            app.send_task(MODERATE, args=(unkeyed,), queue=NORMAL, task_id="the-same-delivery")

    refused = wait_until(lambda: len(found := deployment.events("message_refused")) >= 3 and found, 120, "refusals")
    assert sum(event["kind"] == "id_conflict" for event in refused) == 1
    wait_until(lambda: len(rows()) >= 2, 120, "the verdicts")
    assert sorted(rows()) == [(item["uri"], "acme"), (item["uri"], "twice")]
    (started,) = deployment.events("worker_starting")
    assert started["connections"] >= started["concurrency"] + deployment.settings.worker.fetch_threads
    assert started["concurrency"] == 6


def test_messages_that_are_not_ours_are_kept_and_the_worker_goes_on(
    deploy: Callable[..., Deployment], tmp_path: Path
) -> None:
    deployment = deploy(_sqlite(tmp_path))
    worker = deployment.worker()
    strange: list[tuple[object, ...]] = [
        ({"v": 99, "jobs": ["x"]},),
        ({"v": 1, "jobs": ["no-such-job"], "extra": 1},),
        ("just text",),
        (),
    ]
    with Celery("producer", set_as_current=False) as app:
        app.config_from_object(celery_config(deployment.settings))
        for args in strange:
            app.send_task(MODERATE, args=args, queue=NORMAL)
        app.send_task(MODERATE, args=({"v": 1, "jobs": ["no-such-job"]},), queue=NORMAL)
    store = deployment.store()

    def dead() -> list[str]:
        with store.engine.connect() as connection:
            return list(connection.execute(text("select error from dead_letters order by id")).scalars())

    wait_until(lambda: len(dead()) == len(strange), 120, "dead letters")
    assert any("version 99" in error for error in dead())
    (tmp_path / "files" / "a.jpg").write_bytes(jpeg(6))
    client = deployment.client()
    job = client.enqueue(str(tmp_path / "files" / "a.jpg"))
    assert decided(deployment.client(), [job])[0].outcome is Outcome.JUDGED
    assert worker.alive


def test_a_running_worker_takes_over_a_promoted_release_without_losing_a_job(
    deploy: Callable[..., Deployment], postgres_url: str, tmp_path: Path, toy_release_dir: Path
) -> None:
    deployment = deploy(postgres_url, promote=False)
    (tmp_path / "files" / "a.jpg").write_bytes(jpeg(7))
    worker = deployment.worker()
    wait_until(lambda: deployment.events("waiting_for_release"), 120, "the worker to say what it waits for")
    client = deployment.client()
    early = client.enqueue(str(tmp_path / "files" / "a.jpg"))
    first = promote_release(deployment, toy_release_dir)
    assert decided(deployment.client(), [early])[0].release == first

    changed = tmp_path / "second"
    shutil.copytree(toy_release_dir, changed)
    manifest = json.loads((changed / "manifest.json").read_text())
    (changed / "manifest.json").write_text(json.dumps({**manifest, "notes": "the second one"}))
    ids: list[str] = []
    second = promote_release(deployment, changed)
    assert second != first

    def taken_over() -> bool:
        ids.append(client.enqueue(str(tmp_path / "files" / "a.jpg"), priority=9))
        return decided(deployment.client(), ids[-1:])[0].release == second

    wait_until(taken_over, 120, "the promoted release in use")
    verdicts = decided(deployment.client(), ids)
    assert {verdict.outcome for verdict in verdicts} == {Outcome.JUDGED}
    assert {verdict.release for verdict in verdicts} <= {first, second}
    assert worker.terminate() == 0


@pytest.mark.slow(reason="a worker is started four times, from nothing by its supervisor")
@row(
    "F25",
    injection="a job in a batch of 64 that ends the process without a word",
    expected="quarantined after 3 attempts, 63 judged",
)
def test_a_job_that_kills_the_worker_is_quarantined_and_its_neighbours_are_judged(
    deploy: Callable[..., Deployment], postgres_url: str, tmp_path: Path, seen: Seen
) -> None:
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "deadly.py").write_text(
        "import os\n"
        "from code_worker import hookimpl\n"
        "@hookimpl\n"
        "def code_worker_select_head(job, heads):\n"
        "    if job.metadata.get('poison'):\n"
        "        os._exit(139)\n"
    )
    deployment = deploy(postgres_url, CODE_WORKER_PLUGINS_DIR=str(plugins), CODE_WORKER_WORKER__SWEEP_INTERVAL_S="1")
    for number in range(64):
        (tmp_path / "files" / f"{number}.jpg").write_bytes(jpeg(number))
    items = [
        {"uri": str(tmp_path / "files" / f"{number}.jpg"), "metadata": {"poison": number == 31}}
        for number in range(64)
    ]
    client = deployment.client()
    ids = client.enqueue_many(items)
    deployment.worker("worker", module="code_worker", **{CHILDREN_ENV: "1"})
    began = time.monotonic()
    verdicts = decided(deployment.client(), ids, limit_s=240)
    quarantined_s = time.monotonic() - began
    assert verdicts[31].reason is RejectReason.QUARANTINED
    others = verdicts[:31] + verdicts[32:]
    assert {verdict.outcome for verdict in others} == {Outcome.JUDGED}
    lives = len(deployment.events("worker_starting"))
    seen(executions=lives - 1, quarantined_s=quarantined_s, judged=len(others))
    assert lives == 4, "three deaths, then peace"


def test_a_plugin_that_calls_exit_costs_its_own_jobs_alone(deploy: Callable[..., Deployment], tmp_path: Path) -> None:
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "quitting.py").write_text(
        "import sys\n"
        "from code_worker import hookimpl\n"
        "@hookimpl\n"
        "def code_worker_select_head(job, heads):\n"
        "    if job.metadata.get('quit'):\n"
        "        sys.exit('no licence')\n"
    )
    limits = {"CODE_WORKER_WORKER__MAX_FAULTS": "1"}
    deployment = deploy(_sqlite(tmp_path), CODE_WORKER_PLUGINS_DIR=str(plugins), **limits)
    items = []
    for number in range(4):
        path = tmp_path / "files" / f"{number}.jpg"
        path.write_bytes(jpeg(number))
        items.append({"uri": str(path), "metadata": {"quit": number == 1}})
    ids = deployment.client().enqueue_many(items)
    deployment.worker()
    verdicts = decided(deployment.client(), ids)
    assert [verdict.outcome for verdict in verdicts] == [
        *(Outcome.JUDGED, Outcome.REJECTED, Outcome.JUDGED, Outcome.JUDGED)
    ]
    assert verdicts[1].reason is RejectReason.MODEL_UNAVAILABLE
    assert f"plugin {plugins / 'quitting.py'} (line 6) failed: SystemExit: no licence" in verdicts[1].detail
    assert len(deployment.events("worker_starting")) == 1


def test_a_worker_says_at_its_start_which_settings_no_head_will_take(
    deploy: Callable[..., Deployment], tmp_path: Path
) -> None:
    own = {"CODE_WORKER_HEADS__LINER__C": "1", "CODE_WORKER_HEADS__KNN__N_NEIGHBORS": "5"}
    deployment = deploy(_sqlite(tmp_path), **own)
    deployment.worker()
    wait_until(lambda: deployment.events("worker_starting"), 120, "the worker's start")
    (unused,) = deployment.events("head_settings_unused")
    assert unused["error"].endswith("that no plugin offers; did you mean 'linear'?")


@pytest.mark.parametrize("arguments", [["--queues", "live,unheard"]])
def test_a_wrong_configuration_ends_the_worker_with_status_2(
    deploy: Callable[..., Deployment], tmp_path: Path, arguments: list[str]
) -> None:
    deployment = deploy(_sqlite(tmp_path), promote=False)
    worker = deployment.worker(*arguments)
    assert worker.process.wait(120) == 2
    assert "code_worker.unheard" in deployment.events("configuration_error")[0]["error"]


def test_monitors_tell_the_processes_of_a_host_apart(deploy: Callable[..., Deployment], tmp_path: Path) -> None:
    deployment = deploy(_sqlite(tmp_path), CODE_WORKER_WORKER__REMOTE_CONTROL="inspect")
    deployment.worker(module="code_worker.stack.trainer_process")
    deployment.worker()
    deployment.worker("--name", "second")

    def answering() -> list[str]:
        replies = app.control.ping(timeout=1)
        return sorted(name for reply in replies for name in reply)

    expected = [f"{name}@{gethostname()}" for name in ("second", "trainer", "worker")]
    with closing(create_app(deployment.settings)) as app:
        wait_until(lambda: answering() == expected, 120, "an answer from each")
