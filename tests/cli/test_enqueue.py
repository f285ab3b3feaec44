from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from redis import Redis

from code_worker.doctor.fleet import why_waiting
from code_worker.settings import Settings
from code_worker.store import jobs, releases, verdicts, workers
from code_worker.store.engine import Store
from code_worker.system.terminal import printable
from code_worker.types import Label, Outcome, RejectReason, Verdict
from tests.cli.conftest import Cli, Ran
from tests.cli.ledger_rows import accept, claim
from tests.patience import polls
from tests.servers import RedisServer, S3Server
from tests.test_client import champion

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


@pytest.fixture
def broker(redis_server: RedisServer) -> Iterator[Redis]:
    with closing(Redis.from_url(redis_server.url)) as client:
        yield client


@pytest.fixture
def producer(sqlite_cli: Cli, redis_server: RedisServer) -> Cli:
    sqlite_cli.env["CODE_WORKER_BROKER_URL"] = redis_server.url
    return sqlite_cli


def messages(broker: Redis, queue: str = "normal") -> list[list[str]]:
    """Job ids by message, oldest first."""
    raw: list[Any] = broker.lrange(f"cw:code_worker.{queue}", 0, -1)  # type: ignore[assignment]
    bodies = [json.loads(base64.b64decode(json.loads(one)["body"])) for one in reversed(raw)]
    return [body[0][0]["jobs"] for body in bodies]


def test_uris_become_jobs_and_one_message(producer: Cli, sqlite_store: Store, broker: Redis, tmp_path: Path) -> None:
    ran = producer(
        *("enqueue", "s3://b/a.jpg", "relative/b.jpg", "--tenant", "acme", "--head", "knn", "--json"),
        *("--metadata", '{"post": 7}', "--priority", "7", "--content-type", "avatar"),
    )
    assert ran.status == 0
    ids = [record["job"] for record in ran.records]
    assert messages(broker, "live") == [ids]
    found = [sqlite_store.run(lambda session, id_=id_: jobs.get(session, id_)) for id_ in ids]
    assert [job and job.uri for job in found] == ["s3://b/a.jpg", str(Path("relative/b.jpg").absolute())]
    assert {(job.tenant, job.head, job.content_type, job.metadata["post"]) for job in found if job} == {
        ("acme", "knn", "avatar", 7)
    }


def test_a_head_that_the_champion_lacks_ends_the_command_before_anything_is_accepted(
    producer: Cli, sqlite_store: Store, tmp_path: Path
) -> None:
    champion(sqlite_store, "r-one", ["knn", "linear"])
    ran = producer("enqueue", "s3://b/a.jpg", "s3://b/b.jpg", "--head", "kn")
    assert ran.status == 2
    assert "unknown head 'kn'; known: knn, linear" in ran.stderr
    listed = tmp_path / "list.jsonl"
    listed.write_text('{"uri": "s3://b/a.jpg", "head": "knn"}\n{"uri": "s3://b/b.jpg", "head": "kn"}\n')
    ran = producer("enqueue", "--from", str(listed))
    assert ran.status == 1
    assert (
        "line 2: unknown head 'kn'; known: knn, linear; did you mean 'knn'?\n1 job accepted, 1 line refused"
        in ran.stderr
    )


def test_a_job_with_a_key_is_found_again_though_its_head_is_gone(
    producer: Cli, sqlite_store: Store, tmp_path: Path
) -> None:
    champion(sqlite_store, "r-one", ["knn", "linear"])
    by_key = ("enqueue", "s3://b/a.jpg", "--head", "knn", "--key", "post-7", "--json")
    first = producer(*by_key)
    champion(sqlite_store, "r-two", ["linear"])
    again = producer(*by_key)
    assert (again.status, again.records) == (0, first.records)
    listed = tmp_path / "list.jsonl"
    listed.write_text('{"uri": "s3://b/a.jpg", "key": "post-7"}\n{"uri": "s3://b/a.jpg", "key": "post-8"}\n')
    ran = producer("enqueue", "--from", str(listed), "--head", "knn", "--json")
    assert (ran.status, ran.records) == (1, first.records)
    assert ran.stderr.startswith("line 2: unknown head 'knn'; known: linear\n")
    listed.write_text('{"uri": "s3://b/a.jpg", "key": "post-7"}\ns3://b/b.jpg\n')
    ran = producer("enqueue", "--from", str(listed), "--head", "knn")
    assert ran.status == 2


def test_the_same_key_is_the_same_job_and_a_conflict_is_named(producer: Cli) -> None:
    first = producer("enqueue", "s3://b/a.jpg", "--key", "post-7", "--json")
    assert producer("enqueue", "s3://b/a.jpg", "--key", "post-7", "--json").records == first.records
    conflict = producer("enqueue", "s3://b/other.jpg", "--key", "post-7")
    assert conflict.status == 1
    assert "post-7" in conflict.stderr
    assert producer("enqueue", "a", "b", "--key", "post-7").status == 2


def test_bad_lines_are_named_and_the_others_enqueued(producer: Cli, broker: Redis) -> None:
    lines = [
        "s3://b/plain.jpg",
        '{"uri": "s3://b/object.jpg", "tenant": "own", "priority": 0}',
        "",
        '{"uri": "s3://b/a.jpg", "colour": "red"}',
        '{"uri": "s3://b/a.jpg", "priority": 11}',
        "{not json}",
        '{"tenant": "acme"}',
        '{"uri": "s3://b/nul\\u0000.jpg"}',
        "s3://b/last.jpg",
    ]
    ran = producer("enqueue", "--from", "-", "--tenant", "acme", "--json", stdin="\n".join(lines))
    assert ran.status == 1
    assert [record["uri"] for record in ran.records] == ["s3://b/plain.jpg", "s3://b/object.jpg", "s3://b/last.jpg"]
    named = [line.partition(":")[0] for line in ran.stderr.splitlines() if line.startswith("line ")]
    assert sorted(named) == ["line 4", "line 5", "line 6", "line 7", "line 8"]
    assert "colour" in ran.stderr
    assert [len(one) for one in messages(broker)] == [1, 1]
    assert [len(one) for one in messages(broker, "backfill")] == [1]


def test_a_long_list_is_one_message_per_64_jobs(producer: Cli, broker: Redis, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"s3://b/{number}.jpg\n" for number in range(1100)))
    ran = producer("enqueue", "--from", str(listed))
    assert (ran.status, ran.stdout) == (0, "")
    assert "1,100 jobs accepted" in ran.stderr
    sent = messages(broker)
    assert max(map(len, sent)) == 64
    assert len({job for one in sent for job in one}) == 1100


def test_a_prefix_enqueues_every_object_under_it(producer: Cli, s3_server: S3Server) -> None:
    with closing(s3_server.client()) as s3:
        s3.create_bucket(Bucket="cli-enqueue")
        for name in ("in/a.jpg", "in/b.jpg", "out/c.jpg"):
            s3.put_object(Bucket="cli-enqueue", Key=name, Body=b"x")
    env = {**s3_server.environment, "CODE_WORKER_S3__BUCKETS": '["cli-enqueue"]'}
    ran = producer("enqueue", "--prefix", "s3://cli-enqueue/in/", "--json", env=env)
    assert [record["uri"] for record in ran.records] == ["s3://cli-enqueue/in/a.jpg", "s3://cli-enqueue/in/b.jpg"]
    refused = producer("enqueue", "--prefix", "s3://somebody-elses/", env=env)
    assert refused.status == 2
    assert "source_not_allowed" in refused.stderr


def test_without_a_broker_jobs_are_accepted_all_the_same(sqlite_cli: Cli, sqlite_store: Store) -> None:
    ran = sqlite_cli("enqueue", "s3://b/a.jpg")
    assert ran.status == 0
    assert "publish_postponed" in ran.stderr
    assert len(sqlite_store.run(lambda session: jobs.list_jobs(session, limit=9))) == 1


def decide(store: Store, reasons: dict[str, RejectReason | None]) -> None:
    """Judges each job by its URI as soon as it is there, as a worker would."""

    def work(session: Session) -> int:
        ids = [job.id for job in jobs.list_jobs(session, jobs.JobFilter(), limit=9)]
        for job in jobs.claim(session, ids, owner="test", lease_s=60, max_attempts=3):
            reason = reasons[job.uri]
            answer: dict[str, Any] = {"outcome": Outcome.REJECTED, "reason": reason}
            if reason is None:
                answer = {"outcome": Outcome.JUDGED, "label": Label.REAL, "score": 0.1}
            verdicts.write(session, [Verdict(job.id, job.uri, **answer)])
        return len(ids)

    for _ in polls(every_s=0.02):
        if store.run(work) == len(reasons):
            return


@pytest.mark.parametrize(("reason", "status"), [(None, 0), (RejectReason.EMPTY, 1)])
def test_wait_prints_the_verdicts_in_order(
    producer: Cli, sqlite_store: Store, reason: RejectReason | None, status: int
) -> None:
    worker = threading.Thread(target=decide, args=(sqlite_store, {"s3://b/a.jpg": None, "s3://b/b.jpg": reason}))
    worker.start()
    ran = producer("enqueue", "s3://b/a.jpg", "s3://b/b.jpg", "--wait", "--timeout", "120", "--json")
    worker.join()
    assert ran.status == status
    assert [(record["uri"], record["reason"]) for record in ran.records] == [
        ("s3://b/a.jpg", None),
        ("s3://b/b.jpg", reason),
    ]


def test_wait_gives_up_when_the_time_is_up(producer: Cli) -> None:
    ran = producer("enqueue", "s3://b/a.jpg", "--wait", "--timeout", "0")
    assert ran.status == 1
    assert "1 job is not decided" in ran.stderr


@pytest.mark.parametrize("arguments", [(), ("a.jpg", "--prefix", "s3://b/"), ("a.jpg", "--metadata", "[1]")])
def test_wrong_use_ends_with_status_2(bare_cli: Cli, arguments: tuple[str, ...]) -> None:
    assert bare_cli("enqueue", *arguments).status == 2


def uris(ran: Ran) -> list[str]:
    return [record["uri"] for record in ran.records]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbfs3://b/0.png\r\ns3://b/1.png\r\n", ["s3://b/0.png", "s3://b/1.png"]),
        (b'[{"uri": "s3://b/0.png"},\n "s3://b/1.png"]', ["s3://b/0.png", "s3://b/1.png"]),
        (b'# mine\n\n s3://b/0.png \n\ts3://b/1.png\n"s3://b/2.png"\n', [f"s3://b/{n}.png" for n in range(3)]),
        (b"/a/0 \n.png\0/a/# 1.png\0", ["/a/0 \n.png", "/a/# 1.png"]),
        (b"/a/0.png\0/a/1.png", ["/a/0.png", "/a/1.png"]),
        (b"/a/\r.png\0/a/\r\n.png\0/a/\x1b[2J\t \0", ["/a/\r.png", "/a/\r\n.png", "/a/\x1b[2J\t "]),
        (b"/a/caf\xe9\r.png\0/a/\xc3\xa9.png\0", ["file:///a/caf%E9%0D.png", "/a/é.png"]),
        (b"s3://b/0.png\rs3://b/1.png", ["s3://b/0.png", "s3://b/1.png"]),
        (b"[2024] a.png\ns3://b/1.png\n", [str(Path("[2024] a.png").absolute()), "s3://b/1.png"]),
        (b"file:/x/a.png\nfile:///x/b.png\n", ["file:///x/a.png", "file:///x/b.png"]),
        (b"/x/caf\xe9.png\ns3://b/1.png\n", ["file:///x/caf%E9.png", "s3://b/1.png"]),
        (b"\0" * 3 + b"/a/" + b"n" * 70_000 + b"\0", []),
    ],
    ids=[
        "bom",
        "array",
        "comments",
        "nul",
        "nul between",
        "breaks in names",
        "bytes in names",
        "cr",
        "bracket",
        "file",
        "bytes",
        "long",
    ],
)
def test_lists_are_read_as_tools_write_them(
    producer: Cli, tmp_path: Path, content: bytes, expected: list[str]
) -> None:
    (tmp_path / "list").write_bytes(content)
    assert uris(producer("enqueue", "--from", str(tmp_path / "list"), "--json")) == expected


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'[{"uri": "s3://b/0.png"},\n {"uri": ', "the list: not JSON: "),
        (b'["s3://b/0.png", 7, {"uri": ""}]', "entry 2: a job is a URI or an object of its fields"),
        (b's3://b/0.png\n""\n', "line 2: an empty address names no image"),
        (b"#" + b"x" * 65_534 + b'\r\n""\r\n', "line 2: an empty address names no image"),
        (b"s3:/b/0.png\n", "line 1: s3:/b/0.png is no address: write s3://…, or ./s3:/b/0.png for a file"),
        (b"file:a.png\n", "line 1: file:a.png is no address: write file://…"),
        (b"~nobody-here/a.png\n", "line 1: ~nobody-here/a.png: "),
        (b"s3://b/0.png\ns3://b/caf\xe9.png\n", "line 2: the address is not UTF-8"),
        ("s3://b/0.png\n".encode("utf-16"), "the list: it is UTF-16: save it as UTF-8"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF\0a\0b\0", "the list: it is an image or an archive, and no list"),
        (b"\x89PNG\r\n\x1a\n\0a\0", "the list: it is an image or an archive, and no list"),
        *((empty, "the list: it names no image") for empty in (b"", b"[]", b"# nothing\n\n", b"\xef\xbb\xbf")),
        *((b"/\n", "line 1: a directory: name it"), (b"/tmp\0/\0", "entry 2: a directory: name it")),
        *((b"s3://b/0.png\nfile:///\n", "line 2: a directory"), (b'{"uri": "/"}\n', "line 1: a directory")),
    ],
)
def test_what_names_no_image_is_named_in_one_line(producer: Cli, tmp_path: Path, content: bytes, named: str) -> None:
    (tmp_path / "list").write_bytes(content)
    ran = producer("enqueue", "--from", str(tmp_path / "list"), "--json")
    assert ran.status == 1
    assert named in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    "header", [b"uri,tenant", b"# mine\n\nuri", b'"path";"content_type"', b"\xef\xbb\xbfURI\tkey"]
)
def test_a_csv_is_refused_before_its_rows_are_taken_for_names(producer: Cli, tmp_path: Path, header: bytes) -> None:
    (tmp_path / "list").write_bytes(header + b"\ns3://b/a.jpg,acme\n")
    ran = producer("enqueue", "--from", str(tmp_path / "list"))
    assert ran.status == 1
    assert "this looks like a CSV: write one URI per line, or JSON lines\n0 jobs accepted" in ran.stderr


def test_addresses_that_no_source_reads_are_remarked_on_once_by_scheme(producer: Cli) -> None:
    lines = [f"{scheme}://h/{number}.jpg" for number in range(3) for scheme in ("http", "gs", "s3", "file")]
    ran = producer("enqueue", "--from", "-", stdin="\n".join(lines))
    assert ran.status == 0
    assert [line for line in ran.stderr.splitlines() if "is not read" in line] == [
        f"{scheme}:// is not read: workers reject such images; write s3://… or file://…" for scheme in ("gs", "http")
    ]


@pytest.mark.parametrize("argument", ["", " ", "s3:/b/a.png", "x" * 5000])
def test_an_argument_that_names_no_image_is_refused(producer: Cli, argument: str) -> None:
    ran = producer("enqueue", argument)
    assert (ran.status, ran.stdout) == (1, "")
    assert "0 jobs accepted, 1 line refused" in ran.stderr


def test_a_name_that_is_not_utf_8_is_enqueued_as_its_uri(producer: Cli, tmp_path: Path) -> None:
    tree = Path(os.fsdecode(os.fsencode(tmp_path) + b"/tr\xe9e"))
    tree.mkdir()
    (tree / os.fsdecode(b"\xff\n.png")).write_bytes(b"\x89PNG\r\n\x1a\n")
    uri = f"file://{tmp_path}/tr%E9e/%FF%0A.png"
    for words in ((str(tree),), (os.fsdecode(os.fsencode(tree) + b"/\xff\n.png"),), ("--prefix", str(tree))):
        ran = producer("enqueue", *words, "--json", env={"CODE_WORKER_FILES__ROOTS": str(tmp_path)})
        assert (ran.status, uris(ran)) == (0, [uri]), ran
    for address in ("s3://b/\udce9.png", "file:///\udce9.png"):
        ran = producer("enqueue", address)
        assert (ran.status, ran.stderr) == (
            1,
            f"{printable(address)}: the address is not UTF-8\n0 jobs accepted, 1 line refused\n",
        )


def test_of_a_directory_the_images_are_enqueued_that_a_scan_finds(
    producer: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    (tree / "below").mkdir(parents=True)
    for name in ("a.JPG", "below/b.png", "notes.txt", ".hidden.png"):
        (tree / name).write_bytes(b"x")
    (tree / "no-suffix").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    monkeypatch.chdir(tmp_path)
    ran = producer("enqueue", "tree", "--json")
    assert ran.status == 0, ran.stderr
    assert uris(ran) == [str(tree / name) for name in ("a.JPG", "below/b.png", "no-suffix")]
    assert "notes.txt" in ran.stderr
    assert uris(producer("enqueue", f"{tree.as_uri()}/", "--json")) == [f"file://{uri}" for uri in uris(ran)]
    env = {"CODE_WORKER_FILES__ROOTS": str(tree)}
    whole = producer("enqueue", "--prefix", "tree/below", "--json", env=env)
    assert uris(whole) == [str(tree / "below" / "b.png")], "a relative prefix is made absolute"
    assert producer("enqueue", "--prefix", "", env=env).status == 2


def add_champion(store: Store) -> None:
    def add(session: Session) -> None:
        releases.add(session, id="r", manifest_sha256="a" * 64, location="", manifest={}, source="", by="ann")
        releases.move_alias(session, "champion", "r", by="ann", reason="")

    store.run(add)


def waits(producer: Cli) -> str:
    ran = producer("enqueue", "s3://b/a.jpg", "--wait", "--timeout", "0")
    assert ran.status == 1
    assert "gave up after 0 s: 1 job is not decided" in ran.stderr
    return ran.stderr.splitlines()[-1].partition(": ")[2]


def test_who_waits_hears_why(producer: Cli, sqlite_store: Store) -> None:
    """Each thing that is missing is put there, and the next one is named."""
    assert waits(producer).startswith("there is no release to judge with")
    add_champion(sqlite_store)
    assert waits(producer).startswith("no worker was heard of lately")
    beats = partial(workers.beat, owner="w-1", version="1", info={"queues": ["code_worker.live"]})
    sqlite_store.run(beats)
    assert waits(producer).startswith("no worker takes from the queue code_worker.normal")
    beats.keywords["info"] = {"queues": ["code_worker.normal"]}
    sqlite_store.run(beats)
    assert waits(producer).startswith("a worker has not come to it yet")
    queues = ["code_worker.normal"]
    beats.keywords["info"] |= {"refused": ("r", "head 'mine' does not score as it did")}
    sqlite_store.run(beats)
    assert waits(producer).startswith("no worker of its queue can use the release r: head 'mine' does not score")
    sqlite_store.run(partial(workers.beat, owner="w-2", version="1", release="old", info={"queues": queues}))
    assert waits(producer).startswith("a worker has not come to it yet"), "another judges with the release before"
    sqlite_store.run(partial(workers.pause_source, source="s3://b", seconds=60, detail="HTTP 503"))
    assert waits(producer).startswith("its source s3://b is paused: HTTP 503")


def test_who_waits_hears_of_faults_of_a_broker_that_is_away_and_of_who_judges(
    sqlite_store: Store, tmp_path: Path
) -> None:
    add_champion(sqlite_store)
    sqlite_store.run(partial(workers.beat, owner="w-1", version="1"))
    ids = [accept(sqlite_store, f"s3://b/{n}.jpg")[0] for n in range(3)]
    claim(sqlite_store, ids[:2])
    fault = jobs.Fault(ids[0], RejectReason.FETCH_FAILED, "HTTP 500 of b/0.jpg", 60.0)
    sqlite_store.run(lambda session: jobs.put_back(session, [fault], owner="test"))
    said = why_waiting(Settings(data_dir=tmp_path), sqlite_store, ids)
    assert said[ids[0]].startswith("it is tried again at ")
    assert said[ids[0]].endswith("UTC, after fetch_failed: HTTP 500 of b/0.jpg")
    assert said[ids[1]] == "test is judging it"
    assert said[ids[2]].startswith("workers were not told of it yet; is the broker away?")
