from __future__ import annotations

import pytest

from code_worker.store import jobs, workers
from code_worker.store.engine import Store
from code_worker.types import RejectReason
from tests.cli.conftest import Cli
from tests.cli.ledger_rows import accept, claim, judged, rejected

NO_SUCH_ID = "0198c5a2-7f31-7abc-9def-0123456789ab"


def test_pages_of_jobs_follow_each_other(cli: Cli, store: Store) -> None:
    ids = [accept(store, f"s3://b/{number}.jpg")[0] for number in range(5)]
    first = cli("jobs", "list", "--json", "--limit", "3")
    second = cli("jobs", "list", "--json", "--limit", "3", *first.stderr.split()[1:])
    assert [record["id"] for record in first.records + second.records] == ids[::-1]
    assert second.stderr == ""


def test_jobs_are_filtered_by_state_tenant_and_queue(cli: Cli, store: Store) -> None:
    (mine,) = accept(store, "s3://b/a.jpg", tenant="acme")
    judged(store, "s3://b/b.jpg", 0.9, tenant="acme")
    accept(store, "s3://b/c.jpg")
    found = cli("jobs", "list", "--json", "--state", "accepted", "--tenant", "acme", "--queue", "normal")
    assert [record["id"] for record in found.records] == [mine]
    assert cli("jobs", "list", "--queue", "live").stdout == "no jobs match\n"


def test_show_has_the_last_fault_and_the_verdict(cli: Cli, store: Store) -> None:
    (job,) = accept(store, "s3://b/a.jpg", key="post-7")
    claim(store, [job])
    fault = jobs.Fault(job, RejectReason.FETCH_TIMEOUT, "no answer", 60.0)
    store.run(lambda session: jobs.put_back(session, [fault]))
    shown = cli("jobs", "show", job).stdout
    assert "fetch_timeout: no answer" in shown
    assert "post-7" in shown
    assert "no verdict yet" in shown
    done = judged(store, "s3://b/b.jpg", 0.9)
    assert "verdict: fake" in cli("jobs", "show", done).stdout
    (record,) = cli("jobs", "show", done, "--json").records
    assert (record["state"], record["verdict"]["score"]) == ("done", 0.9)


def test_an_unknown_job_is_said_to_be_unknown(cli: Cli) -> None:
    ran = cli("jobs", "show", NO_SUCH_ID)
    assert ran.status == 1
    assert NO_SUCH_ID in ran.stderr


def test_retry_takes_finished_jobs_alone(cli: Cli, store: Store) -> None:
    done = judged(store, "s3://b/a.jpg", 0.9)
    (waiting,) = accept(store, "s3://b/b.jpg")
    ran = cli("jobs", "retry", done, waiting)
    assert ran.stdout.startswith("1 of 2 jobs to be judged again")
    assert ran.status == 1
    assert ran.stderr == f"job {waiting} is not finished: it is accepted\n"
    unknown = cli("jobs", "retry", NO_SUCH_ID)
    assert (unknown.status, unknown.stdout) == (1, "0 of 1 job to be judged again\n")
    assert unknown.stderr == f"no job has the id {NO_SUCH_ID}\n"
    info = store.run(lambda session: jobs.get(session, done), write=False)
    assert info is not None
    assert (info.state, info.revision) == ("accepted", 1)


def test_retry_by_reason_asks_first_and_takes_all_of_that_reason(cli: Cli, store: Store) -> None:
    wanted = {rejected(store, f"s3://b/{number}.jpg", RejectReason.FETCH_TIMEOUT) for number in range(3)}
    rejected(store, "s3://b/other.jpg", RejectReason.TRUNCATED)
    refused = cli("jobs", "retry", "--reason", "fetch_timeout", stdin="n\n")
    assert refused.status == 1
    assert "retry 3 jobs?" in refused.stderr
    assert cli("jobs", "retry", "--reason", "fetch_timeout", stdin="y\n").status == 0
    accepted = {record["id"] for record in cli("jobs", "list", "--state", "accepted", "--json").records}
    assert accepted == wanted


def test_retry_of_quarantined_jobs_needs_no_reason(cli: Cli, store: Store) -> None:
    job = rejected(store, "s3://b/a.jpg", RejectReason.QUARANTINED)
    assert cli("jobs", "counts", "--json").records[0]["quarantined"] == 1
    assert cli("jobs", "retry", "--state", "quarantined", "--yes").stdout.startswith("1 of 1")
    assert cli("jobs", "show", job, "--json").records[0]["state"] == "accepted"
    assert cli("jobs", "retry", "--state", "quarantined", "--yes").stdout == "no job to retry\n"


@pytest.mark.parametrize(
    "arguments", [(), ("--state", "quarantined", "--reason", "empty"), (NO_SUCH_ID, "--reason", "empty")]
)
def test_retry_wants_to_be_told_one_thing(bare_cli: Cli, arguments: tuple[str, ...]) -> None:
    assert bare_cli("jobs", "retry", *arguments).status == 2


def test_dead_letters_say_why_they_could_not_be_read(cli: Cli, store: Store) -> None:
    assert cli("jobs", "dead-letters").stdout.startswith("no dead letters")
    for number in range(2):
        store.run(
            lambda session, number=number: workers.dead_letter(session, task="t", body=f"m{number}", error="v9")
        )
    first = cli("jobs", "dead-letters", "--json", "--limit", "1")
    assert (first.records[0]["body"], first.records[0]["error"]) == ("m1", "v9")
    second = cli("jobs", "dead-letters", "--json", *first.stderr.split()[1:])
    assert [record["body"] for record in second.records] == ["m0"]


def test_without_a_terminal_jobs_found_by_a_state_are_retried_only_with_yes(cli: Cli, store: Store) -> None:
    rejected(store, "s3://b/a.jpg", RejectReason.FETCH_FAILED)
    refused = cli("jobs", "retry", "--reason", "fetch_failed")
    assert (refused.status, refused.stdout) == (2, "")
    assert "nobody answers whether to retry 1 job: say --yes" in refused.stderr
    assert cli("jobs", "retry", "--reason", "fetch_failed", "--yes").status == 0
