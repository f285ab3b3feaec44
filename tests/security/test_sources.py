"""Default deny: what nobody allowed is refused before anything is opened, resolved or connected to."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Self

import pytest
from pydantic import SecretStr

from code_worker.data.datasets.urls import UrlSource
from code_worker.errors import ImageRejectedError
from code_worker.images.source import Sources
from code_worker.settings import FileSettings, S3Settings, Settings
from code_worker.types import RejectReason

SECRET = "not an image"


class Watch:
    """Every name that this process resolves, every address it connects to and every file it opens, while `on`.

    Python tells its audit hooks before it does any of that; a hook cannot be taken off, so there is one.
    """

    hooked: ClassVar[Watch | None] = None

    def __init__(self) -> None:
        self.on = False
        self.network: list[str] = []
        self.opened: list[str] = []

    @classmethod
    def over_the_process(cls) -> Self:
        if cls.hooked is None:
            cls.hooked = cls()
            sys.addaudithook(cls.hooked._hear)
        assert isinstance(cls.hooked, cls)
        return cls.hooked

    def _hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.on:
            return
        if event in {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}:
            self.network.append(f"{event} {arguments[1:]}")
        if event == "open":
            self.opened.append(str(arguments[0]))

    def __enter__(self) -> Self:
        self.network, self.opened, self.on = [], [], True
        return self

    def __exit__(self, *_: object) -> None:
        self.on = False


class Recorder:
    """A listener on IPv4 and IPv6 loopback that counts who comes, and answers nobody."""

    def __init__(self) -> None:
        self.visits: list[str] = []
        self._sockets = [socket.create_server(("127.0.0.1", 0))]
        self.port = int(self._sockets[0].getsockname()[1])
        with suppress(OSError):  # a machine may have no IPv6
            self._sockets.append(socket.create_server(("::1", self.port), family=socket.AF_INET6))
        self._threads = [threading.Thread(target=self._listen, args=(one,), daemon=True) for one in self._sockets]
        for thread in self._threads:
            thread.start()

    def _listen(self, listener: socket.socket) -> None:
        while True:
            try:
                visitor, address = listener.accept()
            except OSError:
                return
            self.visits.append(str(address))
            visitor.close()

    def close(self) -> None:
        for each in self._sockets:
            each.shutdown(socket.SHUT_RDWR)
            each.close()


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    made = Recorder()
    yield made
    made.close()


@pytest.fixture
def watch() -> Watch:
    return Watch.over_the_process()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where reading is allowed, full of ways out."""
    root = tmp_path / "allowed"
    outside = tmp_path / "outside"
    (root / "inner").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret.jpg").write_text(SECRET)
    (tmp_path / "allowed-beside").mkdir()
    (tmp_path / "allowed-beside" / "secret.jpg").write_text(SECRET)
    (root / "out.jpg").symlink_to(outside / "secret.jpg")
    (root / "out").symlink_to(outside)
    (root / "inner" / "chain.jpg").symlink_to(root / "out.jpg")
    (root / "passwd.jpg").symlink_to("/etc/passwd")
    (root / "environ.jpg").symlink_to("/proc/self/environ")
    (root / "null.jpg").symlink_to("/dev/null")
    os.mkfifo(root / "fifo.jpg")
    return root


@pytest.fixture
def settings(root: Path, recorder: Recorder, tmp_path: Path) -> Settings:
    s3 = S3Settings(
        buckets=("uploads/in",),
        endpoint_url=f"http://127.0.0.1:{recorder.port}",
        region="us-east-1",
        access_key_id=SecretStr("id"),
        secret_access_key=SecretStr("key"),
        path_style=True,
    )
    return Settings(data_dir=tmp_path, files=FileSettings(roots=(root,)), s3=s3)


FILES = {
    "another tree": "/etc/passwd",
    "another tree as a URI": "file:///etc/passwd",
    "up and out": "{root}/../outside/secret.jpg",
    "up and out, encoded": "file://{root}/%2e%2e/outside/secret.jpg",
    "a neighbour whose name begins alike": "{root}-beside/secret.jpg",
    "a link out": "{root}/out.jpg",
    "through a linked directory": "{root}/out/secret.jpg",
    "a link to a link out": "{root}/inner/chain.jpg",
    "a link to the system's users": "{root}/passwd.jpg",
    "a link to this process's environment": "{root}/environ.jpg",
    "this process's environment": "/proc/self/environ",
    "this process's own descriptor": "/proc/self/fd/0",
    "a device": "/dev/zero",
    "a link to a device": "{root}/null.jpg",
    "a pipe": "{root}/fifo.jpg",
    "a directory": "{root}/inner",
    "the root itself": "{root}",
    "another host's file": "file://evil/etc/passwd",
    "a relative URI": "file:etc/passwd",
    "a NUL": "{root}/a.jpg\0.png",
}
BUCKETS = {
    "another bucket": "s3://secrets/a.jpg",
    "a bucket whose name begins alike": "s3://uploads-private/in/a.jpg",
    "outside the prefix": "s3://uploads/out/a.jpg",
    "a prefix that begins alike": "s3://uploads/input/a.jpg",
    "up and out of the prefix": "s3://uploads/in/../out/a.jpg",
    "up and out of the bucket": "s3://uploads/../secrets/a.jpg",
    "no bucket": "s3:///in/a.jpg",
    "another spelling": "S3://uploads/in/a.jpg",
    "a user before the bucket": "s3://id:key@uploads/in/a.jpg",
}
HOSTS = (
    *("127.0.0.1:{port}", "localhost:{port}", "[::1]:{port}", "2130706433:{port}", "0x7f000001:{port}"),
    *("0177.0.0.1:{port}", "127.1:{port}", "0.0.0.0:{port}", "[::]:{port}", "[::ffff:127.0.0.1]:{port}"),
    *("user@127.0.0.1:{port}", "good.example#@127.0.0.1:{port}", "evil#@good", "169.254.169.254", "10.0.0.1"),
    *("192.168.0.1", "172.16.0.1", "100.64.0.1", "224.0.0.1", "[fe80::1]", "[fc00::1]", "[::ffff:10.0.0.1]"),
    *("[64:ff9b::7f00:1]:{port}", "[2002:7f00:1::]:{port}", "metadata.google.internal"),
)
SCHEMES = (
    *("gopher://127.0.0.1:{port}/_", "ftp://127.0.0.1:{port}/a.jpg", "dict://127.0.0.1:{port}/d", "ldap://127.0.0.1"),
    *(
        "data:image/png;base64,AAAA",
        "jar:file:///etc/passwd!/",
        "php://filter/a",
        "smb://127.0.0.1/a",
        "gs://b/a.jpg",
    ),
    *("azure://c/a.jpg", "hf://a/b", "\\\\host\\share\\a.jpg:stream"),
)


def refused(settings: Settings, watch: Watch, uri: str) -> ImageRejectedError:
    sources = Sources(settings)
    try:
        with watch, pytest.raises(ImageRejectedError) as error:
            sources.fetch(uri)
        return error.value
    finally:
        sources.close()


@pytest.mark.parametrize("case", FILES)
def test_files_elsewhere_are_not_opened(settings: Settings, watch: Watch, root: Path, case: str) -> None:
    error = refused(settings, watch, FILES[case].format(root=root))
    assert error.reason is RejectReason.SOURCE_NOT_ALLOWED
    assert SECRET not in str(error)
    assert [path for path in watch.opened if "secret" in path or path.startswith(("/etc", "/dev/zero"))] == []


@pytest.mark.parametrize("case", BUCKETS)
def test_objects_elsewhere_are_not_asked_for(settings: Settings, watch: Watch, recorder: Recorder, case: str) -> None:
    assert refused(settings, watch, BUCKETS[case]).reason is RejectReason.SOURCE_NOT_ALLOWED
    assert (watch.network, recorder.visits) == ([], [])


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_nothing_is_fetched_by_http(
    settings: Settings, watch: Watch, recorder: Recorder, scheme: str, host: str
) -> None:
    uri = f"{scheme}://{host.format(port=recorder.port)}/latest/meta-data/"
    error = refused(settings, watch, uri)
    assert error.reason is RejectReason.SOURCE_NOT_ALLOWED
    assert "meta-data" not in str(error)
    assert (watch.network, recorder.visits) == ([], [])


@pytest.mark.parametrize("uri", SCHEMES)
def test_nothing_is_fetched_by_another_scheme(settings: Settings, watch: Watch, recorder: Recorder, uri: str) -> None:
    assert refused(settings, watch, uri.format(port=recorder.port)).reason in {
        RejectReason.SOURCE_NOT_ALLOWED,
        RejectReason.NOT_FOUND,
    }
    assert (watch.network, recorder.visits) == ([], [])


@pytest.mark.parametrize("uri", ["s3://uploads/in/a.jpg", "file:///etc/hostname", "/etc/hostname", "a.jpg"])
def test_an_empty_list_allows_nothing(watch: Watch, tmp_path: Path, uri: str) -> None:
    error = refused(Settings(data_dir=tmp_path), watch, uri)
    assert (error.reason, watch.network) == (RejectReason.SOURCE_NOT_ALLOWED, [])
    assert "/etc/hostname" not in watch.opened


@pytest.mark.parametrize("prefix", ["s3://secrets/", "s3://uploads/out/", "/etc", "http://127.0.0.1/", "{root}/out"])
def test_nothing_elsewhere_is_listed(
    settings: Settings, watch: Watch, recorder: Recorder, root: Path, prefix: str
) -> None:
    sources = Sources(settings)
    with watch, pytest.raises(ImageRejectedError) as error:
        list(sources.list(prefix.format(root=root)))
    assert error.value.reason is RejectReason.SOURCE_NOT_ALLOWED
    assert (watch.network, recorder.visits) == ([], [])


INWARDS = (
    *("127.0.0.1:{port}", "localhost:{port}", "[::1]:{port}", "2130706433:{port}", "0x7f000001:{port}"),
    *("127.1:{port}", "0.0.0.0:{port}", "[::]:{port}", "[::ffff:127.0.0.1]:{port}", "user@127.0.0.1:{port}"),
    *("169.254.169.254", "10.0.0.1", "192.168.0.1", "172.16.0.1", "100.64.0.1", "[fe80::1]", "[fc00::1]"),
    *("[::ffff:10.0.0.1]", "[64:ff9b::7f00:1]:{port}", "[2002:7f00:1::]:{port}"),
)


@pytest.mark.parametrize("host", INWARDS)
def test_what_a_data_set_lists_leads_to_no_address_of_ours(watch: Watch, recorder: Recorder, host: str) -> None:
    """The one place that speaks HTTP: real images of a data set for training, when somebody asks for them."""
    url = f"http://{host.format(port=recorder.port)}/latest/meta-data/"
    with watch, pytest.raises(ImageRejectedError) as error:
        UrlSource(max_bytes=1000).fetch(url)
    assert error.value.reason is RejectReason.SOURCE_NOT_ALLOWED
    assert [event for event in watch.network if event.startswith("socket.connect")] == []
    assert recorder.visits == []


def test_the_watch_and_the_recorder_would_notice(watch: Watch, recorder: Recorder, settings: Settings) -> None:
    with watch:
        socket.create_connection(("127.0.0.1", recorder.port), timeout=120).close()
        Path(__file__).read_bytes()
    assert any(str(recorder.port) in event for event in watch.network)
    assert __file__ in watch.opened
    sources = Sources(settings)
    with watch, pytest.raises(Exception, match="fetch_"):
        sources.fetch("s3://uploads/in/a.jpg")
    sources.close()
    assert any(event.startswith("socket.connect") for event in watch.network), "what is allowed is asked for"
    assert len(recorder.visits) > 1
