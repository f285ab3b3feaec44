"""Every file of the corpus ends as the table says, and within the bars of time and memory."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from code_worker.errors import ImageRejectedError
from code_worker.images.decode import decode
from code_worker.images.source import Sources
from code_worker.moderation.judge import Judge
from code_worker.moderation.policy import PolicyBook
from code_worker.moderation.pool import PriorityPool
from code_worker.moderation.scan import scan
from code_worker.settings import FileSettings, LimitSettings, Settings
from code_worker.types import Verdict
from tests.corpus.table import JUDGED, expected, files
from tests.moderation.doubles import runtime

ROOT = Path(__file__).resolve().parents[2]


def end_of(verdict: Verdict) -> str:
    """What the table calls the end of an image."""
    return JUDGED if verdict.reason is None else verdict.reason.value


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as files, none with an ending that would say what it is."""
    made = tmp_path_factory.mktemp("corpus")
    for name, data in files().items():
        (made / name).write_bytes(data)
    return made


@pytest.fixture
def judge(directory: Path) -> Iterator[Judge]:
    settings = Settings(files=FileSettings(roots=(directory,)))
    with PriorityPool(4) as pool:
        yield Judge(sources=Sources(settings), pool=pool, limits=settings.limits)


def test_the_table_speaks_of_every_file_and_of_no_other() -> None:
    assert set(files()) == set(expected("file"))
    assert len(files()) >= 134


def test_the_corpus_is_the_same_in_every_process() -> None:
    program = (
        "import hashlib; from tests.corpus.table import files;"
        "print(hashlib.sha256(b''.join(hashlib.sha256(data).digest() for data in files().values())).hexdigest())"
    )
    command = [sys.executable, "-c", program]
    other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert other == hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in files().values())).hexdigest()


def test_all_files_in_one_scan_end_as_listed(directory: Path, judge: Judge) -> None:
    verdicts = scan((str(directory / name) for name in files()), judge, runtime(), PolicyBook())
    ends = {Path(verdict.uri).name: end_of(verdict) for verdict in verdicts}
    wrong = {name: end for name, end in ends.items() if end not in expected("file")[name]}
    assert not wrong
    assert len(ends) == len(files())


@pytest.mark.parametrize("name", sorted(name for name, ends in expected("file").items() if ends != {JUDGED}))
def test_a_bad_file_costs_less_than_a_second(name: str) -> None:
    data, limits = files()[name], LimitSettings()
    began = time.thread_time()
    with suppress(ImageRejectedError):
        decode(data, limits)
    assert time.thread_time() - began < 1.0


def test_sixty_four_bombs_in_one_batch_stay_within_300_megabytes(directory: Path) -> None:
    command = [sys.executable, "-m", "tests.corpus.measure", str(directory)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    grown_mb, judged, rejected = (float(number) for number in found)
    assert grown_mb <= 300
    assert judged + rejected == 64
    assert judged > 0, "some are within the limits, and were decoded"


def test_no_file_starts_another_program(directory: Path) -> None:
    program = """
import sys
from pathlib import Path
from code_worker.errors import ImageRejectedError
from code_worker.images.decode import decode
from code_worker.settings import LimitSettings

def refuse(event, arguments):
    if event in {"subprocess.Popen", "os.exec", "os.fork", "os.posix_spawn", "os.system", "socket.connect"}:
        print("started", event, arguments)

sys.addaudithook(refuse)
for name in sys.argv[2:]:
    try:
        decode(Path(sys.argv[1], name).read_bytes(), LimitSettings())
    except ImageRejectedError:
        pass
print("done")
"""
    named = ["eps_with_pipe", "svg_with_file_link", "pdf", "pickle", "gzip_of_jpeg", "polyglot_jpeg_html", "ok_jpeg"]
    command = [sys.executable, "-c", program, str(directory), *named]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.split() == ["done"]
