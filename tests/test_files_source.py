"""Local files are read under the allowed roots and nowhere else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import TiffImagePlugin

from code_worker.errors import ImageRejectedError, TransientError
from code_worker.images.listing import PREFIX_BYTES, signature_of
from code_worker.images.local_files import FileSource
from code_worker.images.source import Sources, source_name
from code_worker.settings import FileSettings, LimitSettings, Settings
from code_worker.types import RejectReason


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "allowed"
    directory.mkdir()
    (directory / "a.jpg").write_bytes(b"pixels")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    return directory


@pytest.fixture
def sources(root: Path) -> Iterator[Sources]:
    made = Sources(Settings(files=FileSettings(roots=(root,)), limits=LimitSettings(max_bytes=1000)))
    yield made
    made.close()


def refusal(sources: Sources, uri: str) -> RejectReason:
    with pytest.raises(ImageRejectedError) as caught:
        sources.fetch(uri)
    return caught.value.reason


def test_a_path_and_its_uri_give_the_bytes(sources: Sources, root: Path) -> None:
    odd = root / "ünï %41#?.jpg"
    odd.write_bytes(b"odd")
    assert sources.fetch(str(root / "a.jpg")).data == b"pixels"
    assert sources.fetch((root / "a.jpg").as_uri()).data == b"pixels"
    assert sources.fetch(f"file://localhost{root}/a.jpg").data == b"pixels"
    assert sources.fetch(f"file:{root}/a.jpg").data == b"pixels"
    assert sources.fetch(odd.as_uri()).data == b"odd"
    assert sources.fetch(str(odd)).data == b"odd"
    assert sources.fetch((root / "a.jpg").as_uri()).etag is None


def test_a_relative_path_starts_at_the_working_directory(
    sources: Sources, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    (root / "with:colon.jpg").write_bytes(b"colon")
    assert sources.fetch("a.jpg").data == b"pixels"
    assert sources.fetch("./with:colon.jpg").data == b"colon"
    assert refusal(sources, "../secret.jpg") is RejectReason.SOURCE_NOT_ALLOWED


def test_without_roots_nothing_is_read(root: Path) -> None:
    assert refusal(Sources(Settings()), str(root / "a.jpg")) is RejectReason.SOURCE_NOT_ALLOWED


@pytest.mark.parametrize(
    "uri",
    [
        "file:///etc/passwd", "/etc/passwd", "file:///nowhere/at/all", "file://{root}/../secret.jpg",
        "file://{root}/%2e%2e/secret.jpg", "{root}/../secret.jpg", "{root}-not", "file://other.host{root}/a.jpg",
        "file://{root}/a.jpg%00.png", "{root}/a.jpg\0", "{root}/\ud800", "file:a.jpg", "file://", "", "/dev/zero", "file:///",
    ],
)  # fmt: skip
def test_what_lies_elsewhere_is_not_allowed(sources: Sources, root: Path, uri: str) -> None:
    assert refusal(sources, uri.format(root=root)) is RejectReason.SOURCE_NOT_ALLOWED


@pytest.mark.parametrize(
    "uri",
    [
        "http://169.254.169.254/latest/meta-data", "https://example.org/a.jpg", "http://[::1]/", "http://2130706433/",
        "http://good@evil/#", "gopher://host/1", "ftp://host/a", "data:image/png;base64,AAAA", "FILE:///etc/passwd",
        "S3://bucket/key", "jar:file:///x", "with:colon.jpg",
    ],
)  # fmt: skip
def test_an_unknown_scheme_is_refused_by_its_name_alone(sources: Sources, uri: str) -> None:
    for attempt in (sources.fetch, sources.list):
        with pytest.raises(ImageRejectedError, match=rf"not from '{uri.partition(':')[0]}'$") as caught:
            attempt(uri)
        assert caught.value.reason is RejectReason.SOURCE_NOT_ALLOWED


def test_a_refusal_outside_the_roots_does_not_tell_whether_the_file_exists(sources: Sources, tmp_path: Path) -> None:
    texts = set()
    for name in ("secret.jpg", "absent.jpg"):
        with pytest.raises(ImageRejectedError) as caught:
            sources.fetch(str(tmp_path / name))
        texts.add(str(caught.value).replace(name, "NAME"))
    assert len(texts) == 1


def test_links_are_followed_inside_the_root_and_refused_out_of_it(sources: Sources, root: Path) -> None:
    (root / "inside.jpg").symlink_to("a.jpg")
    (root / "outside.jpg").symlink_to(root.parent / "secret.jpg")
    (root / "outside").symlink_to(root.parent)
    (root / "loop.jpg").symlink_to("loop.jpg")
    assert sources.fetch(str(root / "inside.jpg")).data == b"pixels"
    for name in ("outside.jpg", "outside/secret.jpg", "outside/absent.jpg", "loop.jpg"):
        assert refusal(sources, str(root / name)) is RejectReason.SOURCE_NOT_ALLOWED


def test_a_root_may_itself_be_a_link(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)
    source = FileSource(FileSettings(roots=(link,)), max_bytes=100)
    assert source.fetch(str(link / "a.jpg")) == b"pixels"
    assert source.fetch(str(root / "a.jpg")) == b"pixels"


def test_a_link_put_in_place_while_reading_leads_nowhere(sources: Sources, root: Path) -> None:
    (root / "flip").mkdir()
    (root / "flip" / "secret.jpg").write_bytes(b"public")
    stop = threading.Event()

    def flip() -> None:
        (root / "link").symlink_to(root.parent)
        while not stop.is_set():
            os.rename(root / "flip", root / "kept")  # noqa: PTH104 - as fast as possible
            os.rename(root / "link", root / "flip")  # noqa: PTH104 - as above
            os.rename(root / "flip", root / "link")  # noqa: PTH104 - as above
            os.rename(root / "kept", root / "flip")  # noqa: PTH104 - as above

    thread = threading.Thread(target=flip)
    thread.start()
    seen = set()
    try:
        for _ in range(3_000):
            try:
                seen.add(sources.fetch(f"{root}/flip/secret.jpg").data)
            except (ImageRejectedError, TransientError) as error:
                seen.add(error.reason.value.encode())
    finally:
        stop.set()
        thread.join()
    assert b"public" in seen
    assert seen <= {b"public", b"not_found", b"source_not_allowed", b"fetch_failed"}


def test_only_regular_files_are_read(sources: Sources, root: Path) -> None:
    os.mkfifo(root / "pipe")
    (root / "directory").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(root)  # a socket's path is short
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
        for name in ("pipe", "directory", "socket", ""):
            assert refusal(sources, str(root / name)) is RejectReason.SOURCE_NOT_ALLOWED


def test_a_missing_file_is_not_found(sources: Sources, root: Path) -> None:
    for name in ("absent.jpg", "absent/a.jpg", "a.jpg/b", "n" * 300):
        assert refusal(sources, str(root / name)) is RejectReason.NOT_FOUND


READ_AS_NOBODY = """
import os, sys
from pathlib import Path
from code_worker.errors import ImageRejectedError
from code_worker.images.local_files import FileSource
from code_worker.settings import FileSettings
source = FileSource(FileSettings(roots=(Path(sys.argv[1]),)), max_bytes=100)
if os.geteuid() == 0:
    os.setgid(65534); os.setuid(65534)
for name in sys.argv[2:]:
    try:
        print(source.fetch(f"{sys.argv[1]}/{name}").decode())
    except ImageRejectedError as error:
        print(error.reason.value)
"""


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """A directory that another user may enter; pytest's own are private."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name).resolve()


def test_a_file_without_permission_is_access_denied(public_directory: Path) -> None:
    # A process of its own: root may read everything, so it must step down first.
    root = public_directory
    for name, mode in (("closed.jpg", 0o000), ("open.jpg", 0o644)):
        (root / name).write_bytes(b"open")
        (root / name).chmod(mode)
    (root / "enter").mkdir()
    (root / "enter" / "a.jpg").write_bytes(b"entered")
    (root / "enter").chmod(0o711)
    (root / "shut").mkdir()
    (root / "shut").chmod(0o000)
    command = [sys.executable, "-c", READ_AS_NOBODY, str(root), "closed.jpg", "open.jpg", "enter/a.jpg", "shut/a.jpg"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert output == ["access_denied", "open", "entered", "access_denied"]


def test_a_file_over_the_limit_is_too_large(sources: Sources, root: Path) -> None:
    (root / "full.jpg").write_bytes(bytes(1000))
    (root / "over.jpg").write_bytes(bytes(1001))
    assert len(sources.fetch(str(root / "full.jpg")).data) == 1000
    assert refusal(sources, str(root / "over.jpg")) is RejectReason.TOO_LARGE_BYTES


def test_a_file_whose_size_is_not_told_is_still_capped() -> None:
    # Files of /proc say that they are empty and give bytes all the same.
    unsized = Path("/proc/self/smaps") if sys.platform == "linux" else Path("/usr/share/dict/words")
    source = FileSource(FileSettings(roots=(unsized.parent,)), max_bytes=100)
    with pytest.raises(ImageRejectedError) as caught:
        source.fetch(str(unsized))
    assert caught.value.reason is RejectReason.TOO_LARGE_BYTES


def test_a_full_descriptor_table_is_not_the_images_fault(sources: Sources, root: Path) -> None:
    import resource  # POSIX only

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(TransientError) as caught:
            sources.fetch(str(root / "a.jpg"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.reason is RejectReason.FETCH_FAILED


def test_a_tiff_begins_as_pillow_says() -> None:
    for prefix in TiffImagePlugin.PREFIXES:
        assert signature_of(prefix.ljust(PREFIX_BYTES, b"\0")) == "tiff"


@pytest.fixture
def tree(root: Path) -> Path:
    for name in ("b/2.png", "b/10.png", "c/deep/x.gif", "B.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    (root / "linked.jpg").symlink_to("a.jpg")
    (root / "linked").symlink_to(root / "b")
    os.mkfifo(root / "pipe")
    return root


def test_listing_walks_in_order_and_not_through_links(sources: Sources, tree: Path) -> None:
    expected = ["B.png", "a.jpg", "b/10.png", "b/2.png", "c/deep/x.gif", "linked.jpg"]
    assert list(sources.list(str(tree))) == [f"{tree}/{name}" for name in expected]
    uris = list(sources.list(tree.as_uri()))
    assert uris == [(tree / name).as_uri() for name in expected]
    assert [sources.fetch(uri).data for uri in uris[:2]] == [b"x", b"pixels"]


LIST_AS_NOBODY = """
import os, sys
from pathlib import Path
from code_worker.images.listing import LeftOut
from code_worker.images.source import Sources, images_under
from code_worker.settings import FileSettings, Settings
left_out = LeftOut()
sources = Sources(Settings(files=FileSettings(roots=(Path(sys.argv[1]),))))
if os.geteuid() == 0:
    os.setgid(65534); os.setuid(65534)
print(*(Path(found).name for found in images_under(sources, sys.argv[1], left_out)), sep=",")
print(left_out.unreadable, left_out.lost)
assert not {"PIL", "numpy", "boto3"} & sys.modules.keys()
"""


def test_a_directory_that_cannot_be_listed_is_told_and_the_list_goes_on(public_directory: Path) -> None:
    for name in ("a", "b/inner.jpg", "c.jpg"):
        (public_directory / name).parent.mkdir(exist_ok=True)
        (public_directory / name).write_bytes(b"\xff\xd8\xff\xe0" + bytes(20))
    (public_directory / "a").chmod(0o000)
    (public_directory / "b").chmod(0o000)
    command = [sys.executable, "-c", LIST_AS_NOBODY, str(public_directory)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    # What cannot be looked into is listed: reading it says why.
    lost = [(f"{public_directory}/b", "cannot be listed: Permission denied")]
    assert ran.stdout.splitlines() == ["a,c.jpg", f"1 {lost}"]


def test_listing_a_file_gives_the_file(sources: Sources, tree: Path) -> None:
    assert list(sources.list(str(tree / "a.jpg"))) == [str(tree / "a.jpg")]


def test_a_name_that_is_no_text_is_listed_as_a_uri(sources: Sources, tree: Path) -> None:
    name = os.fsencode(tree / "b") + b"/\xff.jpg"
    try:
        with open(name, "wb") as file:  # noqa: PTH123 - a name in bytes
            file.write(b"bytes")
    except OSError:  # macOS keeps names in UTF-8: there is no such file there
        assert sys.platform == "darwin"
        return
    listed = list(sources.list(str(tree / "b")))
    assert listed[-1].startswith("file:///")
    assert sources.fetch(listed[-1]).data == b"bytes"


def test_listing_outside_the_roots_or_nowhere_is_refused_at_once(sources: Sources, root: Path) -> None:
    for place, reason in ((root.parent, RejectReason.SOURCE_NOT_ALLOWED), (root / "absent", RejectReason.NOT_FOUND)):
        with pytest.raises(ImageRejectedError) as caught:
            sources.list(str(place))
        assert caught.value.reason is reason


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("s3://bucket/a/b?versionId=3", "s3://bucket"),
        ("s3://bucket", "s3://bucket"),
        ("file:///a/b", "file"),
        ("/a/b", "file"),
        ("b.jpg", "file"),
        ("https://user:password@host/a", "https"),
    ],
)
def test_a_source_is_named_by_what_fails_together(uri: str, name: str) -> None:
    assert source_name(uri) == name


def test_reading_files_loads_no_boto3(root: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from code_worker.images.source import Sources
from code_worker.settings import FileSettings, Settings
Sources(Settings(files=FileSettings(roots=(Path({str(root)!r}),)))).fetch({str(root / "a.jpg")!r})
print(sorted({{"boto3", "botocore", "torch", "PIL"}} & set(sys.modules)))
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
