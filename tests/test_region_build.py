"""The extension for JPEG regions: what building it takes, and which libjpeg it refuses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

PLUGIN = Path(__file__).resolve().parent.parent / "plugins" / "jpeg"
SOURCES = PLUGIN / "code_worker_jpeg"
# Python.h, the C standard library and dlopen.
HEADERS = {"<Python.h>", "<dlfcn.h>", "<setjmp.h>", "<stddef.h>", "<stdlib.h>", "<string.h>"}
LIBJPEG_HEADERS = ("jpeglib.h", "jmorecfg.h", "jconfig.h", "jerror.h", "jpegint.h", "turbojpeg.h")
BIND = """
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from PIL import Image
for path in sys.argv[1:]:
    spec = spec_from_file_location("_region", path, loader=ExtensionFileLoader("_region", path))
    module = module_from_spec(spec)
    try:
        module.bind(Image.core.__file__)
        print("bound", flush=True)
    except ImportError as error:
        print(error, flush=True)
"""
OTHER_MEMBERS = "Pillow's libjpeg is another than this was built for: its structures have other members"
# Pairs of members of one size: exchanged, the structures keep their sizes, which are all that libjpeg compares.
EXCHANGED = [
    ("long num_warnings", "const char *const *jpeg_message_table"),
    ("image_width", "image_height"),
    ("output_components", "rec_outbuf_height"),
    ("output_scanline", "input_iMCU_row"),
    ("comp_info", "marker_list"),
    ("h_samp_factor", "v_samp_factor"),
]


def compiled(sources: Path, poison: Path) -> Path:
    """The extension, compiled where each header of libjpeg's is an error."""
    poison.mkdir(exist_ok=True)
    for name in LIBJPEG_HEADERS:
        (poison / name).write_text("#error libjpeg's header is not to be needed\n")
    target = sources / "_region.abi3.so"
    flags = ["-shared", "-fPIC", "-O0", "-std=c11", "-Wall", "-Wextra", "-Werror"]
    include = [f"-I{poison}", f"-I{sysconfig.get_paths()['include']}"]
    command = [os.environ.get("CC", "gcc"), *flags, *include, str(sources / "_region.c"), "-o", str(target), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def copied(target: Path) -> Path:
    target.mkdir()
    for source in SOURCES.glob("*.[ch]"):
        shutil.copy(source, target)
    return target


def exchanged(sources: Path, one: str, other: str) -> Path:
    header = sources / "libjpeg_abi.h"
    either = rf"\b(?:{re.escape(one)}|{re.escape(other)})\b"
    text, count = re.subn(either, lambda match: other if match[0] == one else one, header.read_text(encoding="utf-8"))
    assert count >= 2, (one, other)
    header.write_text(text, encoding="utf-8")
    return sources


def test_the_sources_include_no_header_of_another_package() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in SOURCES.glob("*.[ch]"))
    included = set(re.findall(r"^\s*#\s*include\s*(\S+)", text, re.MULTILINE))
    own = {f'"{path.name}"' for path in SOURCES.glob("*.h")}
    assert included == HEADERS | own


def test_a_libjpeg_with_other_members_is_refused_and_not_crashed_by(tmp_path: Path) -> None:
    poison = tmp_path / "poison"
    builds = [compiled(copied(tmp_path / "as_it_is"), poison)]
    for number, (one, other) in enumerate(EXCHANGED):
        builds.append(compiled(exchanged(copied(tmp_path / str(number)), one, other), poison))
    command = [sys.executable, "-c", BIND, *map(str, builds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["bound"] + [OTHER_MEMBERS] * len(EXCHANGED)


def test_a_libjpeg_with_structures_of_another_size_is_refused(tmp_path: Path) -> None:
    sources = copied(tmp_path / "larger")
    header = sources / "libjpeg_abi.h"
    text = header.read_text(encoding="utf-8")
    # Release 8 has a member more here; the size asserted at compile time would tell first.
    text = text.replace("boolean progressive_mode,", "void *is_baseline; boolean progressive_mode,")
    header.write_text(re.sub(r"^_Static_assert.*\n", "", text, flags=re.MULTILINE), encoding="utf-8")
    command = [sys.executable, "-c", BIND, str(compiled(sources, tmp_path / "poison"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"built for: .*library thinks size is \d+, caller expects \d+", done.stdout)


def test_the_source_distribution_holds_all_that_the_compiler_reads(tmp_path: Path) -> None:
    tree = tmp_path / "jpeg"
    shutil.copytree(PLUGIN, tree, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=tree, capture_output=True, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert names >= {path.relative_to(PLUGIN).as_posix() for path in SOURCES.glob("*.*")}
